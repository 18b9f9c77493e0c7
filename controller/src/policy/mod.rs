//! The YAML policy: its model, its validation with line and column, its JSON Schema.

pub mod network;
