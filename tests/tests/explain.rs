//! `explain` and `explain --live` in a running gateway: every kind of question, both families, both hooks. What is told is
//! what was written down beforehand, the kernel agrees, asking moves nothing, and the real packet meets the fate it was told.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use portcullis_tests::edge::{Edge, WithHook};
use portcullis_tests::lab::{
    Craft, Craft6, Mac, RawSender, Sniffer, TcpEcho, TcpFlags, TcpHold, Topology, TopologySpec, eventually,
    ping,
};
use serde_json::Value;

const POLICY: &str = include_str!("policies/explain.yaml");
const LIMIT: Duration = Duration::from_secs(5);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const BOTH: [WithHook; 2] = [WithHook::Xdp, WithHook::Tc];

/// A question: `from to protocol`, further arguments; verdict, reason, rule, rules tried at each place that was asked; and a
/// word that some stage tells.
type Question = (&'static str, &'static str, &'static str, &'static str, &'static [usize], &'static str);

#[rustfmt::skip]
const QUESTIONS: &[Question] = &[
    // To the world.
    ("vm1 198.51.100.1:443 tcp", "forward", "new_flow", "guests/Outbound/AllowInternetOutBound", &[4, 4, 3], "outbound rule lb/out"),
    ("vm1 198.51.100.1:53 udp", "drop", "denied_by_rule", "vm1/Outbound/DenyDns", &[4, 1], "Deny by vm1/DenyDns"),
    ("vm2 198.51.100.1:53 udp", "forward", "new_flow", "guests/Outbound/AllowInternetOutBound", &[4, 3, 3], "the world"),
    ("vm1 198.51.100.2:443 tcp", "drop", "denied_by_rule", "guests/Outbound/DenyWeb", &[4, 4, 1], "on the subnet of vm1/v4"),
    ("vm1 198.51.100.1 icmp", "forward", "new_flow", "guests/Outbound/AllowInternetOutBound", &[4, 4, 3], "lb/fe"),
    ("vm1 198.51.100.1 132", "drop", "protocol_without_ports", "guests/Outbound/AllowInternetOutBound", &[4, 4, 3], "instance-level"),
    ("vm3 198.51.100.1:443 tcp", "forward", "new_flow", "guests/Outbound/AllowInternetOutBound", &[4, 3], "203.0.113.20"),
    ("vm4 198.51.100.1:443 tcp", "drop", "no_outbound_method", "", &[4], "in no backend pool"),
    ("vm1 [2001:db8::7]:443 tcp", "drop", "no_outbound_method", "guests/Outbound/AllowInternetOutBound", &[4, 4, 3], "the world"),
    ("vm1 203.0.113.20:22 tcp", "forward", "new_flow", "guests/Inbound/AllowSsh", &[4, 4, 3, 1], "back in, as if from the world"),
    // Rules before the groups.
    ("vm1 198.51.100.1:25 tcp", "drop", "denied_by_platform_rule", "platformRules/Outbound/BlockSmtp25", &[4], "platformRules/BlockSmtp25"),
    ("vm1 198.51.100.3:1688 tcp", "forward", "new_flow", "platformRules/Outbound/AllowKms", &[3], "platformRules/AllowKms"),
    ("vm2 198.51.100.3:1688 tcp", "drop", "denied_by_rule", "vm2/Outbound/DenyKms", &[3, 1], "only those for AzurePlatformLKM"),
    ("vm1 168.63.129.16:53 udp", "host", "new_flow", "platformRules/Outbound/AllowPlatformService-dns", &[2], "platform's own services"),
    ("vm1 168.63.129.16:80 tcp", "drop", "platform_address", "", &[4], "platform_address"),
    ("vm1 169.254.169.254:80 tcp", "drop", "platform_address", "", &[], "platform_address"),
    // Between guests.
    ("vm1 vm2:80 tcp", "forward", "new_flow", "vm2/Inbound/AllowVnetInBound", &[4, 3, 2, 4, 2], "guest vm2/v4 in lab"),
    ("vm1 vm2:5432 tcp", "drop", "denied_by_rule", "vm2/Inbound/DenyDb", &[4, 3, 2, 4, 1], "network interface of vm2/v4"),
    ("vm1 vm2 icmp", "forward", "new_flow", "vm2/Inbound/AllowVnetInBound", &[4, 3, 2, 4, 2], "none: addresses"),
    ("vm1 vm2 esp", "drop", "denied_by_rule", "guests/Inbound/DenyEsp", &[4, 3, 2, 3], "guests/DenyEsp"),
    ("vm1 vm2 132", "forward", "new_flow", "vm2/Inbound/AllowVnetInBound", &[4, 3, 2, 4, 2], "vm2/v4"),
    ("10.0.0.4:5000 10.0.0.77:80 tcp", "drop", "no_guest", "", &[], "no guest has in lab"),
    ("vm1 vm4:80 tcp", "forward", "new_flow", "guests/Outbound/AllowVnetOutBound", &[4, 3, 2], "in the peered other"),
    ("vm4 vm1:80 tcp", "forward", "new_flow", "vm1/Inbound/AllowVnetInBound", &[4, 4, 1], "in the peered lab"),
    ("vm5 198.51.100.1:443 tcp", "drop", "route_to_nowhere", "", &[], "route rt/nowhere (198.51.100.0/24)"),
    ("vm5 192.0.2.9:80 tcp", "drop", "no_virtual_network_gateway", "", &[], "route rt/branch"),
    ("vm5 10.1.0.4:80 tcp", "forward", "new_flow", "vm2/Inbound/AllowVnetInBound", &[4, 4, 2], "through the appliance vm2/v4"),
    // Between guests, IPv6.
    ("vm1 vm2:80 tcp --ipv6", "forward", "new_flow", "vm2/Inbound/AllowVnetInBound", &[4, 3, 2, 4, 2], "guest vm2/v6"),
    ("[fd00:1::4]:6000 [fd00:1::5]:5432 tcp", "drop", "denied_by_rule", "vm1/Outbound/DenyDb6", &[4, 2], "vm1/DenyDb6"),
    ("vm1 vm2 icmp6", "forward", "new_flow", "vm2/Inbound/AllowVnetInBound", &[4, 3, 2, 4, 2], "vm2/v6"),
    ("vm1/v6 vm2:5353 udp", "drop", "denied_by_rule", "guests/Inbound/DenyMdns", &[4, 3, 2, 2], "DenyMdns"),
    ("vm1 fd00:1::5 ah", "forward", "new_flow", "vm2/Inbound/AllowVnetInBound", &[4, 3, 2, 4, 2], "vm2/v6"),
    ("vm1 vm2 esp --ipv6", "drop", "denied_by_rule", "guests/Inbound/DenyEsp", &[4, 3, 2, 3], "DenyEsp"),
    // With the host.
    ("vm1 host:53 udp", "host", "new_flow", "", &[], "hostAccess opens it"),
    ("vm1 host:8080 tcp", "drop", "host_access", "", &[], "gateway address"),
    ("vm1 host icmp", "host", "new_flow", "", &[], "hostAccess opens it"),
    ("vm1 host icmp6", "host", "new_flow", "", &[], "hostAccess opens it"),
    ("host vm1:22 tcp", "forward", "new_flow", "vm1/Inbound/AllowVnetInBound", &[4, 1], "where this host sends"),
    ("host vm1 icmp --ipv6", "forward", "new_flow", "vm1/Inbound/AllowVnetInBound", &[4, 1], "this host, from fd00:1::1"),
    ("host vm1:5353 udp", "drop", "denied_by_rule", "guests/Inbound/DenyMdns", &[2], "DenyMdns"),
    // From the world.
    ("198.51.100.1 vm3:22 tcp", "forward", "new_flow", "guests/Inbound/AllowSsh", &[1], "public address of guest vm3"),
    ("198.51.100.1 203.0.113.20:80 tcp", "drop", "denied_by_rule", "guests/Inbound/DenyAllInBound", &[6], "DenyAllInBound"),
    ("198.51.100.1 203.0.113.10:80 tcp", "drop", "no_listener", "", &[], "frontend lb/fe"),
    ("198.51.100.1 203.0.113.10:1025 tcp", "drop", "no_flow", "", &[], "frontend lb/fe"),
    ("198.51.100.1 203.0.113.1:22 tcp", "host", "not_ours", "", &[], "an address of this host"),
    ("169.254.7.7 203.0.113.20:22 tcp", "drop", "martian", "", &[], "somebody in the world"),
];

