//! The part of the JSON Schema ([`super::schema`]) about the edge towards the world and about this host.
#![allow(dead_code, reason = "only the schema is made from them")]

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};

use super::schema::{DEVICE, Hook, NAME, PortRange, Transport, in_place, word};

in_place! {
    ServiceProtocol => word(&["Tcp", "Udp"]);
    Announce => word(&["address", "proxy", "routed"]);
}

/// An address under which the world knows guests; used by one ip configuration or one frontend.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct PublicIPAddress {
    /// Unique name.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// IPv4 address outside every virtual network.
    ip_address: String,
    /// How the world finds it: `address` (it is this host's own), `proxy` (answered by ARP on the uplinks) or `routed`
    /// (the world routes it here).
    announce: Announce,
}

/// Frontends shared by pools of guests.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct LoadBalancer {
    /// Unique name.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// Its public addresses.
    #[schemars(rename = "frontendIPConfigurations")]
    frontend_ip_configurations: Vec<FrontendIPConfiguration>,
    /// Groups of guests.
    backend_address_pools: Option<Vec<BackendAddressPool>>,
    /// Which pool leaves by which frontends, and with how many ports.
    outbound_rules: Option<Vec<OutboundRule>>,
}

/// A public address of a load balancer.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct FrontendIPConfiguration {
    /// Name, unique in its load balancer.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// Name of the public address.
    #[schemars(rename = "publicIPAddress")]
    public_ip_address: String,
}

/// A group of guests.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct BackendAddressPool {
    /// Name, unique in its load balancer.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// Members: `vm1`, or `vm1/primary` where an interface has several ip configurations.
    #[schemars(rename = "backendIPConfigurations")]
    backend_ip_configurations: Option<Vec<String>>,
}

/// Gives a pool's members ports of the frontends for flows towards the world.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct OutboundRule {
    /// Name, unique in its load balancer.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// Names of frontends of this load balancer.
    #[schemars(rename = "frontendIPConfigurations", length(min = 1))]
    frontend_ip_configurations: Vec<String>,
    /// Name of a pool of this load balancer.
    backend_address_pool: String,
    /// Tcp, Udp or All (both, and echo).
    protocol: Transport,
    /// Ports per member, a multiple of 8; 0 (default) for Azure's tiers by the size of the pool: 1,024 for up to 50.
    #[schemars(extend("multipleOf" = 8))]
    allocated_outbound_ports: Option<u32>,
    /// Minutes after which an idle TCP or UDP flow ends: 4 to 120. Left out, `timeouts` hold (which are 4 minutes too).
    #[schemars(range(min = 4, max = 120))]
    idle_timeout_in_minutes: Option<u32>,
    /// Not available yet: only false is accepted.
    #[schemars(extend("const" = false))]
    enable_tcp_reset: Option<bool>,
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
    /// TCP closed by FIN; default 240.
    #[schemars(range(min = 1, max = 86400))]
    tcp_fin_seconds: Option<u32>,
    /// TCP closed by RST; default 15.
    #[schemars(range(min = 1, max = 86400))]
    tcp_reset_seconds: Option<u32>,
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
}
