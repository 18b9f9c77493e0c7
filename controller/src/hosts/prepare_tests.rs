//! `prepare` and `unprepare_stale` in namespaces of their own.

use std::net::Ipv4Addr;
use std::path::Path;

use super::*;
use crate::hosts::testing::{Lab, Scratch, ip_in, needs_root};
use crate::hosts::{AttachedHook, DeviceRole, choose_hooks, wishes};
use crate::policy::network::{
    Announce, Hook, Interface, IpConfiguration, Network, PublicAddress, Subnet, Uplink, VirtualNetwork,
};

/// One subnet 10.0.0.0/24 with gateway 10.0.0.1, one uplink `up0`, guests given as (device, address).
pub(super) fn policy(guests: &[(&str, &str)], public: &[&str]) -> Network {
    Network {
        virtual_networks: vec![VirtualNetwork {
            name: "net".into(),
            id: 1,
            address_space: vec!["10.0.0.0/8".parse().unwrap()],
            peers: Vec::new(),
        }],
        subnets: vec![Subnet {
            default_outbound: false,
            name: "subnet".into(),
            network: 0,
            prefixes: vec!["10.0.0.0/24".parse().unwrap()],
            gateways: vec!["10.0.0.1".parse().unwrap()],
            group: None,
            route_table: None,
        }],
        interfaces: guests
            .iter()
            .map(|(device, address)| Interface {
                name: format!("vm-{device}"),
                device: device.to_string(),
                mac: None,
                hook: Hook::Auto,
                group: None,
                addresses: vec![IpConfiguration {
                    name: "ip".into(),
                    address: address.parse().unwrap(),
                    subnet: 0,
                    public_address: None,
                    application_groups: Vec::new(),
                }],
            })
            .collect(),
        public_addresses: public
            .iter()
            .map(|address| PublicAddress {
                name: address.to_string(),
                address: address.parse().unwrap(),
                announce: Announce::Address,
            })
            .collect(),
        uplinks: vec![Uplink { device: "up0".into(), hook: Hook::Auto, reserve_host_ports: true }],
        ..Network::default()
    }
}

pub(super) fn lab() -> Lab {
    let lab = Lab::new();
    lab.ip(&["link", "add", "up0", "type", "veth", "peer", "name", "up1"]);
    lab.ip(&["link", "set", "up0", "up"]);
    lab.ip(&["addr", "add", "192.0.2.2/24", "dev", "up0"]);
    lab.ip(&["link", "add", "g0", "type", "veth", "peer", "name", "g1"]);
    lab.ip(&["link", "set", "g0", "up"]);
    lab
}

/// A controller's view: one host, one journal.
pub(super) struct Controller {
    pub(super) host: Host,
    pub(super) journal: Journal,
    reserved: Ranges,
}

impl Controller {
    pub(super) fn start(path: &Path) -> Self {
        let reserved = Ranges::new([(1024, 1087), (8080, 8080)]);
        Self { host: Host::open().unwrap(), journal: Journal::open(path).unwrap(), reserved }
    }

    pub(super) async fn apply(&mut self, network: &Network) -> Prepared {
        let links = self.host.links().await.unwrap();
        let choices = choose_hooks(network, &links).unwrap();
        prepare(&self.host, network, &links, &choices, &self.reserved, &mut self.journal).await.unwrap()
    }

    pub(super) async fn tidy(&mut self, network: &Network) -> UndoReport {
        let links = self.host.links().await.unwrap();
        let choices = choose_hooks(network, &links).unwrap();
        unprepare_stale(&self.host, network, &links, &choices, &self.reserved, &mut self.journal)
            .await
            .unwrap()
    }

    /// "device address/len", loopback and link-local ones left out, sorted.
    pub(super) async fn addresses(&self) -> Vec<String> {
        let links = self.host.links().await.unwrap();
        let name = |ifindex| links.by_index(ifindex).unwrap().name.clone();
        let all = self.host.addresses().await.unwrap();
        let mut all: Vec<String> =
            all.iter().map(|known| format!("{} {}", name(known.ifindex), known.address)).collect();
        all.retain(|address| !address.starts_with("lo ") && !address.contains(" fe80:"));
        all.sort();
        all
    }
}