fn start(hook: WithHook) -> Edge {
    let mut spec = TopologySpec::clean_veth(5);
    for (guest, address, gateway) in [(3, [10, 1, 0, 4], [10, 1, 0, 1]), (4, [10, 0, 2, 4], [10, 0, 2, 1])] {
        spec.guests[guest].address = address.into();
        spec.guests[guest].gateway = gateway.into();
    }
    let topology = Topology::build(&spec).unwrap();
    for name in ["gw", "vm1", "vm2"] {
        let namespace = if name == "gw" { topology.gateway() } else { topology.guest(name) };
        for (key, value) in [("router_solicitations", "0"), ("accept_ra", "0")] {
            namespace.set_sysctl(&format!("net.ipv6.conf.all.{key}"), value).unwrap();
            namespace.set_sysctl(&format!("net.ipv6.conf.default.{key}"), value).unwrap();
        }
        namespace.set_sysctl("net.ipv6.conf.all.disable_ipv6", "0").unwrap();
    }
    for (guest, address) in [("vm1", "fd00:1::4"), ("vm2", "fd00:1::5")] {
        topology.guest(guest).ip(&format!("address add {address}/64 dev eth0 nodad")).unwrap();
    }
    let edge = Edge::start_in(topology, &POLICY.replace("HOOK", hook.word())).unwrap();
    // So that neighbours and guests are known.
    let once = |from: &str, to: &str| {
        let (from, to) = (edge.topology.guest(from), to.parse().unwrap());
        eventually(LIMIT, || ping(from, to, 1, Duration::from_millis(300)).unwrap().received == 1)
    };
    for (from, to) in [
        ("vm1", "198.51.100.1"),
        ("vm2", "198.51.100.1"),
        ("vm3", "198.51.100.1"),
        ("vm4", "10.0.0.4"),
        ("vm5", "10.0.0.4"),
        ("vm1", "fd00:1::5"),
        ("vm2", "fd00:1::4"),
    ] {
        assert!(once(from, to), "{hook:?}: {from} reaches {to}");
    }
    edge.ask(&["flows", "flush"]).unwrap();
    edge
}

