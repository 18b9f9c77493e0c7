//! The table of hook choices, on devices made up for it.

use super::*;
use crate::hosts::XdpFeatures;
use crate::policy::network::{Interface, Uplink};

/// Features of a driver that receives and redirects, and of one that also transmits.
const RECEIVES: Option<XdpFeatures> = Some(XdpFeatures(0x23));
const TRANSMITS: Option<XdpFeatures> = Some(XdpFeatures(0x67));
const NOTHING: Option<XdpFeatures> = Some(XdpFeatures(0));

fn link(name: &str, ifindex: u32, kind: LinkKind, xdp: Option<XdpFeatures>) -> Link {
    Link {
        name: name.into(),
        ifindex,
        mac: [2, 0, 0, 0, 0, ifindex as u8],
        gateway_mac: [2, 0, 0, 0, 0, ifindex as u8],
        mtu: 1500,
        layer: if kind == LinkKind::Tun { 65534 } else { 1 },
        kind,
        up: true,
        carrier: true,
        master: None,
        peer: None,
        driver: None,
        xdp,
    }
}

/// The host of all these tests.
fn host() -> Links {
    let mut port = link("port0", 20, LinkKind::Physical, RECEIVES);
    port.master = Some(21);
    Links::from_links([
        link("nic0", 1, LinkKind::Physical, RECEIVES),
        link("nic1", 2, LinkKind::Physical, RECEIVES),
        link("old0", 3, LinkKind::Physical, NOTHING),
        link("dim0", 4, LinkKind::Physical, None),
        link("tap0", 5, LinkKind::Tap, TRANSMITS),
        link("veth0", 6, LinkKind::Veth, RECEIVES),
        link("veth1", 7, LinkKind::Veth, TRANSMITS),
        link("vlan0", 8, LinkKind::Vlan, NOTHING),
        link("br0", 9, LinkKind::Bridge, NOTHING),
        link("tun0", 10, LinkKind::Tun, NOTHING),
        port,
        link("br1", 21, LinkKind::Bridge, NOTHING),
    ])
}

