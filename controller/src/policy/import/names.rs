//! Resource ids, template expressions that stand for them, and names that our policy takes.

use std::collections::{HashMap, HashSet};

use super::json::is_expression;

/// Azure's and our limit for names.
const MAX_NAME: usize = 80;

/// A resource id, or as much of it as is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Id {
    /// Subscription and resource group in lower case, if the id has them.
    pub scope: Option<String>,
    /// `virtualnetworks`, `subnets`: from the outermost resource on, in lower case.
    pub types: Vec<String>,
    /// The names that go with them, as written.
    pub names: Vec<String>,
}

impl Id {
    /// Reads `/subscriptions/…/providers/Microsoft.Network/virtualNetworks/v/subnets/s`. Of a text that begins with an
    /// unresolved expression the pairs behind it are taken. Anything else has no types.
    pub fn parse(text: &str) -> Self {
        let segments = split(text);
        let find = |word: &str| segments.iter().position(|segment| segment.eq_ignore_ascii_case(word));
        let provider = segments.iter().rposition(|segment| segment.eq_ignore_ascii_case("providers"));
        let (scope, pairs) = match provider {
            Some(at) => {
                let value =
                    |word| find(word).and_then(|at| segments.get(at + 1)).map(|text| text.to_lowercase());
                let scope = match (value("subscriptions"), value("resourcegroups")) {
                    (Some(subscription), Some(group)) => Some(format!("{subscription}/{group}")),
                    _ => None,
                };
                (scope, segments.get(at + 2..).unwrap_or_default())
            }
            None if segments.first().is_some_and(|first| is_expression(first)) => (None, &segments[1..]),
            None => (None, &[][..]),
        };
        let mut id = Self { scope, ..Self::default() };
        for pair in pairs.chunks_exact(2) {
            id.types.push(pair[0].to_lowercase());
            id.names.push(pair[1].clone());
        }
        id
    }

    /// From a type such as `Microsoft.Network/virtualNetworks/subnets` and a name such as `v/s`.
    pub fn of(kind: &str, name: &str) -> Self {
        let types: Vec<String> = kind.split('/').skip(1).map(str::to_lowercase).collect();
        let mut names = split(name);
        // A name that does not go with its type: all of it belongs to the innermost resource.
        if names.len() != types.len() {
            names = vec![String::new(); types.len().saturating_sub(1)];
            names.push(name.to_owned());
        }
        Self { scope: None, types, names }
    }

    /// Name of the innermost resource.
    pub fn name(&self) -> &str {
        self.names.last().map_or("", String::as_str)
    }

    /// The id of the resource this one is a part of.
    pub fn parent(&self) -> Self {
        let up = |list: &[String]| list[..list.len().saturating_sub(1)].to_vec();
        Self { scope: self.scope.clone(), types: up(&self.types), names: up(&self.names) }
    }

    /// This resource's part of a type, with a name.
    pub fn child(&self, kind: &str, name: &str) -> Self {
        let mut child = self.clone();
        child.types.push(kind.to_lowercase());
        child.names.push(name.to_owned());
        child
    }

    /// Do both mean the same resource? A scope that is not known fits any.
    pub fn same(&self, other: &Self) -> bool {
        let scopes = match (&self.scope, &other.scope) {
            (Some(a), Some(b)) => a == b,
            _ => true,
        };
        let shorter = self.types.len().min(other.types.len());
        // After an unresolved expression only the end of the id is known.
        let ends = |list: &[String]| {
            list[list.len() - shorter..].iter().map(|s| s.to_lowercase()).collect::<Vec<_>>()
        };
        scopes
            && shorter > 0
            && ends(&self.types) == ends(&other.types)
            && ends(&self.names) == ends(&other.names)
    }

    /// How a report calls it.
    pub fn title(&self) -> String {
        if self.types.is_empty() {
            return "an unresolved expression".to_owned();
        }
        let pairs = self.types.iter().zip(&self.names);
        pairs.map(|(kind, name)| format!("{kind}/{name}")).collect::<Vec<_>>().join("/")
    }
}

/// Resources of one kind, to find the one that a reference means.
#[derive(Debug, Default)]
pub struct Index {
    ids: Vec<Id>,
    /// By the innermost name in lower case.
    by_name: HashMap<String, Vec<usize>>,
}

impl Index {
    /// Adds the next resource; they are numbered from 0.
    pub fn add(&mut self, id: &Id) {
        self.by_name.entry(id.name().to_lowercase()).or_default().push(self.ids.len());
        self.ids.push(id.clone());
    }

