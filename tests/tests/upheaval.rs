//! Nothing is lost when the daemon is killed, started again, upgraded or given another policy (promise 5, and 3).

use portcullis_tests::edge::{Edge, HookCheck, LabPolicy, WithHook};
use portcullis_tests::lab::TopologySpec;
use portcullis_tests::random::Random;
use portcullis_tests::upheaval::{Traffic, Upheaval};

/// How often each thing happens. A soak does it a hundred times.
const TIMES: usize = 5;

fn nothing_is_lost(hook: WithHook) {
    let spec = TopologySpec::clean_veth(2);
    let mut policy = LabPolicy::new(hook);
    let plain = policy.yaml(&spec);
    policy.subnet_group = Some("web");
    policy.extra = "networkSecurityGroups:\n  - name: web\n    securityRules:\n      - { name: Deny80, priority: 100, direction: Outbound, access: Deny, protocol: Tcp, sourceAddressPrefix: '*', sourcePortRange: '*', destinationAddressPrefix: '*', destinationPortRange: 80 }\n".into();
    let policies = [plain, policy.yaml(&spec)];
    let mut edge = Edge::start(&spec, &policies[0]).unwrap();
    let traffic = Traffic::start(&edge, "vm1").unwrap();
    let seed =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64 | 1;
    println!("{hook:?}: seed {seed:#x}");
    let mut random = Random(seed);
    traffic.settle().unwrap().check().unwrap_or_else(|error| panic!("{hook:?}: before all: {error}"));
    let mut changes = 0;
    for time in 1..=TIMES {
        for upheaval in Upheaval::ALL {
            changes += usize::from(upheaval == Upheaval::Change);
            upheaval
                .strike(&mut edge, &policies[changes % 2], &mut random)
                .unwrap_or_else(|error| panic!("{hook:?}: {upheaval:?}, time {time}: {error:#}"));
            traffic.go_on(2000).unwrap();
            let tally = traffic.settle().unwrap();
            if let Err(error) = tally.check() {
                panic!("{hook:?}, seed {seed:#x}: {upheaval:?}, time {time}: {error}; {:?}", edge.reasons());
            }
        }
    }
    let check = HookCheck::begin(&edge, hook).unwrap();
    traffic.go_on(1000).unwrap();
    check.end(&edge).unwrap();
    println!("{hook:?}: {:?}", traffic.settle().unwrap());
}

#[test]
fn kills_restarts_upgrades_and_changes_of_policy_lose_no_packet_under_xdp() {
    nothing_is_lost(WithHook::Xdp);
}

#[test]
fn kills_restarts_upgrades_and_changes_of_policy_lose_no_packet_under_tc() {
    nothing_is_lost(WithHook::Tc);
}
