//! `tags`: what service tags stand for, and which of them an address is in.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::addresses::AddressSet;
use super::expand::{BUILT_IN, find_tag, tag_name, tag_prefixes};
use crate::api::Failure;
use crate::cli::table::Table;
use crate::policy::network::{Network, ServiceTag};

/// Names of tags an unknown one is answered with.
const SUGGESTED: usize = 8;

/// The tags of a policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TagList {
    pub tags: Vec<TagSummary>,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TagSummary {
    pub name: String,
    /// Of every policy, not from a file.
    pub built_in: bool,
    /// Does it mean something else in each subnet? Then the numbers are of the first one.
    pub per_subnet: bool,
    pub prefixes: usize,
    /// Those of them that are IPv6.
    pub ipv6_prefixes: usize,
    /// Security rules that name it.
    pub rules: usize,
}

/// What a tag holds, or which tags hold an address or a prefix.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TagDetails {
    pub asked: String,
    /// The tags, each with where it holds that.
    pub tags: Vec<TagContent>,
    /// Was an address or prefix asked about?
    pub by_address: bool,
}

/// A tag's prefixes in some subnets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TagContent {
    pub name: String,
    /// `vnet/subnet` of those where it stands for this; empty: everywhere.
    pub subnets: Vec<String>,
    /// All of them for a tag; those that have the address for an address.
    pub prefixes: Vec<String>,
}

fn per_subnet(tag: ServiceTag) -> bool {
    matches!(tag, ServiceTag::VirtualNetwork | ServiceTag::Internet)
}

fn all_tags(network: &Network) -> impl Iterator<Item = ServiceTag> {
    BUILT_IN.into_iter().chain((0..network.tags.len()).map(ServiceTag::Named))
}

/// What a tag stands for: the same everywhere, or for each subnet; subnets with the same content stand together.
fn contents(network: &Network, tag: ServiceTag) -> Vec<(Vec<String>, Vec<IpNet>)> {
    if !per_subnet(tag) {
        // No subnet is looked at.
        return vec![(Vec::new(), tag_prefixes(network, 0, tag))];
    }
    let mut contents: Vec<(Vec<String>, Vec<IpNet>)> = Vec::new();
    for (index, subnet) in network.subnets.iter().enumerate() {
        let prefixes = tag_prefixes(network, index, tag);
        let name = format!("{}/{}", network.virtual_networks[subnet.network].name, subnet.name);
        match contents.iter_mut().find(|(_, known)| *known == prefixes) {
            Some((subnets, _)) => subnets.push(name),
            None => contents.push((vec![name], prefixes)),
        }
    }
    contents
}

/// All tags: the built-in ones, then those of the tag file and the policy.
pub fn list(network: &Network) -> TagList {
    let rules = network.groups.iter().flat_map(|group| &group.rules);
    let mut uses = std::collections::HashMap::<ServiceTag, usize>::new();
    for rule in rules {
        let terms = rule.source.iter().chain(&rule.destination);
        let mut named: Vec<ServiceTag> = terms
            .filter_map(|term| match term {
                crate::policy::network::AddressMatch::Tag(tag) => Some(*tag),
                _ => None,
            })
            .collect();
        named.dedup();
        for tag in named {
            *uses.entry(tag).or_default() += 1;
        }
    }
    let summary = |tag: ServiceTag| {
        let content = contents(network, tag).into_iter().next().unwrap_or_default().1;
        TagSummary {
            name: tag_name(network, tag).to_owned(),
            built_in: BUILT_IN.contains(&tag),
            per_subnet: per_subnet(tag),
            prefixes: content.len(),
            ipv6_prefixes: content.iter().filter(|net| matches!(net, IpNet::V6(_))).count(),
            rules: uses.get(&tag).copied().unwrap_or(0),
        }
    };
    TagList { tags: all_tags(network).map(summary).collect() }
}

