//! Candidates and numbers of flows, and what their figures are called.

use super::layout::SOCKETS;
use super::options::Scale;

/// A number of live flows; a power of two, at least one for each socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Size {
    Small,
    Middle,
    Large,
}

impl Size {
    /// The three sizes of the design.
    pub const ALL: [Size; 3] = [Size::Small, Size::Middle, Size::Large];

    /// Number of flows; in a test of the bench fewer than the name says.
    pub fn flows(self, scale: Scale) -> u32 {
        match self {
            Size::Small => SOCKETS,
            Size::Middle => scale.pick(2, 64, 64) * SOCKETS,
            Size::Large => scale.pick(4, 1024, 1024) * SOCKETS,
        }
    }

    /// `1k`, `64k`, `1m`.
    pub const fn label(self) -> &'static str {
        match self {
            Size::Small => "1k",
            Size::Middle => "64k",
            Size::Large => "1m",
        }
    }
}

/// What can forward the packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Bare,
    Forward,
    Nftables,
    Iptables,
    Xdp,
    /// With a flow table made for a million flows, however few there are.
    XdpRoomy,
    Tc,
    /// A minimal NAT over a kernel hash.
    TableHash,
    /// The same over buckets of records.
    TableRecords,
}

impl Kind {
    pub const fn title(self) -> &'static str {
        match self {
            Kind::Bare => "bare XDP redirect",
            Kind::Forward => "the kernel's forwarding, without NAT",
            Kind::Nftables => "nftables masquerade",
            Kind::Iptables => "iptables masquerade",
            Kind::Xdp => "Portcullis, XDP",
            Kind::XdpRoomy => "Portcullis, XDP, in a table made for a million flows",
            Kind::Tc => "Portcullis, TC",
            Kind::TableHash => "minimal NAT, kernel hash",
            Kind::TableRecords => "minimal NAT, records",
        }
    }

    /// Name of its packet rate.
    pub fn figure(self, size: Size) -> String {
        let stem = match self {
            Kind::Bare => "bare_redirect",
            Kind::Forward => "kernel_forward",
            Kind::Nftables => "nft",
            Kind::Iptables => "iptables",
            Kind::Xdp => "established",
            Kind::XdpRoomy => "established_in_1m_table",
            Kind::Tc => "tc_established",
            Kind::TableHash => "table_hash",
            Kind::TableRecords => "table_records",
        };
        format!("{stem}_{}", size.label())
    }

    /// Does it write another source address?
    pub const fn translates(self) -> bool {
        !matches!(self, Kind::Bare | Kind::Forward)
    }

    /// Share of the bare redirect that has to be reached, and that is aimed at.
    pub const fn shares(self, size: Size) -> Option<(f64, f64)> {
        match (self, size) {
            (Kind::Xdp, Size::Small) => Some((0.65, 0.80)),
            (Kind::Xdp, Size::Middle) => Some((0.42, 0.55)),
            (Kind::Xdp, Size::Large) => Some((0.35, 0.45)),
            _ => None,
        }
    }
}

/// Name of the time in a candidate's program.
pub(super) fn program_time_figure(kind: Kind, size: Size) -> String {
    let stem = match kind {
        Kind::Bare => "bare_ns_per_packet",
        Kind::Tc => "tc_ns_per_packet",
        _ => "ns_per_packet",
    };
    format!("{stem}_{}", size.label())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_called_as_the_design_calls_them() {
        assert_eq!(Size::ALL.map(Size::label), ["1k", "64k", "1m"]);
        assert_eq!(Kind::Tc.figure(Size::ALL[1]), "tc_established_64k");
    }
}
