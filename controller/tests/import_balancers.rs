//! `portcullis import` of load balancers: what each part becomes, and what is said of those that do not fit.

mod import_support;

use import_support::{at_level, imported};
use portcullis::policy::import::Imported;
use portcullis::policy::import::report::Level;
use portcullis::policy::network::{
    Distribution, InboundNatRule, LoadBalancer, LoadBalancingRule, NatTarget, Network, Probe, ProbeProtocol,
    TransportProtocol,
};
use serde_json::{Value, json};

const SCOPE: &str = "/subscriptions/s/resourceGroups/rg/providers/Microsoft.Network";

fn id(rest: &str) -> Value {
    json!({ "id": format!("{SCOPE}/{rest}") })
}

fn public(name: &str, address: &str) -> Value {
    json!({"type": "Microsoft.Network/publicIPAddresses", "id": format!("{SCOPE}/publicIPAddresses/{name}"), "name": name,
           "properties": {"ipAddress": address}})
}

/// An interface in the pool `p`, of both families, whose ip configuration has these properties besides.
fn nic(name: &str, host: u8, more: &[(&str, Value)]) -> Value {
    let subnet = id("virtualNetworks/v/subnets/s");
    let mut v4 = json!({"privateIPAddress": format!("10.0.1.{host}"), "subnet": subnet,
                        "loadBalancerBackendAddressPools": [id("loadBalancers/lb/backendAddressPools/p")]});
    for (key, value) in more {
        v4[*key] = value.clone();
    }
    json!({"type": "Microsoft.Network/networkInterfaces", "id": format!("{SCOPE}/networkInterfaces/{name}"), "name": name,
           "properties": {"ipConfigurations": [{"name": "v4", "id": format!("{SCOPE}/networkInterfaces/{name}/ipConfigurations/v4"), "properties": v4},
              {"name": "v6", "properties": {"privateIPAddress": format!("fd00:1:0:1::{host}"), "privateIPAddressVersion": "IPv6", "subnet": id("virtualNetworks/v/subnets/s"),
               "loadBalancerBackendAddressPools": [id("loadBalancers/lb/backendAddressPools/p")]}}]}})
}

fn network(default_outbound: Value) -> Value {
    json!({"type": "Microsoft.Network/virtualNetworks", "id": format!("{SCOPE}/virtualNetworks/v"), "name": "v", "properties": {
        "addressSpace": {"addressPrefixes": ["10.0.0.0/16", "fd00:1::/48"]}, "subnets": [{"name": "s", "properties": {
        "addressPrefixes": ["10.0.1.0/24", "fd00:1:0:1::/64"], "defaultOutboundAccess": default_outbound}}]}})
}

fn part(list: &str, name: &str, properties: Value) -> Value {
    json!({"name": name, "id": format!("{SCOPE}/loadBalancers/lb/{list}/{name}"), "properties": properties})
}

fn frontend(name: &str) -> Value {
    id(&format!("loadBalancers/lb/frontendIPConfigurations/{name}"))
}

fn pool() -> Value {
    id("loadBalancers/lb/backendAddressPools/p")
}

/// A load balancer with frontends `fe`, `fe6` and `out`, the last a prefix, and these lists.
fn balancer(lists: &[(&str, Vec<Value>)]) -> Value {
    let mut properties = json!({
        "frontendIPConfigurations": [
            part("frontendIPConfigurations", "fe", json!({"publicIPAddress": id("publicIPAddresses/pip")})),
            part("frontendIPConfigurations", "fe6", json!({"publicIPAddress": id("publicIPAddresses/pip6")})),
            part("frontendIPConfigurations", "out", json!({"publicIPPrefix": id("publicIPPrefixes/pp")}))],
        "backendAddressPools": [part("backendAddressPools", "p", json!({}))]
    });
    for (list, items) in lists {
        properties[*list] = Value::from(items.clone());
    }
    json!({"type": "Microsoft.Network/loadBalancers", "id": format!("{SCOPE}/loadBalancers/lb"), "name": "lb", "properties": properties})
}

