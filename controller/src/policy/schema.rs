//! The policy's shape once more, for the JSON Schema that editors complete and check against.
//!
//! These types are never filled: the reader goes by `shape`, which gives better messages than a derive can. That both
//! name the same fields is tested below; that the committed schema is this one is tested in `tests/policy_schema.rs`.
#![allow(dead_code)]

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

/// The JSON Schema of a policy, as committed in `docs/policy.schema.json`.
pub fn json_schema() -> String {
    let schema = schemars::schema_for!(Policy);
    let mut text = serde_json::to_string_pretty(&schema).expect("a schema is JSON");
    text.push('\n');
    text
}

/// A word that may be written in any case: editors offer the usual spelling and accept the others.
fn word(words: &[&str]) -> Schema {
    let any_case = |c: char| match c.is_ascii_alphabetic() {
        true => format!("[{}{}]", c.to_ascii_uppercase(), c.to_ascii_lowercase()),
        false if c == '*' => "\\*".to_owned(),
        false => c.to_string(),
    };
    let spelled: Vec<String> = words.iter().map(|word| word.chars().map(any_case).collect()).collect();
    let pattern = format!("^({})$", spelled.join("|"));
    json_schema!({ "anyOf": [{ "enum": words }, { "type": "string", "pattern": pattern }] })
}

/// A type that stands for a schema of its own, written in place.
macro_rules! inline {
    ($($name:ident => $schema:expr;)*) => {$(
        struct $name;

        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                $schema
            }
        }
    )*};
}

inline! {
    Direction => word(&["Inbound", "Outbound"]);
    Access => word(&["Allow", "Deny"]);
    RuleProtocol => word(&["Tcp", "Udp", "Icmp", "Esp", "Ah", "*"]);
    Transport => word(&["Tcp", "Udp", "All"]);
    ServiceProtocol => word(&["Tcp", "Udp"]);
    Announce => word(&["address", "proxy", "routed"]);
    Hook => word(&["auto", "xdp", "tc"]);
    HopType => word(&["VnetLocal", "Internet", "VirtualAppliance", "VirtualNetworkGateway", "None"]);
    OnRuleChange => word(&["keep", "reevaluate"]);
    PortRange => json_schema!({ "anyOf": [
        { "type": "integer", "minimum": 0, "maximum": 65535 },
        { "type": "string", "pattern": "^(\\*|[0-9]{1,5}|[0-9]{1,5}-[0-9]{1,5})$" },
    ] });
}

/// A Portcullis policy: the networks behind this host, who may talk to whom, and under whose address.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
struct Policy {
    /// Address spaces and their subnets. Two virtual networks may have the same prefixes.
    virtual_networks: Option<Vec<VirtualNetwork>>,
    /// The guests: one entry per attachment of a VM, container or machine to this host.
    network_interfaces: Option<Vec<NetworkInterface>>,
    /// Groups of rules that subnets and network interfaces refer to.
    network_security_groups: Option<Vec<NetworkSecurityGroup>>,
    /// Addresses under which the world knows the guests.
    #[schemars(rename = "publicIPAddresses")]
    public_ip_addresses: Option<Vec<PublicIPAddress>>,
    /// Frontends shared by pools of guests.
    load_balancers: Option<Vec<LoadBalancer>>,
    /// Devices towards the world.
    uplinks: Option<Vec<Uplink>>,
    /// What guests may ask of this host.
    host_access: Option<HostAccess>,
    /// When idle and closing flows end, in seconds.
    timeouts: Option<Timeouts>,
    /// Size of the table of flows.
    flow_table: Option<FlowTable>,
    /// Sets of ip configurations that rules name instead of addresses.
    application_security_groups: Option<Vec<ApplicationSecurityGroup>>,
    /// Names for sets of prefixes, besides the built-in VirtualNetwork, Internet, AzureLoadBalancer and AzurePlatform tags.
    service_tags: Option<ServiceTags>,
    /// Routes of their own for the subnets that name them.
    route_tables: Option<Vec<RouteTable>>,
    /// Rules that stand before all groups.
    platform_rules: Option<PlatformRules>,
    /// What this host serves under 168.63.129.16 and 169.254.169.254; groups do not apply, unless a rule names the
    /// service's AzurePlatform tag.
    platform_services: Option<Vec<PlatformService>>,
    /// What a change of rules does to live flows: keep (default; they stay until they end) or reevaluate (the initiator's
    /// next packet is judged by the new rules).
    on_rule_change: Option<OnRuleChange>,
    /// How much of everything the policy may have; Azure's limits unless changed.
    limits: Option<Limits>,
}

