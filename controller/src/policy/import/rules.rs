//! Security rules: from Azure's properties to terms, ports and words of ours.
//!
//! What cannot be read is left out. Of an Allow rule that allows less, which is told as a warning; of a Deny rule it may
//! allow more, which is an error. Nothing is ever read as more than it says.

use std::net::IpAddr;

use ipnet::{IpNet, IpSubnets, Ipv4Net, Ipv4Subnets, Ipv6Subnets};

use super::json::is_expression;
use super::names::render;
use super::object::{Field, Object, Reference, what_to_do};
use super::report::{Level, Place, Report};
use crate::policy::network::{Access, Direction};
use crate::policy::ports;

/// One term of a rule's source or destination.
#[derive(Debug, Clone)]
pub enum Term {
    Any,
    Net(IpNet),
    /// A tag as written.
    Tag(String, Place),
    Application(Reference),
}

/// A rule as read.
#[derive(Debug, Clone)]
pub struct Rule {
    pub name: String,
    pub title: String,
    pub place: Place,
    pub description: String,
    pub priority: u32,
    pub direction: Direction,
    pub access: Access,
    pub protocol: &'static str,
    pub source: Vec<Term>,
    pub destination: Vec<Term>,
    pub source_ports: Vec<(u16, u16)>,
    pub destination_ports: Vec<(u16, u16)>,
}

impl Rule {
    /// How grave it is to lose a part of this rule.
    pub fn loss(&self) -> Level {
        loss(self.access)
    }
}

fn loss(access: Access) -> Level {
    if access == Access::Deny { Level::Error } else { Level::Warning }
}

/// Azure's limit for a description, and ours.
const MAX_DESCRIPTION: usize = 140;

const PROTOCOLS: &[(&str, &str)] = &[
    ("*", "*"),
    ("Any", "*"),
    ("All", "*"),
    ("Tcp", "Tcp"),
    ("Udp", "Udp"),
    ("Icmp", "Icmp"),
    ("Esp", "Esp"),
    ("Ah", "Ah"),
];

/// Reads a rule; nothing if it has to be left out, which is reported.
pub fn read(field: &Field<'_>, group: &str, report: &mut Report) -> Option<Rule> {
    let mut object = Object::open(field.json, &field.place, group, Level::Error, report)?;
    let name = object.scalar("name", report).map(|(name, _)| render(&name)).unwrap_or_default();
    let name = name.rsplit('/').next().unwrap_or_default().to_owned();
    object.title = format!("{group}/securityRules/{name}");
    let mut reader = Reader { object, report, level: Level::Error, complete: true };
    // Access comes first: it says how grave everything else is.
    let access = reader.word("access", &[("Allow", Access::Allow), ("Deny", Access::Deny)]);
    reader.level = access.map_or(Level::Error, loss);
    let direction =
        reader.word("direction", &[("Inbound", Direction::Inbound), ("Outbound", Direction::Outbound)]);
    let mut protocol = reader.word("protocol", PROTOCOLS);
    let priority = reader.priority();
    let source =
        reader.side("sourceAddressPrefix", "sourceAddressPrefixes", "sourceApplicationSecurityGroups");
    let destination = reader.side(
        "destinationAddressPrefix",
        "destinationAddressPrefixes",
        "destinationApplicationSecurityGroups",
    );
    let mut source_ports = reader.ports("sourcePortRange", "sourcePortRanges");
    let mut destination_ports = reader.ports("destinationPortRange", "destinationPortRanges");
    if let (Some(word @ ("Icmp" | "Esp" | "Ah")), Some(from), Some(to)) =
        (protocol, &mut source_ports, &mut destination_ports)
        && [from.as_slice(), to.as_slice()].iter().any(|ranges| **ranges != [ports::ANY])
    {
        if access == Some(Access::Deny) {
            reader.note(
                "destinationPortRange",
                format!("{word} has no ports: all of it is denied, as it may have been in Azure"),
            );
            (*from, *to) = (vec![ports::ANY], vec![ports::ANY]);
        } else {
            reader.leave(
                "destinationPortRange",
                format!("{word} has no ports, and without them the rule would allow more"),
            );
            protocol = None;
        }
    }
    let description = reader.description();
    let Reader { object, report, complete, level } = reader;
    let (place, title) = (object.place.clone(), object.title.clone());
    object.finish(&["rule"], report);
    let rule = (|| {
        Some(Rule {
            name,
            title: title.clone(),
            place: place.clone(),
            description,
            priority: priority?,
            direction: direction?,
            access: access?,
            protocol: protocol?,
            source: source?,
            destination: destination?,
            source_ports: source_ports?,
            destination_ports: destination_ports?,
        })
    })();
    let rule = rule.filter(|_| complete);
    if rule.is_none() {
        let why = match level {
            Level::Error => "the rule is left out: what it denies may be allowed now",
            _ => "the rule is left out: what it allows is denied now",
        };
        report.add(level, &place, &title, "", why, "add the rule to the policy by hand");
    }
    rule
}

