//! Not answered yet.
use serde::{Deserialize, Serialize};
use crate::api::Failure;
use crate::daemon::Shared;
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RuleHits {}
impl RuleHits { pub fn text(&self) -> String { String::new() } }
pub fn rules(_: &Shared, _: Option<&str>) -> Result<RuleHits, Failure> { Ok(RuleHits {}) }