/// The arguments of a question.
fn arguments<'q>(question: &'q str, more: &[&'q str]) -> Vec<&'q str> {
    let mut words = question.split_whitespace();
    let mut next = || words.next().unwrap();
    let mut all = vec!["explain", "--from", next(), "--to", next(), "--protocol", next()];
    all.extend(words);
    all.extend(more);
    all
}

/// What neighbours and kernels count by themselves, whether anybody asks or not: `to_host` and `from_host` are the ARP and the
/// neighbour discovery between host and guests (a new flow to the host is `new_flow`).
const BACKGROUND: [&str; 8] = [
    "arp_answered",
    "arp_learned",
    "nd_answered",
    "nd_learned",
    "not_ours",
    "broadcast",
    "to_host",
    "from_host",
];

/// Every counter of reasons and rules that is not zero, and every flow with its counts.
#[derive(Debug, PartialEq)]
struct State {
    reasons: Vec<String>,
    rules: Vec<String>,
    flows: Vec<Value>,
}

fn state(edge: &Edge) -> State {
    let drops = edge.ask(&["drops", "--all"]).unwrap();
    let mut reasons = drops["reasons"].as_array().unwrap().clone();
    reasons.retain(|row| row["packets"] != 0 && !BACKGROUND.contains(&text(row, "reason")));
    let rules = edge.ask(&["rules"]).unwrap()["rules"].as_array().unwrap().clone();
    let mut flows = edge.ask(&["flows"]).unwrap()["flows"].as_array().unwrap().clone();
    for flow in &mut flows {
        flow.as_object_mut().unwrap().remove("idleSecondsLeft");
    }
    State {
        reasons: reasons
            .iter()
            .map(|r| format!("{}: {}, {}", r["reason"], r["packets"], r["bytes"]))
            .collect(),
        rules: rules
            .iter()
            .filter(|rule| rule["hits"] != 0)
            .map(|r| {
                format!("{}/{}/{}: {}, {}", r["group"], r["direction"], r["name"], r["hits"], r["bytes"])
            })
            .collect(),
        flows,
    }
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or_else(|| panic!("no text {key} in {value}"))
}

/// Asks, holds the answer against the list, and gives it back.
fn asked(edge: &Edge, question: &Question, more: &[&str]) -> Value {
    let (words, verdict, reason, rule, tried, stage) = *question;
    let answer = edge.ask(&arguments(words, more)).unwrap_or_else(|error| panic!("{words}: {error:#}"));
    let said = (text(&answer, "verdict"), text(&answer, "reason"), text(&answer, "rule"));
    assert_eq!(said, (verdict, reason, rule), "{words}: {answer:#}");
    let groups = answer["groups"].as_array().unwrap();
    let counts: Vec<usize> = groups.iter().map(|group| group["tried"].as_array().unwrap().len()).collect();
    assert_eq!(counts, tried, "{words}: {answer:#}");
    let fields = [
        "protocolMatched",
        "sourceMatched",
        "sourcePortMatched",
        "destinationMatched",
        "destinationPortMatched",
    ];
    for group in groups {
        let tried = group["tried"].as_array().unwrap();
        let all = |rule: &Value| fields.iter().all(|field| rule[*field].as_bool().unwrap());
        // All but the last one lack something, and the last one is the rule that is named.
        assert!(tried[..tried.len() - 1].iter().all(|rule| !all(rule)), "{words}: {group:#}");
        let last = tried.last().unwrap();
        assert_eq!(all(last), group["rule"] != "", "{words}: {group:#}");
        assert!(!all(last) || last["rule"] == group["rule"], "{words}: {group:#}");
    }
    let stages = answer["stages"].as_array().unwrap();
    assert!(stages.iter().any(|s| text(s, "text").contains(stage)), "{words}: {stage} in {stages:#?}");
    assert_eq!(stages.last().unwrap()["stage"], "verdict", "{words}");
    assert_eq!(
        stages.iter().filter(|s| s["ended"] == true).count(),
        if verdict == "drop" { 2 } else { ends(reason) },
        "{words}: {stages:#?}"
    );
    let notes = answer["notes"].as_array().unwrap();
    assert!(!notes.iter().any(|note| note.as_str().unwrap().contains("please report")), "{words}: {notes:?}");
    answer
}

/// Stages at which a packet ends that is not dropped: what is not ours ends at the route.
fn ends(reason: &str) -> usize {
    if reason == "not_ours" { 2 } else { 1 }
}

/// The frame of the question, as its sender would send it; `None` for what the host sends.
fn frame(edge: &Edge, answer: &Value) -> Option<(RawSender, Vec<u8>)> {
    let address = |key: &str| text(answer, key).parse::<IpAddr>().unwrap();
    let port = |key: &str| answer[key].as_u64().unwrap() as u16;
    let (sender, from, to): (_, Mac, Mac) = match text(answer, "from") {
        "host" => return None,
        "world" => {
            let sender = RawSender::open(edge.topology.internet(), "eth0").unwrap();
            (sender, TopologySpec::INTERNET_MAC, TopologySpec::UPLINK_MAC)
        }
        guest => {
            let name = guest.split('/').next().unwrap();
            let spec = edge.topology.guest_spec(name);
            (RawSender::open(edge.topology.guest(name), "eth0").unwrap(), spec.mac, spec.gateway_mac)
        }
    };
    let (sport, dport) = (port("sourcePort"), port("destinationPort"));
    let protocol = text(answer, "protocol");
    let number = || match protocol {
        "esp" => 50,
        "ah" => 51,
        number => number.parse::<u8>().unwrap(),
    };
    let frame = match (address("source"), address("destination")) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let craft = Craft::new(from, source, to, destination);
            match protocol {
                "tcp" => craft.tcp(sport, dport, TcpFlags::SYN, 1, 0, b""),
                "udp" => craft.udp(sport, dport, b"?"),
                "icmp" => craft.echo_request(sport, 1, b"echo"),
                _ => with_protocol(craft.udp(0, 0, b"12345678"), number()),
            }
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let craft = Craft6::new(from, source, to, destination);
            match protocol {
                "tcp" => craft.tcp(sport, dport, TcpFlags::SYN, 1),
                "udp" => craft.udp(sport, dport, b"?"),
                "icmp6" => craft.echo_request(sport, 1),
                _ => craft.protocol(number(), &[0; 8]),
            }
        }
        other => panic!("two families: {other:?}"),
    };
    Some((sender, frame))
}

