//! Frontends of a load balancer: public addresses, and prefixes of them.

use super::diagnostics::Problems;
use super::fields::Fields;
use super::names::Names;
use super::network;
use super::publics::Publics;
use super::register::Register;
use super::shape;
use super::source::{Span, Text};
use super::tree::Node;

/// A frontend as read.
pub struct Frontend {
    name: Option<Text>,
    address: Option<Text>,
    prefix: Option<Text>,
}

/// Reads one of `frontendIPConfigurations`.
pub fn read(node: &Node<'_>, problems: &mut Problems) -> Option<Frontend> {
    let fields = Fields::open(node, &shape::FRONTEND, problems)?;
    let name = fields.text("name", problems);
    let mut address = fields.text("publicIPAddress", problems);
    let prefix = fields.text("publicIPPrefix", problems);
    if fields.node("publicIPAddress").is_some() && fields.node("publicIPPrefix").is_some() {
        problems
            .error(fields.key("publicIPPrefix"), "`publicIPAddress` and `publicIPPrefix` are given together")
            .also(fields.key("publicIPAddress"), "the other one")
            .help("make it two frontends");
        address = None;
    } else if fields.node("publicIPAddress").is_none() && fields.node("publicIPPrefix").is_none() {
        problems
            .error(fields.span, format!("{} lacks `publicIPAddress` or `publicIPPrefix`", fields.title))
            .help("add `publicIPAddress: ...` with the name of a public address");
    }
    Some(Frontend { name, address, prefix })
}

/// The frontends of a load balancer by name.
pub struct Frontends {
    names: Names,
    pub built: Vec<network::Frontend>,
    /// The family of each, if its address is known.
    v6: Vec<Option<bool>>,
    /// Where a frontend names a public IP prefix.
    prefixes: Vec<Option<Span>>,
}

impl Frontends {
    /// Finds the frontend a rule means.
    pub fn find(&self, reference: &Text, problems: &mut Problems) -> Option<usize> {
        self.names.find(reference, "frontendIPConfigurations", problems)
    }

    /// The same for rules that need a single address: what the world sends to.
    pub fn find_single(&self, reference: &Text, title: &str, problems: &mut Problems) -> Option<usize> {
        let found = self.find(reference, problems)?;
        if let Some(prefix) = self.prefixes[found] {
            problems
                .error(reference.span, format!("{title} is on a public IP prefix"))
                .also(prefix, format!("frontend `{}` has one", reference.value))
                .help("prefixes are for outbound rules: name a frontend with a `publicIPAddress`");
        }
        Some(found)
    }

    /// Is it IPv6? Nothing if its address is not known.
    pub fn is_v6(&self, frontend: usize) -> Option<bool> {
        self.v6[frontend]
    }
}

/// What a family is called.
pub fn family(v6: bool) -> &'static str {
    if v6 { "IPv6" } else { "IPv4" }
}

/// Builds the frontends of load balancer `balancer`.
pub fn resolve(
    read: &[Frontend],
    balancer: &str,
    publics: &mut Publics,
    register: &mut Register,
    problems: &mut Problems,
) -> Frontends {
    let names = Names::new("frontend of this load balancer");
    let mut frontends = Frontends { names, built: Vec::new(), v6: Vec::new(), prefixes: Vec::new() };
    for (index, frontend) in read.iter().enumerate() {
        let name = frontend.name.as_ref().map(|name| name.value.clone()).unwrap_or_default();
        if let Some(text) = &frontend.name {
            frontends.names.declare(text, index, problems);
            register.add(&["loadBalancers", balancer, "frontendIPConfigurations", &name], text.span);
        }
        let user = format!("frontend `{balancer}/{name}`");
        let public_addresses: Vec<usize> = match (&frontend.address, &frontend.prefix) {
            (Some(address), _) => publics.take(address, &user, problems).into_iter().collect(),
            (None, Some(prefix)) => publics.take_prefix(prefix, &user, problems),
            (None, None) => Vec::new(),
        };
        let first = public_addresses.first().and_then(|at| publics.family(*at));
        frontends.v6.push(first);
        frontends.prefixes.push(frontend.prefix.as_ref().map(|prefix| prefix.span));
        frontends.built.push(network::Frontend { name, public_addresses });
    }
    frontends
}
