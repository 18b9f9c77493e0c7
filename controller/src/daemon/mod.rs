//! The daemon: puts a policy in force, keeps the datapath's picture of the world true, answers questions.
//!
//! ```text
//! run         lock, policy, runtime                            this file
//! gateway     the main task's own part, change of devices      gateway
//! start       the first policy                                 start, plan, image
//! apply       change of policy                                 apply, refusals
//! drains      ports on their way to another owner              drains
//! preview     what a policy would change                       preview, inventory
//! world       routes and neighbours into the datapath          world
//! life        what happens when: signals, files, netlink       life
//! shared      what answers are made of                         shared, answers
//! older       connections from before the first start              older
//! state       what is on disk: ids, port ownership, the lock   state
//! down        the way out                                      down
//! ```

mod answers;
mod apply;
mod down;
mod drains;
mod gateway;
mod image;
mod inventory;
mod life;
mod older;
mod plan;
mod policy_file;
mod preview;
mod refusals;
pub mod shared;
mod start;
mod state;
mod world;

use std::path::PathBuf;

pub use apply::Applied;
pub use down::{DownReport, down};
pub use older::Before;
#[cfg(test)]
pub(crate) use plan::Plan;
pub use plan::explain_compile_errors;
pub use preview::Preview;
pub use shared::{InForce, Shared};

use crate::api::{ErrorKind, Failure};
use crate::cli::{BAD_INPUT, DONE, FAILED};
use crate::observe::scrape::Place;
use crate::policy::{self, Diagnostics};
use crate::privileges;

/// What `run` is told.
#[derive(Debug, Clone)]
pub struct Options {
    pub policy: PathBuf,
    pub state_dir: PathBuf,
    pub pin_dir: PathBuf,
    pub socket: PathBuf,
    /// Where Prometheus may ask; nowhere unless asked for.
    pub metrics: Option<Place>,
    /// Flows of another layout are thrown away.
    pub reset: bool,
}

/// Where a daemon's things are.
#[derive(Debug, Clone)]
pub struct Places {
    pub state_dir: PathBuf,
    pub pin_dir: PathBuf,
    pub socket: PathBuf,
}

/// Why a policy did not come into force.
#[derive(Debug)]
pub enum Refusal {
    /// Something in the file is wrong, or does not fit this host.
    Policy(Diagnostics),
    /// This host cannot do what the policy asks for (a device that is not there).
    Host(anyhow::Error),
    /// It should have worked.
    Failed(anyhow::Error),
}

impl Refusal {
    /// One line.
    pub fn message(&self) -> String {
        match self {
            Refusal::Policy(found) => {
                let (errors, _) = found.counts();
                format!("{} has {errors} error{}", found.file(), if errors == 1 { "" } else { "s" })
            }
            Refusal::Host(error) | Refusal::Failed(error) => format!("{error:#}"),
        }
    }

    /// The lines with the carets, if it is about the file.
    pub fn rendered(&self) -> Option<String> {
        match self {
            Refusal::Policy(found) => Some(found.render(false)),
            Refusal::Host(_) | Refusal::Failed(_) => None,
        }
    }

    /// The same for the control socket.
    pub fn failure(&self) -> Failure {
        let (kind, diagnostics) = match self {
            Refusal::Policy(found) => (ErrorKind::Policy, Some(found.to_json())),
            Refusal::Host(_) => (ErrorKind::Policy, None),
            Refusal::Failed(_) => (ErrorKind::Failed, None),
        };
        Failure { kind, message: self.message(), diagnostics, rendered: self.rendered() }
    }

    fn exit_code(&self) -> u8 {
        match self {
            Refusal::Policy(_) | Refusal::Host(_) => BAD_INPUT,
            Refusal::Failed(_) => FAILED,
        }
    }
}

impl From<anyhow::Error> for Refusal {
    fn from(error: anyhow::Error) -> Self {
        Refusal::Failed(error)
    }
}

/// Runs the daemon until it is told to end; the exit code.
pub fn run(options: Options) -> u8 {
    match start(options) {
        Ok(()) => DONE,
        Err(refusal) => {
            if let Some(rendered) = refusal.rendered() {
                let _ = std::io::Write::write_all(&mut std::io::stderr().lock(), rendered.as_bytes());
            }
            log::error!("{}", refusal.message());
            refusal.exit_code()
        }
    }
}

fn start(mut options: Options) -> Result<(), Refusal> {
    use anyhow::Context as _;

    // Before anything is touched, and before root is asked for: a policy with mistakes is told as `check` tells it.
    let stamp = policy_file::Stamp::of(&options.policy);
    let loaded = policy::load(&options.policy).map_err(Refusal::Policy)?;
    if !loaded.warnings.is_empty() {
        log::warn!("{}", loaded.warnings.render(false).trim_end());
    }
    if !nix::unistd::geteuid().is_root() {
        return Err(
            anyhow::anyhow!("the gateway needs root to load programs and change devices: use sudo").into()
        );
    }
    crate::datapath::check_clock()?;
    options.policy = std::path::absolute(&options.policy).context("the policy's path")?;
    let state = state::StateDir::open(&options.state_dir)?;
    // Before there is any other thread, which would keep what it has.
    let helper = privileges::give_up()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("portcullis")
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let outcome = runtime.block_on(async {
        // In a task of its own: what blocks a thread for long may only do so there.
        tokio::spawn(life::live(options, loaded, stamp, state, helper)).await
    });
    // Questions under way have had their time.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    outcome.context("the daemon's main task")?
}