fn rule(name: &str, change: &[(&str, Value)]) -> Value {
    let mut properties = json!({"frontendIPConfiguration": frontend("fe"), "backendAddressPool": pool(), "protocol": "Tcp",
        "frontendPort": 80, "backendPort": 8080, "disableOutboundSnat": true});
    for (key, value) in change {
        properties[*key] = value.clone();
    }
    part("loadBalancingRules", name, properties)
}

fn outbound(frontends: &[&str]) -> Value {
    let frontends: Vec<Value> = frontends.iter().map(|name| frontend(name)).collect();
    part(
        "outboundRules",
        "o",
        json!({"frontendIPConfigurations": frontends, "backendAddressPool": pool(), "protocol": "All",
               "allocatedOutboundPorts": 1024, "idleTimeoutInMinutes": 15, "enableTcpReset": true}),
    )
}

/// Everything around a load balancer with these lists.
fn whole(lists: &[(&str, Vec<Value>)]) -> (Imported, Network) {
    let target = match lists.iter().any(|(list, _)| *list == "inboundNatRules") {
        true => json!([id("loadBalancers/lb/inboundNatRules/ssh")]),
        false => json!([]),
    };
    let prefix = json!({"type": "Microsoft.Network/publicIPPrefixes", "id": format!("{SCOPE}/publicIPPrefixes/pp"), "name": "pp",
                        "properties": {"ipPrefix": "198.51.100.0/30"}});
    let all = json!([
        network(json!(false)),
        public("pip", "203.0.113.10"),
        public("pip6", "2001:db8:1::10"),
        prefix,
        nic("a", 4, &[("loadBalancerInboundNatRules", target)]),
        nic("b", 5, &[]),
        balancer(lists)
    ]);
    let (imported, loaded) = imported(&all);
    (imported, loaded.network)
}

fn warnings(imported: &Imported) -> Vec<(String, String)> {
    assert!(at_level(imported, Level::Error).is_empty(), "{:?}", imported.report.items);
    let all = at_level(imported, Level::Warning);
    all.iter().map(|item| (item.property.clone(), item.why.clone())).collect()
}

fn only(network: &Network) -> &LoadBalancer {
    let [balancer] = network.load_balancers.as_slice() else { panic!("one load balancer") };
    balancer
}