/// Another protocol in an IPv4 frame; its header's checksum is made anew.
fn with_protocol(mut frame: Vec<u8>, protocol: u8) -> Vec<u8> {
    frame[23] = protocol;
    frame[24..26].fill(0);
    let sum: u32 = frame[14..34].chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    let checksum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    frame
}

/// Packets of a reason and hits of a rule so far.
fn counted(edge: &Edge, reason: &str, rule: &str) -> [u64; 2] {
    let hits = match rule.split('/').collect::<Vec<_>>()[..] {
        [group, direction, name] => edge.rule_hits(group, direction, name).unwrap(),
        _ => 0,
    };
    [edge.reason(reason).unwrap(), hits]
}

/// Is there one live flow, and does it go to the host?
fn flow_to_host(edge: &Edge) -> bool {
    let flows = edge.ask(&["flows"]).unwrap()["flows"].as_array().unwrap().clone();
    flows.len() == 1 && flows[0]["toGuest"] == "host"
}

/// Sends the packet that was asked about, and sees what becomes of it; whether one could be made.
fn sent(edge: &Edge, question: &Question, answer: &Value) -> bool {
    let (words, verdict, reason, rule, ..) = *question;
    let Some((sender, frame)) = frame(edge, answer) else { return false };
    let eyes: Option<Sniffer> = (verdict == "forward").then(|| match text(answer, "to") {
        "world" => edge.topology.sniff_internet().unwrap(),
        guest => edge.topology.sniff_guest(guest.split('/').next().unwrap()).unwrap(),
    });
    let before = counted(edge, reason, rule);
    sender.send(&frame).unwrap();
    let moved = eventually(LIMIT, || {
        let after = counted(edge, reason, rule);
        // XDP makes the flow and passes the packet on to TC, which finds it live and counts `to_host` (ADR 0002).
        let begun = verdict == "host" && reason == "new_flow" && flow_to_host(edge);
        (after[0] > before[0] || begun) && (rule.is_empty() || after[1] > before[1])
    });
    assert!(moved, "{words}: told {reason} by {rule}; {:?}", edge.reasons());
    if let Some(eyes) = eyes {
        let told = |key: &str| text(&answer["translation"], key).parse::<IpAddr>().unwrap();
        let (source, destination) = (told("newSource"), told("newDestination"));
        let arrived = eyes.wait_for(LIMIT, |frame| {
            frame.ip.as_ref().is_some_and(|ip| (ip.source, ip.destination) == (source, destination))
        });
        assert!(
            arrived.is_some(),
            "{words}: told to arrive as {source} -> {destination}; {:?}",
            eyes.frames()
        );
    }
    true
}

