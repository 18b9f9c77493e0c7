//! Topologies: that they are as they say, and that traffic gets through when something forwards it.

use super::super::{
    Links, Namespace, TcpEcho, Topology, TopologySpec, UdpEcho, eventually, ping, tcp_exchange, udp_exchange,
};
use super::{NEVER, SOON, needs_root, routed};

#[test]
fn through_a_clean_veth_a_guest_reaches_the_internet_if_the_gateway_forwards() {
    needs_root!();
    reaches_the_internet(&TopologySpec::clean_veth(2));
}

#[test]
fn through_a_container_veth_a_guest_reaches_the_internet_if_the_gateway_forwards() {
    needs_root!();
    reaches_the_internet(&TopologySpec::container_veth(2));
}

fn reaches_the_internet(spec: &TopologySpec) {
    let topology = routed(spec);
    let guest = topology.guest("vm1");
    let extra = (spec.internet_extra[0], 53).into();
    let tcp = TcpEcho::start(topology.internet(), topology.internet_socket(80)).expect("a server");
    let udp = UdpEcho::start(topology.internet(), extra).expect("a server");
    let outcome = tcp_exchange(guest, Some(1111), tcp.address(), b"over there", SOON).expect("an echo");
    assert_eq!(tcp.peers(), [outcome.local]);
    assert_eq!(outcome.local, "10.0.0.4:1111".parse().expect("an address"));
    udp_exchange(guest, None, udp.address(), b"over there", SOON).expect("an echo");
    assert_eq!(ping(guest, spec.internet_extra[1].into(), 3, SOON).expect("ping runs").received, 3);
}

#[test]
fn nobody_answers_a_guest_where_nothing_is_under_test() {
    needs_root!();
    let topology = Topology::build(&TopologySpec::container_veth(1)).expect("the topology");
    let gateway = topology.guest_spec("vm1").gateway;
    let outcome = ping(topology.guest("vm1"), gateway.into(), 1, NEVER).expect("ping runs");
    assert_eq!(outcome.received, 0);
    assert_eq!(topology.gateway().sysctl("net.ipv4.ip_forward").expect("a value"), "0");
}

#[test]
fn the_gateway_and_the_internet_reach_each_other() {
    needs_root!();
    for spec in [TopologySpec::clean_veth(0), TopologySpec::container_veth(0).one_public_address()] {
        let topology = Topology::build(&spec).expect("the topology");
        let far = ping(topology.gateway(), spec.internet_extra[0].into(), 2, SOON).expect("ping runs");
        assert_eq!(far.received, 2);
        let back = ping(topology.internet(), spec.uplink_address.addr().into(), 2, SOON).expect("ping runs");
        assert_eq!(back.received, 2);
        assert_eq!(topology.gateway().address("pc-up").expect("an address"), spec.uplink_address.addr());
    }
    assert_eq!(
        TopologySpec::clean_veth(0).one_public_address().uplink_address.to_string(),
        "203.0.113.10/24"
    );
}

#[test]
fn offloads_are_off_on_clean_links_and_untouched_on_container_links() {
    needs_root!();
    let has = |namespace: &Namespace, device: &str, feature: &str| {
        let listing = namespace.run(&["ethtool", "-k", device]).expect("ethtool runs");
        let line = listing.lines().find(|line| line.trim_start().starts_with(feature)).expect("the feature");
        line.contains(": on")
    };
    for (spec, offloads) in [(TopologySpec::clean_veth(1), false), (TopologySpec::container_veth(1), true)] {
        let topology = Topology::build(&spec).expect("the topology");
        let ends = [
            (topology.guest("vm1"), "eth0"),
            (topology.internet(), "eth0"),
            (topology.gateway(), "pc-vm1"),
            (topology.gateway(), "pc-up"),
        ];
        for (namespace, device) in ends {
            for feature in ["tx-checksumming:", "tcp-segmentation-offload:", "generic-segmentation-offload:"]
            {
                assert_eq!(has(namespace, device, feature), offloads, "{:?} {device} {feature}", spec.links);
            }
        }
        let napi = spec.links == Links::CleanVeth;
        assert_eq!(has(topology.guest("vm1"), "eth0", "generic-receive-offload:"), napi);
        assert_eq!(has(topology.internet(), "eth0", "generic-receive-offload:"), napi);
    }
}

#[test]
fn hardware_addresses_are_those_of_the_specification() {
    needs_root!();
    let topology = Topology::build(&TopologySpec::clean_veth(1)).expect("the topology");
    let spec = topology.guest_spec("vm1");
    assert_eq!(topology.guest("vm1").mac("eth0").expect("an address"), spec.mac);
    assert_eq!(topology.gateway().mac(&spec.device).expect("an address"), spec.gateway_mac);
    assert_eq!(topology.gateway().mac("pc-up").expect("an address"), TopologySpec::UPLINK_MAC);
    assert_eq!(topology.internet().mac("eth0").expect("an address"), TopologySpec::INTERNET_MAC);
}

#[test]
fn a_topology_that_cannot_be_built_leaves_nothing() {
    needs_root!();
    let mut twice = TopologySpec::clean_veth(2);
    twice.guests[1].device = twice.guests[0].device.clone();
    assert!(Topology::build(&twice).err().expect("refused").to_string().contains("twice"));

    let mut broken = TopologySpec::clean_veth(2);
    // A multicast hardware address, which the kernel refuses after much has been built.
    broken.guests[1].mac = [0xff; 6];
    broken.guests[1].name = "refused".to_owned();
    assert!(Topology::build(&broken).is_err());
    let ours =
        |name: &str| name.starts_with(&format!("pc-{}-", std::process::id())) && name.contains("refused");
    let left = || {
        let listing = std::fs::read_dir("/run/netns").expect("namespaces are listed");
        listing.flatten().any(|entry| ours(&entry.file_name().to_string_lossy()))
    };
    assert!(!left());
}

#[test]
fn a_dropped_topology_takes_everything_with_it() {
    needs_root!();
    let topology = Topology::build(&TopologySpec::bridged_taps(2)).expect("the topology");
    let paths = [topology.gateway().path().to_owned(), topology.internet().path().to_owned()];
    assert!(paths.iter().all(|path| path.exists()));
    drop(topology);
    assert!(eventually(SOON, || paths.iter().all(|path| !path.exists())));
}