#[test]
fn every_part_of_a_load_balancer_is_carried_over_with_all_it_says() {
    let lists = [
        (
            "probes",
            vec![part(
                "probes",
                "alive",
                json!({"protocol": "Http", "port": 8080, "requestPath": "health", "intervalInSeconds": 15, "numberOfProbes": 2,
                       "loadBalancingRules": [id("loadBalancers/lb/loadBalancingRules/http")]}),
            )],
        ),
        (
            "loadBalancingRules",
            vec![
                rule(
                    "http",
                    &[
                        ("probe", id("loadBalancers/lb/probes/alive")),
                        ("loadDistribution", json!("SourceIPProtocol")),
                        ("idleTimeoutInMinutes", json!(30)),
                        ("enableTcpReset", json!(true)),
                        ("enableFloatingIP", json!(true)),
                    ],
                ),
                rule(
                    "six",
                    &[
                        ("frontendIPConfiguration", frontend("fe6")),
                        ("disableOutboundSnat", json!(false)),
                        ("loadDistribution", json!("Default")),
                    ],
                ),
            ],
        ),
        (
            "inboundNatRules",
            vec![
                part(
                    "inboundNatRules",
                    "ssh",
                    json!({"frontendIPConfiguration": frontend("fe"), "protocol": "Tcp", "frontendPort": 2201, "backendPort": 22}),
                ),
                part(
                    "inboundNatRules",
                    "range",
                    json!({"frontendIPConfiguration": frontend("fe"), "protocol": "Udp", "frontendPortRangeStart": 5000,
                           "frontendPortRangeEnd": 5009, "backendPort": 53, "backendAddressPool": pool(), "idleTimeoutInMinutes": 4}),
                ),
            ],
        ),
        ("outboundRules", vec![outbound(&["out"])]),
    ];
    let (imported, network) = whole(&lists);
    assert_eq!(warnings(&imported), []);
    let lb = only(&network);
    let addresses: Vec<_> =
        network.public_addresses.iter().map(|public| public.address.to_string()).collect();
    assert_eq!(addresses[..2], ["203.0.113.10", "2001:db8:1::10"]);
    assert_eq!(addresses[2..], ["198.51.100.0", "198.51.100.1", "198.51.100.2", "198.51.100.3"]);
    assert_eq!(lb.frontends[2].public_addresses, [2, 3, 4, 5]);
    assert_eq!(lb.pools[0].members, [(0, 0), (0, 1), (1, 0), (1, 1)], "both families");
    let probe = Probe {
        name: "alive".to_owned(),
        protocol: ProbeProtocol::Http { path: "/health".to_owned() },
        port: 8080,
        interval_seconds: 15,
        threshold: 2,
    };
    assert_eq!(lb.probes, [probe]);
    let http = LoadBalancingRule {
        name: "http".to_owned(),
        frontend: 0,
        pool: 0,
        protocol: TransportProtocol::Tcp,
        frontend_port: 80,
        backend_port: 8080,
        distribution: Distribution::SourceIpProtocol,
        idle_timeout_seconds: Some(1800),
        tcp_reset: true,
        floating_ip: true,
        disable_outbound_snat: true,
        probe: Some(0),
    };
    let six = LoadBalancingRule {
        name: "six".to_owned(),
        frontend: 1,
        distribution: Distribution::Default,
        idle_timeout_seconds: None,
        tcp_reset: false,
        floating_ip: false,
        disable_outbound_snat: false,
        probe: None,
        ..http.clone()
    };
    assert_eq!(lb.rules, [http, six]);
    let ssh = InboundNatRule {
        name: "ssh".to_owned(),
        frontend: 0,
        protocol: TransportProtocol::Tcp,
        backend_port: 22,
        idle_timeout_seconds: None,
        tcp_reset: false,
        floating_ip: false,
        target: NatTarget::Single { frontend_port: 2201, member: (0, 0) },
    };
    let range = InboundNatRule {
        name: "range".to_owned(),
        protocol: TransportProtocol::Udp,
        backend_port: 53,
        idle_timeout_seconds: Some(240),
        target: NatTarget::Range { first: 5000, last: 5009, pool: 0 },
        ..ssh.clone()
    };
    assert_eq!(lb.nat_rules, [ssh, range]);
    let out = &lb.outbound_rules[0];
    assert_eq!(
        (out.frontends.as_slice(), out.tcp_reset, out.idle_timeout_seconds),
        (&[2][..], true, Some(900))
    );
}

#[test]
fn what_a_rule_cannot_be_here_is_told_and_left_out() {
    let nat = |name: &str, port: u16| {
        part(
            "inboundNatRules",
            name,
            json!({"frontendIPConfiguration": frontend("fe"), "protocol": "Tcp", "frontendPort": port, "backendPort": 22}),
        )
    };
    let lists = [
        (
            "loadBalancingRules",
            vec![
                rule("good", &[]),
                rule(
                    "ha",
                    &[("protocol", json!("All")), ("frontendPort", json!(0)), ("backendPort", json!(0))],
                ),
                rule("again", &[]),
                rule("prefix", &[("frontendIPConfiguration", frontend("out"))]),
                rule("no-port", &[("frontendPort", json!("[parameters('port')]"))]),
                rule("no-pool", &[("backendAddressPool", id("loadBalancers/lb/backendAddressPools/gone"))]),
            ],
        ),
        ("inboundNatRules", vec![nat("ssh", 80), nat("nobody", 2202)]),
        ("outboundRules", vec![outbound(&["out"])]),
    ];
    let (imported, network) = whole(&lists);
    let why: Vec<_> =
        warnings(&imported).into_iter().map(|(property, why)| format!("{property}: {why}")).collect();
    let expected = [
        "protocol: HA ports are for internal load balancers, which there are none of",
        "frontendPort: another rule has this port of the frontend",
        "frontendIPConfiguration: its frontend is a public prefix, which outbound rules only can use",
        "frontendPort: its port is missing or cannot be read",
        "backendAddressPool: its pool is not in the input",
        "frontendPort: another rule has this port of the frontend",
        "backendIPConfiguration: no ip configuration of the input says that it leads there",
    ];
    assert_eq!(why, expected);
    assert_eq!(only(&network).rules.len(), 1);
    assert!(only(&network).nat_rules.is_empty());
}