    /// Which one is meant; nothing if none or several could be.
    pub fn find(&self, id: &Id) -> Option<usize> {
        let candidates = self.by_name.get(&id.name().to_lowercase())?;
        let mut fitting = candidates.iter().copied().filter(|at| self.ids[*at].same(id));
        let first = fitting.next()?;
        fitting.next().is_none().then_some(first)
    }
}

/// Splits at slashes that stand outside of `[…]`.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut depth = 0_usize;
    for c in text.chars() {
        match c {
            '[' => depth += 1,
            ']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        match parts.last_mut() {
            Some(_) if c == '/' && depth == 0 => parts.push(String::new()),
            Some(last) => last.push(c),
            None => {}
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

/// Writes a template expression out as far as it goes: `concat`, `format` and `resourceId` of literals become text, what
/// is not known stays as `[…]`, spelled alike wherever it occurs, so that a reference still finds its resource.
pub fn render(text: &str) -> String {
    match is_expression(text) {
        true => evaluate(&text[1..text.len() - 1], 0),
        false => text.to_owned(),
    }
}

fn evaluate(expression: &str, depth: usize) -> String {
    let expression = expression.trim();
    let unknown = || format!("[{}]", expression.split_whitespace().collect::<String>());
    if let Some(literal) = literal(expression) {
        return literal;
    }
    let Some((function, arguments)) = call(expression).filter(|_| depth < 16) else { return unknown() };
    let values = || arguments.iter().map(|argument| evaluate(argument, depth + 1));
    match function.to_ascii_lowercase().as_str() {
        "concat" => values().collect(),
        "format" => {
            let mut values = values();
            let mut text = values.next().unwrap_or_default();
            for (at, value) in values.enumerate() {
                text = text.replace(&format!("{{{at}}}"), &value);
            }
            text
        }
        "resourceid" => {
            let values: Vec<String> = values().collect();
            let Some(at) = values.iter().position(|value| value.contains('.') && value.contains('/')) else {
                return unknown();
            };
            let kind = values[at].trim_end_matches('/');
            let (provider, types) = kind.split_once('/').unwrap_or((kind, ""));
            let names: Vec<String> = values[at + 1..].iter().flat_map(|value| split(value)).collect();
            let pairs: Vec<String> =
                types.split('/').zip(&names).map(|(kind, name)| format!("{kind}/{name}")).collect();
            format!("/providers/{provider}/{}", pairs.join("/"))
        }
        _ => unknown(),
    }
}

/// A quoted text and nothing else; `''` in it is a quote.
fn literal(expression: &str) -> Option<String> {
    let inner = expression.strip_prefix('\'')?.strip_suffix('\'')?;
    let plain = inner.replace("''", "");
    (!plain.contains('\'')).then(|| inner.replace("''", "'"))
}

/// `f(a, b)` as name and arguments.
fn call(expression: &str) -> Option<(&str, Vec<&str>)> {
    let open = expression.find('(')?;
    let name = &expression[..open];
    let inner = expression[open + 1..].strip_suffix(')')?;
    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return None;
    }
    let (mut arguments, mut start, mut depth, mut quoted) = (Vec::new(), 0, 0_i32, false);
    for (at, c) in inner.char_indices() {
        match c {
            '\'' => quoted = !quoted,
            _ if quoted => {}
            '(' | '[' => depth += 1,
            ')' | ']' => depth -= 1,
            ',' if depth == 0 => {
                arguments.push(&inner[start..at]);
                start = at + 1;
            }
            _ => {}
        }
        // `f(a).g(b)` is no call of f.
        if depth < 0 {
            return None;
        }
    }
    arguments.push(&inner[start..]);
    (!quoted && depth == 0).then_some((name, arguments))
}

/// Names of one kind of object in the policy: valid, and each used once without regard to case.
#[derive(Debug, Default)]
pub struct Unique {
    taken: HashSet<String>,
    /// Where to go on counting for a name, so that a million equal names do not cost a million times a million.
    next: HashMap<String, usize>,
}

impl Unique {
    /// The name itself where it can be had, else one like it; `fallback` if nothing of it can be used.
    pub fn take(&mut self, wanted: &str, fallback: &str) -> String {
        let mut name = sanitise(wanted);
        if name.is_empty() {
            name = fallback.to_owned();
        }
        let mut unique = name.clone();
        let next = self.next.entry(name.to_ascii_lowercase()).or_insert(2);
        while !self.taken.insert(unique.to_ascii_lowercase()) {
            let suffix = format!("-{next}");
            *next += 1;
            let room = name.len().min(MAX_NAME - suffix.len());
            unique = format!("{}{suffix}", &name[..room]);
        }
        unique
    }
}

/// Makes a name of anything: characters that names do not have become `-`; of an expression what is quoted remains.
fn sanitise(wanted: &str) -> String {
    let mut text = String::new();
    let (mut depth, mut quoted) = (0_usize, false);
    for c in wanted.chars() {
        match c {
            '[' => depth += 1,
            ']' if depth > 0 => depth -= 1,
            '\'' if depth > 0 => {
                quoted = !quoted;
                if quoted && !text.is_empty() {
                    text.push('-');
                }
                continue;
            }
            _ => {}
        }
        if depth > 0 && !quoted || matches!(c, '[' | ']') {
            continue;
        }
        let good = c.is_ascii_alphanumeric() || "._-".contains(c);
        match good {
            true => text.push(c),
            false if text.ends_with('-') => {}
            false => text.push('-'),
        }
    }
    let text = text.trim_start_matches(['.', '-']);
    text[..text.len().min(MAX_NAME)].trim_end_matches(['.', '-']).to_owned()
}

/// Names of Linux devices: 15 bytes, each used once.
#[derive(Debug, Default)]
pub struct Devices {
    taken: HashSet<String>,
    next: HashMap<String, usize>,
}

/// What the kernel takes, `IFNAMSIZ` without its NUL.
const MAX_DEVICE: usize = 15;

impl Devices {
    /// The prefix and as much of the name as fits.
    pub fn take(&mut self, prefix: &str, name: &str) -> String {
        let clean = |text: &str| {
            text.chars().filter(|c| c.is_ascii_graphic() && !"/:%".contains(*c)).collect::<String>()
        };
        let whole = clean(&format!("{prefix}{name}"));
        let cut = whole[..whole.len().min(MAX_DEVICE)].to_owned();
        let next = self.next.entry(cut.clone()).or_insert(2);
        let mut device = cut;
        while matches!(device.as_str(), "" | "." | "..") || !self.taken.insert(device.clone()) {
            let suffix = next.to_string();
            *next += 1;
            let room = whole.len().min(MAX_DEVICE.saturating_sub(suffix.len()));
            device = format!("{}{suffix}", &whole[..room]);
        }
        device
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_whole_or_from_behind_an_expression() {
        let id = Id::parse(
            "/subscriptions/S/resourceGroups/RG/providers/Microsoft.Network/virtualNetworks/V/subnets/web",
        );
        assert_eq!(id.scope.as_deref(), Some("s/rg"));
        assert_eq!(
            (id.types.as_slice(), id.name()),
            (&["virtualnetworks".to_owned(), "subnets".to_owned()][..], "web")
        );
        let behind = Id::parse(&render("[concat(variables('lbID'), '/frontendIPConfigurations/fe')]"));
        assert_eq!(
            (behind.types.as_slice(), behind.name()),
            (&["frontendipconfigurations".to_owned()][..], "fe")
        );
        assert!(behind.same(&Id::of("Microsoft.Network/loadBalancers/frontendIPConfigurations", "lb/FE")));
        assert!(Id::parse("[parameters('subnetId')]").types.is_empty());
        assert!(!Id::default().same(&Id::default()));
    }

    #[test]
    fn an_expression_that_cannot_be_resolved_still_names_the_same_resource_everywhere() {
        let reference =
            Id::parse(&render("[resourceId('Microsoft.Network/networkSecurityGroups', variables( 'nsg' ))]"));
        let resource = Id::of("Microsoft.Network/networkSecurityGroups", &render("[variables('nsg')]"));
        assert!(reference.same(&resource), "{reference:?} {resource:?}");
        assert_eq!(render("[concat('a', format('{0}/{1}', 'b', 'it''s'))]"), "ab/it's");
        assert_eq!(render("[reference('x').id]"), "[reference('x').id]");
        assert_eq!(render("[[literal]"), "[[literal]");
    }

    #[test]
    fn names_become_valid_and_unique() {
        let mut names = Unique::default();
        assert_eq!(names.take("web nsg/1!", "x"), "web-nsg-1");
        assert_eq!(names.take("WEB-nsg-1", "x"), "WEB-nsg-1-2");
        assert_eq!(names.take("[concat(parameters('vmssName'), 'lb')]", "x"), "vmssName-lb");
        assert_eq!((names.take("", "nsg"), names.take("ü", "nsg")), ("nsg".to_owned(), "nsg-2".to_owned()));
        assert!(names.take(&"n".repeat(500), "x").len() <= 80);
        assert!(names.take(&"n".repeat(500), "x").len() <= 80);
    }

    #[test]
    fn devices_have_at_most_fifteen_characters_and_differ() {
        let mut devices = Devices::default();
        assert_eq!(devices.take("tap-", "production-web-01"), "tap-production-");
        assert_eq!(devices.take("tap-", "production-web-02"), "tap-production2");
        assert_eq!(devices.take("", "/ :"), "2");
    }
}
