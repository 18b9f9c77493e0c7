//! What the operator is told: status, drops, rules, and the events behind them.

mod balancing;
mod drops;
pub mod events;
mod rules;
mod status;
pub mod time;

pub use drops::{Drops, drops};
pub use rules::{RuleHits, rules};
pub use status::{Status, status};