/// A virtual network.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
struct VirtualNetwork {
    /// Unique name.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// The addresses that belong to this network.
    address_space: AddressSpace,
    /// Virtual networks that this one reaches as if they were part of it; they must name this one too.
    virtual_network_peerings: Option<Vec<VirtualNetworkPeering>>,
    /// Parts of the address space.
    subnets: Option<Vec<Subnet>>,
}

const NAME: &str = "^[A-Za-z0-9_]([A-Za-z0-9_.-]{0,78}[A-Za-z0-9_])?$";
const DEVICE: &str = "^[^/:\\s]{1,15}$";
const MAC: &str = "^([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}$|^([0-9A-Fa-f]{2}-){5}[0-9A-Fa-f]{2}$";

/// One side of a peering: the other virtual network has one towards this.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
struct VirtualNetworkPeering {
    /// Name, unique in its virtual network.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// Name of the other virtual network.
    remote_virtual_network: String,
}

/// The addresses of a virtual network.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
struct AddressSpace {
    /// Prefixes of both families, such as 10.0.0.0/16 and fd00:1::/48; they must not overlap.
    #[schemars(length(min = 1))]
    address_prefixes: Vec<String>,
}

/// A part of a virtual network's address space.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
struct Subnet {
    /// Name, unique in its virtual network.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// Prefix inside the address space; this or `addressPrefixes`.
    address_prefix: Option<String>,
    /// Several prefixes, of both families; this or `addressPrefix`.
    #[schemars(length(min = 1))]
    address_prefixes: Option<Vec<String>>,
    /// The address guests use as their router, of one prefix; every other prefix has its first address.
    gateway: Option<String>,
    /// Name of the group whose rules apply to every guest of the subnet.
    network_security_group: Option<String>,
    /// Name of the route table of the subnet's guests.
    route_table: Option<String>,
}

/// One guest's attachment to this host.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
struct NetworkInterface {
    /// Unique name.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// The device of this host behind which the guest is: a veth, a tap, a bridge port, or a LAN port with many guests.
    #[schemars(regex(pattern = DEVICE))]
    device: String,
    /// The guest's hardware address; learned from its ARP if left out.
    #[schemars(regex(pattern = MAC))]
    mac_address: Option<String>,
    /// Which hook of the kernel to use on the device: auto (default), xdp or tc.
    hook: Option<Hook>,
    /// Name of the group whose rules apply to this guest, besides its subnet's.
    network_security_group: Option<String>,
    /// The guest's addresses, all in one virtual network.
    #[schemars(length(min = 1))]
    ip_configurations: Vec<IpConfiguration>,
}

/// One address of a guest.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
struct IpConfiguration {
    /// Name, unique in its interface; `ipconfig1` and so on if left out.
    #[schemars(regex(pattern = NAME))]
    name: Option<String>,
    /// Name of the subnet, as `web`, or as `vnet1/web` where several networks have a subnet of that name.
    subnet: String,
    /// The guest's IPv4 or IPv6 address, in the subnet.
    #[schemars(rename = "privateIPAddress")]
    private_ip_address: String,
    /// Name of a public address that is this guest's alone, in both directions; IPv4 only.
    #[schemars(rename = "publicIPAddress")]
    public_ip_address: Option<String>,
    /// Names of the application security groups it is a member of.
    application_security_groups: Option<Vec<String>>,
}

/// A list of rules; the built-in ones (65000 and up) stand behind them.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
struct NetworkSecurityGroup {
    /// Unique name.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// The rules, in any order.
    security_rules: Option<Vec<SecurityRule>>,
}