#[test]
fn addresses_routes_and_ports_are_added_once_and_removed_again() {
    if !needs_root() {
        return;
    }
    let lab = lab();
    let directory = Scratch::new();
    let path = directory.0.clone();
    lab.run(move || async move {
        sysctl::write(RESERVED_PORTS, "8080-8082").unwrap();
        let network = policy(&[("g0", "10.0.0.4")], &["198.51.100.7", "192.0.2.2"]);
        let mut controller = Controller::start(&path);
        let prepared = controller.apply(&network).await;
        // 192.0.2.2 is the host's already, as 192.0.2.2/24.
        assert_eq!(prepared.made.len(), 4, "{prepared:?}");
        assert_eq!(prepared.warnings, [] as [&str; 0]);
        let added = ["g0 10.0.0.1/32", "up0 192.0.2.2/24", "up0 198.51.100.7/32"];
        assert_eq!(controller.addresses().await, added);
        assert_eq!(sysctl::read(RESERVED_PORTS).unwrap(), "1024-1087,8080-8082");
        let links = controller.host.links().await.unwrap();
        let g0 = links.get("g0").unwrap().ifindex;
        let routes = controller.host.routes(&[g0]).await.unwrap();
        let route = routes.lookup("10.0.0.4".parse().unwrap()).unwrap().unwrap();
        assert_eq!((route.gateway, route.source), (None, Some("10.0.0.1".parse().unwrap())));

        // Again, also by a controller started anew after a kill: nothing more to do, nothing journaled twice.
        assert_eq!(controller.apply(&network).await.made, [] as [&str; 0]);
        let mut second = Controller::start(&path);
        assert_eq!(second.apply(&network).await.made, [] as [&str; 0]);
        assert_eq!(second.journal.changes().len(), 4);

        let report = second.journal.undo_all(&second.host).await.unwrap();
        assert_eq!((report.restored.len(), report.is_clean()), (4, true), "{report}");
        assert_eq!(second.addresses().await, ["up0 192.0.2.2/24"]);
        assert_eq!(sysctl::read(RESERVED_PORTS).unwrap(), "8080-8082");
        assert!(!path.join("journal.json").exists());
    });
}

#[test]
fn what_the_next_policy_does_not_want_is_undone_by_itself() {
    if !needs_root() {
        return;
    }
    let lab = lab();
    lab.ip(&["link", "add", "h0", "type", "veth", "peer", "name", "h1"]);
    lab.ip(&["link", "set", "h0", "up"]);
    let directory = Scratch::new();
    let path = directory.0.clone();
    let name = lab.name().to_string();
    lab.run(move || async move {
        let first = policy(&[("g0", "10.0.0.4"), ("h0", "10.0.0.5")], &["198.51.100.7", "198.51.100.8"]);
        let mut controller = Controller::start(&path);
        controller.apply(&first).await;
        assert_eq!(controller.journal.changes().len(), 7);

        let second = policy(&[("g0", "10.0.0.4")], &["198.51.100.8", "198.51.100.9"]);
        controller.reserved = Ranges::new([(1024, 1055)]);
        assert_eq!(controller.apply(&second).await.made.len(), 2);
        let report = controller.tidy(&second).await;
        assert_eq!(report.restored.len(), 3, "{report}");
        let left = ["g0 10.0.0.1/32", "up0 192.0.2.2/24", "up0 198.51.100.8/32", "up0 198.51.100.9/32"];
        assert_eq!(controller.addresses().await, left);
        // The smaller wish gave ports back, and the original value is still the one to restore.
        assert_eq!(sysctl::read(RESERVED_PORTS).unwrap(), "1024-1055");
        assert!(controller.tidy(&second).await.is_empty());

        // A guest's device that goes takes its changes along.
        ip_in(&name, &["link", "del", "g0"]);
        assert_eq!(controller.apply(&second).await.waiting, ["g0"]);
        assert_eq!(controller.tidy(&second).await.gone.len(), 2);

        let report = controller.journal.undo_all(&controller.host).await.unwrap();
        assert!(report.is_clean(), "{report}");
        assert_eq!(controller.addresses().await, ["up0 192.0.2.2/24"]);
        assert_eq!(sysctl::read(RESERVED_PORTS).unwrap(), "");
    });
}

