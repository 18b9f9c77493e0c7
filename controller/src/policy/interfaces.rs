//! Network interfaces: guests, their devices and addresses.

use std::collections::HashMap;
use std::net::IpAddr;

use super::application::Applications;
use super::diagnostics::Problems;
use super::fields::Fields;
use super::frontends::family;
use super::names::{Names, check_name};
use super::network::{self, Hook, Limits};
use super::networks::Resolved;
use super::publics::Publics;
use super::register::Register;
use super::source::{At, Span, Text};
use super::subnets::reserved;
use super::tree::Node;
use super::{prefixes, shape};

/// The words of `hook`.
pub const HOOKS: &[(&str, Hook)] = &[("auto", Hook::Auto), ("xdp", Hook::Xdp), ("tc", Hook::Tc)];

/// A network interface as read.
pub struct Interface {
    name: Option<Text>,
    span: Span,
    pub device: Option<Text>,
    mac: Option<[u8; 6]>,
    hook: Option<At<Hook>>,
    group: Option<Text>,
    configurations: Vec<Configuration>,
}

struct Configuration {
    /// `ipconfig1` and so on unless given, as Azure's portal names them.
    name: String,
    named: Option<Text>,
    span: Span,
    subnet: Option<Text>,
    address: Option<At<IpAddr>>,
    public: Option<Text>,
    application_groups: Vec<Text>,
}

/// Reads `networkInterfaces`.
pub fn read(items: &[Node<'_>], problems: &mut Problems) -> Vec<Interface> {
    items.iter().filter_map(|node| read_interface(node, problems)).collect()
}

fn read_interface(node: &Node<'_>, problems: &mut Problems) -> Option<Interface> {
    let fields = Fields::open(node, &shape::NETWORK_INTERFACE, problems)?;
    let name = fields.text("name", problems);
    let device = fields.parsed("device", prefixes::parse_device, problems);
    let mac = fields.parsed("macAddress", prefixes::parse_mac, problems).map(|mac| mac.value);
    let hook = fields.choice("hook", HOOKS, problems);
    let group = fields.text("networkSecurityGroup", problems);
    let items = fields.list("ipConfigurations", problems);
    if fields.is_empty_list("ipConfigurations") {
        problems
            .error(fields.key("ipConfigurations"), format!("{} has no ip configuration", fields.title))
            .help("add one with `subnet` and `privateIPAddress`");
    }
    let numbered = items.iter().enumerate();
    let configurations = numbered.filter_map(|(at, item)| read_configuration(at, item, problems)).collect();
    Some(Interface { name, span: fields.span, device, mac, hook, group, configurations })
}

fn read_configuration(at: usize, node: &Node<'_>, problems: &mut Problems) -> Option<Configuration> {
    let fields = Fields::open(node, &shape::IP_CONFIGURATION, problems)?;
    let named = fields.text("name", problems);
    let subnet = fields.text("subnet", problems);
    let address = fields.parsed("privateIPAddress", prefixes::parse_address, problems);
    let public = fields.text("publicIPAddress", problems);
    let application_groups = fields.texts("applicationSecurityGroups", problems);
    let name = named.as_ref().map_or_else(|| format!("ipconfig{}", at + 1), |name| name.value.clone());
    Some(Configuration { name, named, span: fields.span, subnet, address, public, application_groups })
}

/// The interfaces, and what refers to them needs to know.
pub struct Interfaces {
    pub names: Names,
    /// Complete only if nothing was wrong: an ip configuration without an address or a subnet is not in here.
    pub built: Vec<network::Interface>,
    /// The same interfaces as they are written, wrong ones too, for backend pools to refer to.
    pub members: Vec<Member>,
    /// Every guest device and where it is first named.
    pub devices: HashMap<String, Span>,
}

/// An interface's name, and the names and addresses of its ip configurations.
pub struct Member {
    pub name: String,
    pub configurations: Vec<(String, Option<IpAddr>)>,
}

/// What interfaces refer to.
pub struct References<'a> {
    pub networks: &'a Resolved,
    pub groups: &'a Names,
    pub used_groups: &'a mut Vec<usize>,
    pub applications: &'a mut Applications,
    pub publics: &'a mut Publics,
    pub limits: &'a Limits,
}