#[test]
fn what_is_told_is_true_the_kernel_agrees_and_asking_moves_nothing() {
    for hook in BOTH {
        let edge = start(hook);
        let (mut asked_live, mut took) = (0, Duration::ZERO);
        let before = state(&edge);
        assert!(before.flows.is_empty(), "{hook:?}: nothing lives yet: {:?}", before.flows);
        for question in QUESTIONS {
            let words = question.0;
            let plain = asked(&edge, question, &[]);
            assert_eq!((&plain["live"], &plain["liveFlow"]), (&Value::Null, &false.into()), "{words}");
            let began = Instant::now();
            let live = asked(&edge, question, &["--live"]);
            took += began.elapsed();
            asked_live += 1;
            let kernel = &live["live"];
            assert_eq!(kernel["agrees"], true, "{hook:?} {words}: {kernel:#}");
            assert_eq!(kernel["comparison"], "the same", "{hook:?} {words}: {kernel:#}");
            let hooks: Vec<&str> =
                kernel["hooks"].as_array().unwrap().iter().map(|h| text(h, "hook")).collect();
            let expected: &[&[&str]] = match (text(&live, "from"), hook) {
                ("host", _) => &[&["hostEgress"]],
                (_, WithHook::Xdp) => &[&["xdp"], &["xdp", "tc"]],
                _ => &[&["tc"]],
            };
            assert!(expected.contains(&&hooks[..]), "{hook:?} {words}: {hooks:?}");
        }
        assert_eq!(state(&edge), before, "{hook:?}: asking has moved something");
        println!("{hook:?}: {asked_live} questions asked of the kernel, {:?} each", took / asked_live);

        // Now for real, each on ground that the ones before have left no flow on.
        let mut real = 0;
        for question in QUESTIONS {
            edge.ask(&["flows", "flush"]).unwrap();
            let answer = asked(&edge, question, &[]);
            real += usize::from(sent(&edge, question, &answer));
        }
        println!("{hook:?}: {real} of them sent for real");
        assert!(real >= 40, "{hook:?}: {real}");
        for guest in ["10.0.0.4", "fd00:1::4"] {
            let guest: IpAddr = guest.parse().unwrap();
            assert_eq!(ping(edge.topology.gateway(), guest, 1, LIMIT).unwrap().received, 1, "{hook:?}");
        }
    }
}

