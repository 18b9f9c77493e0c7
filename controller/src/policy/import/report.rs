//! What could not be carried over, what was made up, and what was left aside with its reason.

use std::sync::Arc;

use serde::Serialize;

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Level {
    /// Made up, renamed or written differently; nothing of the input is missing.
    Note,
    /// Not carried over. What the policy allows is not more than it was.
    Warning,
    /// Not carried over, and the policy may allow what Azure did not.
    Error,
}

impl Level {
    pub fn word(self) -> &'static str {
        match self {
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// Where something stands in the input: a file, and the JSON path in it. Objects that stand one after another in a file
/// are counted as if in a list (`jq --slurp`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub file: Arc<str>,
    pub path: String,
}

impl Place {
    /// Something that the input does not have.
    pub fn nowhere() -> Self {
        Self { file: "".into(), path: String::new() }
    }

    /// Which place this is, over all files.
    pub fn id(&self) -> String {
        format!("{}\0{}", self.file, self.path)
    }

    pub fn key(&self, key: &str) -> Self {
        let plain = key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
            && !key.starts_with(|c: char| c.is_ascii_digit())
            && !key.is_empty();
        let path = match plain {
            true => format!("{}.{key}", self.path),
            false => format!("{}['{}']", self.path, key.replace('\\', "\\\\").replace('\'', "\\'")),
        };
        Self { file: Arc::clone(&self.file), path }
    }

    pub fn index(&self, index: usize) -> Self {
        Self { file: Arc::clone(&self.file), path: format!("{}[{index}]", self.path) }
    }
}

/// One thing to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Item {
    pub level: Level,
    pub file: String,
    /// JSON path in the file.
    pub path: String,
    /// `networkSecurityGroups/nsg1/securityRules/ssh`.
    pub resource: String,
    /// The property it is about; empty if the whole resource.
    pub property: String,
    pub why: String,
    pub what_to_do: String,
}

/// A property that needs no carrying over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Ignored {
    pub file: String,
    pub path: String,
    pub why: &'static str,
}

/// All of it, in the order it was found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub items: Vec<Item>,
    pub ignored: Vec<Ignored>,
}

impl Report {
    pub fn add(
        &mut self,
        level: Level,
        place: &Place,
        resource: &str,
        property: &str,
        why: impl Into<String>,
        what_to_do: impl Into<String>,
    ) {
        let item = Item {
            level,
            file: place.file.to_string(),
            path: place.path.clone(),
            resource: resource.to_owned(),
            property: property.to_owned(),
            why: why.into(),
            what_to_do: what_to_do.into(),
        };
        self.items.push(item);
    }

    pub fn ignore(&mut self, place: &Place, why: &'static str) {
        self.ignored.push(Ignored { file: place.file.to_string(), path: place.path.clone(), why });
    }

    /// How many findings of a level.
    pub fn count(&self, level: Level) -> usize {
        self.items.iter().filter(|item| item.level == level).count()
    }

    /// The gravest level; a note if there is nothing.
    pub fn worst(&self) -> Level {
        self.items.iter().map(|item| item.level).max().unwrap_or(Level::Note)
    }
}
