//! Network interfaces: guests, their devices and addresses.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;

use super::diagnostics::Problems;
use super::fields::Fields;
use super::names::{Names, check_name};
use super::network::{self, Hook};
use super::networks::Resolved;
use super::publics::Publics;
use super::register::Register;
use super::source::{At, Span, Text};
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
    address: Option<At<Ipv4Addr>>,
    public: Option<Text>,
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
    if let Some(node) = fields.node("ipConfigurations")
        && matches!(&node.value, super::tree::Value::List(list) if list.is_empty())
    {
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
    let parse = |text: &str| prefixes::parse_v4(text, "guest address");
    let address = fields.parsed("privateIPAddress", parse, problems);
    let public = fields.text("publicIPAddress", problems);
    let name = named.as_ref().map_or_else(|| format!("ipconfig{}", at + 1), |name| name.value.clone());
    Some(Configuration { name, named, span: fields.span, subnet, address, public })
}

/// The interfaces by name, for backend pools to refer to.
pub struct Interfaces {
    pub names: Names,
    pub interfaces: Vec<network::Interface>,
    /// Every guest device and where it is first named.
    pub devices: HashMap<String, Span>,
}

/// Checks what concerns more than one object and builds the interfaces.
pub fn resolve(
    read: Vec<Interface>,
    resolved: &Resolved,
    groups: &Names,
    used_groups: &mut Vec<usize>,
    publics: &mut Publics,
    register: &mut Register,
    problems: &mut Problems,
) -> Interfaces {
    let mut names = Names::new("network interface");
    let mut owners = Owners::default();
    let mut devices: HashMap<String, Span> = HashMap::new();
    let mut hooks: HashMap<String, At<Hook>> = HashMap::new();
    let mut interfaces = Vec::with_capacity(read.len());
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
            let user = format!("`{name}/{}`", configuration.name);
            let public = configuration.public.as_ref().and_then(|text| publics.take(text, &user, problems));
            addresses.push(network::IpConfiguration {
                name: configuration.name,
                address: IpAddr::V4(
                    configuration.address.map_or(Ipv4Addr::UNSPECIFIED, |address| address.value),
                ),
                subnet: subnet.unwrap_or_default(),
                public_address: public,
                application_groups: Vec::new(),
            });
        }
        let hook = interface.hook.map(|hook| hook.value).unwrap_or_default();
        interfaces.push(network::Interface { name, device, mac: interface.mac, hook, group, addresses });
    }
    // A device has one hook; an interface that leaves it open follows the one that says it.
    for interface in &mut interfaces {
        if let Some(hook) = hooks.get(&interface.device) {
            interface.hook = hook.value;
        }
    }
    Interfaces { names, interfaces, devices }
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

fn check_address(address: &At<Ipv4Addr>, subnet: usize, resolved: &Resolved, problems: &mut Problems) {
    let subnet = &resolved.subnets[subnet];
    let name = &subnet.name;
    let holds =
        |subnet: &network::Subnet| subnet.prefixes.iter().any(|net| net.contains(&IpAddr::V4(address.value)));
    if subnet.prefixes.is_empty() {
        return;
    }
    let Some(IpNet::V4(prefix)) = subnet.prefixes.iter().find(|net| net.contains(&IpAddr::V4(address.value)))
    else {
        let list: Vec<_> = subnet.prefixes.iter().map(ToString::to_string).collect();
        let other = resolved.subnets.iter().find(|other| other.network == subnet.network && holds(other));
        problems
            .error(
                address.span,
                format!(
                    "{} is not in subnet `{name}` \
                ({})",
                    address.value,
                    list.join(", ")
                ),
            )
            .help(match other {
                Some(other) => format!(
                    "it is in subnet `{}`: correct the address or the \
                    subnet",
                    other.name
                ),
                None => "choose an address of this subnet".to_owned(),
            });
        return;
    };
    let reserved = if address.value == prefix.network() {
        "the network address"
    } else if address.value == prefix.broadcast() {
        "the broadcast address"
    } else if subnet.gateways.contains(&IpAddr::V4(address.value)) {
        "the gateway"
    } else {
        return;
    };
    problems
        .error(address.span, format!("{} is {reserved} of subnet `{name}` ({prefix})", address.value))
        .help("choose another address; Azure keeps the first four and the last one for itself");
}

/// Who has which address.
#[derive(Default)]
struct Owners {
    in_network: HashMap<(usize, Ipv4Addr), (String, Span)>,
    on_device: HashMap<(String, Ipv4Addr), (String, Span)>,
}

impl Owners {
    fn claim(
        &mut self,
        name: &str,
        device: &str,
        network: usize,
        address: &At<Ipv4Addr>,
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
