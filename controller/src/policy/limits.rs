//! How much of what a policy may have: Azure's limits, which it may change (`reference/azure.md` §1.2).

use super::diagnostics::Problems;
use super::fields::Fields;
use super::groups::MAX_RULES_PER_DIRECTION;
use super::network::Limits;
use super::shape;
use super::tree::Node;

/// The datapath numbers groups of both kinds with 16 bits, of which 0 means none.
const MAX_GROUPS: u32 = 65_535;

/// A rule and a group hold their addresses in classes; this many is a memory limit, not one of the tables.
const MAX_PREFIXES: u32 = 1_000_000;

/// Both directions together.
pub const MAX_RULES: u32 = 2 * MAX_RULES_PER_DIRECTION as u32;

/// A sixteenth of a machine of 16 TiB: whoever writes more has slipped.
const MAX_MEMORY_MIB: u32 = 1 << 20;

/// Reads `limits`.
pub fn read(node: Option<&Node<'_>>, problems: &mut Problems) -> Limits {
    let default = Limits::default();
    let Some(fields) = node.and_then(|node| Fields::open(node, &shape::LIMITS, problems)) else {
        return default;
    };
    let mut number =
        |field, most, default| fields.number(field, 1, most, problems).map_or(default, |number| number.value);
    Limits {
        network_security_groups: number("networkSecurityGroups", MAX_GROUPS, default.network_security_groups),
        rules_per_group: number("securityRulesPerGroup", MAX_RULES, default.rules_per_group),
        prefixes_per_group: number("addressPrefixesPerGroup", MAX_PREFIXES, default.prefixes_per_group),
        application_groups: number("applicationSecurityGroups", MAX_GROUPS, default.application_groups),
        application_groups_per_configuration: number(
            "applicationSecurityGroupsPerIpConfiguration",
            MAX_GROUPS,
            default.application_groups_per_configuration,
        ),
        application_groups_per_rule: number(
            "applicationSecurityGroupsPerRule",
            MAX_GROUPS,
            default.application_groups_per_rule,
        ),
        application_groups_per_group: number(
            "applicationSecurityGroupsPerGroup",
            MAX_GROUPS,
            default.application_groups_per_group,
        ),
        configurations_per_application_group: number(
            "ipConfigurationsPerApplicationSecurityGroup",
            MAX_GROUPS,
            default.configurations_per_application_group,
        ),
        policy_memory_mib: number("policyMemoryMiB", MAX_MEMORY_MIB, default.policy_memory_mib),
    }
}
