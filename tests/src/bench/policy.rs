//! The policy that Portcullis is measured with, as a user would write it.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use super::layout::{FIRST_GUEST, GUEST_MAC, GUESTS};
use super::rig::GATEWAY;
use super::rules::{Fate, Rules};

/// Where translated packets come from.
pub(super) const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);

/// The groups that every guest has, one on its interface and one on its subnet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Groups {
    /// Of each of the two.
    pub rules: usize,
    /// What becomes of the bench's packets. The group of the interface, which is asked first, allows them in any case.
    pub fate: Fate,
}

impl Groups {
    /// As in the figures of packets that are forwarded.
    pub const THOUSAND: Groups = Groups { rules: 1000, fate: Fate::Allowed };

    /// The lists of the interface's and of the subnet's group, the same for everybody who has them.
    pub fn lists(self) -> [Rules; 2] {
        [Rules::new(self.rules, 1, Fate::Allowed), Rules::new(self.rules, 2, self.fate)]
    }
}

/// Guests behind one device, with their groups, behind one outbound rule; `max_flows` is what the flow table is made for.
pub(super) fn text(inside: &str, outside: &str, max_flows: u32, groups: Groups) -> String {
    let [nic, subnet] = groups.lists();
    let mut text = format!(
        "limits: {{ securityRulesPerGroup: 7994 }}
virtualNetworks:
  - name: bench
    addressSpace: {{ addressPrefixes: [10.0.0.0/16] }}
    subnets:
      - {{ name: guests, addressPrefix: 10.0.1.0/24, gateway: {GATEWAY}, networkSecurityGroup: subnet }}
networkSecurityGroups:
{nic}{subnet}publicIPAddresses:
  - {{ name: public, ipAddress: {PUBLIC}, announce: proxy }}
uplinks:
  - {{ device: {outside} }}
flowTable: {{ maxFlows: {max_flows}, maxFlowsPerGuest: {max_flows} }}
networkInterfaces:
",
        nic = nic.group("nic"),
        subnet = subnet.group("subnet"),
    );
    for guest in 0..GUESTS {
        let [mac @ .., last] = GUEST_MAC;
        let mac = mac.map(|byte| format!("{byte:02x}:")).concat() + &format!("{:02x}", last | guest as u8);
        let address = Ipv4Addr::from(FIRST_GUEST | guest);
        let _ = write!(
            text,
            "  - name: guest{guest}
    device: {inside}
    macAddress: '{mac}'
    networkSecurityGroup: nic
    ipConfigurations: [{{ subnet: guests, privateIPAddress: {address} }}]
"
        );
    }
    let members: Vec<String> = (0..GUESTS).map(|guest| format!("guest{guest}")).collect();
    let _ = write!(
        text,
        "loadBalancers:
  - name: lb
    frontendIPConfigurations: [{{ name: front, publicIPAddress: public }}]
    backendAddressPools: [{{ name: pool, backendIPConfigurations: [{}] }}]
    outboundRules:
      - {{ name: out, frontendIPConfigurations: [front], backendAddressPool: pool, protocol: All }}
",
        members.join(", ")
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_of_the_bench_is_in_order() {
        let loaded =
            portcullis::policy::parse("bench", &text("inside", "outside", 1 << 20, Groups::THOUSAND));
        let loaded = loaded.unwrap_or_else(|problems| panic!("{problems:?}"));
        assert_eq!(loaded.network.interfaces.len(), GUESTS as usize);
        assert_eq!(loaded.network.interfaces[63].mac, Some([0x02, 0x62, 0x65, 0x6e, 0x63, 0x7f]));
        assert_eq!(loaded.network.load_balancers[0].pools[0].members.len(), GUESTS as usize);
    }
}
