//! This host: uplinks, what guests may ask of it, timers and the size of the flow table.

use std::collections::HashMap;

use super::diagnostics::Problems;
use super::fields::Fields;
use super::interfaces::HOOKS;
use super::network::{Adoption, FlowTable, HostAccess, Timeouts, TransportProtocol, Uplink, flows_per_guest};
use super::register::Register;
use super::source::{Span, Text};
use super::tree::Node;
use super::{ports, prefixes, shape};

/// A day: longer idle timers only fill the table with the dead. RFC 5382 asks for 7,440 seconds.
const MAX_SECONDS: u32 = 86_400;

/// An hour: what has been silent for longer has other troubles, and a door that opens from the middle is not left open.
const MAX_GRACE: u32 = 3600;

/// Below the first the table is of no use, above the second its index no longer fits a half-record.
const FLOWS: std::ops::RangeInclusive<u32> = 1024..=4_194_304;
const GUEST_FLOWS: std::ops::RangeInclusive<u32> = 16..=4_194_304;

/// An uplink as read.
pub struct ReadUplink {
    device: Option<Text>,
    uplink: Uplink,
}

/// Reads `uplinks`.
pub fn read_uplinks(items: &[Node<'_>], problems: &mut Problems) -> Vec<ReadUplink> {
    items.iter().filter_map(|node| read_uplink(node, problems)).collect()
}

fn read_uplink(node: &Node<'_>, problems: &mut Problems) -> Option<ReadUplink> {
    let fields = Fields::open(node, &shape::UPLINK, problems)?;
    let device = fields.parsed("device", prefixes::parse_device, problems);
    let hook = fields.choice("hook", HOOKS, problems).map(|hook| hook.value).unwrap_or_default();
    let reserve_host_ports = fields.flag("reserveHostPorts", problems).is_some_and(|flag| flag.value);
    let name = device.as_ref().map(|device| device.value.clone()).unwrap_or_default();
    Some(ReadUplink { device, uplink: Uplink { device: name, hook, reserve_host_ports } })
}

/// Checks the uplinks against each other and against the guests' devices.
pub fn resolve_uplinks(
    read: Vec<ReadUplink>,
    guests: &HashMap<String, Span>,
    register: &mut Register,
    problems: &mut Problems,
) -> Vec<Uplink> {
    let mut seen: HashMap<String, Span> = HashMap::new();
    for uplink in &read {
        let Some(device) = &uplink.device else { continue };
        register.add(&["uplinks", &device.value], device.span);
        if let Some(first) = seen.insert(device.value.clone(), device.span) {
            problems
                .error(device.span, format!("device `{}` is an uplink twice", device.value))
                .also(first, "the first one")
                .help("remove one of them");
        }
        if let Some(guest) = guests.get(&device.value) {
            problems
                .error(
                    device.span,
                    format!("device `{}` is both an uplink and a guest's device", device.value),
                )
                .also(*guest, "a guest is attached here")
                .help("guests and the world must be on different devices (a VLAN device counts as one)");
        }
    }
    read.into_iter().map(|uplink| uplink.uplink).collect()
}

/// Reads `hostAccess`.
pub fn read_host_access(node: Option<&Node<'_>>, problems: &mut Problems) -> HostAccess {
    let default = HostAccess::default();
    let Some(fields) = node.and_then(|node| Fields::open(node, &shape::HOST_ACCESS, problems)) else {
        return default;
    };
    let mut flag = |field, default| fields.flag(field, problems).map_or(default, |flag| flag.value);
    let dhcp = flag("dhcp", default.dhcp);
    let dns = flag("dns", default.dns);
    let echo = flag("echo", default.echo);
    let items = fields.list("services", problems);
    let services = items.iter().filter_map(|item| read_service(item, problems)).collect();
    HostAccess { dhcp, dns, echo, services }
}

fn read_service(node: &Node<'_>, problems: &mut Problems) -> Option<(TransportProtocol, u16, u16)> {
    let fields = Fields::open(node, &shape::HOST_SERVICE, problems)?;
    let words = [("Tcp", TransportProtocol::Tcp), ("Udp", TransportProtocol::Udp)];
    let protocol = fields.choice("protocol", &words, problems);
    let range = fields.parsed("portRange", |text| ports::parse_range(text, "services"), problems);
    let (low, high) = range?.value;
    Some((protocol?.value, low, high))
}

/// Reads `timeouts`; `default` holds for what is left out.
pub fn read_timeouts(node: Option<&Node<'_>>, default: Timeouts, problems: &mut Problems) -> Timeouts {
    let Some(fields) = node.and_then(|node| Fields::open(node, &shape::TIMEOUTS, problems)) else {
        return default;
    };
    let mut seconds = |field, default| {
        fields.number(field, 1, MAX_SECONDS, problems).map_or(default, |number| number.value)
    };
    Timeouts {
        tcp_established: seconds("tcpEstablishedSeconds", default.tcp_established),
        tcp_half_open: seconds("tcpHalfOpenSeconds", default.tcp_half_open),
        tcp_fin: seconds("tcpFinSeconds", default.tcp_fin),
        tcp_reset: seconds("tcpResetSeconds", default.tcp_reset),
        tcp_transitory: seconds("tcpTransitorySeconds", default.tcp_transitory),
        udp: seconds("udpSeconds", default.udp),
        icmp: seconds("icmpSeconds", default.icmp),
        other: seconds("otherSeconds", default.other),
    }
}

/// Reads `adoption`.
pub fn read_adoption(node: Option<&Node<'_>>, problems: &mut Problems) -> Adoption {
    let default = Adoption::default();
    let Some(fields) = node.and_then(|node| Fields::open(node, &shape::ADOPTION, problems)) else {
        return default;
    };
    let seconds = fields.number("graceSeconds", 0, MAX_GRACE, problems);
    Adoption { grace_seconds: seconds.map_or(default.grace_seconds, |seconds| seconds.value) }
}

/// Reads `flowTable`.
pub fn read_flow_table(node: Option<&Node<'_>>, problems: &mut Problems) -> FlowTable {
    let default = FlowTable::default();
    let Some(fields) = node.and_then(|node| Fields::open(node, &shape::FLOW_TABLE, problems)) else {
        return default;
    };
    let mut flows = |field, range: &std::ops::RangeInclusive<u32>, default| {
        fields.number(field, *range.start(), *range.end(), problems).map_or(default, |number| number.value)
    };
    let max_flows = flows("maxFlows", &FLOWS, default.max_flows);
    let max_flows_v6 = flows("maxFlowsIPv6", &FLOWS, default.max_flows_v6);
    FlowTable {
        max_flows,
        max_flows_v6,
        max_flows_per_guest: flows("maxFlowsPerGuest", &GUEST_FLOWS, flows_per_guest(max_flows)),
        max_flows_per_guest_v6: flows("maxFlowsPerGuestIPv6", &GUEST_FLOWS, flows_per_guest(max_flows_v6)),
    }
}
