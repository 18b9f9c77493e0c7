//! Azure's published file of service tags, `ServiceTags_Public_….json`.
//!
//! The weekly download, its older vintages (2019 has no `regionId` and no `networkFeatures`) and what the Discovery API
//! answers (`changeNumber` is a text there, and `name`, `id` and `type` stand beside it) agree in what is read here:
//! `values[].name` and `values[].properties.addressPrefixes`. Everything else is ignored.

use std::fmt;
use std::io::Read;
use std::net::IpAddr;
use std::path::Path;

use ipnet::IpNet;
use serde::Deserialize;
use serde::de::{Deserializer, Error, SeqAccess, Visitor};

use super::fields::Complaint;
use super::network::TagDefinition;

/// The public file is 4 MB.
const MAX_BYTES: u64 = 64 * 1024 * 1024;

/// What was wrong with a prefix is shown this far.
const MAX_SHOWN: usize = 60;

/// The tags of a file.
#[derive(Debug)]
pub struct TagFile {
    pub tags: Vec<TagDefinition>,
    /// Tags of which something was not used, and what: `has 2 prefixes that …`.
    pub skipped: Vec<(String, String)>,
}

/// Reads a file; every complaint names it and says what to do.
pub fn read(path: &Path) -> Result<TagFile, Complaint> {
    let name = path.display();
    let unreadable = |error: std::io::Error| {
        let help = match error.kind() {
            std::io::ErrorKind::NotFound => {
                "the path is relative to the policy file; download `Azure IP Ranges and Service Tags` from Microsoft, or \
                 save what `az network list-service-tags` prints"
            }
            std::io::ErrorKind::PermissionDenied => "let this user read the file",
            _ => "check the path and the file",
        };
        Complaint::new(format!("cannot read the tag file {name}: {error}")).help(help)
    };
    // A pipe would be waited for without end.
    if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(Complaint::new(format!("the tag file {name} is not a regular file"))
            .help("name the JSON file itself"));
    }
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Complaint::new(format!("the tag file {name} is larger than {} MiB", MAX_BYTES >> 20))
            .help("Azure's file is about 4 MB: is this the right one?"));
    }
    parse(&bytes).map_err(|error| {
        let message = format!("the tag file {name} cannot be used: {error}");
        let help = if error.is_data() {
            "this is not Azure's format, `{\"values\": [{\"name\": ..., \"properties\": {\"addressPrefixes\": [...]}}]}`: \
             download the file again"
        } else {
            "it is not whole, or not JSON: download it again"
        };
        Complaint::new(message).help(help)
    })
}

/// Reads the text of a file. A byte order mark, which Microsoft's own downloads have had, is skipped.
fn parse(bytes: &[u8]) -> Result<TagFile, serde_json::Error> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    // serde_json itself refuses what is nested deeper than 128.
    let listing: Listing = serde_json::from_slice(bytes)?;
    let mut file = TagFile { tags: Vec::with_capacity(listing.values.len()), skipped: Vec::new() };
    for Entry { name, properties: Properties { address_prefixes: prefixes } } in listing.values {
        if !plain(&name) {
            file.skipped.push((short(&name), "is not used: that is not a name".to_owned()));
            continue;
        }
        if let Some(first) = prefixes.first_wrong {
            let many = prefixes.wrong;
            let what = if many == 1 { "a prefix" } else { "prefixes" };
            let why = format!("has {many} {what} that cannot be used, such as `{first}`");
            file.skipped.push((name.clone(), why));
        }
        file.tags.push(TagDefinition { name, prefixes: prefixes.good.into() });
    }
    Ok(file)
}

/// Azure's rule for names, which every published tag follows: what a rule can name and a terminal can show.
fn plain(name: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    (1..=80).contains(&name.len())
        && name.bytes().all(|b| word(b) || b == b'.' || b == b'-')
        && name.bytes().next().is_some_and(word)
}

/// A text of the file as a message may show it.
fn short(text: &str) -> String {
    text.chars().take(MAX_SHOWN).flat_map(char::escape_debug).collect()
}

