//! What the host gets for guests of IPv6, in namespaces of their own.

use super::tests::{Controller, lab, policy};
use super::*;
use crate::hosts::testing::{Scratch, ip_in, needs_root};
use crate::policy::network::{Announce, IpConfiguration, PublicAddress};

/// The policy of the IPv4 tests with fd00:1::/64 in its subnet, gateway fd00:1::1, and a second address for each guest.
fn dual(guests: &[(&str, &str, &str)]) -> Network {
    let v4: Vec<(&str, &str)> = guests.iter().map(|&(device, v4, _)| (device, v4)).collect();
    let mut network = policy(&v4, &[]);
    network.uplinks[0].reserve_host_ports = false;
    network.virtual_networks[0].address_space.push("fd00:1::/48".parse().unwrap());
    network.subnets[0].prefixes.push("fd00:1::/64".parse().unwrap());
    network.subnets[0].gateways.push("fd00:1::1".parse().unwrap());
    for (interface, (.., v6)) in network.interfaces.iter_mut().zip(guests) {
        interface.addresses.push(IpConfiguration {
            name: "ip6".into(),
            address: v6.parse().unwrap(),
            subnet: 0,
            public_address: None,
            application_groups: Vec::new(),
        });
    }
    network
}

/// The route to a prefix: (device, source).
async fn route(controller: &Controller, prefix: &str) -> Option<(String, Option<String>)> {
    let links = controller.host.links().await.unwrap();
    let everywhere: Vec<u32> = links.iter().map(|link| link.ifindex).collect();
    let routes = controller.host.device_routes(&everywhere).await.unwrap();
    let prefix = prefix.parse().unwrap();
    let route = routes.into_iter().find(|route| route.prefix == prefix && route.direct)?;
    Some((links.by_index(route.ifindex).unwrap().name.clone(), route.source.map(|source| source.to_string())))
}

fn sysctls() -> Vec<String> {
    let names = ["all/forwarding", "default/forwarding", "g0/forwarding", "g0/accept_ra", "g0/autoconf"];
    names.map(|name| sysctl::read(&format!("/proc/sys/net/ipv6/conf/{name}")).unwrap()).to_vec()
}

#[test]
fn a_guest_of_ipv6_gets_gateway_and_route_at_once_and_down_takes_them_away() {
    if !needs_root() {
        return;
    }
    let lab = lab();
    lab.ip(&["link", "set", "g1", "up"]);
    let directory = Scratch::new();
    let path = directory.0.clone();
    let name = lab.name().to_string();
    lab.run(move || async move {
        let before = sysctls();
        let network = dual(&[("g0", "10.0.0.4", "fd00:1::4")]);
        let mut controller = Controller::start(&path);
        let prepared = controller.apply(&network).await;
        let made = [
            "address 10.0.0.1/32 on g0",
            "route to 10.0.0.4/32 by g0",
            "address fd00:1::1/128 on g0",
            "route to fd00:1::4/128 by g0",
        ];
        assert_eq!((prepared.made, prepared.warnings), (made.map(str::to_owned).to_vec(), Vec::new()));
        assert_eq!(controller.addresses().await, ["g0 10.0.0.1/32", "g0 fd00:1::1/128", "up0 192.0.2.2/24"]);
        let six = Some(("g0".to_owned(), Some("fd00:1::1".to_owned())));
        assert_eq!(route(&controller, "fd00:1::4/128").await, six);
        assert_eq!(controller.apply(&network).await.made, [] as [&str; 0]);
        let mut again = Controller::start(&path);
        assert_eq!(again.apply(&network).await.made, [] as [&str; 0]);
        assert_eq!(again.journal.changes().len(), 4);

        // The kernel takes IPv6 from a device that goes down, and IPv4 routes: both come back with it.
        ip_in(&name, &["link", "set", "g0", "down"]);
        assert_eq!(again.apply(&network).await.waiting, ["g0"]);
        ip_in(&name, &["link", "set", "g0", "up"]);
        let made = again.apply(&network).await.made;
        assert!(made.contains(&"address fd00:1::1/128 on g0".to_owned()), "{made:?}");
        assert_eq!(route(&again, "fd00:1::4/128").await, six);
        assert_eq!(again.journal.changes().len(), 4);
        assert_eq!(sysctls(), before, "forwarding, accept_ra and autoconf are not ours to set");

        let report = again.journal.undo_all(&again.host).await.unwrap();
        assert_eq!((report.restored.len(), report.is_clean()), (4, true), "{report}");
        assert_eq!(again.addresses().await, ["up0 192.0.2.2/24"]);
        assert_eq!(route(&again, "fd00:1::4/128").await, None);
        assert!(!path.join("journal.json").exists());
    });
}

