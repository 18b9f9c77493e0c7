//! Public IP addresses and prefixes of them, and who uses which.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;

use super::diagnostics::Problems;
use super::fields::{Complaint, Fields};
use super::names::Names;
use super::network::{self, Announce, PublicAddress};
use super::register::Register;
use super::source::{At, Span, Text};
use super::tree::Node;
use super::{prefixes, shape};

/// Azure's largest public IP prefix: a /28, or a /124 of IPv6.
pub const MAX_PREFIX: u32 = 16;

/// What the Internet's registries give out of IPv6; documentation is inside.
pub const GLOBAL_UNICAST: &str = "2000::/3";

/// The words of `announce`.
const ANNOUNCE: &[(&str, Announce)] =
    &[("address", Announce::Address), ("proxy", Announce::Proxy), ("routed", Announce::Routed)];

/// A public address or prefix as read.
pub struct Public<T> {
    name: Option<Text>,
    span: Span,
    what: Option<At<T>>,
    announce: Option<Announce>,
}

/// Reads `publicIPAddresses`.
pub fn read(items: &[Node<'_>], problems: &mut Problems) -> Vec<Public<IpAddr>> {
    let read = |node| read_one(node, &shape::PUBLIC_ADDRESS, "ipAddress", prefixes::parse_address, problems);
    items.iter().filter_map(read).collect()
}

/// Reads `publicIPPrefixes`.
pub fn read_prefixes(items: &[Node<'_>], problems: &mut Problems) -> Vec<Public<IpNet>> {
    let read = |node| read_one(node, &shape::PUBLIC_PREFIX, "ipPrefix", parse_public_prefix, problems);
    items.iter().filter_map(read).collect()
}

fn read_one<T>(
    node: &Node<'_>,
    shape: &'static shape::Shape,
    field: &str,
    parse: fn(&str) -> Result<T, Complaint>,
    problems: &mut Problems,
) -> Option<Public<T>> {
    let fields = Fields::open(node, shape, problems)?;
    let name = fields.text("name", problems);
    let what = fields.parsed(field, parse, problems);
    let announce = fields.choice("announce", ANNOUNCE, problems).map(|announce| announce.value);
    Some(Public { name, span: fields.span, what, announce })
}

fn parse_public_prefix(text: &str) -> Result<IpNet, Complaint> {
    let net = prefixes::parse_prefix(text)?;
    let bits = net.max_prefix_len() - net.prefix_len();
    if bits > MAX_PREFIX.ilog2() as u8 {
        let longest = net.max_prefix_len() - MAX_PREFIX.ilog2() as u8;
        return Err(Complaint::new(format!("{net} has more than {MAX_PREFIX} addresses"))
            .help(format!("as in Azure a public prefix is at most a /{longest}: write several")));
    }
    Ok(net)
}

/// An address or a prefix that something may use.
struct Resource {
    name: String,
    span: Span,
    /// Indices into the addresses, first and behind the last.
    addresses: (usize, usize),
    user: Option<(Span, String)>,
}

/// The public addresses by name, and what each is used for.
pub struct Publics {
    names: Names,
    prefix_names: Names,
    pub addresses: Vec<PublicAddress>,
    single: Vec<Resource>,
    prefixes: Vec<Resource>,
}

impl Publics {
    /// Finds the address a reference means and takes it: an address has one user.
    pub fn take(&mut self, reference: &Text, user: &str, problems: &mut Problems) -> Option<usize> {
        let index = self.names.find(reference, "publicIPAddresses", problems)?;
        self.single[index].take(reference, user, "public IP address", problems);
        Some(self.single[index].addresses.0)
    }

    /// The same for a prefix: all of its addresses.
    pub fn take_prefix(&mut self, reference: &Text, user: &str, problems: &mut Problems) -> Vec<usize> {
        let Some(index) = self.prefix_names.find(reference, "publicIPPrefixes", problems) else {
            return Vec::new();
        };
        self.prefixes[index].take(reference, user, "public IP prefix", problems);
        let (first, end) = self.prefixes[index].addresses;
        (first..end).collect()
    }

    /// Is the address IPv6? Nothing if it could not be read.
    pub fn family(&self, index: usize) -> Option<bool> {
        let address = self.addresses[index].address;
        (!address.is_unspecified()).then_some(address.is_ipv6())
    }

    /// Where the first use of any public address stands.
    pub fn first_use(&self) -> Option<Span> {
        let all = self.single.iter().chain(&self.prefixes);
        all.filter_map(|resource| resource.user.as_ref()).map(|(span, _)| *span).min()
    }

    /// Addresses that nothing uses are hardly meant.
    pub fn warn_unused(&self, problems: &mut Problems) {
        let single = self.single.iter().map(|resource| {
            (resource, "public IP address", "`publicIPAddress` of an ip configuration or a frontend")
        });
        let prefixes = self
            .prefixes
            .iter()
            .map(|resource| (resource, "public IP prefix", "`publicIPPrefix` of a frontend"));
        for (resource, what, place) in single.chain(prefixes).filter(|(resource, ..)| resource.user.is_none())
        {
            problems
                .warning(resource.span, format!("nothing uses {what} `{}`", resource.name))
                .help(format!("name it as {place}, or remove it"));
        }
    }
}

impl Resource {
    fn take(&mut self, reference: &Text, user: &str, what: &str, problems: &mut Problems) {
        match &self.user {
            Some((span, first)) => {
                problems
                    .error(reference.span, format!("{what} `{}` is used twice", reference.value))
                    .label(format!("by {user}"))
                    .also(*span, format!("already used by {first}"))
                    .help("an address belongs to one ip configuration or one frontend: define another one");
            }
            None => self.user = Some((reference.span, user.to_owned())),
        }
    }
}

/// Where public addresses cannot be.
struct Space<'a> {
    spaces: &'a [(usize, At<IpNet>)],
    networks: &'a [network::VirtualNetwork],
    by_address: HashMap<IpAddr, Span>,
}

/// Checks what concerns more than one address.
pub fn resolve(
    read: Vec<Public<IpAddr>>,
    read_prefixes: Vec<Public<IpNet>>,
    spaces: &[(usize, At<IpNet>)],
    networks: &[network::VirtualNetwork],
    register: &mut Register,
    problems: &mut Problems,
) -> Publics {
    let mut publics = Publics {
        names: Names::new("public IP address"),
        prefix_names: Names::new("public IP prefix"),
        addresses: Vec::new(),
        single: Vec::new(),
        prefixes: Vec::new(),
    };
    let mut space = Space { spaces, networks, by_address: HashMap::new() };
    for (index, public) in read.into_iter().enumerate() {
        if let Some(name) = &public.name {
            publics.names.declare(name, index, problems);
            register.add(&["publicIPAddresses", &name.value], name.span);
        }
        if let Some(address) = &public.what {
            space.check(&At::new(IpNet::from(address.value), address.span), problems);
            space.claim(address.value, address.span, problems);
        }
        let name = public.name.map(|name| name.value).unwrap_or_default();
        let first = publics.addresses.len();
        publics.addresses.push(PublicAddress {
            name: name.clone(),
            address: public.what.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |address| address.value),
            announce: public.announce.unwrap_or(Announce::Proxy),
        });
        publics.single.push(Resource { name, span: public.span, addresses: (first, first + 1), user: None });
    }
    for (index, public) in read_prefixes.into_iter().enumerate() {
        let name = public.name.as_ref().map(|name| name.value.clone()).unwrap_or_default();
        if let Some(text) = &public.name {
            publics.prefix_names.declare(text, index, problems);
            register.add(&["publicIPPrefixes", &name], text.span);
        }
        let first = publics.addresses.len();
        if let Some(prefix) = &public.what {
            space.check(prefix, problems);
            for address in all_of(&prefix.value) {
                space.claim(address, prefix.span, problems);
                let own = format!("{name}/{address}");
                register.add(&["publicIPAddresses", &own], public.span);
                let announce = public.announce.unwrap_or(Announce::Proxy);
                publics.addresses.push(PublicAddress { name: own, address, announce });
            }
        }
        let addresses = (first, publics.addresses.len());
        publics.prefixes.push(Resource { name, span: public.span, addresses, user: None });
    }
    publics
}