struct Reader<'j, 'r> {
    object: Object<'j>,
    report: &'r mut Report,
    level: Level,
    complete: bool,
}

impl<'j> Reader<'j, '_> {
    fn tell(&mut self, level: Level, place: &Place, property: &str, why: String, action: &str) {
        self.report.add(level, place, &self.object.title, property, why, action);
    }

    fn note(&mut self, property: &str, why: String) {
        let place = self.object.place.clone();
        self.tell(Level::Note, &place, property, why, "see whether that is what is meant");
    }

    /// The rule cannot be carried over because of this property.
    fn leave(&mut self, property: &str, why: String) {
        let place = self.object.place.clone();
        self.tell(self.level, &place, property, why, "write the rule into the policy by hand");
        self.complete = false;
    }

    fn word<T: Copy>(&mut self, property: &str, words: &[(&str, T)]) -> Option<T> {
        let Some(field) = self.object.take(property) else {
            self.leave(property, "the rule does not say it".to_owned());
            return None;
        };
        let text = field.json.scalar().unwrap_or_default();
        let found = words.iter().find(|(word, _)| word.eq_ignore_ascii_case(&text)).map(|(_, value)| *value);
        if found.is_none() {
            let choices: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            let why = format!("expected one of {}, found {}", choices.join(", "), shown(&field));
            self.tell(self.level, &field.place, property, why, what_to_do(field.json));
        }
        found
    }

    fn priority(&mut self) -> Option<u32> {
        let Some(field) = self.object.take("priority") else {
            self.leave("priority", "the rule does not say it".to_owned());
            return None;
        };
        let text = field.json.scalar().unwrap_or_default();
        let number = text.parse::<f64>().ok().filter(|n| n.fract() == 0.0 && (100.0..=4096.0).contains(n));
        if number.is_none() {
            let why = format!("expected a number from 100 to 4096, found {}", shown(&field));
            self.tell(self.level, &field.place, "priority", why, what_to_do(field.json));
        }
        number.map(|n| n as u32)
    }

    fn description(&mut self) -> String {
        let Some((text, place)) = self.object.scalar("description", self.report) else {
            return String::new();
        };
        if text.chars().count() <= MAX_DESCRIPTION {
            return text;
        }
        let why = format!("longer than {MAX_DESCRIPTION} characters, the rest is cut off");
        self.tell(Level::Note, &place, "description", why, "put the rest into a comment");
        text.chars().take(MAX_DESCRIPTION).collect()
    }

    /// The values of a singular and a plural property, of which Azure fills one. A value may be several, with commas.
    fn values(&mut self, single: &str, plural: &str) -> Option<Vec<Field<'j>>> {
        let one = self.object.take(single);
        let before = self.report.items.len();
        let many = self.object.list(plural, self.level, self.report);
        if self.report.items.len() > before {
            self.complete = false;
        }
        match (one, many.is_empty()) {
            (Some(one), true) => Some(vec![one]),
            (None, _) => Some(many),
            // Azure's own answers repeat a single value in the list.
            (Some(one), false) if many.iter().all(|item| item.json == one.json) => Some(vec![one]),
            (Some(_), false) => {
                self.leave(plural, format!("`{single}` and `{plural}` are given together"));
                None
            }
        }
    }

    /// Addresses, tags or application security groups of one side.
    fn side(&mut self, single: &str, plural: &str, groups: &str) -> Option<Vec<Term>> {
        let before = self.report.items.len();
        let members = self.object.references(groups, self.level, self.report);
        let broken = self.report.items.len() > before;
        let values = self.values(single, plural)?;
        if !members.is_empty() || broken {
            if !values.is_empty() {
                self.leave(groups, "addresses and application security groups are given together".to_owned());
                return None;
            }
            return Some(members.into_iter().map(Term::Application).collect())
                .filter(|m: &Vec<_>| !m.is_empty());
        }
        let mut terms = Vec::new();
        for value in &values {
            let Some(text) = value.json.scalar().filter(|text| !is_expression(text)) else {
                let why = format!("expected an address, a prefix or a tag, found {}", shown(value));
                self.tell(self.level, &value.place, plural, why, what_to_do(value.json));
                continue;
            };
            for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
                match term(part) {
                    Ok(Parsed::Any) => terms.push(Term::Any),
                    Ok(Parsed::Tag) => terms.push(Term::Tag(part.to_owned(), value.place.clone())),
                    Ok(Parsed::Nets(nets, None)) => terms.extend(nets.into_iter().map(Term::Net)),
                    Ok(Parsed::Nets(nets, Some(why))) => {
                        terms.extend(nets.into_iter().map(Term::Net));
                        self.tell(
                            Level::Note,
                            &value.place,
                            plural,
                            why,
                            "see whether that is what is meant",
                        );
                    }
                    Err(why) => self.tell(self.level, &value.place, plural, why, what_to_do(value.json)),
                }
            }
        }
        if terms.is_empty() {
            self.leave(single, "the rule names no address that can be carried over".to_owned());
            return None;
        }
        Some(terms)
    }

    fn ports(&mut self, single: &str, plural: &str) -> Option<Vec<(u16, u16)>> {
        let values = self.values(single, plural)?;
        let mut ranges = Vec::new();
        for value in &values {
            let text = value.json.scalar().unwrap_or_default();
            if text.is_empty() {
                let why = format!("expected ports, found {}", shown(value));
                self.tell(self.level, &value.place, plural, why, what_to_do(value.json));
            }
            for part in text.split(',').filter(|part| !part.trim().is_empty()) {
                let bare: String = part.split_whitespace().collect();
                match ports::parse_range(&bare, plural) {
                    Ok(range) => ranges.push(range),
                    Err(complaint) => {
                        self.tell(
                            self.level,
                            &value.place,
                            plural,
                            complaint.message,
                            what_to_do(value.json),
                        );
                    }
                }
            }
        }
        if ranges.is_empty() {
            self.leave(single, "the rule names no port that can be carried over".to_owned());
            return None;
        }
        Some(ports::merge(ranges))
    }
}

