//! The policy's shape once more, for the JSON Schema that editors complete and check against.
//!
//! These types are never filled: the reader goes by `shape`, which gives better messages than a derive can. That both
//! name the same fields is tested below; that the committed schema is this one is tested in `tests/policy_schema.rs`.
#![allow(dead_code)]

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

use super::schema_balancers::LoadBalancer;
use super::schema_edge::{
    Adoption, DefaultOutbound, FlowTable, HostAccess, PublicIPAddress, PublicIPPrefix, Snat, Timeouts, Uplink,
};
use super::schema_rules::{
    ApplicationSecurityGroup, Limits, NetworkSecurityGroup, PlatformRules, PlatformService, ServiceTags,
};

/// The JSON Schema of a policy, as committed in `docs/policy.schema.json`.
pub fn json_schema() -> String {
    let schema = schemars::schema_for!(Policy);
    let mut text = serde_json::to_string_pretty(&schema).expect("a schema is JSON");
    text.push('\n');
    text
}

/// A word that may be written in any case: editors offer the usual spelling and accept the others.
pub fn word(words: &[&str]) -> Schema {
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
macro_rules! in_place {
    ($($name:ident => $schema:expr;)*) => {$(
        pub struct $name;

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

pub(super) use in_place;

in_place! {
    Transport => word(&["Tcp", "Udp", "All"]);
    ServiceProtocol => word(&["Tcp", "Udp"]);
    Hook => word(&["auto", "xdp", "tc"]);
    PortRange => json_schema!({ "anyOf": [
        { "type": "integer", "minimum": 0, "maximum": 65535 },
        { "type": "string", "pattern": "^(\\*|[0-9]{1,5}|[0-9]{1,5}-[0-9]{1,5})$" },
    ] });
    HopType => word(&["VnetLocal", "Internet", "VirtualAppliance", "VirtualNetworkGateway", "None"]);
    OnRuleChange => word(&["keep", "reevaluate"]);
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
    /// Ranges of such addresses, for outbound rules.
    #[schemars(rename = "publicIPPrefixes")]
    public_ip_prefixes: Option<Vec<PublicIPPrefix>>,
    /// Frontends shared by pools of guests.
    load_balancers: Option<Vec<LoadBalancer>>,
    /// The way out of guests that have no other, in subnets that allow it.
    default_outbound: Option<DefaultOutbound>,
    /// What holds for all SNAT ports.
    snat: Option<Snat>,
    /// Devices towards the world.
    uplinks: Option<Vec<Uplink>>,
    /// What guests may ask of this host.
    host_access: Option<HostAccess>,
    /// When idle and closing flows end, in seconds.
    timeouts: Option<Timeouts>,
    /// Size of the table of flows.
    flow_table: Option<FlowTable>,
    /// What becomes of connections that are older than the first start.
    adoption: Option<Adoption>,
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

pub const NAME: &str = "^[A-Za-z0-9_]([A-Za-z0-9_.-]{0,78}[A-Za-z0-9_])?$";
pub const DEVICE: &str = "^[^/:\\s]{1,15}$";
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
    /// May its guests leave by `defaultOutbound` if they have no other way out? Default false.
    default_outbound_access: Option<bool>,
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
    /// Name of a public address that is this guest's alone, in both directions; of the address's family.
    #[schemars(rename = "publicIPAddress")]
    public_ip_address: Option<String>,
    /// Names of the application security groups it is a member of.
    application_security_groups: Option<Vec<String>>,
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
