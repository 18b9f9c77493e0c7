//! What everybody has: the kernel forwards, nftables masquerades.

use std::fs;

use anyhow::Context as _;

use super::rig::{Rig, UPLINK};

/// Nothing of the machine's own is changed, and how many connections conntrack may hold is the machine's: since it is
/// read-only in other namespaces than the first, the bench takes it as it is.
const LIMIT: &str = "/proc/sys/net/netfilter/nf_conntrack_max";

/// Namespaces with a masquerading gateway; the least ruleset that does it.
pub(super) fn build() -> anyhow::Result<Rig> {
    let rig = Rig::build("nftables", UPLINK)?;
    let outside = &rig.outside.device;
    rig.gateway.run(&["nft", "add table ip nat"])?;
    rig.gateway
        .run(&["nft", "add chain ip nat postrouting { type nat hook postrouting priority srcnat; }"])?;
    rig.gateway.run(&["nft", &format!("add rule ip nat postrouting oifname {outside} masquerade")])?;
    // Longer than any run: nobody answers, so conntrack would forget the flows after half a minute.
    for timeout in ["nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"] {
        rig.gateway.set_sysctl(&format!("net.netfilter.{timeout}"), "3600")?;
    }
    rig.gateway.set_sysctl("net.ipv4.ip_forward", "1")?;
    Ok(rig)
}

/// Connections that conntrack knows in the gateway.
pub(super) fn known(rig: &Rig) -> anyhow::Result<u32> {
    let count = rig.gateway.sysctl("net.netfilter.nf_conntrack_count")?;
    count.parse().with_context(|| format!("nf_conntrack_count is {count}"))
}

/// Why so many flows cannot be measured on this machine; `None` if they can.
pub(super) fn limit(flows: u32) -> Option<String> {
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
