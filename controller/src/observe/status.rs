//! Not answered yet.
use serde::{Deserialize, Serialize};
use crate::api::Failure;
use crate::daemon::Shared;
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {}
impl Status { pub fn text(&self) -> String { String::new() } }
pub fn status(_: &Shared) -> Result<Status, Failure> { Ok(Status {}) }
