//! In the end: every flow over, every port free.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;

use super::events::flows_of;
use crate::edge::Edge;
use crate::stop;

/// The idle timer of an outbound rule is four minutes at least, and a port may be held after its flows.
const PATIENCE: Duration = Duration::from_secs(8 * 60);

/// What is left in the tables.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Left {
    pub flows: u64,
    /// Ports by what they are, over all guests and protocols.
    pub used: u64,
    pub holding: u64,
    pub free: u64,
    pub allocated: u64,
    pub draining: u64,
    /// Packets dropped, by reason.
    pub drops: BTreeMap<String, u64>,
    /// How long that took to become so.
    pub after_seconds: u64,
}

impl Left {
    /// Nothing lives, and every port is free?
    pub fn is_clean(&self) -> bool {
        self.flows == 0
            && (self.used, self.holding, self.draining) == (0, 0, 0)
            && self.free == self.allocated
            && self.allocated > 0
    }

    fn look(edge: &Edge) -> anyhow::Result<Self> {
        let mut left = Left { flows: flows_of(edge, None)?, ..Self::default() };
        let snat = edge.ask(&["snat"])?;
        for total in snat["totals"].as_array().context("snat has totals")? {
            let of = |key: &str| total[key].as_u64().with_context(|| format!("no {key} in {total}"));
            left.used += of("used")?;
            left.holding += of("holding")?;
            left.free += of("free")?;
            left.allocated += of("allocated")?;
            left.draining += of("draining")?;
        }
        left.drops = edge.reasons()?;
        Ok(left)
    }
}

/// Waits until nothing is left, and says what is. `report` is called now and then.
///
/// # Errors
/// If the daemon does not answer, or somebody interrupts.
pub fn wait(edge: &Edge, mut report: impl FnMut(&Left)) -> anyhow::Result<Left> {
    let began = Instant::now();
    let mut told = Instant::now();
    loop {
        stop::check()?;
        let mut left = Left::look(edge)?;
        left.after_seconds = began.elapsed().as_secs();
        if left.is_clean() || began.elapsed() > PATIENCE {
            return Ok(left);
        }
        if told.elapsed() > Duration::from_secs(15) {
            report(&left);
            told = Instant::now();
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}