fn shown(field: &Field<'_>) -> String {
    match field.json.scalar() {
        Some(text) if text.chars().count() <= 60 => format!("{} `{text}`", field.json.kind()),
        _ => field.json.kind().to_owned(),
    }
}

enum Parsed {
    Any,
    Tag,
    /// Prefixes, and what had to be changed to get them.
    Nets(Vec<IpNet>, Option<String>),
}

/// One address, range, prefix, tag or `*`.
fn term(text: &str) -> Result<Parsed, String> {
    if text == "*" || text.eq_ignore_ascii_case("any") {
        return Ok(Parsed::Any);
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(Parsed::Nets(vec![IpNet::from(address)], None));
    }
    if let Ok(net) = text.parse::<IpNet>() {
        let changed = net.addr() != net.network();
        let why = format!("{text} has bits set behind its length: written as {}", net.trunc());
        return Ok(Parsed::Nets(vec![net.trunc()], changed.then_some(why)));
    }
    if let Some((address, mask)) = text.split_once('/')
        && let (Ok(address), Ok(mask)) = (address.parse(), mask.parse())
        && let Ok(net) = Ipv4Net::with_netmask(address, mask)
    {
        let why = format!("{text} is written as {}", net.trunc());
        return Ok(Parsed::Nets(vec![IpNet::V4(net.trunc())], Some(why)));
    }
    if let Some((first, last)) = text.split_once('-')
        && let (Ok(first), Ok(last)) = (first.trim().parse::<IpAddr>(), last.trim().parse::<IpAddr>())
    {
        let nets: Vec<IpNet> = match (first, last) {
            (IpAddr::V4(first), IpAddr::V4(last)) if first <= last => {
                IpSubnets::V4(Ipv4Subnets::new(first, last, 0)).collect()
            }
            (IpAddr::V6(first), IpAddr::V6(last)) if first <= last => {
                IpSubnets::V6(Ipv6Subnets::new(first, last, 0)).collect()
            }
            _ => return Err(format!("{text} is not a range of addresses")),
        };
        return Ok(Parsed::Nets(nets, Some(format!("the range {text} is written as prefixes"))));
    }
    let tag = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && text.starts_with(|c: char| c.is_ascii_alphabetic());
    if tag { Ok(Parsed::Tag) } else { Err(format!("`{text}` is not an address, a prefix or a tag")) }
}
