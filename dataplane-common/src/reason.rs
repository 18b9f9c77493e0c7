//! Why a packet ended the way it did: the counter index, the metric label, the CLI column, the event and the test
//! assertion are all this enum (design §1, promise 6).

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal, $drop:literal;)+) => {
        /// The outcome of one packet. `as u32` is the index of its counter; the order is ABI and only ever grows.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Reason { $($(#[doc = $doc])+ $name,)+ }

        impl Reason {
            /// Every reason, in the order of their counters.
            pub const ALL: &'static [Reason] = &[$(Reason::$name,)+];

            /// The word the operator sees: CLI column, metric label, event.
            pub const fn label(self) -> &'static str {
                match self { $(Reason::$name => $label,)+ }
            }

            /// Did the packet end here?
            pub const fn is_drop(self) -> bool {
                match self { $(Reason::$name => $drop,)+ }
            }

            /// One sentence for `drops` and `explain`.
            pub const fn description(self) -> &'static str {
                match self { $(Reason::$name => concat!($($doc),+),)+ }
            }

            /// The reason with this counter index.
            pub fn from_index(index: u32) -> Option<Reason> {
                Self::ALL.get(index as usize).copied()
            }
        }
    };
}

reasons! {
    /// A live flow's packet, translated where the flow says so, and sent on.
    Forwarded = "forwarded", false;
    /// The first packet of a flow that policy allows, sent on.
    NewFlow = "new_flow", false;
    /// Given to this host's own stack.
    ToHost = "to_host", false;
    /// Not for any address of the policy; left untouched for the kernel.
    NotOurs = "not_ours", false;
    /// An ARP request answered by the datapath.
    ArpAnswered = "arp_answered", false;
    /// An ARP announcement taken note of.
    ArpLearned = "arp_learned", false;
    /// Sent by this host to a guest over a live or new flow.
    FromHost = "from_host", false;
    /// Shorter than its own headers say, or headers that contradict each other.
    Malformed = "malformed", true;
    /// An EtherType that is neither IPv4, IPv6 nor ARP, from a guest.
    EtherType = "ethertype", true;
    /// A VLAN tag on a device that the policy declares untagged.
    Vlan = "vlan_tag", true;
    /// A fragment cut to deceive, or of a message that is never fragmented.
    Fragment = "fragment", true;
    /// An ICMP error about no live flow, one that quotes too little, or one that is not forwarded (a redirect).
    IcmpError = "icmp_error", true;
    /// ICMP that stays on its link, or without an identifier where only ports tell guests apart.
    IcmpType = "icmp_type", true;
    /// Source address or MAC that does not belong to the interface.
    Spoofed = "spoofed_source", true;
    /// ARP with a sender that does not belong to the interface.
    SpoofedArp = "spoofed_arp", true;
    /// A guest answering DHCP like a server.
    DhcpServer = "dhcp_server", true;
    /// Broadcast or multicast that no service here takes.
    Broadcast = "broadcast", true;
    /// A source or destination that may never appear there (loopback, link-local, 0.0.0.0/8, ours from outside).
    Martian = "martian", true;
    /// A cloud platform address; never routed to an uplink.
    PlatformAddress = "platform_address", true;
    /// A security rule with access Deny, or DenyAll among the default rules.
    DeniedByRule = "denied_by_rule", true;
    /// A service of this host that `hostAccess` does not open.
    HostAccess = "host_access", true;
    /// No guest has this address of the virtual network.
    NoGuest = "no_guest", true;
    /// Neither an instance-level public IP nor an outbound rule: there is no way out.
    NoOutboundMethod = "no_outbound_method", true;
    /// A protocol without ports needs an instance-level public IP.
    NoPorts = "protocol_without_ports", true;
    /// Every port this guest owns is taken towards this destination.
    SnatExhausted = "snat_exhausted", true;
    /// The same, answered from the memory of the last refusal.
    SnatRefused = "snat_refused_again", true;
    /// The flow table has no room; live flows are not evicted.
    TableFull = "table_full", true;
    /// Another CPU was making the same flow at the same moment.
    Contended = "contended", true;
    /// Mid-stream, or an answer, without a flow; also a port that SNAT owns and nobody uses.
    NoFlow = "no_flow", true;
    /// Addressed to a public address of ours where nothing listens.
    NoListener = "no_listener", true;
    /// No route to the world for this destination.
    NoRoute = "no_route", true;
    /// The time to live ran out here.
    TtlExpired = "ttl_expired", true;
    /// TCP flags that no connection has.
    TcpFlags = "tcp_flags", true;
    /// A private source about to leave on an uplink.
    Untranslated = "untranslated", true;
    /// The next hop's hardware address is unknown and the kernel could not be asked.
    Unresolved = "unresolved_next_hop", true;
    /// The policy tables do not hold what they should; a bug, please report it.
    Internal = "internal", true;
    /// A neighbour solicitation answered by the datapath.
    NdAnswered = "nd_answered", false;
    /// A neighbour advertisement taken note of.
    NdLearned = "nd_learned", false;
    /// Neighbour discovery with a sender or target that does not belong to the interface.
    SpoofedNd = "spoofed_nd", true;
    /// A guest advertising itself as a router, or redirecting others.
    RouterAdvertisement = "router_advertisement", true;
    /// IPv6 extension headers in a chain too long, out of order, or of a kind that is obsolete.
    ExtensionHeaders = "extension_headers", true;
    /// A platform rule that stands before the groups: the block of outbound SMTP.
    DeniedByPlatform = "denied_by_platform_rule", true;
    /// A route with next hop type None, or to an appliance that is no guest.
    RouteNone = "route_to_nowhere", true;
    /// A route through a virtual network gateway, which this host is not.
    NoGateway = "no_virtual_network_gateway", true;
    /// A load balancing rule of which no backend takes new flows.
    NoBackend = "no_healthy_backend", true;
    /// As many ports tried as one packet may, and all taken towards this destination; the retransmission goes on with the rest.
    SnatSearching = "snat_search_goes_on", true;
    /// Longer than the next link takes, and not to be fragmented.
    TooBig = "packet_too_big", true;
    /// The guest holds as many flows as one guest may (`flowTable.maxFlowsPerGuest`).
    GuestFlowQuota = "guest_flow_quota", true;
    /// The guest has as many half-open flows from outside as one may, and the oldest was not found in time.
    HalfOpenQuota = "half_open_quota", true;
    /// A later fragment before the one it follows, or long after it: nothing can be held back here.
    FragmentOutOfOrder = "fragment_out_of_order", true;
    /// A fragment of bytes that another one has brought already.
    FragmentOverlap = "fragment_overlap", true;
    /// Longer than the next link takes, and cut into fragments, each of which counts for itself.
    Fragmented = "fragmented", false;
    /// A frame for another station's hardware address, on a device that several guests share.
    NotForUs = "not_for_us", true;
    /// A segment of a connection older than the first start, which policy allows: a flow from now on, sent on.
    Adopted = "adopted", false;
}

/// Room for the counters in the kernel: more than there are reasons, so that adding one is no layout change.
pub const REASON_SLOTS: usize = 64;
const _: () = assert!(Reason::ALL.len() <= REASON_SLOTS);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_found_under_its_own_index_and_has_a_label_of_its_own() {
        let mut labels = std::collections::BTreeSet::new();
        for (i, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, i);
            assert_eq!(Reason::from_index(i as u32), Some(*reason));
            assert!(labels.insert(reason.label()), "{} twice", reason.label());
            assert!(!reason.description().is_empty());
        }
        assert_eq!(Reason::from_index(Reason::ALL.len() as u32), None);
    }
}