/// A rule. Of all that match a flow's first packet the one with the lowest priority decides.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
struct SecurityRule {
    /// Name, unique in its group; drops are reported under it.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// What the rule is for.
    #[schemars(length(max = 140))]
    description: Option<String>,
    /// 100 to 4096, unique in its group and direction; the lowest is asked first.
    #[schemars(range(min = 100, max = 4096))]
    priority: u16,
    /// Inbound (to the guest) or Outbound (from the guest).
    direction: Direction,
    /// Allow or Deny.
    access: Access,
    /// Tcp, Udp, Icmp, Esp, Ah or '*'.
    protocol: RuleProtocol,
    /// '*', an address, a prefix, or a service tag.
    source_address_prefix: Option<String>,
    /// Several addresses and prefixes, and at most one tag.
    #[schemars(length(min = 1))]
    source_address_prefixes: Option<Vec<String>>,
    /// Names of application security groups, instead of addresses; all groups of a rule are in one virtual network.
    #[schemars(length(min = 1))]
    source_application_security_groups: Option<Vec<String>>,
    /// A port, a range such as 8000-8010, or '*'; '*' if left out.
    source_port_range: Option<PortRange>,
    /// Several ports and ranges.
    #[schemars(length(min = 1))]
    source_port_ranges: Option<Vec<PortRange>>,
    /// '*', an address, a prefix, or a service tag.
    destination_address_prefix: Option<String>,
    /// Several addresses and prefixes, and at most one tag.
    #[schemars(length(min = 1))]
    destination_address_prefixes: Option<Vec<String>>,
    /// Names of application security groups, instead of addresses; all groups of a rule are in one virtual network.
    #[schemars(length(min = 1))]
    destination_application_security_groups: Option<Vec<String>>,
    /// A port, a range such as 8000-8010, or '*'; required for Tcp, Udp and '*'.
    destination_port_range: Option<PortRange>,
    /// Several ports and ranges.
    #[schemars(length(min = 1))]
    destination_port_ranges: Option<Vec<PortRange>>,
}

/// A set of ip configurations that rules name; its members are those that name it.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
struct ApplicationSecurityGroup {
    /// Unique name.
    #[schemars(regex(pattern = NAME))]
    name: String,
}

/// Names for sets of prefixes.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
struct ServiceTags {
    /// Azure's published file, such as ServiceTags_Public_20251013.json; relative to the policy file's folder.
    file: Option<String>,
    /// Tags of this policy.
    tags: Option<Vec<ServiceTag>>,
}

/// A service tag of this policy.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
struct ServiceTag {
    /// Name; neither built in nor in the tag file.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// Addresses and prefixes of both families.
    #[schemars(length(min = 1))]
    address_prefixes: Vec<String>,
}

/// Routes that replace the built-in ones for the subnets that name the table.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
struct RouteTable {
    /// Unique name.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// Does a default route make the tag VirtualNetwork mean everything, as in Azure? Default false.
    widen_virtual_network: Option<bool>,
    /// The routes; of all that match the one with the longest prefix is taken.
    routes: Option<Vec<Route>>,
}

/// A route.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
struct Route {
    /// Name, unique in its table.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// Where packets go that take this route; unique in its table.
    address_prefix: String,
    /// VnetLocal, Internet, VirtualAppliance, VirtualNetworkGateway or None (dropped).
    next_hop_type: HopType,
    /// The guest that a VirtualAppliance is, in the same or a peered virtual network; not with any other type.
    next_hop_ip_address: Option<String>,
}

/// Rules that stand before all groups.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
struct PlatformRules {
    /// May guests reach the KMS servers on TCP 1688 whatever the groups say? A rule that names AzurePlatformLKM and a
    /// route for 0.0.0.0/0 end that. Default false.
    allow_kms: Option<bool>,
    /// Addresses of the KMS servers, which AzurePlatformLKM stands for; Azure's if left out.
    #[schemars(length(min = 1))]
    kms_servers: Option<Vec<String>>,
    /// Is TCP 25 out of the virtual network blocked, whatever the groups say? Default false.
    #[schemars(rename = "blockSmtp25")]
    block_smtp25: Option<bool>,
}