/// Checks what concerns more than one object and builds the interfaces.
pub fn resolve(
    read: Vec<Interface>,
    references: References<'_>,
    register: &mut Register,
    problems: &mut Problems,
) -> Interfaces {
    let References { networks: resolved, groups, used_groups, applications, publics, limits } = references;
    let mut names = Names::new("network interface");
    let mut owners = Owners::default();
    let mut devices: HashMap<String, Span> = HashMap::new();
    let mut hooks: HashMap<String, At<Hook>> = HashMap::new();
    let mut interfaces = Vec::with_capacity(read.len());
    let mut members = Vec::with_capacity(read.len());
    for (index, interface) in read.into_iter().enumerate() {
        let name = interface.name.as_ref().map(|name| name.value.clone()).unwrap_or_default();
        if let Some(text) = &interface.name {
            names.declare(text, index, problems);
            register.add(&["networkInterfaces", &name], interface.span);
        }
        let device = interface.device.as_ref().map(|device| device.value.clone()).unwrap_or_default();
        if let Some(text) = &interface.device {
            devices.entry(text.value.clone()).or_insert(text.span);
            if let Some(hook) = &interface.hook {
                one_hook(&mut hooks, &device, hook, problems);
            }
        }
        let group =
            interface.group.as_ref().and_then(|text| groups.find(text, "networkSecurityGroups", problems));
        used_groups.extend(group);
        let mut own: HashMap<String, Span> = HashMap::new();
        let mut network: Option<(usize, Span)> = None;
        let mut addresses = Vec::new();
        let mut configurations = Vec::new();
        for configuration in interface.configurations {
            if let Some(text) = &configuration.named {
                check_name(text, "ip configuration", problems);
            }
            if let Some(first) = own.insert(configuration.name.to_ascii_lowercase(), configuration.span) {
                problems
                    .error(
                        configuration.span,
                        format!("`{name}` has a second ip configuration `{}`", configuration.name),
                    )
                    .also(first, "the first one")
                    .help("give each ip configuration of an interface its own name");
            }
            let path = ["networkInterfaces", &name, "ipConfigurations", &configuration.name];
            register.add(&path, configuration.span);
            let subnet = configuration.subnet.as_ref().and_then(|text| {
                let index = resolved.find_subnet(text, problems)?;
                same_network(&name, resolved, index, text.span, &mut network, problems);
                Some(index)
            });
            if let (Some(subnet), Some(address)) = (subnet, &configuration.address) {
                check_address(address, subnet, resolved, problems);
                owners.claim(&name, &device, resolved.subnets[subnet].network, address, problems);
            }
            let title = format!("{name}/{}", configuration.name);
            let public = configuration.public.as_ref().and_then(|text| {
                let found = publics.take(text, &format!("`{title}`"), problems)?;
                let address = configuration.address.as_ref()?;
                same_family(&title, address.value, text, publics.family(found), problems);
                Some(found)
            });
            let network = subnet.map(|subnet| resolved.network_of(subnet));
            let groups = &configuration.application_groups;
            let groups = applications.join(groups, &title, network, resolved, limits, problems);
            let address = configuration.address.map(|address| address.value);
            configurations.push((configuration.name.clone(), address));
            if let (Some(address), Some(subnet)) = (address, subnet) {
                addresses.push(network::IpConfiguration {
                    name: configuration.name,
                    address,
                    subnet,
                    public_address: public,
                    application_groups: groups,
                });
            }
        }
        members.push(Member { name: name.clone(), configurations });
        let hook = interface.hook.map(|hook| hook.value).unwrap_or_default();
        interfaces.push(network::Interface { name, device, mac: interface.mac, hook, group, addresses });
    }
    // A device has one hook; an interface that leaves it open follows the one that says it.
    for interface in &mut interfaces {
        if let Some(hook) = hooks.get(&interface.device) {
            interface.hook = hook.value;
        }
    }
    Interfaces { names, built: interfaces, members, devices }
}

impl Interfaces {
    /// The address of (interface, its ip configuration), if it could be read.
    pub fn address(&self, (interface, configuration): (usize, usize)) -> Option<IpAddr> {
        self.members[interface].configurations[configuration].1
    }

    /// `vm1/primary`.
    pub fn title(&self, (interface, configuration): (usize, usize)) -> String {
        let member = &self.members[interface];
        format!("{}/{}", member.name, member.configurations[configuration].0)
    }
}

