//! What the operator is told: status, drops, rules, and the events behind them.

mod balancing;
mod drops;
pub mod events;
pub mod health;
pub mod history;
pub mod holdings;
pub mod metrics;
pub mod outbound;
mod rules;
pub mod scrape;
mod shortage;
mod status;
pub mod time;
pub mod whois;

pub use drops::{Drops, drops};
pub use rules::{RuleHits, rules};
pub use status::{Status, status};

use crate::daemon::Shared;

/// The backends of every listener and what their probes say.
fn backends(_shared: &Shared) -> Vec<metrics::BackendHealth> {
    Vec::new()
}
