//! Not answered yet.
use serde::{Deserialize, Serialize};
use crate::api::Failure;
use crate::daemon::Shared;
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FlowList {}
impl FlowList { pub fn text(&self) -> String { String::new() } }
pub fn list(_: &Shared, _: Option<&str>, _: Option<usize>) -> Result<FlowList, Failure> { Ok(FlowList {}) }
