//! `import`: Azure's JSON becomes a policy.
//!
//! `json` reads the files, `discover` finds the resources in them, `sources` reads each (every concept its own part:
//! `rules`, `networks`, `interfaces`, `publics`, `balancers`, `inbound`), `plan*` resolves names and fills gaps, `yaml` writes. On
//! the way every property of the input is either used, known not to matter (`irrelevant`) or reported: nothing is lost
//! in silence, and what is lost never lets through more than Azure did without being told as an error.

mod balancers;
mod discover;
mod draft;
mod inbound;
mod interfaces;
mod irrelevant;
mod json;
mod names;
mod networks;
mod object;
mod plan;
mod plan_balancers;
mod plan_guests;
mod plan_inbound;
mod plan_networks;
mod plan_outbound;
mod plan_peerings;
mod plan_publics;
mod plan_rules;
mod publics;
pub mod report;
mod rules;
mod sources;
mod yaml;
mod yaml_balancers;

use std::collections::BTreeMap;
use std::path::Path;

use discover::Kind;
use report::{Level, Place, Report};

pub use json::MAX_BYTES;

/// How to fill what Azure has no word for.
#[derive(Debug, Clone)]
pub struct Options {
    /// What device names begin with.
    pub device_prefix: String,
    /// The device towards the world.
    pub uplink: String,
    pub tag_file: Option<TagFile>,
}

impl Default for Options {
    fn default() -> Self {
        Self { device_prefix: "tap-".to_owned(), uplink: "uplink-REPLACE".to_owned(), tag_file: None }
    }
}

/// Azure's published tags.
#[derive(Debug, Clone)]
pub struct TagFile {
    /// As the policy is to name it: relative to its own folder, or absolute.
    pub written: String,
    /// The tags in it.
    pub names: Vec<String>,
}

impl TagFile {
    /// Reads which tags a file has.
    ///
    /// # Errors
    /// What is wrong with the file, and what to do.
    pub fn read(path: &Path, written: String) -> Result<Self, String> {
        let read = super::tag_file::read(path).map_err(|complaint| match complaint.help {
            Some(help) => format!("{}; {help}", complaint.message),
            None => complaint.message,
        })?;
        Ok(Self { written, names: read.tags.into_iter().map(|tag| tag.name).collect() })
    }
}

/// One file.
#[derive(Debug, Clone)]
pub struct Input {
    pub name: String,
    pub bytes: Vec<u8>,
}

/// What came of it.
#[derive(Debug)]
pub struct Imported {
    pub yaml: String,
    pub report: Report,
    /// How many resources of each kind were found, by their REST names.
    pub found: BTreeMap<&'static str, usize>,
}

/// Makes a policy of files.
///
/// # Errors
/// A file that is no JSON, or files without any resource that Portcullis knows, or without an interface and room for one: what is
/// wrong, file first.
pub fn import(inputs: &[Input], options: &Options) -> Result<Imported, String> {
    let mut report = Report::default();
    let mut documents = Vec::new();
    for input in inputs {
        let values =
            json::parse(&input.bytes).map_err(|error| format!("{}: not JSON: {error}", input.name))?;
        documents.push((input, values));
    }
    let mut found = Vec::new();
    for (input, values) in &documents {
        let whole = Place { file: input.name.as_str().into(), path: "$".to_owned() };
        for (at, value) in values.iter().enumerate() {
            let place = if values.len() == 1 { whole.clone() } else { whole.index(at) };
            discover::discover(value, &place, &mut found, &mut report);
        }
    }
    if found.is_empty() {
        let names: Vec<&str> = inputs.iter().map(|input| input.name.as_str()).collect();
        return Err(format!("{}: no resource of a kind that Portcullis knows", names.join(", ")));
    }
    let mut counts = BTreeMap::new();
    for resource in &found {
        *counts.entry(word(resource.kind)).or_insert(0) += 1;
    }
    let sources = sources::read(&found, &mut report);
    let draft = plan::plan(&sources, options, &mut report);
    if draft.interfaces.is_empty() {
        let names: Vec<&str> = inputs.iter().map(|input| input.name.as_str()).collect();
        return Err(format!(
            "{}: no interface, and no virtual network has room for one that is made up; \
             export the interfaces too, or widen an address space to /28",
            names.join(", ")
        ));
    }
    let yaml = yaml::write(&draft, &heading(inputs, &report));
    Ok(Imported { yaml, report, found: counts })
}

fn heading(inputs: &[Input], report: &Report) -> Vec<String> {
    let names: Vec<&str> = inputs.iter().map(|input| input.name.as_str()).collect();
    let lost = report.count(Level::Warning) + report.count(Level::Error);
    let mut lines = vec![
        format!("Made by `portcullis import` from {}", names.join(", ")),
        "Lines with REPLACE have something that was made up. Check the result with `portcullis check`."
            .to_owned(),
    ];
    lines.push(match lost {
        0 => "Everything was carried over.".to_owned(),
        _ => format!("{lost} things were not carried over; the report of the import lists them."),
    });
    if report.worst() == Level::Error {
        let errors = report.count(Level::Error);
        lines.push(format!("ATTENTION: {errors} of them may let through what Azure did not."));
    }
    lines
}

fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::Group => "networkSecurityGroups",
        Kind::Rule => "securityRules",
        Kind::DefaultRule => "defaultSecurityRules",
        Kind::ApplicationGroup => "applicationSecurityGroups",
        Kind::Network => "virtualNetworks",
        Kind::Subnet => "subnets",
        Kind::Peering => "virtualNetworkPeerings",
        Kind::RouteTable => "routeTables",
        Kind::Route => "routes",
        Kind::Interface => "networkInterfaces",
        Kind::PublicAddress => "publicIPAddresses",
        Kind::PublicPrefix => "publicIPPrefixes",
        Kind::Balancer => "loadBalancers",
        Kind::Frontend => "frontendIPConfigurations",
        Kind::Pool => "backendAddressPools",
        Kind::OutboundRule => "outboundRules",
        Kind::BalancingRule => "loadBalancingRules",
        Kind::NatRule => "inboundNatRules",
        Kind::NatPool => "inboundNatPools",
        Kind::Probe => "probes",
        Kind::TagList => "serviceTags",
    }
}