#[test]
fn a_rule_that_gives_out_ports_of_an_outbound_rules_frontend_no_longer_does() {
    let snat = ("disableOutboundSnat", json!(false));
    let lists = [
        ("loadBalancingRules", vec![rule("http", std::slice::from_ref(&snat))]),
        ("outboundRules", vec![outbound(&["fe"])]),
    ];
    let (imported, network) = whole(&lists);
    let [(property, why)] = &warnings(&imported)[..] else { panic!("{:?}", imported.report.items) };
    assert_eq!(property, "disableOutboundSnat");
    assert!(why.starts_with("an outbound rule gives out the frontend's ports"), "{why}");
    assert!(only(&network).rules[0].disable_outbound_snat);
    // Without the outbound rule the load balancing rule gives the pool its ports, as in Azure.
    let (imported, network) = whole(&[("loadBalancingRules", vec![rule("http", &[snat])])]);
    assert_eq!(warnings(&imported), []);
    assert!(!only(&network).rules[0].disable_outbound_snat);
}

#[test]
fn a_scale_sets_nat_pool_becomes_a_range_for_the_only_pool_and_says_so() {
    let nat_pool = |name: &str, first: u16, last: u16| {
        part(
            "inboundNatPools",
            name,
            json!({"frontendIPConfiguration": frontend("fe"), "protocol": "tcp", "frontendPortRangeStart": first,
                   "frontendPortRangeEnd": last, "backendPort": 3389}),
        )
    };
    let (imported, network) =
        whole(&[("inboundNatPools", vec![nat_pool("rdp", 50000, 50119), nat_pool("few", 4000, 4000)])]);
    assert_eq!(only(&network).nat_rules[0].target, NatTarget::Range { first: 50000, last: 50119, pool: 0 });
    let notes = at_level(&imported, Level::Note);
    assert!(notes.iter().any(|item| item.why.contains("the members of pool `p` are here")), "{notes:?}");
    let why: Vec<_> = warnings(&imported).into_iter().map(|(_, why)| why).collect();
    assert_eq!(why, ["1 ports are too few for 2 members"]);
}

#[test]
fn a_probe_that_cannot_be_asked_becomes_a_handshake() {
    let probe = |name: &str, protocol: &str, port: u16, path: &str| {
        part(
            "probes",
            name,
            json!({"protocol": protocol, "port": port, "requestPath": path, "probeThreshold": 3, "numberOfProbes": 1}),
        )
    };
    let lists = [(
        "probes",
        vec![
            probe("tls", "Https", 443, "/"),
            probe("smtp", "Http", 25, "/"),
            probe("odd", "Http", 80, "/a\r\nHost: b"),
            probe("good", "http", 80, "/ok"),
        ],
    )];
    let (imported, network) = whole(&lists);
    let probes = &only(&network).probes;
    assert_eq!(probes.len(), 4);
    assert!(probes[..3].iter().all(|probe| probe.protocol == ProbeProtocol::Tcp && probe.threshold == 3));
    assert_eq!(probes[3].protocol, ProbeProtocol::Http { path: "/ok".to_owned() });
    let told = warnings(&imported).into_iter().filter(|(property, _)| property == "protocol").count();
    assert_eq!(told, 3);
}

#[test]
fn default_outbound_is_carried_over_where_it_is_said_and_told_where_it_is_silent() {
    let with = |value: Value| {
        imported(&json!([network(value), nic("a", 4, &[("loadBalancerBackendAddressPools", json!([]))])]))
    };
    let (_, loaded) = with(json!(true));
    let outbound = loaded.network.default_outbound.as_ref().unwrap();
    assert!(loaded.network.subnets[0].default_outbound);
    assert_eq!(loaded.network.public_addresses[outbound.public_addresses[0]].name, "default-outbound");
    for silent in [json!(null), json!(false)] {
        let (imported, loaded) = with(silent.clone());
        assert_eq!(loaded.network.default_outbound, None);
        let notes = at_level(&imported, Level::Note);
        let told = notes.iter().any(|item| item.property == "defaultOutboundAccess");
        assert_eq!(told, silent.is_null(), "{notes:?}");
    }
}

