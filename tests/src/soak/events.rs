//! What happens during a soak.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::stand::{SERVER, UDP_PORT, Variant, policy};
use crate::edge::{Edge, WithHook};
use crate::lab::{eventually, ping, udp_socket};
use crate::random::Random;
use crate::upheaval::Upheaval;

/// For what comes back to come back.
const PATIENCE: Duration = Duration::from_secs(60);
/// Flows that vm3 opens and forgets.
const FORGOTTEN: u16 = 20;

/// Something that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    Kill,
    Restart,
    Upgrade,
    KilledStart,
    /// A group comes to the subnet, or goes.
    Rules,
    /// vm4 leaves the pool, or joins it.
    Member,
    /// The link of vm3 goes down and comes up.
    Link,
    /// vm3 opens flows and forgets them.
    Idle,
}

impl Event {
    /// One of them.
    pub fn random(random: &mut Random) -> Self {
        use Event::*;
        [Kill, Restart, Upgrade, KilledStart, Rules, Rules, Member, Link, Idle][random.below(9)]
    }

    /// Does it, and returns when it is over.
    ///
    /// # Errors
    /// If something does not come back.
    pub fn happen(
        self,
        edge: &mut Edge,
        hook: WithHook,
        variant: &mut Variant,
        random: &mut Random,
    ) -> anyhow::Result<()> {
        let upheaval = match self {
            Event::Kill => Upheaval::Kill,
            Event::Restart => Upheaval::Restart,
            Event::Upgrade => Upheaval::Upgrade,
            Event::KilledStart => Upheaval::KilledStart,
            Event::Rules => {
                variant.group = !variant.group;
                Upheaval::Change
            }
            Event::Member => {
                variant.without_vm4 = !variant.without_vm4;
                Upheaval::Change
            }
            Event::Link => return flap(edge),
            Event::Idle => return forget(edge),
        };
        let policy = policy(edge.topology.spec(), hook, *variant);
        upheaval.strike(edge, &policy, random)
    }
}

/// Takes the link of vm3 away, gives it back and waits for it to work.
fn flap(edge: &Edge) -> anyhow::Result<()> {
    let device = edge.topology.guest_spec("vm3").device.clone();
    for state in ["down", "up"] {
        edge.topology.gateway().ip(&format!("link set dev {device} {state}"))?;
    }
    let guest = edge.topology.guest("vm3");
    let works =
        || ping(guest, SERVER.into(), 1, Duration::from_secs(1)).is_ok_and(|outcome| outcome.received == 1);
    ensure!(
        eventually(PATIENCE, works),
        "vm3 has no way out after its link came back: {:?}",
        edge.reasons()?
    );
    Ok(())
}

/// vm3 sends from so many sockets and closes them; its flows are gone when their time is over, and others' are not.
fn forget(edge: &Edge) -> anyhow::Result<()> {
    let guest = edge.topology.guest("vm3");
    let of_vm3 = || flows_of(edge, Some("vm3"));
    for _ in 0..FORGOTTEN {
        let socket = udp_socket(guest, (Ipv4Addr::UNSPECIFIED, 0).into())?;
        socket.send_to(b"forgotten", SocketAddr::from((SERVER, UDP_PORT)))?;
    }
    ensure!(
        eventually(PATIENCE, || of_vm3().is_ok_and(|flows| flows == 0)),
        "vm3 said nothing for long and still has {} flows",
        of_vm3()?
    );
    ensure!(flows_of(edge, Some("vm1"))? >= 2, "the flows of vm1 ended with those of vm3");
    Ok(())
}

/// Live flows of a guest, or of all.
pub fn flows_of(edge: &Edge, guest: Option<&str>) -> anyhow::Result<u64> {
    let mut words = vec!["flows", "--limit", "1"];
    if let Some(guest) = guest {
        words.extend(["--guest", guest]);
    }
    edge.ask(&words)?["total"].as_u64().context("flows has a total")
}
