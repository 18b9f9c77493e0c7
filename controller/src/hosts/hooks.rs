//! Which hook each device of a policy gets, and why (design §4, "XDP or TC").

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Result, bail};

use super::links::{Link, LinkKind, Links};
use crate::policy::network::{Hook, Network};
use crate::probes::is_prober;

/// What a device is to the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceRole {
    Guest,
    Uplink,
}

/// Where the datapath attaches to receive. A device on XDP also gets the TC programs: what XDP passes on goes there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttachedHook {
    Xdp,
    Tc,
}

impl fmt::Display for AttachedHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Xdp => "xdp",
            Self::Tc => "tc",
        })
    }
}

/// The decision for one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceChoice {
    pub name: String,
    pub ifindex: u32,
    pub role: DeviceRole,
    pub hook: AttachedHook,
    /// For people, shown by `status`.
    pub why: String,
    /// Whether a frame that an XDP program redirects into this device arrives. Where it does not, XDP must hand
    /// the packet to TC instead.
    pub xdp_redirect_ok: bool,
    /// Chosen as asked for, but likely not what is wanted.
    pub warning: Option<String>,
}

/// Decides for all devices of the policy: guests first, by name, then uplinks in the policy's order.
///
/// Guests' devices that do not exist yet are left out (`missing_devices`); call again when they appear. Errors name
/// the device and say what to change: an uplink that does not exist or is a port of something, no Ethernet, XDP
/// asked for where it cannot work.
pub fn choose_hooks(network: &Network, links: &Links) -> Result<Vec<DeviceChoice>> {
    choose_hooks_without(network, links, &BTreeMap::new())
}

/// As `choose_hooks`, knowing that some drivers refused an XDP program: device name to the driver's error. Under
/// `auto` those get TC, and so does every uplink that could not reach them any more.
pub fn choose_hooks_without(
    network: &Network,
    links: &Links,
    refused: &BTreeMap<String, String>,
) -> Result<Vec<DeviceChoice>> {
    let mut choices = Vec::new();
    let mut absent = Vec::new();
    for (device, wished) in guest_devices(network)? {
        if links.get(device).is_none() {
            absent.push(device);
            continue;
        }
        let link = links.usable(device)?;
        choices.push(choose(link, DeviceRole::Guest, wished, refused)?);
    }
    let guests = choices.clone();
    for uplink in &network.uplinks {
        let link = links.usable(&uplink.device)?;
        if let Some(master) = link.master.and_then(|master| links.by_index(master))
            && matches!(master.kind, LinkKind::Bridge | LinkKind::Bond)
        {
            bail!(
                "uplink `{}` is a port of the {} `{}`, which holds the addresses and routes: name `{}` as the uplink",
                link.name,
                master.kind,
                master.name,
                master.name
            );
        }
        let mut choice = choose(link, DeviceRole::Uplink, uplink.hook, refused)?;
        if choice.hook == AttachedHook::Xdp {
            // Nothing from outside goes to a prober.
            let counts = |guest: &&DeviceChoice| !guest.xdp_redirect_ok && !is_prober(&guest.name);
            let unreachable: Vec<&DeviceChoice> = guests.iter().filter(counts).collect();
            match (uplink.hook, unreachable.first()) {
                (Hook::Xdp, Some(guest)) => {
                    bail!(unreachable_text(network, link, guest, &unreachable, links))
                }
                (_, Some(guest)) => {
                    choice = tc(
                        link,
                        DeviceRole::Uplink,
                        format!(
                            "{} takes XDP, but frames redirected by XDP would not arrive at guest device {}{}",
                            describe(link),
                            guest.name,
                            others(unreachable.len())
                        ),
                    );
                }
                (Hook::Auto, None) if !absent.is_empty() => {
                    choice = tc(
                        link,
                        DeviceRole::Uplink,
                        format!(
                            "{} takes XDP, but guest device {}{} does not exist yet, so nobody knows whether XDP \
                             could reach it",
                            describe(link),
                            absent[0],
                            others(absent.len())
                        ),
                    );
                }
                _ => {}
            }
        }
        choices.push(choice);
    }
    Ok(choices)
}

