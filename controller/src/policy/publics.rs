//! Public IP addresses, and who uses which.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;

use super::diagnostics::Problems;
use super::fields::Fields;
use super::names::Names;
use super::network::{self, Announce};
use super::register::Register;
use super::source::{At, Span, Text};
use super::tree::Node;
use super::{prefixes, shape};

/// A public address as read.
pub struct Public {
    name: Option<Text>,
    span: Span,
    address: Option<At<Ipv4Addr>>,
    announce: Option<Announce>,
}

/// Reads `publicIPAddresses`.
pub fn read(items: &[Node<'_>], problems: &mut Problems) -> Vec<Public> {
    items.iter().filter_map(|node| read_public(node, problems)).collect()
}

fn read_public(node: &Node<'_>, problems: &mut Problems) -> Option<Public> {
    let fields = Fields::open(node, &shape::PUBLIC_ADDRESS, problems)?;
    let name = fields.text("name", problems);
    let parse = |text: &str| prefixes::parse_v4(text, "public address");
    let address = fields.parsed("ipAddress", parse, problems);
    let announce = fields.choice(
        "announce",
        &[("address", Announce::Address), ("proxy", Announce::Proxy), ("routed", Announce::Routed)],
        problems,
    );
    Some(Public { name, span: fields.span, address, announce: announce.map(|announce| announce.value) })
}

/// The public addresses by name, and what each is used for.
pub struct Publics {
    names: Names,
    pub addresses: Vec<network::PublicAddress>,
    spans: Vec<Span>,
    users: Vec<Option<(Span, String)>>,
}

impl Publics {
    /// Finds the address a reference means and takes it: an address has one user.
    pub fn take(&mut self, reference: &Text, user: &str, problems: &mut Problems) -> Option<usize> {
        let index = self.names.find(reference, "publicIPAddresses", problems)?;
        match &self.users[index] {
            Some((span, first)) => {
                problems
                    .error(reference.span, format!("public IP address `{}` is used twice", reference.value))
                    .label(format!("by {user}"))
                    .also(*span, format!("already used by {first}"))
                    .help("an address belongs to one ip configuration or one frontend: define another one");
            }
            None => self.users[index] = Some((reference.span, user.to_owned())),
        }
        Some(index)
    }

    /// Where the first use of any public address stands.
    pub fn first_use(&self) -> Option<Span> {
        self.users.iter().flatten().map(|(span, _)| *span).min()
    }

    /// Addresses that nothing uses are hardly meant.
    pub fn warn_unused(&self, problems: &mut Problems) {
        for (index, user) in self.users.iter().enumerate() {
            if user.is_none() {
                problems
                    .warning(
                        self.spans[index],
                        format!("nothing uses public IP address `{}`", self.addresses[index].name),
                    )
                    .help(
                        "name it as `publicIPAddress` of an ip configuration or a frontend, or \
                        remove it",
                    );
            }
        }
    }
}

/// Checks what concerns more than one address.
pub fn resolve(
    read: Vec<Public>,
    spaces: &[(usize, At<IpNet>)],
    networks: &[network::VirtualNetwork],
    register: &mut Register,
    problems: &mut Problems,
) -> Publics {
    let mut publics = Publics {
        names: Names::new("public IP address"),
        addresses: Vec::new(),
        spans: Vec::new(),
        users: Vec::new(),
    };
    let mut by_address: HashMap<Ipv4Addr, Span> = HashMap::new();
    for (index, public) in read.into_iter().enumerate() {
        if let Some(name) = &public.name {
            publics.names.declare(name, index, problems);
            register.add(&["publicIPAddresses", &name.value], name.span);
        }
        if let Some(address) = &public.address {
            check_address(address, spaces, networks, problems);
            match by_address.get(&address.value) {
                Some(first) => {
                    problems
                        .error(
                            address.span,
                            format!("{} is defined twice as a public address", address.value),
                        )
                        .also(*first, "the first one")
                        .help("use the first definition, or correct the address");
                }
                None => {
                    by_address.insert(address.value, address.span);
                }
            }
        }
        publics.addresses.push(network::PublicAddress {
            name: public.name.map(|name| name.value).unwrap_or_default(),
            address: IpAddr::V4(public.address.map_or(Ipv4Addr::UNSPECIFIED, |address| address.value)),
            announce: public.announce.unwrap_or(Announce::Proxy),
        });
        publics.spans.push(public.span);
        publics.users.push(None);
    }
    publics
}

fn check_address(
    address: &At<Ipv4Addr>,
    spaces: &[(usize, At<IpNet>)],
    networks: &[network::VirtualNetwork],
    problems: &mut Problems,
) {
    let ip = IpAddr::V4(address.value);
    if let Some((range, why)) = prefixes::forbidden(&IpNet::from(ip)) {
        problems
            .error(
                address.span,
                format!("{} is in {range} ({why}) and cannot be a public address", address.value),
            )
            .help("give an address that the world can reach");
    }
    if let Some((network, prefix)) = spaces.iter().find(|(_, prefix)| prefix.value.contains(&ip)) {
        let name = &networks[*network].name;
        problems
            .error(
                address.span,
                format!("public address {} is inside the address space of `{name}`", address.value),
            )
            .also(prefix.span, "this address space")
            .help("guests would look for it on their own network: choose an address outside");
    }
}
