//! What stands before the groups: the platform's rules and services (design §4, `reference/azure.md` §1.8).

use std::collections::HashMap;
use std::net::Ipv4Addr;

use super::diagnostics::Problems;
use super::fields::{Complaint, Fields, parse_text};
use super::names::Names;
use super::network::{OnRuleChange, Platform, PlatformService, TransportProtocol};
use super::register::Register;
use super::source::{At, Span};
use super::tree::Node;
use super::{prefixes, shape};

/// The words of `onRuleChange`.
pub const ON_RULE_CHANGE: &[(&str, OnRuleChange)] =
    &[("keep", OnRuleChange::Keep), ("reevaluate", OnRuleChange::Reevaluate)];

/// The platform's own addresses: DNS, health probes and the agent; instance metadata.
const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(168, 63, 129, 16), Ipv4Addr::new(169, 254, 169, 254)];

/// Reads `platformRules` and `platformServices`.
pub fn read(
    rules: Option<&Node<'_>>,
    services: &[Node<'_>],
    register: &mut Register,
    problems: &mut Problems,
) -> Platform {
    let mut platform =
        Platform { services: read_services(services, register, problems), ..Platform::default() };
    let Some(fields) = rules.and_then(|node| Fields::open(node, &shape::PLATFORM_RULES, problems)) else {
        return platform;
    };
    let flag = |field, problems: &mut Problems| fields.flag(field, problems).is_some_and(|flag| flag.value);
    platform.allow_kms = flag("allowKms", problems);
    platform.block_smtp = flag("blockSmtp25", problems);
    let servers = fields.texts("kmsServers", problems);
    if fields.node("kmsServers").is_some() {
        if fields.is_empty_list("kmsServers") {
            problems
                .error(fields.key("kmsServers"), "`kmsServers` is empty: AzurePlatformLKM would mean nothing")
                .help("list the servers' addresses, or leave `kmsServers` out to use Azure's");
        }
        let nets = servers.into_iter().filter_map(|text| parse_text(text, prefixes::parse_network, problems));
        platform.kms_servers = nets.map(|net| net.value).collect();
    }
    platform
}

fn read_services(
    items: &[Node<'_>],
    register: &mut Register,
    problems: &mut Problems,
) -> Vec<PlatformService> {
    let mut names = Names::new("platform service");
    let mut read = Vec::new();
    let mut taken: HashMap<(Ipv4Addr, u16), Vec<(TransportProtocol, String, Span)>> = HashMap::new();
    for (index, item) in items.iter().enumerate() {
        let Some(fields) = Fields::open(item, &shape::PLATFORM_SERVICE, problems) else { continue };
        let name = fields.text("name", problems);
        if let Some(name) = &name {
            names.declare(name, index, problems);
            register.add(&["platformServices", &name.value], name.span);
        }
        let address = fields.parsed("address", parse_address, problems);
        let words = [
            ("Tcp", TransportProtocol::Tcp),
            ("Udp", TransportProtocol::Udp),
            ("All", TransportProtocol::All),
        ];
        let protocol = fields.choice("protocol", &words, problems);
        let port = fields.number("port", 1, u32::from(u16::MAX), problems);
        let service = (|| {
            Some(PlatformService {
                name: name?.value,
                address: address?.value,
                protocol: protocol?.value,
                port: port.as_ref()?.value as u16,
            })
        })();
        let (Some(service), Some(At { span, .. })) = (service, port) else { continue };
        let others = taken.entry((service.address, service.port)).or_default();
        let both = |other: TransportProtocol| {
            other == service.protocol
                || other == TransportProtocol::All
                || service.protocol == TransportProtocol::All
        };
        if let Some((_, first, place)) = others.iter().find(|(other, ..)| both(*other)) {
            problems
                .error(span, format!("port {} of {} is declared twice", service.port, service.address))
                .also(*place, format!("by `{first}`"))
                .help("remove one of them, or let one be Tcp and the other Udp");
        }
        others.push((service.protocol, service.name.clone(), span));
        read.push(service);
    }
    read
}

fn parse_address(text: &str) -> Result<Ipv4Addr, Complaint> {
    let address = text.parse::<Ipv4Addr>().ok().filter(|address| ADDRESSES.contains(address));
    address.ok_or_else(|| {
        Complaint::new(format!("`{text}` is not an address of the platform"))
            .help(format!("use {} or {}", ADDRESSES[0], ADDRESSES[1]))
    })
}