#[test]
fn bridge_ports_put_the_gateway_on_the_bridge_with_its_prefix_unless_it_is_there() {
    if !needs_root() {
        return;
    }
    let lab = lab();
    lab.ip(&["link", "add", "br0", "type", "bridge"]);
    lab.ip(&["link", "set", "br0", "up"]);
    lab.ip(&["tuntap", "add", "tap0", "mode", "tap"]);
    lab.ip(&["tuntap", "add", "tap1", "mode", "tap"]);
    lab.ip(&["link", "set", "tap0", "master", "br0"]);
    lab.ip(&["link", "set", "tap1", "master", "br0"]);
    let directory = Scratch::new();
    let path = directory.0.clone();
    let name = lab.name().to_string();
    lab.run(move || async move {
        let mut network = policy(&[("tap0", "10.0.0.4"), ("tap1", "10.0.0.5")], &[]);
        network.uplinks[0].reserve_host_ports = false;
        let mut controller = Controller::start(&path);
        assert_eq!(controller.apply(&network).await.made, ["address 10.0.0.1/24 on br0"]);
        controller.journal.undo_all(&controller.host).await.unwrap();
        assert_eq!(controller.addresses().await, ["up0 192.0.2.2/24"]);

        // The host's own idea of the subnet counts as present, and is never taken away.
        ip_in(&name, &["addr", "add", "10.0.0.1/16", "dev", "br0"]);
        assert_eq!(controller.apply(&network).await, Prepared::default());
        assert!(controller.journal.undo_all(&controller.host).await.unwrap().is_empty());
        assert_eq!(controller.addresses().await, ["br0 10.0.0.1/16", "up0 192.0.2.2/24"]);
    });
}

#[test]
fn routes_the_host_has_to_a_guest_already_are_left_untouched() {
    if !needs_root() {
        return;
    }
    let lab = lab();
    lab.ip(&["addr", "add", "10.0.0.1/24", "dev", "g0"]);
    lab.ip(&["route", "add", "10.0.0.9/32", "dev", "up0"]);
    let directory = Scratch::new();
    let path = directory.0.clone();
    lab.run(move || async move {
        let mut network = policy(&[("g0", "10.0.0.4"), ("g0", "10.0.0.9")], &[]);
        network.uplinks[0].reserve_host_ports = false;
        let mut controller = Controller::start(&path);
        let prepared = controller.apply(&network).await;
        assert_eq!(prepared.made, [] as [&str; 0]);
        assert_eq!(prepared.warnings.len(), 1, "{prepared:?}");
        assert!(prepared.warnings[0].contains("10.0.0.9/32 by up0"), "{prepared:?}");
        assert!(controller.journal.changes().is_empty());
    });
}

#[test]
fn a_guest_route_waits_for_its_device_and_changes_its_source_with_the_gateway() {
    if !needs_root() {
        return;
    }
    let lab = lab();
    lab.ip(&["link", "set", "g0", "down"]);
    let directory = Scratch::new();
    let path = directory.0.clone();
    let name = lab.name().to_string();
    lab.run(move || async move {
        let mut network = policy(&[("g0", "10.0.0.4")], &[]);
        network.uplinks[0].reserve_host_ports = false;
        let mut controller = Controller::start(&path);
        let prepared = controller.apply(&network).await;
        assert_eq!((prepared.made.len(), prepared.waiting), (1, vec!["g0".to_string()]));
        ip_in(&name, &["link", "set", "g0", "up"]);
        assert_eq!(controller.apply(&network).await.made, ["route to 10.0.0.4/32 by g0"]);

        network.subnets[0].gateways = vec!["10.0.0.254".parse().unwrap()];
        assert_eq!(controller.apply(&network).await.made.len(), 2);
        controller.tidy(&network).await;
        assert_eq!(controller.addresses().await, ["g0 10.0.0.254/32", "up0 192.0.2.2/24"]);
        let g0 = controller.host.links().await.unwrap().get("g0").unwrap().ifindex;
        let routes = controller.host.routes(&[g0]).await.unwrap();
        let route = routes.lookup("10.0.0.4".parse().unwrap()).unwrap().unwrap();
        assert_eq!(route.source, Some("10.0.0.254".parse().unwrap()));
    });
}