#[test]
fn of_a_live_flow_the_kernel_says_forwarded_and_that_is_agreement() {
    for hook in BOTH {
        let edge = start(hook);
        let _server = TcpEcho::start(edge.topology.internet(), SocketAddr::from((SERVER, 9000))).unwrap();
        let mut held = TcpHold::open(edge.topology.guest("vm1"), (SERVER, 9000).into(), 1, LIMIT).unwrap();
        assert_eq!(held.alive(LIMIT), 1);
        let port = held.locals()[0].port().to_string();
        let ask = |more: &[&str]| {
            let question = ["explain", "--from", "vm1", "--to", "198.51.100.1:9000", "--live"];
            edge.ask(&[&question, more].concat()).unwrap()
        };
        let before = state(&edge);
        let rule = "guests/Outbound/AllowInternetOutBound";
        let mine = ask(&["--from-port", &port]);
        assert_eq!((&mine["liveFlow"], &mine["liveFlowRules"][0]), (&true.into(), &rule.into()), "{mine:#}");
        assert_eq!((text(&mine, "reason"), text(&mine["live"], "reason")), ("new_flow", "forwarded"));
        assert_eq!((&mine["live"]["agrees"], text(&mine["live"], "rule")), (&true.into(), rule), "{mine:#}");
        assert!(text(&mine["live"], "comparison").contains("live flow"), "{mine:#}");
        // The address and port that the connection really has.
        let flow = &before.flows[0];
        let real = format!("203.0.113.10:{} -> 198.51.100.1:9000", flow["translatedSourcePort"]);
        assert_eq!(text(&mine["live"], "becomes"), real);
        // From another port it would be a new one.
        let other = ask(&[]);
        assert_eq!(
            (&other["liveFlow"], text(&other["live"], "reason")),
            (&true.into(), "new_flow"),
            "{other:#}"
        );
        // Its answers: to the engine, which knows no flow, a stranger's packet.
        let answers = format!("203.0.113.10:{}", flow["translatedSourcePort"]);
        let back = edge.ask(&["explain", "--from", "198.51.100.1:9000", "--to", &answers, "--live"]).unwrap();
        assert_eq!(
            (text(&back, "reason"), text(&back["live"], "reason")),
            ("no_flow", "forwarded"),
            "{back:#}"
        );
        assert_eq!(back["live"]["agrees"], true, "{back:#}");
        assert_eq!(state(&edge), before, "{hook:?}: asking has moved something");

        // What is allowed no more lives on, and the answer says both.
        let denied = POLICY
            .replace("HOOK", hook.word())
            .replace("198.51.100.2, destinationPortRange: 443", "198.51.100.1, destinationPortRange: 9000");
        let (applied, said) = edge.apply(&denied).unwrap();
        assert!(applied, "{said}");
        let now = ask(&["--from-port", &port]);
        assert_eq!(
            (text(&now, "rule"), text(&now["live"], "reason")),
            ("guests/Outbound/DenyWeb", "forwarded")
        );
        assert!(text(&now["live"], "comparison").contains("could not be opened now"), "{now:#}");
        let fresh = ask(&[]);
        assert_eq!(
            (&fresh["live"]["agrees"], text(&fresh["live"], "reason")),
            (&true.into(), "denied_by_rule")
        );
        assert_eq!(held.alive(LIMIT), 1, "{hook:?}: told to live, and it does");
    }
}

