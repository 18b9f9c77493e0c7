//! Not answered yet.
use serde::{Deserialize, Serialize};
use crate::api::Failure;
use crate::daemon::Shared;
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Explanation {}
impl Explanation { pub fn text(&self) -> String { String::new() } }
pub fn explain(_: &Shared, _: &Question) -> Result<Explanation, Failure> { Ok(Explanation {}) }
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Question { pub from: String, pub to: String, pub protocol: crate::api::Protocol, pub from_port: Option<u16> }
