//! The prober as the policy sees it: one more guest of every virtual network that has probed backends.

use std::borrow::Cow;
use std::collections::BTreeSet;

use super::targets::probed_members;
use crate::compile::PLATFORM_ADDRESS;
use crate::policy::network::{Hook, Interface, IpConfiguration, Network, Subnet};

/// Hardware address of the prober's end of every pair; each pair is a link of its own.
pub const PROBER_MAC: [u8; 6] = [0x02, 0x70, 0x63, 0x70, 0x72, 0x01];

/// What devices of probers begin with.
const DEVICE: &str = "pcprobe";

/// The prober of one virtual network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prober {
    /// The end of the veth pair on this host: `pcprobe1`.
    pub device: String,
    /// Index into the policy's virtual networks.
    pub network: usize,
}

/// Is a device called so one of ours? Nothing from outside goes there, so that no uplink has to reach it by XDP.
pub fn is_prober(device: &str) -> bool {
    device.strip_prefix(DEVICE).is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The probers a policy needs, by virtual network.
pub fn probers(network: &Network) -> Vec<Prober> {
    let mut networks: BTreeSet<usize> = BTreeSet::new();
    for ((interface, configuration), ..) in probed_members(network) {
        let subnet = network.interfaces[interface].addresses[configuration].subnet;
        networks.insert(network.subnets[subnet].network);
    }
    let numbered = networks.into_iter().zip(1..);
    numbered.map(|(network, number)| Prober { device: format!("{DEVICE}{number}"), network }).collect()
}

/// The policy with its probers as interfaces, behind all others so that every index stays what it was: what is to be
/// compiled and attached. Each stands in a subnet of its own, with no prefix, no group and no route table: what it sends
/// is judged where it arrives.
pub fn with_probers(network: &Network) -> Cow<'_, Network> {
    let probers = probers(network);
    if probers.is_empty() {
        return Cow::Borrowed(network);
    }
    let mut network = network.clone();
    for Prober { device, network: of } in probers {
        // No name of a policy has a blank in it.
        let name = format!("probes of {}", network.virtual_networks[of].name);
        let subnet = network.subnets.len();
        network.subnets.push(Subnet {
            name: name.clone(),
            network: of,
            prefixes: Vec::new(),
            gateways: Vec::new(),
            group: None,
            route_table: None,
            default_outbound: false,
        });
        network.interfaces.push(Interface {
            name,
            device,
            mac: Some(PROBER_MAC),
            hook: Hook::Auto,
            group: None,
            addresses: vec![IpConfiguration {
                name: "prober".into(),
                address: PLATFORM_ADDRESS.into(),
                subnet,
                public_address: None,
                application_groups: Vec::new(),
            }],
        });
    }
    Cow::Owned(network)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use portcullis_common::policy::AT_GUEST;

    use super::super::targets::tests::balanced;
    use super::*;
    use crate::compile::{self, HostFacts, Ownership, Registry};

    #[test]
    fn every_virtual_network_with_probed_backends_gets_a_prober_behind_all_others() {
        let network = balanced();
        assert_eq!(
            probers(&network),
            [
                Prober { device: "pcprobe1".into(), network: 0 },
                Prober { device: "pcprobe2".into(), network: 2 }
            ]
        );
        let with = with_probers(&network);
        assert_eq!(with.interfaces[..network.interfaces.len()], network.interfaces[..]);
        assert_eq!(with.subnets[..network.subnets.len()], network.subnets[..]);
        let added = &with.interfaces[network.interfaces.len()..];
        assert_eq!(added.len(), 2);
        for (interface, of) in added.iter().zip([0, 2]) {
            assert_eq!(interface.addresses[0].address, IpAddr::from([168, 63, 129, 16]));
            let subnet = &with.subnets[interface.addresses[0].subnet];
            assert_eq!((subnet.network, subnet.group, subnet.route_table), (of, None, None));
        }
    }

    #[test]
    fn a_policy_without_probes_is_compiled_as_it_is() {
        let mut network = balanced();
        for balancer in &mut network.load_balancers {
            balancer.rules.iter_mut().for_each(|rule| rule.probe = None);
        }
        assert!(matches!(with_probers(&network), Cow::Borrowed(_)));
    }

    #[test]
    fn the_compiler_takes_a_prober_as_a_guest_of_its_virtual_network() {
        let network = balanced();
        let facts = HostFacts::default();
        let compiled = |network: &Network| {
            compile::compile(network, &facts, &mut Registry::default(), &Ownership::default(), 1).unwrap()
        };
        let (before, after) = (compiled(&network), compiled(&with_probers(&network)));
        let count = before.members.len();
        assert_eq!(after.members[..count], before.members[..]);
        assert_eq!(after.members[count..], ["probes of first/prober", "probes of third/prober"]);
        let at: Vec<_> = after
            .endpoints
            .iter()
            .filter(|(key, _)| key.address == u32::from_ne_bytes([168, 63, 129, 16]))
            .collect();
        assert_eq!(at.len(), 2, "one in each of the two networks, overlapping as they are");
        assert!(at.iter().all(|(key, value)| key.network != 0 && value >> 24 == AT_GUEST));
        assert!(after.guest_hops[count..].iter().all(|hop| hop.mac == Some(PROBER_MAC)));
    }

    #[test]
    fn only_devices_called_so_are_probers() {
        assert!(is_prober("pcprobe1") && is_prober("pcprobe12"));
        assert!(!is_prober("pcprobex") && !is_prober("pc-vm1") && !is_prober("eth0"));
    }
}
