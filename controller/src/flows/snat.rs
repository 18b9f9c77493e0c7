//! Not answered yet.
use serde::{Deserialize, Serialize};
use crate::api::Failure;
use crate::daemon::Shared;
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SnatUse {}
impl SnatUse { pub fn text(&self) -> String { String::new() } }
pub fn snat(_: &Shared) -> Result<SnatUse, Failure> { Ok(SnatUse {}) }