/// Devices with the hook the policy asks for.
type Devices<'a> = &'a [(&'a str, Hook)];

fn network(guests: Devices<'_>, uplinks: Devices<'_>) -> Network {
    Network {
        interfaces: guests
            .iter()
            .map(|(device, hook)| Interface {
                name: format!("vm-{device}"),
                device: device.to_string(),
                mac: None,
                hook: *hook,
                group: None,
                addresses: Vec::new(),
            })
            .collect(),
        uplinks: uplinks
            .iter()
            .map(|(device, hook)| Uplink {
                device: device.to_string(),
                hook: *hook,
                reserve_host_ports: false,
            })
            .collect(),
        ..Network::default()
    }
}

/// "device: hook" of each choice, with a `>` where XDP redirects arrive.
fn summary(guests: Devices<'_>, uplinks: Devices<'_>) -> String {
    let choices = choose_hooks(&network(guests, uplinks), &host()).unwrap();
    let line = |choice: &DeviceChoice| {
        assert!(!choice.why.is_empty());
        format!("{} {}{}", choice.name, choice.hook, if choice.xdp_redirect_ok { ">" } else { "" })
    };
    choices.iter().map(line).collect::<Vec<_>>().join(", ")
}

fn error(guests: Devices<'_>, uplinks: Devices<'_>) -> String {
    choose_hooks(&network(guests, uplinks), &host()).unwrap_err().to_string()
}

use Hook::{Auto, Tc, Xdp};

#[test]
fn the_table_of_choices() {
    let cases: &[(Devices<'_>, Devices<'_>, &str)] = &[
        (&[], &[("nic0", Auto)], "nic0 xdp>"),
        (&[], &[("nic0", Tc)], "nic0 tc"),
        (&[], &[("old0", Auto)], "old0 tc"),
        (&[], &[("dim0", Auto)], "dim0 tc"),
        (&[], &[("dim0", Xdp)], "dim0 xdp>"),
        (&[], &[("veth0", Auto)], "veth0 tc"),
        (&[], &[("br0", Auto)], "br0 tc"),
        (&[], &[("vlan0", Auto)], "vlan0 tc"),
        // XDP redirects into taps, so taps keep no uplink from XDP.
        (&[("tap0", Auto)], &[("nic0", Auto)], "tap0 tc>, nic0 xdp>"),
        (&[("tap0", Auto)], &[("nic0", Xdp)], "tap0 tc>, nic0 xdp>"),
        (&[("tap0", Auto)], &[("veth1", Xdp)], "tap0 tc>, veth1 xdp>"),
        // One veth on TC does.
        (&[("tap0", Auto), ("veth0", Auto)], &[("nic0", Auto)], "tap0 tc>, veth0 tc, nic0 tc"),
        (&[("veth1", Xdp)], &[("nic0", Auto)], "veth1 xdp>, nic0 xdp>"),
        (&[("veth1", Xdp)], &[("veth0", Xdp)], "veth1 xdp>, veth0 xdp>"),
        (&[("nic1", Auto)], &[("nic0", Auto)], "nic1 xdp>, nic0 xdp>"),
        (&[("nic1", Tc)], &[("nic0", Auto)], "nic1 tc, nic0 tc"),
        (&[("vlan0", Auto)], &[("nic0", Auto)], "vlan0 tc, nic0 tc"),
        // Several guests behind one device, one of them with an opinion.
        (&[("nic1", Auto), ("nic1", Tc)], &[("nic0", Tc)], "nic1 tc, nic0 tc"),
        // A guest that is not there yet leaves the uplink on the safe side.
        (&[("later0", Auto)], &[("nic0", Auto)], "nic0 tc"),
        (&[("later0", Auto)], &[("nic0", Xdp)], "nic0 xdp>"),
    ];
    for (guests, uplinks, expected) in cases {
        assert_eq!(summary(guests, uplinks), *expected, "{guests:?} {uplinks:?}");
    }
}

#[test]
fn what_cannot_work_is_refused_with_what_to_do() {
    let cases: &[(Devices<'_>, Devices<'_>, &[&str])] = &[
        (&[("tap0", Xdp)], &[], &["tap `tap0`", "partial checksums"]),
        (&[("vlan0", Xdp)], &[], &["VLAN device `vlan0`"]),
        (&[("br0", Xdp)], &[], &["bridge `br0`"]),
        (&[("tun0", Auto)], &[], &["tun0", "no Ethernet"]),
        (&[("old0", Xdp)], &[], &["old0", "does not take XDP"]),
        (&[], &[("none0", Auto)], &["no device `none0`"]),
        (&[], &[("port0", Auto)], &["port0", "name `br1` as the uplink"]),
        (&[("nic0", Auto)], &[("nic0", Auto)], &["both an uplink"]),
        (&[("nic1", Xdp), ("nic1", Tc)], &[], &["share device `nic1`"]),
        (
            &[("veth0", Auto), ("vlan0", Auto)],
            &[("nic0", Xdp)],
            &["`vm-veth0`", "and one more", "set `hook: xdp` on that interface"],
        ),
        (&[("nic1", Tc)], &[("nic0", Xdp)], &["`vm-nic1`", "let that NIC use XDP"]),
    ];
    for (guests, uplinks, parts) in cases {
        let error = error(guests, uplinks);
        for part in *parts {
            assert!(error.contains(part), "{part:?} is not in {error:?}");
        }
    }
}

#[test]
fn a_driver_that_refuses_the_program_falls_back_to_tc_and_takes_the_uplink_along() {
    let network = network(&[("nic1", Auto)], &[("nic0", Auto)]);
    let refused = BTreeMap::from([("nic1".to_string(), "too few queues".to_string())]);
    let choices = choose_hooks_without(&network, &host(), &refused).unwrap();
    assert!(choices.iter().all(|choice| choice.hook == AttachedHook::Tc));
    assert!(choices[0].why.contains("too few queues"), "{}", choices[0].why);
    assert!(choices[1].why.contains("nic1"), "{}", choices[1].why);
}

#[test]
fn a_veth_that_the_kernel_knows_to_lose_frames_is_honoured_with_a_warning() {
    let choices = choose_hooks(&network(&[("veth0", Xdp), ("veth1", Xdp)], &[]), &host()).unwrap();
    assert!(choices[0].warning.as_ref().unwrap().contains("GRO"));
    assert_eq!(choices[1].warning, None);
    assert!(choices[0].xdp_redirect_ok);
}

#[test]
fn devices_that_are_not_there_yet_are_listed_once() {
    let network = network(&[("later1", Auto), ("later0", Auto), ("later1", Auto), ("tap0", Auto)], &[]);
    assert_eq!(missing_devices(&network, &host()), ["later0", "later1"]);
}
