//! Why a policy could not be turned into tables. A policy is in force whole or not at all (design §1), so any of
//! these leaves the old one running.

use std::fmt;

/// One thing that does not fit, and where in the policy it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompileError {
    /// Azure's error code where Azure has one for it (`reference/azure.md` §2.3).
    pub code: Option<&'static str>,
    /// Path as in [`crate::policy::network::Places`], such as `loadBalancers/lb/outboundRules/out`.
    pub place: String,
    /// A sentence that says what is wrong and what there is room for.
    pub message: String,
}

impl CompileError {
    /// An error without an Azure code.
    pub fn new(place: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: None, place: place.into(), message: message.into() }
    }

    /// An error Azure has a code for.
    pub fn coded(code: &'static str, place: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: Some(code), place: place.into(), message: message.into() }
    }
}

impl fmt::Display for CompileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.place)?;
        if let Some(code) = self.code {
            write!(f, "{code}: ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for CompileError {}
