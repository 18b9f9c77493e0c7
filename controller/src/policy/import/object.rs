//! One object of the input, open for reading. Whatever nobody asked for is either known not to matter or reported.

use super::irrelevant::{Verdict, verdict};
use super::json::{Json, is_expression};
use super::names::{Id, render};
use super::report::{Level, Place, Report};

/// A property as found.
#[derive(Debug, Clone)]
pub struct Field<'j> {
    pub json: &'j Json,
    pub place: Place,
}

/// A reference to another resource.
#[derive(Debug, Clone)]
pub struct Reference {
    pub id: Id,
    pub place: Place,
}

/// An object with its nested `properties` on the same level, as the command line of Azure prints it.
pub struct Object<'j> {
    pub place: Place,
    /// What the report calls it.
    pub title: String,
    fields: Vec<(&'j str, &'j Json, bool, bool)>,
}

impl<'j> Object<'j> {
    /// Opens an object; anything else is reported and nothing.
    pub fn open(
        json: &'j Json,
        place: &Place,
        title: &str,
        level: Level,
        report: &mut Report,
    ) -> Option<Self> {
        let Json::Map(entries) = json else {
            let why = format!("expected an object, found {}", json.kind());
            report.add(level, place, title, "", why, "export the resource itself, with its values filled in");
            return None;
        };
        let mut fields = Vec::with_capacity(entries.len() + 8);
        let mut nested: &[(String, Json)] = &[];
        for (key, value) in entries {
            match value {
                Json::Map(inner) if key.eq_ignore_ascii_case("properties") && nested.is_empty() => {
                    nested = inner
                }
                _ => fields.push((key.as_str(), value, false, false)),
            }
        }
        fields.extend(nested.iter().map(|(key, value)| (key.as_str(), value, true, false)));
        Some(Self { place: place.clone(), title: title.to_owned(), fields })
    }

    fn place_of(&self, key: &str, nested: bool) -> Place {
        if nested { self.place.key("properties").key(key) } else { self.place.key(key) }
    }

    /// Takes a property, in whatever case it is written. Empty ones count as absent.
    pub fn take(&mut self, name: &str) -> Option<Field<'j>> {
        let at = self
            .fields
            .iter()
            .position(|(key, json, _, taken)| !taken && key.eq_ignore_ascii_case(name) && !json.is_empty())?;
        let (key, json, nested, taken) = &mut self.fields[at];
        *taken = true;
        let (key, json, nested) = (*key, *json, *nested);
        Some(Field { json, place: self.place_of(key, nested) })
    }

    /// A text, number or boolean as text; anything else is reported.
    pub fn scalar(&mut self, name: &str, report: &mut Report) -> Option<(String, Place)> {
        let field = self.take(name)?;
        match field.json.scalar() {
            Some(text) => Some((text, field.place)),
            None => {
                self.wrong(&field, name, "a single value", Level::Warning, report);
                None
            }
        }
    }

    /// `true` or `false`, also as text; anything else is reported.
    pub fn flag(&mut self, name: &str, report: &mut Report) -> Option<bool> {
        let field = self.take(name)?;
        match field.json.scalar().map(|text| text.to_ascii_lowercase()).as_deref() {
            Some("true") => Some(true),
            Some("false") => Some(false),
            _ => {
                self.wrong(&field, name, "true or false", Level::Warning, report);
                None
            }
        }
    }

    /// The items of a list, each with its place; anything else is reported at `level`.
    pub fn list(&mut self, name: &str, level: Level, report: &mut Report) -> Vec<Field<'j>> {
        let Some(field) = self.take(name) else { return Vec::new() };
        match field.json {
            Json::List(items) => items
                .iter()
                .enumerate()
                .map(|(at, json)| Field { json, place: field.place.index(at) })
                .collect(),
            _ => {
                self.wrong(&field, name, "a list", level, report);
                Vec::new()
            }
        }
    }

    /// `{ "id": … }`.
    pub fn reference(&mut self, name: &str, level: Level, report: &mut Report) -> Option<Reference> {
        let field = self.take(name)?;
        self.read_reference(&field, name, level, report)
    }

    /// A list of `{ "id": … }`.
    pub fn references(&mut self, name: &str, level: Level, report: &mut Report) -> Vec<Reference> {
        let items = self.list(name, level, report);
        items.iter().filter_map(|item| self.read_reference(item, name, level, report)).collect()
    }

    fn read_reference(
        &self,
        field: &Field<'j>,
        name: &str,
        level: Level,
        report: &mut Report,
    ) -> Option<Reference> {
        let mut inner = Object::open(field.json, &field.place, &self.title, level, report)?;
        let id = inner.take("id");
        inner.finish(&["reference"], report);
        match id.as_ref().and_then(|id| id.json.text()) {
            Some(text) => Some(Reference { id: Id::parse(&render(text)), place: field.place.clone() }),
            None => {
                let why = "a reference without an `id`";
                report.add(
                    level,
                    &field.place,
                    &self.title,
                    name,
                    why,
                    "name the resource in the policy by hand",
                );
                None
            }
        }
    }

    /// Reports a value of a kind that the property does not have.
    pub fn wrong(&self, field: &Field<'j>, name: &str, expected: &str, level: Level, report: &mut Report) {
        let why = format!("expected {expected}, found {}", field.json.kind());
        report.add(level, &field.place, &self.title, name, why, what_to_do(field.json));
    }

    /// Accounts for every property that was not taken. `kinds` are the tables of `irrelevant` to look it up in.
    pub fn finish(self, kinds: &[&str], report: &mut Report) {
        for (key, json, nested, taken) in &self.fields {
            if *taken {
                continue;
            }
            let place = self.place_of(key, *nested);
            match verdict(kinds, key, json) {
                Verdict::Ignore(why) => report.ignore(&place, why),
                Verdict::Report(level, why, action) => {
                    report.add(level, &place, &self.title, key, why, action)
                }
            }
        }
    }
}

/// What to do about a value that cannot be read.
pub fn what_to_do(json: &Json) -> &'static str {
    match json {
        Json::Text(text) if is_expression(text) => {
            "import what is deployed (`az ... show`), or fill the value in before importing the template"
        }
        _ => "correct it in the input, or add it to the policy by hand",
    }
}
