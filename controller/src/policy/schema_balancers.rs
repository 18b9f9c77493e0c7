//! The part of the JSON Schema ([`super::schema`]) about load balancers.
#![allow(dead_code, reason = "only the schema is made from them")]

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};

use super::schema::{NAME, ServiceProtocol, Transport, in_place, word};

in_place! {
    SnatAllocation => word(&["min1024", "multiply", "basic"]);
    FrontendUse => word(&["sequential", "spread"]);
    ProbeProtocol => word(&["Tcp", "Http"]);
    LoadDistribution => word(&["Default", "SourceIP", "SourceIPProtocol"]);
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
    /// Default ports per member where there are several frontends: min1024 (default; the tier times the frontends, at most
    /// 1,024), multiply (the tier on each) or basic (one frontend, chosen at random).
    snat_allocation: Option<SnatAllocation>,
    /// In which order a member's ports on several frontends are used: sequential (default; one frontend after the other) or
    /// spread.
    frontend_use: Option<FrontendUse>,
    /// Groups of guests.
    backend_address_pools: Option<Vec<BackendAddressPool>>,
    /// How backends are asked whether they live.
    probes: Option<Vec<Probe>>,
    /// What arrives at a frontend's port goes to one of a pool.
    load_balancing_rules: Option<Vec<LoadBalancingRule>>,
    /// What arrives at a frontend's port goes to one member.
    inbound_nat_rules: Option<Vec<InboundNatRule>>,
    /// Which pool leaves by which frontends, and with how many ports.
    outbound_rules: Option<Vec<OutboundRule>>,
}

/// A public address of a load balancer, or a prefix of them.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct FrontendIPConfiguration {
    /// Name, unique in its load balancer.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// Name of the public address; this or `publicIPPrefix`.
    #[schemars(rename = "publicIPAddress")]
    public_ip_address: Option<String>,
    /// Name of the public prefix, for outbound rules only; this or `publicIPAddress`.
    #[schemars(rename = "publicIPPrefix")]
    public_ip_prefix: Option<String>,
}

/// A group of guests.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct BackendAddressPool {
    /// Name, unique in its load balancer.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// Members: `vm1` for its only IPv4 ip configuration, `vm1/ipconfig6` for any.
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
    /// Names of frontends of this load balancer, all of one family.
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
    /// Do both sides get a RST when an established TCP flow has been idle for too long? Default false.
    enable_tcp_reset: Option<bool>,
}

/// How a backend is asked whether it lives.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct Probe {
    /// Name, unique in its load balancer.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// Tcp (a handshake) or Http (GET, answered 200).
    protocol: ProbeProtocol,
    /// Port of the backend; with Http not 19, 21, 25, 70, 110, 119, 143, 220 or 993.
    #[schemars(range(min = 1, max = 65535))]
    port: u16,
    /// Path to GET, required with Http.
    #[schemars(length(max = 2048), regex(pattern = "^/[!-~]*$"))]
    request_path: Option<String>,
    /// Seconds between probes: 5 (default) to 86400.
    #[schemars(range(min = 5, max = 86400))]
    interval_in_seconds: Option<u32>,
    /// So many results in a row change the state: 1 (default) to 100.
    #[schemars(range(min = 1, max = 100))]
    probe_threshold: Option<u32>,
    /// The older name of `probeThreshold`.
    #[schemars(range(min = 1, max = 100))]
    number_of_probes: Option<u32>,
}

/// What arrives at a frontend's port goes to one of a pool.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct LoadBalancingRule {
    /// Name, unique in its load balancer.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// Name of a frontend of this load balancer, with a public address.
    #[schemars(rename = "frontendIPConfiguration")]
    frontend_ip_configuration: String,
    /// Name of a pool of this load balancer.
    backend_address_pool: String,
    /// Tcp or Udp.
    protocol: ServiceProtocol,
    /// Port of the frontend, which no other rule has for this protocol.
    #[schemars(range(min = 1, max = 65535))]
    frontend_port: u16,
    /// Port of the backend; the frontend's if left out.
    #[schemars(range(min = 1, max = 65535))]
    backend_port: Option<u16>,
    /// Name of a probe of this load balancer; without one every member is taken to live.
    probe: Option<String>,
    /// What goes to the same member: the packets of one flow (Default), of one client (SourceIP), of one client and protocol
    /// (SourceIPProtocol).
    load_distribution: Option<LoadDistribution>,
    /// Minutes after which an idle flow ends: 4 to 30. Left out, `timeouts` hold (which are 4 minutes too).
    #[schemars(range(min = 4, max = 30))]
    idle_timeout_in_minutes: Option<u32>,
    /// Do both sides get a RST when an established TCP flow has been idle for too long? Default false.
    enable_tcp_reset: Option<bool>,
    /// Does the packet keep the frontend's address as its destination? Default false.
    #[schemars(rename = "enableFloatingIP")]
    enable_floating_ip: Option<bool>,
    /// Does the rule give its pool no SNAT ports? Default false; must be true where an outbound rule has the frontend too.
    disable_outbound_snat: Option<bool>,
}

/// What arrives at a frontend's port goes to one member; what arrives at one of a range, to the member that has it.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct InboundNatRule {
    /// Name, unique in its load balancer.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// Name of a frontend of this load balancer, with a public address.
    #[schemars(rename = "frontendIPConfiguration")]
    frontend_ip_configuration: String,
    /// Tcp, Udp or All (both).
    protocol: Transport,
    /// A single port of the frontend, with `backendIPConfiguration`.
    #[schemars(range(min = 1, max = 65535))]
    frontend_port: Option<u16>,
    /// First port of a range, with `frontendPortRangeEnd` and `backendAddressPool`.
    #[schemars(range(min = 1, max = 65535))]
    frontend_port_range_start: Option<u16>,
    /// Last port of the range, which has one for each member at least.
    #[schemars(range(min = 1, max = 65535))]
    frontend_port_range_end: Option<u16>,
    /// Port of the backend.
    #[schemars(range(min = 1, max = 65535))]
    backend_port: u16,
    /// The member of a single port: `vm1` or `vm1/primary`.
    #[schemars(rename = "backendIPConfiguration")]
    backend_ip_configuration: Option<String>,
    /// The pool of a range.
    backend_address_pool: Option<String>,
    /// Minutes after which an idle flow ends: 4 to 30. Left out, `timeouts` hold (which are 4 minutes too).
    #[schemars(range(min = 4, max = 30))]
    idle_timeout_in_minutes: Option<u32>,
    /// Do both sides get a RST when an established TCP flow has been idle for too long? Default false.
    enable_tcp_reset: Option<bool>,
    /// Does the packet keep the frontend's address as its destination? Default false.
    #[schemars(rename = "enableFloatingIP")]
    enable_floating_ip: Option<bool>,
}