/// Every address of a prefix, the first and the last too: nobody broadcasts in it.
fn all_of(net: &IpNet) -> Vec<IpAddr> {
    let count = 1_u32 << (net.max_prefix_len() - net.prefix_len());
    match net {
        IpNet::V4(net) => (0..count).map(|at| Ipv4Addr::from(u32::from(net.network()) + at).into()).collect(),
        IpNet::V6(net) => {
            let first = u128::from(net.network());
            (0..count).map(|at| IpAddr::V6((first + u128::from(at)).into())).collect()
        }
    }
}

impl Space<'_> {
    /// An address is defined once.
    fn claim(&mut self, address: IpAddr, span: Span, problems: &mut Problems) {
        match self.by_address.get(&address) {
            Some(first) => {
                problems
                    .error(span, format!("{address} is defined twice as a public address"))
                    .also(*first, "the first one")
                    .help("use the first definition, or correct the address");
            }
            None => {
                self.by_address.insert(address, span);
            }
        }
    }

    /// The address or prefix is one that the world can reach, and outside every virtual network.
    fn check(&self, public: &At<IpNet>, problems: &mut Problems) {
        let net = public.value;
        let single = net.prefix_len() == net.max_prefix_len();
        let (what, title) = match single {
            true => ("public address", net.addr().to_string()),
            false => ("public prefix", net.to_string()),
        };
        if let Some((range, why)) = prefixes::forbidden(&net) {
            problems
                .error(public.span, format!("{title} is in {range} ({why}) and cannot be a {what}"))
                .help("give an address that the world can reach");
            return;
        }
        let global: IpNet = GLOBAL_UNICAST.parse().expect("a constant prefix");
        if net.addr().is_ipv6() && !global.contains(&net) {
            problems
                .error(public.span, format!("{title} is outside {global} and cannot be a {what}"))
                .help("give a global unicast address, one that the world can reach");
        }
        let shared = |prefix: &IpNet| prefix.contains(&net.network()) || net.contains(&prefix.network());
        if let Some((network, prefix)) = self.spaces.iter().find(|(_, prefix)| shared(&prefix.value)) {
            let name = &self.networks[*network].name;
            problems
                .error(public.span, format!("{what} {title} is inside the address space of `{name}`"))
                .also(prefix.span, "this address space")
                .help("guests would look for it on their own network: choose an address outside");
        }
    }
}