/// What the tag of this name holds; or, of an address or prefix, which tags hold all of it.
pub fn show(network: &Network, asked: &str) -> Result<TagDetails, Failure> {
    let net = asked.parse::<IpAddr>().map(IpNet::from).or_else(|_| asked.parse::<IpNet>().map(|n| n.trunc()));
    if let Ok(net) = net {
        return Ok(holding(network, asked, net));
    }
    let tag = find_tag(network, asked).ok_or_else(|| unknown(network, asked))?;
    let tags = contents(network, tag)
        .into_iter()
        .map(|(subnets, prefixes)| content(network, tag, subnets, prefixes.iter()))
        .collect();
    Ok(TagDetails { asked: asked.to_owned(), tags, by_address: false })
}

fn content<'n>(
    network: &Network,
    tag: ServiceTag,
    subnets: Vec<String>,
    prefixes: impl Iterator<Item = &'n IpNet>,
) -> TagContent {
    TagContent {
        name: tag_name(network, tag).to_owned(),
        subnets,
        prefixes: prefixes.map(ToString::to_string).collect(),
    }
}

fn holding(network: &Network, asked: &str, net: IpNet) -> TagDetails {
    let wanted = AddressSet::from_prefixes([&net]);
    let meets = |other: &&IpNet| other.contains(&net) || net.contains(*other);
    let mut tags = Vec::new();
    for tag in all_tags(network) {
        for (subnets, prefixes) in contents(network, tag) {
            // Only what meets it can hold it; several prefixes of a tag may do so together.
            let near: Vec<&IpNet> = prefixes.iter().filter(meets).collect();
            if !near.is_empty() && AddressSet::from_prefixes(near.iter().copied()).covers(&wanted) {
                tags.push(content(network, tag, subnets, near.into_iter()));
            }
        }
    }
    TagDetails { asked: asked.to_owned(), tags, by_address: true }
}

fn unknown(network: &Network, asked: &str) -> Failure {
    let wanted = asked.to_ascii_lowercase();
    let names = all_tags(network).map(|tag| tag_name(network, tag));
    let near: Vec<&str> =
        names.filter(|name| name.to_ascii_lowercase().contains(&wanted)).take(SUGGESTED).collect();
    let advice = match near.as_slice() {
        [] => "`portcullis tags list` shows all".to_owned(),
        near => format!("did you mean {}?", near.join(", ")),
    };
    Failure::input(format!("there is no service tag `{asked}` in the policy, nor is it an address; {advice}"))
}

impl TagList {
    /// For people.
    pub fn text(&self) -> String {
        let mut table = Table::new(&["NAME", "PREFIXES>", "IPV6>", "RULES>", "MEANING"]);
        for tag in &self.tags {
            let meaning = match (tag.per_subnet, tag.built_in) {
                (true, _) => "built in, for each subnet its own",
                (false, true) => "built in",
                (false, false) => "",
            };
            table.row([
                tag.name.clone(),
                tag.prefixes.to_string(),
                tag.ipv6_prefixes.to_string(),
                tag.rules.to_string(),
                meaning.to_owned(),
            ]);
        }
        table.render("no tags")
    }
}

impl TagDetails {
    /// For people.
    pub fn text(&self) -> String {
        if self.by_address {
            let mut table = Table::new(&["TAG", "BY", "IN"]);
            for tag in &self.tags {
                table.row([tag.name.clone(), super::effective::few(&tag.prefixes), place(&tag.subnets)]);
            }
            return table.render(&format!("no service tag holds {}", self.asked));
        }
        let mut text = String::new();
        for tag in &self.tags {
            text += &format!("{} in {}: {} prefixes\n", tag.name, place(&tag.subnets), tag.prefixes.len());
            for prefix in &tag.prefixes {
                text += &format!("  {prefix}\n");
            }
        }
        if text.is_empty() { format!("{}: the policy has no subnet\n", self.asked) } else { text }
    }
}

fn place(subnets: &[String]) -> String {
    match subnets {
        [] => "every subnet".to_owned(),
        some => some.join(", "),
    }
}