#[test]
fn public_ipv6_addresses_are_carried_over_to_guests_of_their_family() {
    let six = json!({"type": "Microsoft.Network/publicIPAddresses", "id": format!("{SCOPE}/publicIPAddresses/six"), "name": "six",
                     "properties": {"publicIPAddressVersion": "IPv6"}});
    let mut guest = nic("a", 4, &[("loadBalancerBackendAddressPools", json!([]))]);
    let own = &mut guest["properties"]["ipConfigurations"][1]["properties"];
    own["loadBalancerBackendAddressPools"] = json!([]);
    own["publicIPAddress"] = id("publicIPAddresses/six");
    let (imported, loaded) = imported(&json!([network(json!(false)), six, guest]));
    assert_eq!(warnings(&imported), []);
    let public = loaded.network.interfaces[0].addresses[1].public_address.unwrap();
    assert_eq!(loaded.network.public_addresses[public].address.to_string(), "2001:db8:ffff::1", "made up");
}

#[test]
fn members_of_two_pools_keep_both_and_have_outbound_ports_of_the_first() {
    let two = json!([pool(), id("loadBalancers/lb/backendAddressPools/q")]);
    let snat = ("disableOutboundSnat", json!(false));
    let mut lb = balancer(&[(
        "loadBalancingRules",
        vec![
            rule("one", std::slice::from_ref(&snat)),
            rule(
                "two",
                &[
                    snat.clone(),
                    ("frontendPort", json!(81)),
                    ("backendAddressPool", id("loadBalancers/lb/backendAddressPools/q")),
                ],
            ),
        ],
    )]);
    let pools = lb["properties"]["backendAddressPools"].as_array_mut().unwrap();
    pools.push(part("backendAddressPools", "q", json!({})));
    let all = json!([
        network(json!(false)),
        public("pip", "203.0.113.10"),
        public("pip6", "2001:db8:1::10"),
        nic("a", 4, &[("loadBalancerBackendAddressPools", two)]),
        lb
    ]);
    let (imported, loaded) = imported(&all);
    let lb = only(&loaded.network);
    assert_eq!(
        (&lb.pools[1].members, lb.rules[0].disable_outbound_snat, lb.rules[1].disable_outbound_snat),
        (&vec![(0, 0)], false, true)
    );
    let told = warnings(&imported);
    assert!(
        told.iter().any(|(_, why)| why.starts_with("1 members of `q` have outbound ports of another pool")),
        "{told:?}"
    );
}

#[test]
fn parts_that_az_prints_by_themselves_join_their_load_balancer() {
    let mut all = vec![
        network(json!(false)),
        public("pip", "203.0.113.10"),
        public("pip6", "2001:db8:1::10"),
        nic("a", 4, &[]),
        balancer(&[]),
    ];
    // `az network lb rule list` and `probe list`: without `properties`, and after the load balancer.
    for (list, name, fields) in [
        ("probes", "alive", json!({"protocol": "Tcp", "port": 80, "intervalInSeconds": 5})),
        (
            "loadBalancingRules",
            "http",
            json!({"frontendIPConfiguration": frontend("fe"), "backendAddressPool": pool(), "protocol": "Tcp", "frontendPort": 80,
                   "backendPort": 80, "disableOutboundSnat": true, "probe": id("loadBalancers/lb/probes/alive"), "enableFloatingIP": false}),
        ),
        (
            "inboundNatRules",
            "ssh",
            json!({"frontendIPConfiguration": frontend("fe"), "protocol": "Tcp", "frontendPort": 22, "backendPort": 22,
                   "backendIPConfiguration": id("networkInterfaces/a/ipConfigurations/v4")}),
        ),
    ] {
        let mut one = json!({"type": format!("Microsoft.Network/loadBalancers/{list}"), "name": name,
                             "id": format!("{SCOPE}/loadBalancers/lb/{list}/{name}")});
        for (key, value) in fields.as_object().unwrap() {
            one[key] = value.clone();
        }
        all.push(one);
    }
    let (_, loaded) = imported(&Value::from(all));
    let lb = only(&loaded.network);
    assert_eq!(
        (lb.rules[0].probe, lb.nat_rules[0].target.clone()),
        (Some(0), NatTarget::Single { frontend_port: 22, member: (0, 0) })
    );
}
