//! `diagnose`: NSG diagnostics, with Azure's input and output (`reference/azure.md` §1.9).

use serde::{Deserialize, Serialize};

use super::azure;
use super::expand::Terms;
use super::judge::{GroupJudgement, Judgement, judge, one_family_each};
use super::regions::{ANY_PORT, Protocols, Region};
use super::trace::Level;
use crate::api::Failure;
use crate::cli::table::Table;
use crate::policy::network::{Access, Direction, Network, RuleProtocol, SecurityRule};

pub use super::trace::FieldsMatched;

/// Profiles in one request: Azure takes one, a program may want some more.
const MAX_PROFILES: usize = 100;

/// Azure's `NetworkConfigurationDiagnosticParameters`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DiagnosticParameters {
    /// The interface or its virtual machine, by name or id.
    pub target_resource_id: String,
    pub profiles: Vec<Profile>,
}

/// Azure's `NetworkConfigurationDiagnosticProfile`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Profile {
    /// `Inbound` or `Outbound`.
    pub direction: String,
    /// `TCP`, `UDP`, `ICMP`, `ESP`, `AH` or `*`.
    pub protocol: String,
    /// An address, a prefix, `*` or a service tag.
    pub source: String,
    pub destination: String,
    /// A port, a range or `*`.
    #[serde(deserialize_with = "azure::text_or_number")]
    pub destination_port: String,
}

/// Azure's `NetworkConfigurationDiagnosticResponse`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Diagnosis {
    pub results: Vec<ProfileResult>,
}

/// What became of one profile.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProfileResult {
    pub profile: Profile,
    pub network_security_group_result: GroupResult,
}

/// The verdict and how it came about.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GroupResult {
    /// `Allow` only if every packet of the profile is allowed.
    pub security_rule_access_result: Access,
    pub evaluated_network_security_groups: Vec<EvaluatedGroup>,
    /// A rule before the groups that decided (Azure has no such field): absent otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform_rule: Option<MatchedRule>,
}

/// One group that was asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EvaluatedGroup {
    pub network_security_group_id: String,
    /// Id of the subnet or the interface.
    pub applied_to: String,
    /// Absent only where none but a platform tag's rules were asked and none denied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub matched_rule: Option<MatchedRule>,
    pub rules_evaluation_result: Vec<RuleEvaluation>,
    /// Every rule that decided a part of the profile, where the matched rule does not decide all of it (Azure has no such
    /// field); absent otherwise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub partly_matched_rules: Vec<MatchedRule>,
}

/// A rule and what it does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MatchedRule {
    pub rule_name: String,
    pub action: Access,
}

/// A rule that was tried; a field matched if the rule's covers all of the profile's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RuleEvaluation {
    pub name: String,
    #[serde(flatten)]
    pub fields: FieldsMatched,
}

/// Judges every profile.
pub fn diagnose(network: &Network, ask: &DiagnosticParameters) -> Result<Diagnosis, Failure> {
    let interface = azure::interface(network, &ask.target_resource_id)?;
    if ask.profiles.is_empty() || ask.profiles.len() > MAX_PROFILES {
        let count = ask.profiles.len();
        return Err(Failure::input(format!(
            "profiles: {count} were given; between 1 and {MAX_PROFILES} can be"
        )));
    }
    let results = ask.profiles.iter().map(|profile| judge_profile(network, interface, profile));
    Ok(Diagnosis { results: results.collect::<Result<_, _>>()? })
}

fn judge_profile(network: &Network, interface: usize, profile: &Profile) -> Result<ProfileResult, Failure> {
    let direction = azure::direction(&profile.direction)?;
    let rule_protocol = azure::protocol(&profile.protocol)?;
    let protocols = Protocols::of_rule(rule_protocol);
    let source = azure::address(network, "source", &profile.source)?;
    let destination = azure::address(network, "destination", &profile.destination)?;
    let ports = azure::ports("destinationPort", &profile.destination_port)?;
    let with_ports = matches!(rule_protocol, RuleProtocol::Any | RuleProtocol::Tcp | RuleProtocol::Udp);
    if !with_ports && ports != ANY_PORT {
        return Err(Failure::input(format!(
            "destinationPort: {} has no ports; write *",
            profile.protocol.to_uppercase()
        )));
    }
    let place = |region: &Region| {
        let local = if direction == Direction::Inbound { &region.destination } else { &region.source };
        let configurations = &network.interfaces[interface].addresses;
        let own = configurations.iter().position(|c| local.contains(c.address));
        (interface, own.unwrap_or(0))
    };
    if network.interfaces[interface].addresses.is_empty() {
        let name = &network.interfaces[interface].name;
        return Err(Failure::input(format!("{name} has no ip configuration")));
    }
    // Which of the interface's subnets it is about depends on addresses, and those of tags on the subnet: the first one's
    // meaning finds the configuration, whose own then holds.
    let region_in = |subnet: usize| {
        let mut terms = Terms::new(network, subnet);
        let mut region = Region {
            protocols,
            source: terms.term(&source).as_ref().clone(),
            source_ports: vec![ANY_PORT],
            destination: terms.term(&destination).as_ref().clone(),
            destination_ports: vec![ports],
        };
        one_family_each(&mut region).map(|()| region)
    };
    let subnet_of = |place: (usize, usize)| network.interfaces[place.0].addresses[place.1].subnet;
    let place = place(&region_in(subnet_of((interface, 0)))?);
    let region = region_in(subnet_of(place))?;
    let judgement = judge(network, place, direction, &region)?;
    Ok(ProfileResult {
        profile: profile.clone(),
        network_security_group_result: result(network, place, judgement),
    })
}

