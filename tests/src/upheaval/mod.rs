//! What a gateway has to go through without losing a packet: killed, started again, upgraded, given another policy.
//!
//! [`Traffic`] runs through a gateway for as long as it lives; [`Upheaval::strike`] does one thing to the daemon at a random
//! instant.

mod connection;
mod datagrams;
mod traffic;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::edge::Edge;
use crate::random::Random;

pub use datagrams::{ANSWERED, RATE};
pub use traffic::{Tally, Traffic};

/// One thing that happens to a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upheaval {
    /// SIGKILL; a new one some time later.
    Kill,
    /// SIGTERM; a new one at once.
    Restart,
    /// SIGTERM; another build with the same layout.
    Upgrade,
    /// `apply` of another policy.
    Change,
    /// SIGKILL, and again in the middle of the next start.
    KilledStart,
}

impl Upheaval {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Kill, Self::Restart, Self::Upgrade, Self::Change, Self::KilledStart];

    /// Does it to the daemon at an instant drawn from `random`, and returns once a daemon answers again and `policy`, which
    /// should differ from the one in force for [`Upheaval::Change`], is in force if it was that.
    ///
    /// # Errors
    /// If the daemon does not come back, or refuses the policy.
    pub fn strike(self, edge: &mut Edge, policy: &str, random: &mut Random) -> anyhow::Result<()> {
        let mut at_random = |within_ms: usize| {
            // The instant itself, not a wait for something.
            std::thread::sleep(Duration::from_micros(
                1000 * random.below(within_ms) as u64 + random.below(1000) as u64,
            ));
        };
        at_random(300);
        match self {
            Self::Kill => {
                edge.daemon.kill();
                at_random(300);
                edge.restart()
            }
            Self::Restart => {
                edge.daemon.terminate()?;
                edge.restart()
            }
            Self::Upgrade => {
                let before = edge.daemon.spec().binary.clone();
                edge.daemon.spec_mut().binary = another_build(edge)?;
                edge.daemon.terminate()?;
                edge.restart().with_context(|| format!("an upgrade from {}", before.display()))
            }
            Self::Change => {
                let generation = edge.generation()?;
                let (applied, said) = edge.apply(policy)?;
                ensure!(applied, "the policy was refused: {said}");
                let now = edge.generation()?;
                ensure!(now > generation, "generation {generation} is still in force: {said}");
                Ok(())
            }
            Self::KilledStart => {
                edge.daemon.kill();
                edge.daemon.start()?;
                at_random(2500);
                edge.daemon.kill();
                edge.restart()
            }
        }
    }
}

/// The same program in a file of its own that differs: what an upgrade with the same layout is to the datapath, which looks at
/// layouts and shapes and never at builds (`controller/src/datapath/pins.rs`).
fn another_build(edge: &Edge) -> anyhow::Result<PathBuf> {
    let mut program = std::fs::read(&edge.daemon.spec().binary)?;
    // Behind all that the loader looks at.
    program.extend_from_slice(b"another build");
    let place = edge.bpffs.scratch().path().join(format!("portcullis-{}", program.len()));
    std::fs::write(&place, program)?;
    std::fs::set_permissions(&place, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    Ok(place)
}