#[derive(Deserialize)]
struct Listing {
    values: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    name: String,
    properties: Properties,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Properties {
    address_prefixes: Prefixes,
}

/// A tag's prefixes; those that are none are counted.
#[derive(Default)]
struct Prefixes {
    good: Vec<IpNet>,
    wrong: usize,
    first_wrong: Option<String>,
}

impl<'de> Deserialize<'de> for Prefixes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;

        impl<'de> Visitor<'de> for List {
            type Value = Prefixes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of address prefixes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Prefixes, A::Error> {
                let mut prefixes = Prefixes::default();
                while let Some(Written(prefix)) = access.next_element()? {
                    match prefix {
                        Ok(net) => prefixes.good.push(net),
                        Err(text) => {
                            prefixes.wrong += 1;
                            prefixes.first_wrong.get_or_insert(text);
                        }
                    }
                }
                Ok(prefixes)
            }
        }

        deserializer.deserialize_seq(List)
    }
}

/// One prefix. With bits behind its length it is not used: to widen it would be a guess about who is meant.
struct Written(Result<IpNet, String>);

impl<'de> Deserialize<'de> for Written {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;

        impl Visitor<'_> for Text {
            type Value = Written;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an address prefix")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Written, E> {
                let net = text.parse::<IpNet>().ok().filter(|net| net.addr() == net.network());
                let net = net.or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
                Ok(Written(net.ok_or_else(|| short(text))))
            }
        }

        deserializer.deserialize_str(Text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tags(text: &str) -> TagFile {
        parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn the_shapes_of_2019_of_today_and_of_the_discovery_api_are_read() {
        let old = r#"{"changeNumber": 7, "cloud": "Public", "values": [{"name": "Sql", "id": "Sql", "properties":
            {"changeNumber": 1, "region": "", "platform": "Azure", "systemService": "AzureSQL",
             "addressPrefixes": ["13.66.60.72/32"]}}]}"#;
        let new =
            old.replace("\"platform\"", "\"regionId\": 0, \"networkFeatures\": [\"API\"], \"platform\"");
        let discovery = old
            .replace(
                "\"changeNumber\": 7",
                "\"name\": \"public\", \"id\": \"x\", \"type\": \"y\", \"changeNumber\": \"7\"",
            )
            .replace("\"changeNumber\": 1", "\"changeNumber\": \"1\"");
        for text in
            [old.to_owned(), new.replace("[\"API\"]", "null"), new, discovery, format!("\u{feff}{old}")]
        {
            let file = tags(&text);
            assert_eq!(file.tags.len(), 1);
            assert_eq!(file.tags[0].name, "Sql");
            assert_eq!(&*file.tags[0].prefixes, ["13.66.60.72/32".parse::<IpNet>().unwrap()]);
            assert!(file.skipped.is_empty());
        }
    }

    #[test]
    fn prefixes_that_are_none_are_left_out_and_counted() {
        let file = tags(
            r#"{"values": [{"name": "A", "properties": {"addressPrefixes":
                ["10.0.0.1/8", "10.0.0.0/8", "\u001b[31mred", "2001:db8::1", "10.0.0.0/33"]}},
                {"name": "no name", "properties": {"addressPrefixes": []}}]}"#,
        );
        assert_eq!(file.tags.len(), 1);
        assert_eq!(file.tags[0].prefixes.len(), 2);
        assert_eq!(file.skipped[0].1, "has 3 prefixes that cannot be used, such as `10.0.0.1/8`");
        assert_eq!(file.skipped[1].0, "no name");
    }

    #[test]
    fn what_is_not_a_tag_file_is_refused() {
        let deep = format!("{{\"values\": {}", "[".repeat(100_000));
        let ignored = format!("{{\"other\": {}", "[".repeat(100_000));
        let entry = r#"{"values": [{"name": "A"}]}"#;
        for text in ["", "{", "[]", "{}", "\u{0}", entry, &deep, &ignored, r#"{"values": [1]}"#] {
            assert!(parse(text.as_bytes()).is_err(), "{text:.40}");
        }
        let whole = r#"{"values": [{"name": "A", "properties": {"addressPrefixes": ["10.0.0.0/8"]}}]}"#;
        for end in 0..whole.len() {
            assert!(parse(&whole.as_bytes()[..end]).is_err(), "{}", &whole[..end]);
        }
    }
}
