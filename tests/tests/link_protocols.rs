//! What keeps a link itself working passes groups that deny everything: spanning tree, as two bridges of the kernel's speak it
//! through a guest's device, and DHCP, between a real server on the host and a real client in a guest.

use std::fs::Permissions;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use portcullis_tests::edge::{Edge, LabPolicy, under_both};
use portcullis_tests::lab::{Namespace, TopologySpec, eventually, udp_exchange};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);
const DENY_ALL: &str = "
networkSecurityGroups:
  - name: deny
    securityRules:
      - { name: In, priority: 100, direction: Inbound, access: Deny, protocol: '*', sourceAddressPrefix: '*', destinationAddressPrefix: '*', destinationPortRange: '*' }
      - { name: Out, priority: 100, direction: Outbound, access: Deny, protocol: '*', sourceAddressPrefix: '*', destinationAddressPrefix: '*', destinationPortRange: '*' }
";

fn start(hook: portcullis_tests::edge::WithHook, spec: &TopologySpec) -> Edge {
    let mut policy = LabPolicy::new(hook);
    policy.subnet_group = Some("deny");
    policy.extra.push_str(DENY_ALL);
    Edge::start(spec, &policy.yaml(spec)).unwrap()
}

/// A bridge that speaks as often as it may, with `port` on it.
fn bridge(at: &Namespace, name: &str, port: &str, priority: u16) {
    at.ip(&format!(
        "link add {name} type bridge stp_state 1 hello_time 100 forward_delay 200 max_age 600 priority {priority}"
    ))
    .unwrap();
    at.ip(&format!("link set {port} master {name}")).unwrap();
    at.ip(&format!("link set {name} up")).unwrap();
}

/// Does the bridge know a better root than itself, behind its one port?
fn follows(at: &Namespace, name: &str) -> bool {
    let said: Value = serde_json::from_str(&at.ip(&format!("-j -d link show {name}")).unwrap()).unwrap();
    let data = &said[0]["linkinfo"]["info_data"];
    data["root_port"].as_u64().unwrap_or_else(|| panic!("no root_port in {data}")) != 0
}

#[test]
fn bridges_on_both_sides_of_a_guests_device_agree_on_a_spanning_tree_through_it() {
    under_both(|hook| {
        let spec = TopologySpec::clean_veth(1);
        let edge = start(hook, &spec);
        let (gateway, guest) = (edge.topology.gateway(), edge.topology.guest("vm1"));
        bridge(gateway, "pc-lan", "pc-vm1", 0x1000);
        bridge(guest, "lan", "eth0", 0x2000);
        let (hosts, guests) = ((gateway, "pc-lan"), (guest, "lan"));
        let agree = |root: (&Namespace, &str), other: (&Namespace, &str)| {
            eventually(PATIENCE, || follows(other.0, other.1) && !follows(root.0, root.1))
        };
        assert!(agree(hosts, guests), "{hook:?}: the guest's bridge has not heard of the host's");
        guest.ip("link set lan type bridge priority 0").unwrap();
        assert!(agree(guests, hosts), "{hook:?}: the host's bridge has not heard of the guest's");
        let drops = edge.reasons().unwrap().get("ether_type").copied();
        assert_eq!(drops, None, "{hook:?}");
    });
}

#[test]
fn a_client_gets_its_address_by_dhcp_behind_a_group_that_denies_everything_else() {
    under_both(|hook| {
        let spec = TopologySpec::clean_veth(1);
        let edge = start(hook, &spec);
        let (gateway, guest) = (edge.topology.gateway(), edge.topology.guest("vm1"));
        let of_policy = &spec.guests[0];
        let scratch = edge.bpffs.scratch().path();
        guest.ip("address flush dev eth0").unwrap();
        let mac = guest.mac("eth0").unwrap().map(|byte| format!("{byte:02x}")).join(":");
        let _server = gateway
            .spawn(&[
                "dnsmasq",
                "--keep-in-foreground",
                "--conf-file=/dev/null",
                "--port=0",
                "--user=root",
                "--pid-file=",
                "--interface=pc-vm1",
                "--dhcp-authoritative",
                &format!("--dhcp-leasefile={}", scratch.join("leases").display()),
                "--dhcp-range=10.0.0.0,static,255.255.255.0",
                &format!("--dhcp-host={mac},{}", of_policy.address),
                &format!("--dhcp-option=option:router,{}", of_policy.gateway),
            ])
            .unwrap();
        let script = scratch.join("leased");
        let body = "#!/bin/sh\nif [ \"$1\" = bound ]; then\n  ip address add \"$ip/$mask\" dev \"$interface\"\n  ip route add default via \"$router\"\nfi\n";
        std::fs::write(&script, body).unwrap();
        std::fs::set_permissions(&script, Permissions::from_mode(0o755)).unwrap();
        let said = guest
            .run(&[
                "udhcpc",
                "-f",
                "-n",
                "-q",
                "-t",
                "30",
                "-T",
                "1",
                "-i",
                "eth0",
                "-s",
                script.to_str().unwrap(),
            ])
            .unwrap_or_else(|error| panic!("{hook:?}: {error:#}; {:?}", edge.reasons()));
        assert_eq!(guest.address("eth0").unwrap(), of_policy.address, "{hook:?}: {said}");
        // And nothing else: what it has the address for is denied.
        let before = edge.reason("denied_by_rule").unwrap();
        let server = (Ipv4Addr::new(198, 51, 100, 1), 53).into();
        udp_exchange(guest, None, server, b"?", Duration::from_millis(300)).expect_err("denied");
        assert_eq!(edge.reason("denied_by_rule").unwrap(), before + 1, "{hook:?}");
    });
}