#[test]
fn people_see_the_rule_that_matched_or_all_that_were_tried_and_nonsense_is_code_2() {
    let edge = start(WithHook::Tc);
    let ask = |more: &[&str]| {
        let question = ["explain", "--from", "vm1", "--to", "198.51.100.2:443", "--live"];
        edge.daemon.ask_text(&[&question, more].concat()).unwrap()
    };
    let short = ask(&[]);
    println!("{short}");
    for part in [
        "DROPPED (denied_by_rule)",
        "agrees: the same",
        "tc: drop",
        "DenyWeb",
        "<- ends here",
        "route       the world",
    ] {
        assert!(short.contains(part), "{part} in\n{short}");
    }
    assert!(!short.contains("DenyDns"), "{short}");
    let long = ask(&["--all-rules"]);
    println!("{long}");
    assert!(long.contains("DenyDns") && long.contains("protocol, destination port"), "{long}");
    assert_eq!(long, ask(&["--verbose"]));
    for (words, said) in [
        ("vm9 vm1:80 tcp", "there is no guest `vm9`"),
        ("vm1 vm2 tcp", "needs a port"),
        ("vm1 vm2:1 icmp", "has no ports"),
        ("vm1 [fd00:1::5]:80 tcp --from-port 70000", "70000"),
        ("10.0.0.4 fd00:1::5 esp", "no packet goes between them"),
        ("vm1 198.51.100.1:80 tcp --ipv6", "--ipv6"),
        ("vm3 vm1:80 tcp --ipv6", "vm3 has no IPv6 address"),
        ("vm1 fd00:1::5 44", "extension header"),
        ("vm1 vm2 sctp", "is no protocol"),
        ("10.0.0.99 vm1:80 tcp", "nobody can send from there"),
        ("host 198.51.100.1:80 tcp", "the kernel's business"),
        ("198.51.100.1 vm1:80 tcp", "no public address"),
    ] {
        let (status, out, err) = edge.daemon.client(&arguments(words, &[])).unwrap();
        assert_eq!((status.code(), out.as_str()), (Some(2), ""), "{words}: {err}");
        assert!(err.contains(said), "{words}: {err}");
    }
}
