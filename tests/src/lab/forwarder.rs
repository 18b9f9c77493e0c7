//! A router of the plainest kind: the kernel forwards from one veth to another, and an nftables ruleset says what.
//!
//! ```text
//!   ends: in ---- in router out ---- out
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::craft::Mac;
use super::namespace::Namespace;
use super::packet_socket::RawSender;
use super::sniffer::Sniffer;
use super::{ScratchDir, eventually};

/// Longer than a batch of a hundred packets takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(10);

/// The router and the two ends of its wire. It keeps no state of connections: each packet is judged by itself.
pub struct Forwarder {
    router: Namespace,
    // Nothing answers at the ends; the namespace is only where they are.
    _ends: Namespace,
    sender: RawSender,
    sniffer: Sniffer,
    scratch: ScratchDir,
}

impl Forwarder {
    /// Where frames to the router are addressed.
    pub const MAC: Mac = [0x02, 0, 0, 0, 0xcc, 1];
    /// Counter of the ruleset that counts every packet the router is about to forward.
    pub const JUDGED: &str = "judged";
    /// Counter of the ruleset that counts what nothing has dropped.
    pub const PASSED: &str = "passed";

    /// Builds it, without rules.
    pub fn build() -> anyhow::Result<Self> {
        let (router, ends) = (Namespace::create("router")?, Namespace::create("ends")?);
        for scope in ["all", "default"] {
            router.set_sysctl(&format!("net.ipv6.conf.{scope}.disable_ipv6"), "0")?;
            router.set_sysctl(&format!("net.ipv6.conf.{scope}.forwarding"), "1")?;
            // Sources are as they come: everything is behind the one default route.
            router.set_sysctl(&format!("net.ipv4.conf.{scope}.rp_filter"), "0")?;
        }
        router.set_sysctl("net.ipv4.ip_forward", "1")?;
        for (device, near, far) in [
            ("in", "02:00:00:00:cc:01", "02:00:00:00:cc:02"),
            ("out", "02:00:00:00:cc:03", "02:00:00:00:cc:04"),
        ] {
            let name = ends.name();
            router.ip(&format!(
                "link add {device} address {near} type veth peer name {device} address {far} netns {name}"
            ))?;
            router.ip(&format!("link set {device} up"))?;
            ends.ip(&format!("link set {device} up"))?;
        }
        // Addresses of the link itself, which no packet of a test has.
        router.ip("address add 169.254.77.1/30 dev out")?;
        for next in ["169.254.77.2", "fe80::2"] {
            router.ip(&format!("neighbour add {next} lladdr 02:00:00:00:cc:04 dev out nud permanent"))?;
        }
        router.ip("route add default via 169.254.77.2 dev out")?;
        router.ip("-6 route add default via fe80::2 dev out")?;
        let sender = RawSender::open(&ends, "in")?;
        let sniffer = Sniffer::start_filtered(&ends, "out", |frame| !frame.outgoing)?;
        Ok(Self { router, _ends: ends, sender, sniffer, scratch: ScratchDir::create()? })
    }

    /// Puts a ruleset in the place of the one before, in one transaction. It has two counters, [`Self::JUDGED`] and
    /// [`Self::PASSED`], in the table `inet groups`.
    pub fn load(&self, ruleset: &str) -> anyhow::Result<()> {
        let file = self.scratch.write("ruleset.nft", &format!("flush ruleset\n{ruleset}"))?;
        let path = file.to_str().context("the path is text")?;
        self.router.run(&["nft", "-f", path]).map(drop)
    }

    /// Sends frames in at one end, all of them different, and says of each whether it came out at the other.
    ///
    /// # Errors
    /// If not every one of them came as far as the ruleset, or one that passed it was lost.
    pub fn fates(&self, frames: &[Vec<u8>]) -> anyhow::Result<Vec<bool>> {
        self.sniffer.clear();
        let before = self.counters()?;
        for frame in frames {
            self.sender.send(frame)?;
        }
        let count = |name: &str| -> anyhow::Result<u64> {
            let now = self.counters()?;
            let of = |counters: &BTreeMap<String, u64>| counters.get(name).copied().unwrap_or(0);
            Ok(of(&now) - of(&before))
        };
        let sent = frames.len() as u64;
        let judged = eventually(LIMIT, || count(Self::JUDGED).is_ok_and(|judged| judged >= sent));
        ensure!(judged, "of {sent} packets, {} came as far as the ruleset", count(Self::JUDGED)?);
        let passed = count(Self::PASSED)?;
        let wanted: BTreeSet<Vec<u8>> = frames.iter().map(|frame| unrouted(frame)).collect();
        ensure!(wanted.len() == frames.len(), "two frames are the same");
        let arrived = || -> BTreeSet<Vec<u8>> {
            let seen = self.sniffer.frames().into_iter().map(|frame| unrouted(&frame.bytes));
            seen.filter(|frame| wanted.contains(frame)).collect()
        };
        ensure!(
            eventually(LIMIT, || arrived().len() as u64 >= passed),
            "{passed} packets passed the ruleset and {} arrived",
            arrived().len()
        );
        let arrived = arrived();
        ensure!(arrived.len() as u64 == passed, "{} arrived of {passed} that passed", arrived.len());
        Ok(frames.iter().map(|frame| arrived.contains(&unrouted(frame))).collect())
    }

    fn counters(&self) -> anyhow::Result<BTreeMap<String, u64>> {
        let listing = self.router.run(&["nft", "-j", "list", "counters"])?;
        let listing: serde_json::Value = serde_json::from_str(&listing).context("output of nft")?;
        let objects = listing["nftables"].as_array().context("nft lists objects")?;
        Ok(objects
            .iter()
            .filter_map(|object| {
                let counter = object.get("counter")?;
                Some((counter["name"].as_str()?.to_owned(), counter["packets"].as_u64()?))
            })
            .collect())
    }
}

/// What of a frame a router leaves as it is: no hardware addresses, hop limit or header checksum.
fn unrouted(frame: &[u8]) -> Vec<u8> {
    let mut packet = frame.get(14..).unwrap_or_default().to_vec();
    match packet.first().map(|byte| byte >> 4) {
        Some(4) if packet.len() >= 20 => {
            packet[8] = 0;
            packet[10..12].fill(0);
        }
        Some(6) if packet.len() >= 40 => packet[7] = 0,
        _ => {}
    }
    packet
}