fn result(network: &Network, place: (usize, usize), judgement: Judgement<'_>) -> GroupResult {
    let matched =
        |rule: &SecurityRule| MatchedRule { rule_name: azure::rule_name(rule), action: rule.access };
    let group = |group: &GroupJudgement<'_>| EvaluatedGroup {
        network_security_group_id: azure::group_id(network, group.group),
        applied_to: match group.level {
            Level::Subnet => azure::subnet_id(network, network.interfaces[place.0].addresses[place.1].subnet),
            Level::NetworkInterface => azure::interface_id(network, place.0),
        },
        matched_rule: group.matched.map(matched),
        rules_evaluation_result: group
            .trials
            .iter()
            .map(|trial| RuleEvaluation { name: azure::rule_name(trial.rule), fields: trial.fields })
            .collect(),
        partly_matched_rules: group.parts.iter().map(|rule| matched(rule)).collect(),
    };
    GroupResult {
        security_rule_access_result: judgement.access,
        evaluated_network_security_groups: judgement.groups.iter().map(group).collect(),
        platform_rule: judgement.platform.map(|rule| MatchedRule {
            rule_name: format!("PlatformRule_{}", rule.name(network)),
            action: if rule.denies() { Access::Deny } else { Access::Allow },
        }),
    }
}

impl Diagnosis {
    /// Are all profiles allowed?
    pub fn all_allowed(&self) -> bool {
        let access =
            |result: &ProfileResult| result.network_security_group_result.security_rule_access_result;
        self.results.iter().all(|result| access(result) == Access::Allow)
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for result in &self.results {
            let profile = &result.profile;
            let answer = &result.network_security_group_result;
            if !text.is_empty() {
                text.push('\n');
            }
            text += &format!(
                "{:?}: {} {} {} -> {} port {}\n",
                answer.security_rule_access_result,
                profile.direction,
                profile.protocol,
                profile.source,
                profile.destination,
                profile.destination_port
            );
            if let Some(rule) = &answer.platform_rule {
                text += &format!("{:?} by {}, before the groups\n", rule.action, rule.rule_name);
            }
            if answer.evaluated_network_security_groups.is_empty() && answer.platform_rule.is_none() {
                text += "no group on this interface or its subnet: everything is allowed\n";
            }
            for group in &answer.evaluated_network_security_groups {
                text += &group.text();
            }
        }
        text
    }
}

impl EvaluatedGroup {
    fn text(&self) -> String {
        let place = if self.applied_to.contains("/subnets/") { "subnet" } else { "network interface" };
        let mut text = format!(
            "\n{} on {place} {}: {}\n",
            azure::short(&self.network_security_group_id),
            azure::short(&self.applied_to),
            match &self.matched_rule {
                Some(rule) => format!("{:?} by {}", rule.action, rule.rule_name),
                None => "no rule names the platform's tag".to_owned(),
            }
        );
        let mut table =
            Table::new(&["RULE", "PROTOCOL", "SOURCE", "SOURCE PORT", "DESTINATION", "DESTINATION PORT"]);
        for rule in &self.rules_evaluation_result {
            let word = |matched: bool| if matched { "yes" } else { "-" }.to_owned();
            let fields = &rule.fields;
            table.row([
                rule.name.clone(),
                word(fields.protocol_matched),
                word(fields.source_matched),
                word(fields.source_port_matched),
                word(fields.destination_matched),
                word(fields.destination_port_matched),
            ]);
        }
        text += &table.render("no rule was tried");
        if !self.partly_matched_rules.is_empty() {
            let rules = self.partly_matched_rules.iter();
            let rules: Vec<String> = rules.map(|r| format!("{:?} by {}", r.action, r.rule_name)).collect();
            text += &format!("parts of the profile are decided apart: {}\n", rules.join(", "));
        }
        text
    }
}
