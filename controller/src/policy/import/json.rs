//! JSON as a tree that keeps what serde's own forgets: the order of fields, and that a field stands there twice.
//!
//! The input is somebody else's file: its size, its nesting (serde_json stops at 128 levels) and its number of values
//! are bounded.

use std::cell::Cell;
use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// The public service tag file has 4.6 MB; a subscription's export a few hundred.
pub const MAX_BYTES: usize = 256 * 1024 * 1024;
/// Values in one input, at about 60 bytes each.
const MAX_VALUES: usize = 8_000_000;

/// A JSON value.
#[derive(Debug, Clone, PartialEq)]
pub enum Json {
    Null,
    Bool(bool),
    Number(serde_json::Number),
    Text(String),
    List(Vec<Json>),
    Map(Vec<(String, Json)>),
}

impl Json {
    /// Nothing is said by it: null, an empty text, list or mapping.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Null => true,
            Self::Text(text) => text.trim().is_empty(),
            Self::List(items) => items.is_empty(),
            Self::Map(entries) => entries.is_empty(),
            Self::Bool(_) | Self::Number(_) => false,
        }
    }

    /// The field of a mapping, without regard to case: Azure's resource manager has none either.
    pub fn get(&self, name: &str) -> Option<&Json> {
        match self {
            Self::Map(entries) => {
                entries.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
            }
            _ => None,
        }
    }

    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Text, number or boolean as text.
    pub fn scalar(&self) -> Option<String> {
        match self {
            Self::Text(text) => Some(text.trim().to_owned()),
            Self::Number(number) => Some(number.to_string()),
            Self::Bool(flag) => Some(flag.to_string()),
            _ => None,
        }
    }

    /// What this is, in the reader's words.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool(_) => "true or false",
            Self::Number(_) => "a number",
            Self::Text(text) if is_expression(text) => "a template expression",
            Self::Text(_) => "a text",
            Self::List(_) => "a list",
            Self::Map(_) => "an object",
        }
    }
}

/// Is this text an ARM template expression, `[…]`? `[[` is an escaped bracket.
pub fn is_expression(text: &str) -> bool {
    text.starts_with('[') && text.ends_with(']') && !text.starts_with("[[")
}

/// Reads one value or several, one after another (one a line, as `jq --compact-output` writes them).
///
/// # Errors
/// What is wrong and at which line and column.
pub fn parse(bytes: &[u8]) -> Result<Vec<Json>, String> {
    if bytes.len() > MAX_BYTES {
        return Err(format!("the file has more than {} MiB", MAX_BYTES >> 20));
    }
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let left = Cell::new(MAX_VALUES);
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let mut values = Vec::new();
    while reader.end().is_err() {
        values.push(Seed(&left).deserialize(&mut reader).map_err(|error| error.to_string())?);
    }
    Ok(values)
}

struct Seed<'b>(&'b Cell<usize>);

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Json;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Json, D::Error> {
        let left = self.0.get().checked_sub(1).ok_or_else(|| D::Error::custom("more values than fit"))?;
        self.0.set(left);
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Number(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
        Ok(Json::Number(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Json, E> {
        serde_json::Number::from_f64(value).map(Json::Number).ok_or_else(|| E::custom("not a finite number"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Json, E> {
        Ok(Json::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Json, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(Seed(self.0))? {
            list.push(item);
        }
        Ok(Json::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Json, A::Error> {
        let mut map: Vec<(String, Json)> = Vec::new();
        let mut seen = HashSet::new();
        while let Some(key) = fields.next_key::<String>()? {
            // One of the two would be lost, and which one depends on the reader.
            if !seen.insert(key.clone()) {
                return Err(A::Error::custom(format_args!("`{key}` is given twice in one object")));
            }
            map.push((key, fields.next_value_seed(Seed(self.0))?));
        }
        Ok(Json::Map(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_document_and_one_object_a_line_are_read_alike() {
        assert_eq!(parse(b"\xef\xbb\xbf{\"a\": [1, -2, 2.5, null, true]}").unwrap().len(), 1);
        assert_eq!(parse(b"{\"a\": 1}\n{\"a\": 2}\n\n").unwrap().len(), 2);
        assert_eq!(parse(b" \n").unwrap(), []);
    }

    #[test]
    fn what_is_cut_off_doubled_or_too_deep_is_an_error_with_its_place() {
        assert!(parse(b"{\"a\": [1,").unwrap_err().contains("line 1"));
        assert!(parse(b"{\"a\": 1, \"a\": 2}").unwrap_err().contains("`a` is given twice"));
        assert!(parse("[".repeat(100_000).as_bytes()).unwrap_err().contains("recursion limit"));
        assert!(parse(b"{\"a\": 1e999}").is_err());
        assert!(parse(b"\xff\xfe").is_err());
    }
}