/// A service of this host under a platform address.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
struct PlatformService {
    /// Unique name.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// 168.63.129.16 or 169.254.169.254.
    #[schemars(extend("enum" = ["168.63.129.16", "169.254.169.254"]))]
    address: String,
    /// Tcp, Udp or All (both).
    protocol: Transport,
    /// The port, 1 to 65535.
    #[schemars(range(min = 1, max = 65535))]
    port: u16,
}

/// How much of everything a policy may have.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
struct Limits {
    /// Network security groups; default 5000, at most 65535.
    #[schemars(range(min = 1, max = 65535))]
    network_security_groups: Option<u32>,
    /// Rules of one group, both directions together; default 1000, at most 7994 (3997 in each direction).
    #[schemars(range(min = 1, max = 7994))]
    security_rules_per_group: Option<u32>,
    /// Addresses and prefixes in all rules of a group, for sources and for destinations each, without tags; default
    /// 4000, at most 1000000.
    #[schemars(range(min = 1, max = 1_000_000))]
    address_prefixes_per_group: Option<u32>,
    /// Application security groups; default 3000, at most 65535.
    #[schemars(range(min = 1, max = 65535))]
    application_security_groups: Option<u32>,
    /// Application security groups one ip configuration is in; default 20.
    #[schemars(range(min = 1, max = 65535))]
    application_security_groups_per_ip_configuration: Option<u32>,
    /// Application security groups on one side of a rule; default 10.
    #[schemars(range(min = 1, max = 65535))]
    application_security_groups_per_rule: Option<u32>,
    /// Application security groups in all rules of a group; default 100.
    #[schemars(range(min = 1, max = 65535))]
    application_security_groups_per_group: Option<u32>,
    /// Members of one application security group; default 4000.
    #[schemars(range(min = 1, max = 65535))]
    ip_configurations_per_application_security_group: Option<u32>,
    /// Kernel memory that one generation of tables may take, in MiB; default 512.
    #[schemars(rename = "policyMemoryMiB", range(min = 1, max = 1_048_576))]
    policy_memory_mib: Option<u32>,
}

/// An address under which the world knows guests; used by one ip configuration or one frontend.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
struct PublicIPAddress {
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
struct LoadBalancer {
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
struct FrontendIPConfiguration {
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
struct BackendAddressPool {
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
struct OutboundRule {
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
struct Uplink {
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
struct HostAccess {
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
struct HostService {
    /// Tcp or Udp.
    protocol: ServiceProtocol,
    /// A port or a range such as 8000-8010.
    port_range: PortRange,
}

/// When flows end, in seconds (1 to 86400).
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
struct Timeouts {
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
struct FlowTable {
    /// Flows it must be able to hold, 1024 to 4194304; default 262144. A running datapath keeps its size until `portcullis down`.
    #[schemars(range(min = 1024, max = 4_194_304))]
    max_flows: Option<u32>,
    /// The same for IPv6, which has a table of its own: 1024 to 4194304; default 65536.
    #[schemars(rename = "maxFlowsIPv6", range(min = 1024, max = 4_194_304))]
    max_flows_ipv6: Option<u32>,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::shape;

    #[test]
    fn the_schema_and_the_reader_name_the_same_fields() {
        let schema: serde_json::Value = serde_json::from_str(&super::json_schema()).unwrap();
        let definitions = schema["$defs"].as_object().unwrap();
        let names: BTreeSet<_> = definitions.keys().map(String::as_str).chain(["Policy"]).collect();
        let shapes: BTreeSet<_> = shape::ALL.iter().map(|shape| shape.schema).collect();
        assert_eq!(names, shapes);
        for shape in shape::ALL {
            let object = definitions.get(shape.schema).unwrap_or(&schema);
            let set = |value: &serde_json::Value| -> BTreeSet<String> {
                let list = value.as_array().into_iter().flatten();
                list.map(|item| item.as_str().unwrap().to_owned()).collect()
            };
            let fields: BTreeSet<_> = object["properties"].as_object().unwrap().keys().cloned().collect();
            assert_eq!(fields, shape.fields.iter().map(ToString::to_string).collect(), "{}", shape.schema);
            assert_eq!(
                set(&object["required"]),
                shape.required.iter().map(ToString::to_string).collect(),
                "{}",
                shape.schema
            );
            assert_eq!(object["additionalProperties"], false, "{}", shape.schema);
        }
    }
}
