//! What an operator asks of security groups, answered from the policy alone: `effective`, `verify`, `diagnose`, `lint`,
//! `tags` (`reference/azure.md` §1.9).
//!
//! Every answer is a function of the [`Network`](crate::policy::network::Network), so a policy file can be asked offline and
//! the daemon answers about the one in force with the same code. Nothing here looks at the compiler's tables: [`trace`] is
//! the plain linear search that those are held against, and [`regions`] decides exactly what whole sets of packets meet.

pub mod addresses;
pub mod azure;
pub mod diagnose;
pub mod effective;
pub mod expand;
pub mod judge;
pub mod lint;
pub mod regions;
pub mod tags;
pub mod trace;
pub mod verify;

pub use diagnose::{Diagnosis, DiagnosticParameters, Profile, diagnose};
pub use effective::{EffectiveGroups, effective};
pub use lint::{LintReport, lint};
pub use tags::{TagDetails, TagList};
pub use verify::{FlowParameters, FlowVerdict, verify};

use serde_json::Value;

use crate::api::{Failure, Request};
use crate::policy::network::{Network, Places};

/// The answer to a question about security groups; `lint` alone looks at places and surroundings.
pub fn answer(
    network: &Network,
    places: &Places,
    around: lint::Surroundings<'_>,
    question: &Request,
) -> Result<Value, Failure> {
    let answer = match question {
        Request::Effective { nic } => serde_json::to_value(effective(network, nic)?),
        Request::Verify(ask) => serde_json::to_value(verify(network, ask)?),
        Request::Diagnose(ask) => serde_json::to_value(diagnose(network, ask)?),
        Request::Lint => serde_json::to_value(lint(network, places, around)),
        Request::Tags { show: Some(asked) } => serde_json::to_value(tags::show(network, asked)?),
        Request::Tags { show: None } => serde_json::to_value(tags::list(network)),
        _ => return Err(Failure::input("not a question about security groups")),
    };
    answer.map_err(|error| Failure::failed(&anyhow::Error::new(error).context("writing JSON")))
}