#[test]
fn a_gateway_of_ipv6_is_not_tentative_and_the_host_speaks_to_its_guest_from_it() {
    if !needs_root() {
        return;
    }
    let lab = lab();
    let guest = crate::hosts::testing::Lab::new();
    lab.ip(&["link", "set", "g1", "netns", guest.name()]);
    guest.ip(&["link", "set", "g1", "up"]);
    guest.ip(&["addr", "add", "fd00:1::4/64", "dev", "g1", "nodad"]);
    let directory = Scratch::new();
    let path = directory.0.clone();
    let name = lab.name().to_string();
    lab.run(move || async move {
        let mut controller = Controller::start(&path);
        controller.apply(&dual(&[("g0", "10.0.0.4", "fd00:1::4")])).await;
        let run = |line: &str| {
            let words = line.split_whitespace();
            let output = std::process::Command::new("ip").args(["netns", "exec", &name]).args(words).output();
            let output = output.unwrap();
            (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let (_, shown) = run("ip -6 addr show dev g0");
        assert!(
            shown.contains("fd00:1::1/128") && !shown.contains("fd00:1::1/128 scope global tentative"),
            "{shown}"
        );
        assert!(
            run("ping -6 -c 1 -W 3 fd00:1::4").0,
            "no datapath is here: the kernel's own route and neighbour"
        );
        let (_, route) = run("ip -6 route get fd00:1::4");
        assert!(route.contains("src fd00:1::1"), "{route}");
    });
}

#[test]
fn the_gateway_of_ipv6_stands_on_the_bridge_with_its_prefix() {
    if !needs_root() {
        return;
    }
    let lab = lab();
    lab.ip(&["link", "add", "br0", "type", "bridge"]);
    lab.ip(&["link", "set", "br0", "up"]);
    for tap in ["tap0", "tap1"] {
        lab.ip(&["tuntap", "add", tap, "mode", "tap"]);
        lab.ip(&["link", "set", tap, "master", "br0"]);
    }
    let directory = Scratch::new();
    let path = directory.0.clone();
    lab.run(move || async move {
        let network = dual(&[("tap0", "10.0.0.4", "fd00:1::4"), ("tap1", "10.0.0.5", "fd00:1::5")]);
        let mut controller = Controller::start(&path);
        let made = controller.apply(&network).await.made;
        assert_eq!(made, ["address 10.0.0.1/24 on br0", "address fd00:1::1/64 on br0"]);
        assert_eq!(route(&controller, "fd00:1::/64").await.unwrap().0, "br0");
        assert!(controller.journal.undo_all(&controller.host).await.unwrap().is_clean());
        assert_eq!(controller.addresses().await, ["up0 192.0.2.2/24"]);
    });
}

#[test]
fn a_device_with_ipv6_turned_off_costs_a_warning_and_nothing_of_ipv4() {
    if !needs_root() {
        return;
    }
    let lab = lab();
    let directory = Scratch::new();
    let path = directory.0.clone();
    lab.run(move || async move {
        let off = "/proc/sys/net/ipv6/conf/g0/disable_ipv6";
        sysctl::write(off, "1").unwrap();
        let network = dual(&[("g0", "10.0.0.4", "fd00:1::4")]);
        let mut controller = Controller::start(&path);
        let prepared = controller.apply(&network).await;
        assert_eq!(prepared.made.len(), 2, "{prepared:?}");
        assert_eq!(prepared.warnings.len(), 1, "{prepared:?}");
        assert!(prepared.warnings[0].contains("net.ipv6.conf.g0.disable_ipv6 is 1"), "{prepared:?}");
        assert_eq!(sysctl::read(off).unwrap(), "1", "not ours to turn on");

        sysctl::write(off, "0").unwrap();
        let prepared = controller.apply(&network).await;
        assert_eq!((prepared.made.len(), prepared.warnings.len()), (2, 0), "{prepared:?}");
        // Turned off again, the kernel has taken everything of IPv6 away.
        sysctl::write(off, "1").unwrap();
        let report = controller.journal.undo_all(&controller.host).await.unwrap();
        assert_eq!((report.restored.len(), report.gone.len(), report.is_clean()), (2, 2, true), "{report}");
    });
}

#[test]
fn what_the_host_has_of_ipv6_is_left_and_a_guest_that_moves_takes_its_route_along() {
    if !needs_root() {
        return;
    }
    let lab = lab();
    lab.ip(&["link", "add", "h0", "type", "veth", "peer", "name", "h1"]);
    lab.ip(&["link", "set", "h0", "up"]);
    lab.ip(&["addr", "add", "fd00:1::1/64", "dev", "g0", "nodad"]);
    let directory = Scratch::new();
    let path = directory.0.clone();
    lab.run(move || async move {
        let mut network = dual(&[("g0", "10.0.0.4", "fd00:1::4")]);
        let mut controller = Controller::start(&path);
        let made = controller.apply(&network).await.made;
        assert!(
            made.iter().all(|change| change.contains("10.0.0.")),
            "the prefix route covers the guest: {made:?}"
        );

        network.interfaces[0].device = "h0".into();
        controller.apply(&network).await;
        controller.tidy(&network).await;
        assert_eq!(route(&controller, "fd00:1::4/128").await.unwrap().0, "h0");
        network.interfaces[0].device = "g0".into();
        controller.apply(&network).await;
        controller.tidy(&network).await;
        let at = route(&controller, "fd00:1::4/128").await;
        assert!(at.is_none_or(|(device, _)| device == "g0"));
        assert!(controller.journal.undo_all(&controller.host).await.unwrap().is_clean());
        assert_eq!(controller.addresses().await, ["g0 fd00:1::1/64", "up0 192.0.2.2/24"]);
    });
}

#[test]
fn a_policy_without_guests_of_ipv6_touches_nothing_of_ipv6() {
    let mut network = dual(&[("g0", "10.0.0.4", "fd00:1::4")]);
    network.interfaces[0].addresses.pop();
    let link = |name: &str, ifindex| crate::hosts::Link {
        name: name.into(),
        ifindex,
        mac: [2; 6],
        gateway_mac: [2; 6],
        mtu: 1500,
        kind: crate::hosts::LinkKind::Tap,
        up: true,
        carrier: true,
        master: None,
        layer: 1,
        peer: None,
        driver: None,
        xdp: None,
    };
    let links = Links::from_links([link("g0", 1), link("up0", 2)]);
    let keys = wishes(&network, &links, &[], &Ranges::default()).keys();
    assert_eq!(keys.len(), 2);
    assert!(keys.iter().all(|key| !key.contains("fd00")), "{keys:?}");
}

#[test]
fn an_announced_address_of_ipv6_stands_on_the_uplink_at_once_and_is_no_source_of_the_hosts_own() {
    if !needs_root() {
        return;
    }
    let lab = lab();
    lab.ip(&["addr", "add", "2001:db8:1::2/64", "dev", "up0", "nodad"]);
    let directory = Scratch::new();
    let path = directory.0.clone();
    let name = lab.name().to_string();
    lab.run(move || async move {
        let mut network = policy(&[], &[]);
        network.uplinks[0].reserve_host_ports = false;
        for (name, address, announce) in [
            ("pip6", "2001:db8:1::10", Announce::Address),
            ("proxied", "2001:db8:1::11", Announce::Proxy),
            ("routed", "2001:db8:1::12", Announce::Routed),
        ] {
            let address = address.parse().unwrap();
            network.public_addresses.push(PublicAddress { name: name.into(), address, announce });
        }
        let mut controller = Controller::start(&path);
        let prepared = controller.apply(&network).await;
        assert_eq!(prepared.made, ["address 2001:db8:1::10/128 on up0"], "{prepared:?}");
        let shown = std::process::Command::new("ip")
            .args(["-n", &name, "-6", "addr", "show", "dev", "up0", "to", "2001:db8:1::10"])
            .output()
            .unwrap();
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        assert!(shown.contains("deprecated") && !shown.contains("tentative"), "{shown}");
        let chosen = std::process::Command::new("ip")
            .args(["-n", &name, "-6", "route", "get", "2001:db8:1::13"])
            .output()
            .unwrap();
        let chosen = String::from_utf8_lossy(&chosen.stdout).into_owned();
        assert!(
            chosen.contains("src 2001:db8:1::2"),
            "nearer by its last bits, and still not chosen: {chosen}"
        );
        assert_eq!(controller.apply(&network).await.made, [] as [&str; 0]);

        network.public_addresses.clear();
        controller.apply(&network).await;
        controller.tidy(&network).await;
        assert_eq!(controller.addresses().await, ["up0 192.0.2.2/24", "up0 2001:db8:1::2/64"]);
    });
}
