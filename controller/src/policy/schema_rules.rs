//! The part of the JSON Schema ([`super::schema`]) that says who may talk to whom.
#![allow(dead_code, reason = "only the schema is made from them")]

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};

use super::schema::{NAME, PortRange, Transport, in_place, word};

in_place! {
    Direction => word(&["Inbound", "Outbound"]);
    Access => word(&["Allow", "Deny"]);
    RuleProtocol => word(&["Tcp", "Udp", "Icmp", "Esp", "Ah", "*"]);
}

/// A list of rules; the built-in ones (65000 and up) stand behind them.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetworkSecurityGroup {
    /// Unique name.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// The rules, in any order.
    security_rules: Option<Vec<SecurityRule>>,
}

/// A rule. Of all that match a flow's first packet the one with the lowest priority decides.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct SecurityRule {
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
pub struct ApplicationSecurityGroup {
    /// Unique name.
    #[schemars(regex(pattern = NAME))]
    name: String,
}

/// Names for sets of prefixes.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceTags {
    /// Azure's published file, such as ServiceTags_Public_20251013.json; relative to the policy file's folder.
    file: Option<String>,
    /// Tags of this policy.
    tags: Option<Vec<ServiceTag>>,
}

/// A service tag of this policy.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceTag {
    /// Name; neither built in nor in the tag file.
    #[schemars(regex(pattern = NAME))]
    name: String,
    /// Addresses and prefixes of both families.
    #[schemars(length(min = 1))]
    address_prefixes: Vec<String>,
}

/// Rules that stand before all groups.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", deny_unknown_fields)]
pub struct PlatformRules {
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
pub struct PlatformService {
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
pub struct Limits {
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