/// Guests' devices that do not exist on this host (yet), by name. An uplink that does not exist is an error of
/// `choose_hooks` instead.
pub fn missing_devices(network: &Network, links: &Links) -> Vec<String> {
    let mut missing: Vec<String> = network
        .interfaces
        .iter()
        .map(|interface| &interface.device)
        .filter(|device| links.get(device).is_none())
        .cloned()
        .collect();
    missing.sort();
    missing.dedup();
    missing
}

/// One wish per guest device; several interfaces may share a device (a LAN port with many guests behind it).
fn guest_devices(network: &Network) -> Result<BTreeMap<&str, Hook>> {
    let mut devices: BTreeMap<&str, (Hook, &str)> = BTreeMap::new();
    for interface in &network.interfaces {
        if network.uplinks.iter().any(|uplink| uplink.device == interface.device) {
            bail!(
                "device `{}` is both an uplink and the device of network interface `{}`: it can be only one",
                interface.device,
                interface.name
            );
        }
        let known = devices.entry(&interface.device).or_insert((interface.hook, &interface.name));
        match (known.0, interface.hook) {
            (Hook::Auto, wished) => *known = (wished, &interface.name),
            (_, Hook::Auto) => {}
            (one, other) if one != other => bail!(
                "network interfaces `{}` and `{}` share device `{}` and ask for different hooks: give both the same",
                known.1,
                interface.name,
                interface.device
            ),
            _ => {}
        }
    }
    Ok(devices.into_iter().map(|(device, (hook, _))| (device, hook)).collect())
}

/// The choice for one device by itself.
fn choose(
    link: &Link,
    role: DeviceRole,
    wished: Hook,
    refused: &BTreeMap<String, String>,
) -> Result<DeviceChoice> {
    match wished {
        Hook::Tc => Ok(tc(link, role, "the policy says `hook: tc`".into())),
        Hook::Xdp => explicit_xdp(link, role, refused),
        Hook::Auto => Ok(match (&link.kind, link.xdp, refused.get(&link.name)) {
            (LinkKind::Physical, _, Some(error)) => {
                tc(link, role, format!("{} refused the XDP program: {error}", describe(link)))
            }
            (LinkKind::Physical, Some(features), None) if features.receives() => {
                xdp(link, role, format!("{} takes XDP", describe(link)))
            }
            (LinkKind::Physical, Some(_), None) => {
                tc(link, role, format!("{} does not take XDP with redirects", describe(link)))
            }
            (LinkKind::Physical, None, None) => tc(
                link,
                role,
                format!(
                    "this kernel (before 6.3) does not say whether {} takes XDP; try `hook: xdp`",
                    describe(link)
                ),
            ),
            (kind, _, _) => tc(link, role, why_not_xdp(kind, role).into()),
        }),
    }
}

/// Why `auto` stays with TC for what is not a NIC.
fn why_not_xdp(kind: &LinkKind, role: DeviceRole) -> &'static str {
    match (kind, role) {
        (LinkKind::Tap, _) => {
            "tap: guests hand over packets with partial checksums and segmentation left to do, which TC keeps and \
             XDP would corrupt"
        }
        (LinkKind::Veth, DeviceRole::Guest) => {
            "veth: its packets may carry partial checksums, which XDP would corrupt, and TC keeps their \
             segmentation offload; set `hook: xdp` if both ends are known good"
        }
        (LinkKind::Veth, DeviceRole::Uplink) => {
            "veth: its packets may carry partial checksums, which XDP would corrupt; set `hook: xdp` if both ends \
             are known good"
        }
        (LinkKind::Vlan, _) => "VLAN device: drivers run XDP below it, where the tag is still on",
        (LinkKind::Bridge, _) => "bridge: it has no driver that runs XDP",
        (LinkKind::Bond, _) => "bond: whether XDP works depends on its mode and ports; try `hook: xdp`",
        _ => "not a NIC: TC works on every device",
    }
}

