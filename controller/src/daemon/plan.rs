//! From a policy and this host to everything that is to be done, before anything is done.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::time::SystemTime;

use anyhow::{Context as _, anyhow};

use super::Refusal;
use crate::compile::{self, CompileError, Compiled, DeviceFacts, HostFacts, Ownership, Registry};
use crate::hosts::{self, DeviceChoice, Host, HostChange, Journal, Links, Ranges};
use crate::observe::time::unix_seconds;
use crate::policy::network::Network;
use crate::policy::{Diagnostics, Loaded};
use crate::probes::with_probers;

/// What a policy comes to on this host.
#[derive(Debug)]
pub struct Plan {
    pub links: Links,
    pub choices: Vec<DeviceChoice>,
    pub facts: HostFacts,
    pub compiled: Compiled,
    /// The ids after this compilation.
    pub registry: Registry,
}

impl Plan {
    /// Ports of the host's own addresses that its own sockets must not take.
    pub fn reserved(&self) -> Ranges {
        Ranges::new(self.compiled.reserved_ports.iter().copied())
    }
}

/// What of this host a policy depends on.
#[derive(Debug, Clone)]
pub struct HostView {
    pub links: Links,
    pub facts: HostFacts,
}

impl HostView {
    /// The same, knowing which backends are down.
    pub fn with_down(mut self, down: BTreeSet<String>) -> Self {
        self.facts.down = down;
        self
    }
}

/// Looks at this host.
pub async fn look(host: &Host, journal: &Journal) -> anyhow::Result<HostView> {
    let links = host.links().await?;
    // What is there by our own hand comes and goes with the policy; the compiler knows it from there.
    let ours: HashSet<(u32, ipnet::IpNet)> = journal
        .changes()
        .iter()
        .filter_map(|change| match change {
            HostChange::AddressAdded { ifindex, address, .. } => Some((*ifindex, *address)),
            _ => None,
        })
        .collect();
    let mut addresses: Vec<_> = host
        .addresses()
        .await?
        .into_iter()
        .filter(|known| !ours.contains(&(known.ifindex, known.address)))
        .map(|known| known.address.addr())
        .filter(|address| !is_link_local(address))
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    let devices = links
        .iter()
        .map(|link| {
            let facts = DeviceFacts { ifindex: link.ifindex, mac: link.mac, gateway_mac: link.gateway_mac };
            (link.name.clone(), facts)
        })
        .collect();
    let (ephemeral, now) = (hosts::ephemeral_range()?, unix_seconds(SystemTime::now()));
    let facts = HostFacts { addresses, devices, ephemeral, now, ..HostFacts::default() };
    Ok(HostView { links, facts })
}

/// fe80::/10, which every device has: no packet that the datapath forwards goes there, and a device that comes up is no
/// reason to compile again.
fn is_link_local(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

/// Only the devices that the policy names, and those of probes: others coming and going are no reason to compile again.
pub fn relevant(mut facts: HostFacts, network: &Network) -> HostFacts {
    let named: HashSet<&str> = network
        .interfaces
        .iter()
        .map(|interface| interface.device.as_str())
        .chain(network.uplinks.iter().map(|uplink| uplink.device.as_str()))
        .collect();
    facts.devices.retain(|name, _| named.contains(name.as_str()));
    facts
}

/// Works everything out. `refused` are the drivers known not to take our XDP program.
pub fn plan(
    view: HostView,
    loaded: &Loaded,
    registry: &Registry,
    ownership: &Ownership,
    generation: u32,
    refused: &BTreeMap<String, String>,
) -> Result<Plan, Refusal> {
    let HostView { links, facts } = view;
    let network = with_probers(&loaded.network);
    let facts = relevant(facts, &network);
    let choices = hosts::choose_hooks_without(&network, &links, refused).map_err(Refusal::Host)?;
    let mut registry = registry.clone();
    let compiled = compile::compile(&network, &facts, &mut registry, ownership, generation)
        .map_err(|errors| Refusal::Policy(explain_compile_errors(loaded, &errors)))?;
    Ok(Plan { links, choices, facts: facts.lasting(), compiled, registry })
}

/// The compiler's errors at their places in the file.
pub fn explain_compile_errors(loaded: &Loaded, errors: &[CompileError]) -> Diagnostics {
    let mut found = loaded.no_findings();
    for error in errors {
        let message = match error.code {
            Some(code) => format!("{}: {}", code, error.message),
            None => error.message.clone(),
        };
        let help = format!("see {}", error.place);
        found.error_at(&loaded.places, &error.place, message, help);
    }
    found
}

/// Gives a compiled policy the number it comes into force with.
pub fn renumber(compiled: &mut Compiled, generation: u32) -> anyhow::Result<()> {
    let header = compiled.pages.first_mut().context("the compiled policy has no header")?;
    // The header's first field; page 0 is the header.
    let mut word = header.words[0].to_ne_bytes();
    word[..4].copy_from_slice(&generation.to_ne_bytes());
    header.words[0] = u64::from_ne_bytes(word);
    compiled.generation = generation;
    compiled.settings.epoch = compile::epoch(generation);
    let image = compile::lookup::Image { pages: &compiled.pages };
    if image.header().generation != generation {
        return Err(anyhow!(
            "the header of the compiled policy begins with something else than its generation"
        ));
    }
    Ok(())
}
