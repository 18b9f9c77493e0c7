//! How full the flow table may be: at half load, which it is made for, no key is refused.

use portcullis_common::Reason;
use portcullis_common::engine::Hook;
use portcullis_tests::backend::{Backend as _, HostBackend, host_env};
use portcullis_tests::lab::{Craft, Craft6};

const POLICY: &str = include_str!("policies/both-families.yaml");
/// Eight half-records each; a flow takes two.
const BUCKETS: u32 = 1 << 15;

#[test]
fn at_half_load_no_flow_of_either_family_is_refused() {
    // One guest makes them all, so its quota has to be as large as what is measured.
    let policy = format!("{POLICY}\nflowTable: {{maxFlowsPerGuest: 65536, maxFlowsPerGuestIPv6: 65536}}\n");
    let backend = HostBackend::new(&policy).unwrap();
    let env = host_env(backend.gateway(), BUCKETS);
    let ifindex = backend.gateway().devices["vm1"].ifindex;
    let flows = BUCKETS * 8 / 2 / 2;
    let (mac, gateway) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0xaa, 0]);
    let v4 = Craft::new(mac, [10, 0, 1, 4].into(), gateway, [10, 0, 1, 5].into());
    let v6 = Craft6::new(mac, "fd00:1:0:1::4".parse().unwrap(), gateway, "fd00:1:0:1::5".parse().unwrap());
    for flow in 0..flows {
        let (source, destination) = (1024 + (flow % 60_000) as u16, 1024 + (flow / 60_000) as u16);
        env.packet(&v4.udp(source, destination, b""), ifindex, Hook::Tc, false);
        env.packet(&v6.udp(source, destination, b""), ifindex, Hook::Tc, false);
    }
    assert_eq!(env.counters(), [(Reason::NewFlow, u64::from(flows) * 2)]);
}