#[test]
fn a_guest_and_an_announced_address_that_move_to_other_devices_are_never_lost_between_policies() {
    if !needs_root() {
        return;
    }
    let lab = lab();
    lab.ip(&["link", "add", "h0", "type", "veth", "peer", "name", "h1"]);
    lab.ip(&["link", "set", "h0", "up"]);
    let directory = Scratch::new();
    let path = directory.0.clone();
    lab.run(move || async move {
        let mut network = policy(&[("g0", "10.0.0.4")], &["198.51.100.7"]);
        let mut controller = Controller::start(&path);
        controller.apply(&network).await;
        network.interfaces[0].device = "h0".into();
        network.uplinks[0].device = "up1".into();
        controller.apply(&network).await;
        controller.tidy(&network).await;
        assert_eq!(
            controller.addresses().await,
            ["h0 10.0.0.1/32", "up0 192.0.2.2/24", "up1 198.51.100.7/32"]
        );
        let h0 = controller.host.links().await.unwrap().get("h0").unwrap().ifindex;
        let routes = controller.host.routes(&[h0]).await.unwrap();
        assert_eq!(routes.lookup("10.0.0.4".parse().unwrap()).unwrap().unwrap().ifindex, h0);
        assert!(controller.journal.undo_all(&controller.host).await.unwrap().is_clean());
        assert_eq!(controller.addresses().await, ["up0 192.0.2.2/24"]);
    });
}

#[test]
fn the_work_on_the_host_can_be_spawned_on_any_runtime() {
    fn sendable<T: Send>(_: T) {}
    fn check(host: &Host, network: &Network, links: &Links, journal: &mut Journal) {
        let none = Ranges::default();
        sendable(prepare(host, network, links, &[], &none, journal));
        sendable(unprepare_stale(host, network, links, &[], &none, journal));
        sendable(journal.undo_all(host));
        sendable(host.links());
        sendable(host.routes(&[]));
        sendable(host.probe(1, Ipv4Addr::LOCALHOST.into()));
    }
    let _ = check;
}

#[test]
fn offloads_are_turned_off_only_on_devices_that_get_xdp_and_turned_on_again() {
    if !needs_root() {
        return;
    }
    let lab = lab();
    let directory = Scratch::new();
    let path = directory.0.clone();
    lab.run(move || async move {
        let mut network = policy(&[("g0", "10.0.0.4")], &[]);
        network.uplinks[0].reserve_host_ports = false;
        network.interfaces[0].hook = Hook::Xdp;
        let mut controller = Controller::start(&path);
        let made = controller.apply(&network).await.made;
        assert!(made.contains(&"offload rx-vlan-hw-parse of g0".to_string()), "{made:?}");
        let is_on = |device: &str| ethtool::feature(device, "rx-vlan-hw-parse").unwrap().unwrap().on;
        assert!(!is_on("g0") && is_on("up0"));
        // Off is not "not wanted any more": tidying the same policy leaves it off.
        assert!(controller.tidy(&network).await.is_empty());
        network.interfaces[0].hook = Hook::Tc;
        assert_eq!(controller.tidy(&network).await.restored, ["offload rx-vlan-hw-parse of g0"]);
        assert!(is_on("g0"));
    });
}

#[test]
fn two_networks_with_the_same_address_get_one_host_route_and_a_warning() {
    use crate::hosts::{Link, LinkKind};
    let link = |name: &str, ifindex| Link {
        name: name.into(),
        ifindex,
        mac: [2; 6],
        gateway_mac: [2; 6],
        mtu: 1500,
        kind: LinkKind::Tap,
        up: true,
        carrier: true,
        master: None,
        layer: 1,
        peer: None,
        driver: None,
        xdp: None,
    };
    let links = Links::from_links([link("tap0", 1), link("tap1", 2), link("up0", 3)]);
    let network = policy(&[("tap0", "10.0.0.4"), ("tap1", "10.0.0.4")], &[]);
    let choice = DeviceChoice {
        name: "up0".into(),
        ifindex: 3,
        role: DeviceRole::Uplink,
        hook: AttachedHook::Tc,
        why: String::new(),
        xdp_redirect_ok: false,
        warning: None,
    };
    let wishes = wishes(&network, &links, &[choice], &Ranges::default());
    assert_eq!(wishes.warnings.len(), 1);
    // Two gateway addresses, one route; no ports were asked for.
    assert_eq!(wishes.keys().len(), 3);
}
