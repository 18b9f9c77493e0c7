//! The part of the JSON Schema ([`super::schema`]) about the edge towards the world and about this host.
#![allow(dead_code, reason = "only the schema is made from them")]

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};

use super::schema::{DEVICE, Hook, NAME, PortRange, ServiceProtocol, in_place, word};

in_place! {
    Announce => word(&["address", "proxy", "routed"]);
    Profile => word(&["azure", "natgateway", "rfc"]);
    Filtering => word(&["addressAndPort", "endpointIndependent"]);
    Exhaustion => word(&["silent", "icmp", "reset"]);
}

/// An address under which the world knows guests; used by one ip configuration or one frontend.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct PublicIPAddress {
    /// Unique name.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// IPv4 address, or IPv6 address in 2000::/3, outside every virtual network.
    ip_address: String,
    /// How the world finds it: `address` (it is this host's own), `proxy` (answered by ARP on the uplinks) or `routed`
    /// (the world routes it here).
    announce: Announce,
}

/// A range of such addresses, all of which an outbound rule's frontend uses.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct PublicIPPrefix {
    /// Unique name.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// Prefix of up to 16 addresses (IPv4 /28, IPv6 /124) outside every virtual network.
    ip_prefix: String,
    /// How the world finds its addresses, as for a public address.
    announce: Announce,
}

/// The shared addresses of guests that have no other way out; at least one.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct DefaultOutbound {
    /// Name of an IPv4 public address that nothing else uses.
    #[schemars(rename = "publicIPAddress")]
    public_ip_address: Option<String>,
    /// Name of an IPv6 public address that nothing else uses.
    #[schemars(rename = "publicIPAddressIPv6")]
    public_ip_address_ipv6: Option<String>,
    /// Minutes after which an idle TCP or UDP flow ends: 4 to 120. Left out, `timeouts` hold (which are 4 minutes too).
    #[schemars(range(min = 4, max = 120))]
    idle_timeout_in_minutes: Option<u32>,
}

/// What holds for all SNAT ports.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct Snat {
    /// Whose behaviour: Azure's load balancer (default), its NAT gateway (which holds ports otherwise), or what RFC 4787, 5382
    /// and 5508 ask of a NAT (a port for each socket). Changes the defaults of `timeouts`.
    profile: Option<Profile>,
    /// Who may send to a port that an inside socket has: addressAndPort, whom it has sent to (default), or
    /// endpointIndependent, anybody as far as the guest's groups allow (default of the profile rfc).
    filtering: Option<Filtering>,
    /// What a guest is told that finds no port: silent (default), icmp (type 3 code 13; default of the profile rfc, and of
    /// every refusal there) or reset (a RST to TCP, ICMP to others).
    on_exhaustion: Option<Exhaustion>,
    /// Minutes that flows on reclaimed ports may go on: 0 to 1440, default 60.
    #[schemars(range(min = 0, max = 1440))]
    drain_minutes: Option<u32>,
}

/// A device towards the world.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct Uplink {
    /// The device of this host.
    #[schemars(regex(pattern = DEVICE))]
    device: String,
    /// Which hook of the kernel to use: auto (default), xdp or tc.
    hook: Option<Hook>,
    /// May the host's own ports be restricted (`ip_local_reserved_ports`) so that frontends on its address get all
    /// 64,000? Default false.
    reserve_host_ports: Option<bool>,
}

/// What guests may ask of this host.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct HostAccess {
    /// DHCP, default true.
    dhcp: Option<bool>,
    /// DNS, default true.
    dns: Option<bool>,
    /// Ping, default true.
    echo: Option<bool>,
    /// Further services of the host.
    services: Option<Vec<HostService>>,
}

/// A service of this host that guests may use.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct HostService {
    /// Tcp or Udp.
    protocol: ServiceProtocol,
    /// A port or a range such as 8000-8010.
    port_range: PortRange,
}

/// When flows end, in seconds (1 to 86400).
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct Timeouts {
    /// Established TCP without traffic; default 240 (outbound rules have their own).
    #[schemars(range(min = 1, max = 86400))]
    tcp_established_seconds: Option<u32>,
    /// TCP whose handshake is not complete; default 30.
    #[schemars(range(min = 1, max = 86400))]
    tcp_half_open_seconds: Option<u32>,
    /// TCP closed by FIN; default 240, 65 with the profile natgateway of `snat`.
    #[schemars(range(min = 1, max = 86400))]
    tcp_fin_seconds: Option<u32>,
    /// TCP closed by a RST of one of its ends; default 15, 16 with the profile natgateway of `snat`.
    #[schemars(range(min = 1, max = 86400))]
    tcp_reset_seconds: Option<u32>,
    /// TCP after a RST whose sequence number does not show that it is one of its ends', if nobody speaks any more; default 240.
    #[schemars(range(min = 1, max = 86400))]
    tcp_transitory_seconds: Option<u32>,
    /// UDP without traffic; default 240.
    #[schemars(range(min = 1, max = 86400))]
    udp_seconds: Option<u32>,
    /// ICMP queries; default 60.
    #[schemars(range(min = 1, max = 86400))]
    icmp_seconds: Option<u32>,
    /// Any other protocol; default 240.
    #[schemars(range(min = 1, max = 86400))]
    other_seconds: Option<u32>,
}

/// Size of the table of flows.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct FlowTable {
    /// Flows it must be able to hold, 1024 to 4194304; default 262144. A running datapath keeps its size until `portcullis down`.
    #[schemars(range(min = 1024, max = 4_194_304))]
    max_flows: Option<u32>,
    /// The same for IPv6, which has a table of its own: 1024 to 4194304; default 65536.
    #[schemars(rename = "maxFlowsIPv6", range(min = 1024, max = 4_194_304))]
    max_flows_ipv6: Option<u32>,
    /// Flows of IPv4 that one guest may hold, 16 to 4194304; default a quarter of `maxFlows`, but at least 1024.
    #[schemars(range(min = 16, max = 4_194_304))]
    max_flows_per_guest: Option<u32>,
    /// The same for IPv6; default a quarter of `maxFlowsIPv6`, but at least 1024.
    #[schemars(rename = "maxFlowsPerGuestIPv6", range(min = 16, max = 4_194_304))]
    max_flows_per_guest_ipv6: Option<u32>,
}

/// What becomes of connections that are older than the first start.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct Adoption {
    /// Seconds after the first start, 0 to 3600, for which TCP connections that need no translation of ports are adopted, and
    /// guests are told by a RST that others are gone; default 300. 0: neither, and nothing is taken over from conntrack.
    #[schemars(range(min = 0, max = 3600))]
    grace_seconds: Option<u32>,
}
