//! When health events are told, on a clock of the tests' own.

use portcullis_common::layout::v4;

use super::*;
use crate::compile::{HostFacts, Ownership, Registry, compile};
use crate::daemon::Plan;
use crate::flows::end_on;
use crate::flows::on_tables::{Put, TCP as FLOW, claimed, with_tables};
use crate::hosts::Links;
use crate::policy::parse;

fn about(kind: Kind) -> About {
    About {
        kind,
        guest: "vm1/a".into(),
        frontends: vec!["203.0.113.10".parse().unwrap()],
        which: ALLOC_TCP,
        destination: Some("198.51.100.7:443".parse().unwrap()),
    }
}

fn finding(kind: Kind, taken: u32) -> Finding {
    Finding { about: about(kind), taken, of: 1024 }
}

#[test]
fn an_event_is_told_when_it_begins_every_five_minutes_and_when_it_ends() {
    let mut state = State::default();
    let lines = state.look(vec![finding(Kind::High, 800)], 1000);
    assert_eq!(
        lines,
        [
            "HighSnatPortUsage (Warning): vm1/a on 203.0.113.10, tcp towards 198.51.100.7:443: more than three quarters \
          of the ports are taken (800 of 1024), since 1970-01-01T00:16:40Z"
        ]
    );
    for now in (1015..1300).step_by(15) {
        assert!(state.look(vec![finding(Kind::High, 900)], now).is_empty(), "{now}");
    }
    let lines = state.look(vec![finding(Kind::High, 901)], 1300);
    assert!(lines.len() == 1 && lines[0].contains("still more") && lines[0].contains("901 of"), "{lines:?}");
    assert!(lines[0].ends_with("since 1970-01-01T00:16:40Z"), "{lines:?}");
    let lines = state.look(Vec::new(), 1315);
    assert_eq!(
        lines,
        ["HighSnatPortUsage ended after 5m 15s: vm1/a on 203.0.113.10, tcp towards 198.51.100.7:443"]
    );
    assert!(state.standing.is_empty());
}

#[test]
fn an_exhaustion_lasts_as_long_as_flows_are_refused() {
    let mut state = State::default();
    let line = state.detect(finding(Kind::Exhausted, 1024), 1000, true).unwrap();
    assert!(line.contains("SnatPortExhaustion (Critical)") && line.contains("refused"), "{line}");
    assert_eq!(state.detect(finding(Kind::Exhausted, 1024), 1001, true), None, "told once");
    assert!(state.look(Vec::new(), 1030).is_empty());
    let lines = state.look(Vec::new(), 1050);
    assert!(lines.len() == 1 && lines[0].contains("ended after 50s"), "{lines:?}");
}

#[test]
fn events_that_stand_are_bounded() {
    let mut state = State::default();
    for port in 0..MOST as u32 + 10 {
        let mut found = finding(Kind::High, 1000);
        found.about.destination = Some(SocketAddr::from(([198, 51, 100, 7], port as u16)));
        state.detect(found, 1000, false);
    }
    assert_eq!(state.standing.len(), MOST);
    assert_eq!(state.look(Vec::new(), 2000).len(), MOST);
}

/// One guest with eight ports.
const POLICY: &str = "
virtualNetworks:
  - name: lab
    addressSpace: { addressPrefixes: [10.0.0.0/16] }
    subnets: [{ name: a, addressPrefix: 10.0.1.0/24 }]
networkInterfaces:
  - { name: vm1, device: vm1, ipConfigurations: [{ name: a, subnet: a, privateIPAddress: 10.0.1.4 }] }
publicIPAddresses: [{ name: p, ipAddress: 203.0.113.10, announce: proxy }]
loadBalancers:
  - name: lb
    frontendIPConfigurations: [{ name: fe, publicIPAddress: p }]
    backendAddressPools: [{ name: pool, backendIPConfigurations: [vm1] }]
    outboundRules: [{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All, allocatedOutboundPorts: 8 }]
uplinks: [{ device: uplink }]
";

