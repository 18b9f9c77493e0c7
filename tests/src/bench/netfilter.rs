//! What everybody has: the kernel forwards, nftables or iptables filters and masquerades.
//!
//! The rules are Portcullis' own, as an administrator would write them who knows what they cost: packets of established
//! connections are accepted first, and only the others walk the lists.

use std::fs;

use anyhow::{Context as _, ensure};

use super::conntrack;
use super::policy::Groups;
use super::rig::{Rig, UPLINK};
use super::rules::Rules;
use crate::lab::ScratchDir;

/// Nothing of the machine's own is changed, and how many connections conntrack may hold is the machine's: since it is
/// read-only in other namespaces than the first, the bench takes it as it is.
const LIMIT: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
/// Passes over all flows until each has had an answer.
const PASSES: u32 = 8;
/// One flow in so many may still have had none.
const TOLERATED: u64 = 10_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tool {
    Nft,
    Iptables,
}

/// What packets that belong to no established connection have to pass.
#[derive(Debug, Clone, Copy)]
pub(super) enum Lists {
    /// Two, one after the other.
    Both(Groups),
    /// Only the second one of them, which denies the bench's packets.
    Second(Groups),
}

/// Namespaces with a filtering and masquerading gateway.
pub(super) struct Netfilter {
    pub rig: Rig,
    tool: Tool,
}

impl Netfilter {
    pub fn build(tool: Tool, lists: Lists) -> anyhow::Result<Self> {
        let rig = Rig::build(if tool == Tool::Nft { "nftables" } else { "iptables" }, UPLINK)?;
        let (inside, outside) = (&rig.inside.device, &rig.outside.device);
        let scratch = ScratchDir::create()?;
        let (name, text) = match tool {
            Tool::Nft => ("rules.nft", nft(lists, inside, outside)),
            Tool::Iptables => ("rules.v4", iptables(lists, inside, outside)),
        };
        let file = scratch.write(name, &text)?;
        let path = file.to_str().context("the path is text")?;
        match tool {
            Tool::Nft => rig.gateway.run(&["nft", "-f", path])?,
            Tool::Iptables => rig.gateway.run(&["iptables-restore", path])?,
        };
        // Longer than any run: conntrack would forget the flows after two minutes.
        for timeout in ["udp_timeout", "udp_timeout_stream", "tcp_timeout_syn_sent"] {
            rig.gateway.set_sysctl(&format!("net.netfilter.nf_conntrack_{timeout}"), "3600")?;
        }
        rig.gateway.set_sysctl("net.ipv4.ip_forward", "1")?;
        Ok(Self { rig, tool })
    }

    /// Makes conntrack know `flows` flows, at least `enough` of them, and each of those in both directions: without an answer a
    /// flow is not established, and all of its packets walk the lists.
    pub fn open_flows(&mut self, flows: u32, enough: u32) -> anyhow::Result<()> {
        let mut new = 0;
        for _ in 0..PASSES {
            let before = self.fresh()?;
            self.rig.answered(|rig| rig.open_flows(flows, enough, known))?;
            new = self.fresh()? - before;
            if new <= u64::from(flows) / TOLERATED {
                return Ok(());
            }
        }
        anyhow::bail!("after {PASSES} passes over {flows} flows {new} are not established")
    }

    /// Connections that conntrack knows in the gateway.
    pub fn known(&self) -> anyhow::Result<u32> {
        known(&self.rig)
    }

    /// Packets so far that walked the lists.
    pub fn fresh(&self) -> anyhow::Result<u64> {
        let (said, number) = match self.tool {
            Tool::Nft => {
                let said =
                    self.rig.gateway.run(&["nft", "-j", "list", "counter", "ip", "filter", "fresh"])?;
                let json: serde_json::Value = serde_json::from_str(&said).context("nft -j")?;
                let counters = json["nftables"].as_array().into_iter().flatten();
                let packets = counters.filter_map(|o| o.pointer("/counter/packets")?.as_u64()).next();
                (said, packets)
            }
            Tool::Iptables => {
                let said = self.rig.gateway.run(&["iptables", "-nvxL", "FORWARD", "2"])?;
                let packets = said.split_whitespace().next().and_then(|word| word.parse().ok());
                (said, packets)
            }
        };
        number.with_context(|| format!("no packets counted: {said}"))
    }

    /// Forgets all flows.
    pub fn flush(&self) -> anyhow::Result<()> {
        self.rig.gateway.enter(conntrack::flush)?;
        let left = self.known()?;
        ensure!(left == 0, "{left} connections are there after a flush");
        Ok(())
    }
}

fn known(rig: &Rig) -> anyhow::Result<u32> {
    let count = rig.gateway.sysctl("net.netfilter.nf_conntrack_count")?;
    count.parse().with_context(|| format!("nf_conntrack_count is {count}"))
}

/// Why so many flows cannot be measured with this tool on this machine; `None` if they can.
pub(super) fn limit(tool: Tool, flows: u32) -> Option<String> {
    if tool == Tool::Iptables {
        let found = std::process::Command::new("iptables").arg("--version").output();
        if let Err(error) = found {
            return Some(format!("iptables cannot be run here: {error}"));
        }
    }
    // Before the module is loaded the file does not exist; then its default is not known either.
    let max: u32 = fs::read_to_string(LIMIT).ok()?.trim().parse().ok()?;
    // The limit holds for each namespace by itself, and close to it conntrack begins to evict.
    (u64::from(flows) > u64::from(max) * 9 / 10).then(|| {
        format!(
            "nf_conntrack_max is {max}, for the whole machine, and the bench does not change the machine: for this \
             figure run `sysctl net.netfilter.nf_conntrack_max={} net.netfilter.nf_conntrack_buckets={0}` first",
            flows * 2
        )
    })
}

fn chains(lists: Lists) -> Vec<(&'static str, Rules)> {
    match lists {
        Lists::Both(groups) => ["nic", "subnet"].into_iter().zip(groups.lists()).collect(),
        Lists::Second(groups) => vec![("subnet", {
            let [_, subnet] = groups.lists();
            subnet
        })],
    }
}

fn nft(lists: Lists, inside: &str, outside: &str) -> String {
    let chains = chains(lists);
    let texts: String = chains.iter().map(|(name, rules)| rules.nft_chain(name)).collect();
    let jumps: String =
        chains.iter().map(|(name, _)| format!("    iifname \"{inside}\" jump {name}\n")).collect();
    format!(
        "table ip filter {{
  counter fresh {{ }}
{texts}  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    counter name fresh
{jumps}    iifname \"{inside}\" accept
  }}
}}
table ip nat {{
  chain postrouting {{
    type nat hook postrouting priority srcnat;
    oifname \"{outside}\" masquerade
  }}
}}
"
    )
}

fn iptables(lists: Lists, inside: &str, outside: &str) -> String {
    let chains = chains(lists);
    let names: String = chains.iter().map(|(name, _)| format!(":{name} - [0:0]\n")).collect();
    let jumps: String = chains.iter().map(|(name, _)| format!("-A fresh -i {inside} -j {name}\n")).collect();
    let texts: String = chains.iter().map(|(name, rules)| rules.iptables_chain(name)).collect();
    format!(
        "*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:fresh - [0:0]
{names}-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A FORWARD -j fresh
{jumps}-A fresh -i {inside} -j ACCEPT
{texts}COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
-A POSTROUTING -o {outside} -j MASQUERADE
COMMIT
"
    )
}