/// A public address is one to one: of the family of the address behind it.
fn same_family(title: &str, address: IpAddr, public: &Text, v6: Option<bool>, problems: &mut Problems) {
    let own = family(address.is_ipv6());
    if let Some(other) = v6.filter(|v6| *v6 != address.is_ipv6()).map(family) {
        problems
            .error(
                public.span,
                format!("`{title}` is {own} ({address}), public IP address `{}` is {other}", public.value),
            )
            .help(format!("give it to an {other} ip configuration of the guest, or name an {own} address"));
    }
}

fn one_hook(hooks: &mut HashMap<String, At<Hook>>, device: &str, hook: &At<Hook>, problems: &mut Problems) {
    match hooks.get(device) {
        Some(first) if first.value != hook.value => {
            problems
                .error(hook.span, format!("device `{device}` is given two different hooks"))
                .also(first.span, "the other one")
                .help("interfaces on one device share its hook: name it once");
        }
        Some(_) => {}
        None => {
            hooks.insert(device.to_owned(), hook.clone());
        }
    }
}

/// All addresses of one interface are in one virtual network: its packets carry one network id.
fn same_network(
    name: &str,
    resolved: &Resolved,
    subnet: usize,
    span: Span,
    network: &mut Option<(usize, Span)>,
    problems: &mut Problems,
) {
    let this = resolved.subnets[subnet].network;
    match network {
        Some((first, place)) if *first != this => {
            problems
                .error(span, format!("`{name}` has addresses in two virtual networks"))
                .also(*place, format!("this one is in `{}`", resolved.networks[*first].name))
                .help("make it two network interfaces");
        }
        _ => *network = Some((this, span)),
    }
}

fn check_address(address: &At<IpAddr>, subnet: usize, resolved: &Resolved, problems: &mut Problems) {
    let subnet = &resolved.subnets[subnet];
    let name = &subnet.name;
    let holds = |subnet: &network::Subnet| subnet.prefixes.iter().any(|net| net.contains(&address.value));
    if subnet.prefixes.is_empty() {
        return;
    }
    let Some(prefix) = subnet.prefixes.iter().find(|net| net.contains(&address.value)) else {
        let list: Vec<_> = subnet.prefixes.iter().map(ToString::to_string).collect();
        let other = resolved.subnets.iter().find(|other| other.network == subnet.network && holds(other));
        let found = problems.error(
            address.span,
            format!("{} is not in subnet `{name}` ({})", address.value, list.join(", ")),
        );
        if let Some(other) = other {
            found.help(format!("it is in subnet `{}`: correct the address or the subnet", other.name));
        } else if subnet.prefixes.iter().all(|net| net.addr().is_ipv4() != address.value.is_ipv4()) {
            found.help(
                "give the subnet a prefix of this family in `addressPrefixes`, and the address space too",
            );
        } else {
            found.help("choose an address of this subnet");
        }
        return;
    };
    let is = match reserved(prefix, address.value) {
        Some(is) => is,
        None if subnet.gateways.contains(&address.value) => "gateway",
        None => return,
    };
    problems
        .error(address.span, format!("{} is the {is} of subnet `{name}` ({prefix})", address.value))
        .help("choose another address; Azure keeps the first four and the last one for itself");
}

/// Who has which address.
#[derive(Default)]
struct Owners {
    in_network: HashMap<(usize, IpAddr), (String, Span)>,
    on_device: HashMap<(String, IpAddr), (String, Span)>,
}

impl Owners {
    fn claim(
        &mut self,
        name: &str,
        device: &str,
        network: usize,
        address: &At<IpAddr>,
        problems: &mut Problems,
    ) {
        if let Some((other, span)) = self.in_network.get(&(network, address.value)) {
            let message = if other == name {
                format!("`{name}` has the address {} twice", address.value)
            } else {
                format!("`{other}` and `{name}` have the same address {}", address.value)
            };
            problems
                .error(address.span, message)
                .also(*span, format!("`{other}` has it here"))
                .help("give one of them another address");
            return;
        }
        self.in_network.insert((network, address.value), (name.to_owned(), address.span));
        if device.is_empty() {
            return;
        }
        let key = (device.to_owned(), address.value);
        if let Some((other, span)) = self.on_device.get(&key) {
            problems
                .error(
                    address.span,
                    format!(
                        "`{other}` and `{name}` have the same address {} on one \
                    device",
                        address.value
                    ),
                )
                .also(*span, format!("`{other}` has it here"))
                .help(
                    "guests behind one device are told apart by their address: give one of them \
                    another, or its own device",
                );
            return;
        }
        self.on_device.insert(key, (name.to_owned(), address.span));
    }
}