fn explicit_xdp(link: &Link, role: DeviceRole, refused: &BTreeMap<String, String>) -> Result<DeviceChoice> {
    let name = &link.name;
    match &link.kind {
        LinkKind::Tap => bail!(
            "`hook: xdp` cannot work on tap `{name}`: what the guest sends has partial checksums, and every packet \
             would leave corrupt; use `auto` or `tc` (an uplink on XDP still redirects *into* the tap)"
        ),
        LinkKind::Vlan => bail!(
            "`hook: xdp` cannot work on VLAN device `{name}`: drivers run XDP below it; use `auto` or `tc`"
        ),
        LinkKind::Bridge => bail!("`hook: xdp` cannot work on bridge `{name}`: use `auto` or `tc`"),
        _ => {}
    }
    if let Some(error) = refused.get(name) {
        bail!(
            "`hook: xdp` was asked for on `{name}`, but {} refused it: {error}; use `auto`",
            describe(link)
        );
    }
    if link.xdp.is_some_and(|features| !features.receives()) {
        bail!(
            "`hook: xdp` was asked for on `{name}`, but {} does not take XDP with redirects; use `auto` or `tc`",
            describe(link)
        );
    }
    let mut choice = xdp(link, role, "the policy says `hook: xdp`".into());
    if link.kind == LinkKind::Veth {
        choice.why = "the policy says `hook: xdp`, that is: both ends of this veth are known good".into();
        if link.xdp.is_some_and(|features| !features.transmits()) {
            choice.warning = Some(format!(
                "the kernel says that frames redirected into veth {name} are lost: at its other end turn GRO on \
                 (`ethtool -K <peer> gro on`) or attach an XDP program"
            ));
        }
    }
    Ok(choice)
}

fn xdp(link: &Link, role: DeviceRole, why: String) -> DeviceChoice {
    // A NIC transmits for XDP once a program is attached to it; a veth by the user's word.
    choice(link, role, AttachedHook::Xdp, why, true)
}

fn tc(link: &Link, role: DeviceRole, why: String) -> DeviceChoice {
    // A tap takes redirected frames whatever runs on it; measured (design §4).
    let reachable = link.kind == LinkKind::Tap && link.xdp.is_none_or(|features| features.transmits());
    choice(link, role, AttachedHook::Tc, why, reachable)
}

fn choice(
    link: &Link,
    role: DeviceRole,
    hook: AttachedHook,
    why: String,
    xdp_redirect_ok: bool,
) -> DeviceChoice {
    DeviceChoice {
        name: link.name.clone(),
        ifindex: link.ifindex,
        role,
        hook,
        why,
        xdp_redirect_ok,
        warning: None,
    }
}

fn describe(link: &Link) -> String {
    match &link.driver {
        Some(driver) => format!("the driver ({driver}) of {}", link.name),
        None => format!("the driver of {}", link.name),
    }
}

fn others(count: usize) -> String {
    match count {
        0 | 1 => String::new(),
        2 => " and one more".into(),
        _ => format!(" and {} more", count - 1),
    }
}

fn unreachable_text(
    network: &Network,
    uplink: &Link,
    guest: &DeviceChoice,
    all: &[&DeviceChoice],
    links: &Links,
) -> String {
    let interface = network.interfaces.iter().find(|interface| interface.device == guest.name);
    let interface = interface.map_or(guest.name.as_str(), |interface| interface.name.as_str());
    let advice = match links.get(&guest.name).map(|link| &link.kind) {
        Some(LinkKind::Veth) => {
            "if both ends of that veth are known good (GRO on or an XDP program at the guest's end, checksum \
             offload off), set `hook: xdp` on that interface too; otherwise set `hook: auto` or `tc` on the uplink"
        }
        Some(LinkKind::Physical) => {
            "let that NIC use XDP (`hook: xdp`, or `auto` where its driver takes it), or set `hook: auto` or `tc` on \
             the uplink"
        }
        _ => "set `hook: auto` or `tc` on the uplink",
    };
    format!(
        "uplink `{}` is to use XDP, but frames redirected by XDP do not arrive at device `{}` of network interface \
         `{interface}`{} ({}): {advice}",
        uplink.name,
        guest.name,
        others(all.len()),
        guest.why
    )
}

#[cfg(test)]
#[path = "hooks_tests.rs"]
mod tests;
