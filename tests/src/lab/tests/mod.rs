//! The harness tried on itself: with the kernel's own forwarding where a test needs a gateway that works.

mod daemon;
mod namespaces;
mod topologies;
mod traffic;
mod wire;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{Namespace, Topology, TopologySpec};

/// Long enough for anything that works, however busy the machine.
const SOON: Duration = Duration::from_secs(10);
/// Long enough to believe that nothing comes.
const NEVER: Duration = Duration::from_millis(300);

/// Returns from a test that needs root where there is none.
macro_rules! needs_root {
    () => {
        if let Some(reason) = $crate::lab::why_unavailable() {
            eprintln!("skipped: {reason}");
            return;
        }
    };
}
use needs_root;

/// Two namespaces with a veth between: `near` has 192.0.2.1/24, `far` has 192.0.2.2/24, both on `link0`.
struct Pair {
    near: Namespace,
    far: Namespace,
}

impl Pair {
    const NEAR: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    const FAR: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));

    fn create() -> Self {
        let near = Namespace::create("near").expect("a namespace");
        let far = Namespace::create("far").expect("a namespace");
        near.ip(&format!("link add link0 type veth peer name link0 netns {}", far.name())).expect("a veth");
        for (namespace, address) in [(&near, Self::NEAR), (&far, Self::FAR)] {
            namespace.ip(&format!("address add {address}/24 dev link0")).expect("an address");
            namespace.ip("link set link0 up").expect("the link comes up");
        }
        Pair { near, far }
    }

    fn far_socket(port: u16) -> SocketAddr {
        SocketAddr::new(Self::FAR, port)
    }
}

/// Builds a topology whose gateway the kernel forwards for, without translation: it has 10.0.0.1 on its first
/// guest's device (or on the bridge), and the internet knows the way back.
fn routed(spec: &TopologySpec) -> Topology {
    let topology = Topology::build(spec).expect("the topology");
    let device = match spec.links {
        super::Links::BridgedTaps => &spec.bridge_device,
        _ => &spec.guests[0].device,
    };
    let gateway = topology.gateway();
    gateway.ip(&format!("address add 10.0.0.1/24 dev {device}")).expect("an address");
    gateway.set_sysctl("net.ipv4.ip_forward", "1").expect("forwarding");
    topology
        .internet()
        .ip(&format!("route add 10.0.0.0/24 via {}", spec.uplink_address.addr()))
        .expect("a route");
    topology
}

/// The command that runs one ignored test of this module alone, in a process of its own.
fn rerun(module: &str, test: &str) -> Command {
    // The path of a test leaves out the crate.
    let path = module.split_once("::").expect("a module inside a crate").1;
    let mut command = Command::new(std::env::current_exe().expect("this test's program"));
    command.args(["--exact", &format!("{path}::{test}"), "--ignored", "--nocapture", "--test-threads=1"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}
