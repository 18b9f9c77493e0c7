//! The YAML policy: its model, its validation with line and column, its JSON Schema.
//!
//! A file goes through four steps. `tree` reads YAML into nodes that know their place; `fields`, guided by `shape`,
//! takes them apart; every concept (`networks`, `interfaces`, `groups`, `tags`, `publics`, `host`, ...) reads its own
//! part and then resolves it against the others; the result is a [`network::Network`]. Findings are collected on the
//! way and reported together: only broken YAML ends the reading early.

pub mod allocation;
mod application;
mod balancers;
mod balancing_rules;
mod capacity;
mod default_outbound;
pub mod diagnostics;
mod fields;
mod frontends;
pub mod groups;
mod host;
pub mod import;
mod interfaces;
mod limits;
mod listeners;
mod names;
mod nat_rules;
pub mod network;
mod networks;
mod outbound_rules;
mod overlap;
mod peerings;
mod plain;
mod platform;
mod pools;
mod ports;
mod prefixes;
mod probes;
mod publics;
mod register;
mod render;
mod routes;
mod schema;
mod schema_balancers;
mod schema_edge;
mod schema_rules;
mod shape;
mod sides;
mod snat;
pub mod source;
mod subnets;
mod tag_file;
mod tags;
mod tree;
mod ways_out;

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use diagnostics::Problems;
pub use diagnostics::{Diagnostic, Diagnostics, Severity};
use fields::Fields;
use names::Names;
use network::{Network, Places};
use register::Register;
pub use schema::json_schema;
use sides::Words;
use source::{Source, Span, Text};
use tree::{Node, Value};

/// A policy that is in order.
#[derive(Debug)]
pub struct Loaded {
    pub network: Network,
    /// Where its parts stand in the file; paths as in [`network::Places`].
    pub places: Places,
    /// What is allowed but hardly meant.
    pub warnings: Diagnostics,
}

impl Loaded {
    /// An empty list of findings about this file; later stages add theirs with [`Diagnostics::error_at`].
    pub fn no_findings(&self) -> Diagnostics {
        Diagnostics::none(&self.warnings.source)
    }
}

/// Reads and checks a policy file. All of its errors are reported, not the first.
pub fn load(path: &Path) -> Result<Loaded, Diagnostics> {
    let name = path.display().to_string();
    let fail = |text: &str, message: String, span: Option<Span>, help: &str| {
        let mut problems = Problems::default();
        let found = match span {
            Some(span) => problems.error(span, message),
            None => problems.file_error(message),
        };
        found.help(help);
        Err(problems.finish(&Arc::new(Source::new(&name, text))))
    };
    let read = || {
        let mut bytes = Vec::new();
        // One byte more than `tree` takes; the path may be a device without an end.
        std::fs::File::open(path)?.take(tree::MAX_BYTES as u64 + 1).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(bytes)
    };
    let bytes = match read() {
        Ok(bytes) => bytes,
        Err(error) => {
            let help = match error.kind() {
                std::io::ErrorKind::NotFound => "check the path; `examples/` has policies to begin with",
                std::io::ErrorKind::IsADirectory => "name the policy file inside the directory",
                std::io::ErrorKind::PermissionDenied => {
                    "let this user read the file; the daemon is root without the power to look past file modes, so the \
                     file has to be root's or readable by all"
                }
                _ => "check the path and the file",
            };
            return fail("", format!("cannot read the policy: {error}"), None, help);
        }
    };
    match String::from_utf8(bytes) {
        Ok(text) => parse(&name, &text),
        Err(error) => {
            let at = error.utf8_error().valid_up_to();
            let text = String::from_utf8_lossy(error.as_bytes()).into_owned();
            // `Source` drops a byte order mark and offsets count from behind it.
            let at = if text.starts_with('\u{feff}') { at - 3 } else { at };
            let span = Span::new(at, at + '\u{fffd}'.len_utf8());
            fail(
                &text,
                "the file is not UTF-8 from here on".to_owned(),
                Some(span),
                "save it with the encoding UTF-8",
            )
        }
    }
}

/// Checks the text of a policy; `file_name` is what the findings call it.
pub fn parse(file_name: &str, text: &str) -> Result<Loaded, Diagnostics> {
    let source = Arc::new(Source::new(file_name, text));
    let mut problems = Problems::default();
    let built = tree::read(&source, &mut problems).and_then(|root| build(&root, &source, &mut problems));
    let failed = problems.has_errors();
    let findings = problems.finish(&source);
    match built {
        Some((network, places)) if !failed => Ok(Loaded { network, places, warnings: findings.warnings() }),
        _ => Err(findings),
    }
}