fn in_force() -> Arc<InForce> {
    let loaded = Arc::new(parse("test.yaml", POLICY).expect("the test's policy"));
    let (facts, mut registry) = (HostFacts::default(), Registry::default());
    let compiled =
        compile(&loaded.network, &facts, &mut registry, &Ownership::default(), 1).expect("it compiles");
    let plan = Plan { links: Links::default(), choices: Vec::new(), facts, compiled, registry };
    Arc::new(InForce::new("test.yaml".into(), loaded, plan, Vec::new(), Vec::new()))
}

#[test]
fn what_stands_in_the_flow_tables_is_told_at_once_and_again_every_five_minutes_with_the_same_since() {
    with_tables(|flows, flows6| {
        let (in_force, tables) = (in_force(), [flows, flows6]);
        let guest = in_force.guests().next().expect("vm1");
        let &unit = in_force.compiled.ownership.frontends.values().next().unwrap().tcp.keys().next().unwrap();
        let take = |n: u16| {
            let (from, outside) = (("10.0.1.4", 40_000 + n), ("203.0.113.10", unit * 8 + n));
            claimed(
                flows,
                Put { slot: 2 * u32::from(n), guest: guest.endpoint.next_hop, from, outside, ..FLOW },
            );
        };
        let log = HealthLog::default();
        let look = |now| log.look_at(&in_force, tables, now);
        (0..6).for_each(take);
        assert_eq!(look(1000), [] as [String; 0], "three quarters are not more than three quarters");
        take(6);
        let who = "vm1/a on 203.0.113.10, tcp towards 198.51.100.1:443";
        let high = |what: &str| {
            format!(
                "HighSnatPortUsage (Warning): {who}: {what}more than three quarters of the ports are taken"
            )
        };
        assert_eq!(look(1015), [high("") + " (7 of 8), since 1970-01-01T00:16:55Z"]);
        take(7);
        let exhausted = |what: &str| {
            format!("SnatPortExhaustion (Critical): {who}: {what} (8 of 8), since 1970-01-01T00:17:10Z")
        };
        assert_eq!(look(1030), [exhausted("every port is taken")]);
        let refused = Event {
            source: v4("10.0.1.4".parse().unwrap()),
            destination: v4("198.51.100.1".parse().unwrap()),
            source_port: 50_000u16.to_be(),
            destination_port: 443u16.to_be(),
            network: guest.endpoint.network,
            protocol: 6,
            reason: Reason::SnatExhausted as u8,
            ..Event::default()
        };
        assert_eq!(log.felt(&refused, || Arc::clone(&in_force), 1031), None, "it has been told");

        let told = |from: u64, to: u64| -> Vec<(u64, String)> {
            let looks = (from..=to).step_by(15);
            looks.flat_map(|now| look(now).into_iter().map(move |line| (now, line))).collect()
        };
        let again = [
            (1315, high("still ") + " (8 of 8), since 1970-01-01T00:16:55Z"),
            (1330, exhausted("still new flows are refused for want of a port")),
        ];
        assert_eq!(told(1045, 1600), again, "once in five minutes");
        let again = again.map(|(now, line)| (now + 300, line));
        assert_eq!(told(1615, 1630), again, "and once more");
        let events = log.events().into_iter().map(|event| (event.event, event.since, event.detected));
        let expected = [
            ("SnatPortExhaustion".to_owned(), "1970-01-01T00:17:10Z".to_owned(), 3),
            ("HighSnatPortUsage".to_owned(), "1970-01-01T00:16:55Z".to_owned(), 3),
        ];
        assert_eq!(events.collect::<Vec<_>>(), expected);
        assert_eq!(log.looks(), 3 + 38 + 2);

        let address = "203.0.113.10".parse().unwrap();
        assert_eq!(end_on(tables, &[(address, 6, unit)].into()), 8);
        let over = [
            format!("HighSnatPortUsage ended after 10m 30s: {who}"),
            format!("SnatPortExhaustion ended after 10m 15s: {who}"),
        ];
        assert_eq!(look(1645), over);
        assert_eq!(log.events(), []);
    });
}
