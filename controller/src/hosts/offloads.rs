//! Offloads that stand between XDP and the packet.
//!
//! With `rx-vlan-hw-parse` on, the NIC takes the VLAN tag out before XDP sees the frame, and a tagged packet looks
//! untagged (reference/field.md §7.13). With `rx-lro` on, packets are merged beyond what a redirect can send.

use anyhow::Result;

use super::ethtool;

/// What is turned off, where it is on and the driver allows it, on devices that get XDP.
pub(super) const UNWANTED_UNDER_XDP: [&str; 2] = ["rx-vlan-hw-parse", "rx-lro"];

/// The offloads of one device that matter here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceFeatures {
    /// On and changeable: `prepare` turns these off.
    pub to_turn_off: Vec<&'static str>,
    /// On and fixed by the driver: worth a warning.
    pub stuck: Vec<&'static str>,
}

/// Reads the offloads of a device that stand in XDP's way. Error: the device is gone.
pub fn features(device: &str) -> Result<DeviceFeatures> {
    let mut found = DeviceFeatures::default();
    for name in UNWANTED_UNDER_XDP {
        match ethtool::feature(device, name)? {
            Some(feature) if feature.on && feature.changeable => found.to_turn_off.push(name),
            Some(feature) if feature.on => found.stuck.push(name),
            _ => {}
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosts::testing::{Lab, needs_root};

    #[test]
    fn the_vlan_offload_of_a_veth_is_found_and_can_be_turned_off_and_on() {
        if !needs_root() {
            return;
        }
        let lab = Lab::new();
        lab.ip(&["link", "add", "v0", "type", "veth", "peer", "name", "v1"]);
        lab.run(|| async {
            assert_eq!(features("v0").unwrap().to_turn_off, ["rx-vlan-hw-parse"]);
            ethtool::set_feature("v0", "rx-vlan-hw-parse", false).unwrap();
            assert_eq!(features("v0").unwrap(), DeviceFeatures::default());
            ethtool::set_feature("v0", "rx-vlan-hw-parse", true).unwrap();
            assert_eq!(features("v0").unwrap().to_turn_off, ["rx-vlan-hw-parse"]);
            // LRO is fixed off on a veth: the driver's refusal is an error, not a silence.
            assert!(ethtool::set_feature("v0", "rx-lro", true).is_err());
            assert!(features("gone0").is_err());
            assert_eq!(ethtool::driver("v0").unwrap(), "veth");
        });
    }
}