fn build(root: &Node<'_>, source: &Source, problems: &mut Problems) -> Option<(Network, Places)> {
    let empty = match &root.value {
        Value::Null => true,
        Value::Map(entries) => entries.is_empty(),
        _ => false,
    };
    if empty {
        problems.error(Span::default(), "the policy is empty").help(
            "begin with `virtualNetworks` and `networkInterfaces`; examples/minimal.yaml shows \
                the least there is",
        );
        return None;
    }
    let fields = Fields::open(root, &shape::POLICY, problems)?;
    let mut register = Register::default();
    let limits = limits::read(fields.node("limits"), problems);
    // The tag file's path counts from the policy's own folder; without one, from the current directory.
    let folder = Path::new(&source.name).parent().unwrap_or(Path::new(""));
    let tags = tags::read(fields.node("serviceTags"), folder, &mut register, problems);
    let mut applications = application::read(
        fields.list("applicationSecurityGroups", problems),
        &limits,
        &mut register,
        problems,
    );
    let words = Words { tags: &tags, applications: &applications.names, limits: &limits };
    let group_drafts = groups::read(fields.list("networkSecurityGroups", problems), &words, problems);
    let mut tables = routes::read(fields.list("routeTables", problems), &tags, &mut register, problems);
    let platform = platform::read(
        fields.node("platformRules"),
        fields.list("platformServices", problems),
        &mut register,
        problems,
    );
    let on_rule_change = fields.choice("onRuleChange", platform::ON_RULE_CHANGE, problems);
    let network_drafts = networks::read(fields.list("virtualNetworks", problems), problems);
    let interface_drafts = interfaces::read(fields.list("networkInterfaces", problems), problems);
    let public_drafts = publics::read(fields.list("publicIPAddresses", problems), problems);
    let prefix_drafts = publics::read_prefixes(fields.list("publicIPPrefixes", problems), problems);
    let default_outbound_key = fields.key("defaultOutbound");
    let default_outbound =
        default_outbound::read(fields.node("defaultOutbound"), default_outbound_key, problems);
    let balancer_drafts = balancers::read(fields.list("loadBalancers", problems), problems);
    let uplink_drafts = host::read_uplinks(fields.list("uplinks", problems), problems);
    let host_access = host::read_host_access(fields.node("hostAccess"), problems);
    let (snat, default_timeouts, rfc) = snat::read(fields.node("snat"), problems);
    let timeouts = host::read_timeouts(fields.node("timeouts"), default_timeouts, problems);
    let flow_table = host::read_flow_table(fields.node("flowTable"), problems);
    let adoption = host::read_adoption(fields.node("adoption"), problems);

    let no_interface = match fields.node("networkInterfaces").map(|node| &node.value) {
        None => true,
        Some(Value::List(items)) => items.is_empty(),
        Some(_) => false,
    };
    if no_interface {
        let given = fields.key("networkInterfaces");
        let at = if given == Span::default() { root.head() } else { given };
        problems
            .error(at, "the policy has no network interface: there is no guest to serve")
            .help("add `networkInterfaces` with a name, a device and an ip configuration");
    }

    let mut group_names = Names::new("network security group");
    let own_names: Vec<_> = group_drafts.iter().map(|group| group.name.clone()).collect();
    let groups = groups::resolve(group_drafts, &mut group_names, &limits, &mut register, problems);
    let mut used_groups = Vec::new();
    let mut references =
        networks::References { groups: &group_names, used_groups: &mut used_groups, tables: &mut tables };
    let networks = networks::resolve(network_drafts, &mut references, &mut register, problems);
    tables.check_appliances(&networks, problems);
    let mut publics = publics::resolve(
        public_drafts,
        prefix_drafts,
        &networks.spaces,
        &networks.networks,
        &mut register,
        problems,
    );
    let references = interfaces::References {
        networks: &networks,
        groups: &group_names,
        used_groups: &mut used_groups,
        applications: &mut applications,
        publics: &mut publics,
        limits: &limits,
    };
    let interfaces = interfaces::resolve(interface_drafts, references, &mut register, problems);
    applications.check_rules(&groups.uses, &networks, problems);
    let uplinks = host::resolve_uplinks(uplink_drafts, &interfaces.devices, &mut register, problems);
    let default_outbound = default_outbound::resolve(default_outbound, &networks, &mut publics, problems);
    let balancers =
        balancers::resolve(balancer_drafts, &interfaces, &mut publics, &uplinks, &mut register, problems);
    if let Some(span) = publics.first_use()
        && fields.list("uplinks", problems).is_empty()
    {
        problems
            .error(span, "a public address is used, but the policy has no uplink")
            .help("add `uplinks: [{ device: ... }]` with the device towards the world");
    }
    // Something that seems unused may be what a misspelt reference meant.
    if !problems.has_errors() {
        publics.warn_unused(problems);
        balancers.warn(&interfaces, problems);
        warn_unused_groups(&own_names, &used_groups, problems);
        applications.warn_unused(&groups.uses, problems);
        tables.warn_unused(&networks, &interfaces.built, problems);
    }
    let faultless = !problems.has_errors();
    let network = Network {
        virtual_networks: networks.networks,
        subnets: networks.subnets,
        interfaces: interfaces.built,
        groups: groups.groups,
        application_groups: applications.finish(),
        tag_file: tags.file,
        tags: tags.definitions,
        route_tables: tables.built,
        platform,
        on_rule_change: on_rule_change.map(|change| change.value).unwrap_or_default(),
        limits,
        public_addresses: publics.addresses,
        load_balancers: balancers.built,
        default_outbound,
        snat,
        uplinks,
        host_access,
        timeouts,
        flow_table,
        adoption,
    };
    if faultless {
        default_outbound::check(&network, default_outbound_key, problems);
        if let Some(profile) = rfc {
            snat::check_rfc(&network, profile, problems);
        }
    }
    Some((network, register.places(source)))
}

fn warn_unused_groups(names: &[Option<Text>], used: &[usize], problems: &mut Problems) {
    for (index, name) in names.iter().enumerate() {
        if let Some(name) = name
            && !used.contains(&index)
        {
            problems
                .warning(name.span, format!("nothing uses network security group `{}`", name.value))
                .help("name it as `networkSecurityGroup` of a subnet or a network interface, or remove it");
        }
    }
}
