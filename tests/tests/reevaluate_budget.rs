//! What judging live flows again costs at most: a budget for each processor and tick; who is beyond it goes on as judged
//! and has his turn later.

use portcullis_common::clock::TICK_SHIFT;
use portcullis_common::engine::Hook;
use portcullis_tests::backend::{Backend as _, KernelBackend};
use portcullis_tests::lab::Craft;

const FLOWS: u16 = 400;
const BUDGET: u32 = 5;
const RULE: &str = "open/Outbound/securityRules/All";

const POLICY: &str = "
onRuleChange: reevaluate
virtualNetworks: [{ name: lab, addressSpace: { addressPrefixes: [10.0.0.0/16] }, subnets: [{ name: a, addressPrefix: 10.0.1.0/24, networkSecurityGroup: open }, { name: b, addressPrefix: 10.0.2.0/24 }] }]
networkInterfaces:
  - { name: vm1, device: vm1, macAddress: 02:00:00:00:00:01, ipConfigurations: [{ subnet: a, privateIPAddress: 10.0.1.4 }] }
  - { name: vm2, device: vm2, macAddress: 02:00:00:00:00:02, ipConfigurations: [{ subnet: b, privateIPAddress: 10.0.2.4 }] }
networkSecurityGroups:
  - name: open
    securityRules: [{ name: All, priority: 100, direction: Outbound, access: Allow, protocol: '*', sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: '*', destinationPortRange: '*' }]
uplinks: [{ device: up }]
";

#[test]
fn live_flows_are_judged_again_within_the_budget_of_a_tick_and_none_is_forgotten() {
    KernelBackend::with(POLICY, &["vm1", "vm2", "up"], Hook::Tc, |backend| {
        let ifindex = backend.ifindex("vm1")?;
        let send = |backend: &KernelBackend, flow: u16| -> anyhow::Result<u32> {
            let craft = Craft::new(
                [2, 0, 0, 0, 0, 1],
                [10, 0, 1, 4].into(),
                [2, 0, 0, 0, 0xaa, 0],
                [10, 0, 2, 4].into(),
            );
            Ok(backend.datapath.run_tc(&craft.udp(1000 + flow, 53, b""), ifindex)?.verdict)
        };
        let hits = |backend: &KernelBackend| backend.rule_hits().map(|h| h.get(RULE).copied().unwrap_or(0));
        for flow in 0..FLOWS {
            assert_eq!(send(backend, flow)?, 7);
        }
        assert_eq!(hits(backend)?, u64::from(FLOWS), "each was judged as it began");

        backend.gateway.recompile_as(POLICY, |settings| settings.reevaluate = BUDGET)?;
        let image = backend.gateway.image();
        backend.datapath.install(&image)?;
        let tick = std::time::Duration::from_nanos(1 << TICK_SHIFT);
        let begun = std::time::Instant::now();
        for flow in 0..FLOWS {
            assert_eq!(send(backend, flow)?, 7, "whether it is judged again or not, it passes");
        }
        // This test may be moved from one processor to another, and a tick may end meanwhile.
        let ticks = begun.elapsed().as_nanos() / tick.as_nanos() + 2;
        let processors = std::thread::available_parallelism()?.get() as u64;
        let again = hits(backend)? - u64::from(FLOWS);
        println!("{again} of {FLOWS} flows judged again in {:?}", begun.elapsed());
        assert!(
            again >= u64::from(BUDGET) && again <= u64::from(BUDGET) * processors * ticks as u64,
            "{again}"
        );
        for _ in 0..1000 {
            for flow in 0..FLOWS {
                send(backend, flow)?;
            }
            if hits(backend)? == 2 * u64::from(FLOWS) {
                break;
            }
            std::thread::sleep(tick / 4);
        }
        assert_eq!(hits(backend)?, 2 * u64::from(FLOWS), "in the end every flow was judged again, once");
        Ok(())
    })
    .unwrap();
}
