//! Not answered yet.
use serde::{Deserialize, Serialize};
use crate::api::Failure;
use crate::daemon::Shared;
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Drops {}
impl Drops { pub fn text(&self) -> String { String::new() } }
pub fn drops(_: &Shared, _: bool) -> Result<Drops, Failure> { Ok(Drops {}) }
