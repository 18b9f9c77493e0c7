//! Pools of SNAT ports without a policy around them.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::LazyLock;

use portcullis::compile::ports::{Ground, LiveUnits, Ownership, Pool, UnitSet, allocate};
use portcullis::policy::network::{Allocation, TransportProtocol};

pub const DRAIN: u32 = 3600;

/// One of five public addresses.
pub fn front(number: u8) -> IpAddr {
    Ipv4Addr::new(203, 0, 113, 100 + number).into()
}

/// `name0`, `name1` and so on by an outbound rule of that name, under these addresses.
pub fn pool(name: &str, members: impl IntoIterator<Item = usize>, fronts: std::ops::Range<u8>) -> Pool {
    Pool {
        place: format!("loadBalancers/lb/outboundRules/{name}"),
        protocol: TransportProtocol::All,
        frontends: fronts.map(front).collect(),
        members: members.into_iter().map(|i| format!("{name}{i}/ipconfig1")).collect(),
        allocated_outbound_ports: 0,
        allocation: Allocation::Min1024,
    }
}

/// Five addresses of which all may be used, and no guests but those of the pools.
pub fn ground<'a>(pools: &'a [Pool], live: &'a LiveUnits, now: u64) -> Ground<'a> {
    static WHOLE: LazyLock<UnitSet> = LazyLock::new(UnitSet::whole_address);
    Ground {
        addresses: (0..5).map(|number| (front(number), [WHOLE.clone(), WHOLE.clone()])).collect(),
        exists: pools.iter().flat_map(|pool| &pool.members).map(String::as_str).collect(),
        live,
        now,
        drain_seconds: DRAIN,
    }
}

pub fn step(before: &Ownership, pools: &[Pool], live: &LiveUnits, now: u64) -> Ownership {
    allocate(before.clone(), pools, &ground(pools, live, now)).unwrap().ownership
}

pub fn start(pools: &[Pool]) -> Ownership {
    step(&Ownership::default(), pools, &LiveUnits::new(), 0)
}
