//! The packets of the stages: the flows that the generator sends, as single frames.

use std::net::Ipv4Addr;

use crate::backend::ROUTER_MAC;
use crate::bench::layout::{
    FIRST_DESTINATION_PORT, FIRST_GUEST, FIRST_SOURCE_PORT, GUEST_MAC, GUESTS, SOCKETS,
};
use crate::bench::rig::DESTINATION;
use crate::lab::{Craft, Mac, TcpFlags};
use crate::random::Random;

/// Flows that SYNs are drawn from: as many as half of the table holds.
const SYNS: u32 = 1 << 17;
/// Where the guest sends everything that runs out of ports; no flow's port.
const CROWDED_PORT: u16 = 65_000;

/// Frames between guests and the world.
pub(super) struct Packets {
    /// Of the gateway's device towards the guests.
    pub inside: Mac,
    /// Of the gateway's device towards the world.
    pub outside: Mac,
}

/// `count` numbers of flows drawn from so many, the same in every run.
pub(super) fn drawn(flows: u32, count: usize) -> Vec<u32> {
    let mut random = Random(11);
    (0..count).map(|_| random.below(flows as usize) as u32).collect()
}

impl Packets {
    fn of_guest(&self, flow: u32) -> Craft {
        let guest = flow & (GUESTS - 1);
        let [mac @ .., last] = GUEST_MAC;
        let [a, b, c, d, e] = mac;
        let address = Ipv4Addr::from(FIRST_GUEST | guest);
        Craft::new([a, b, c, d, e, last | guest as u8], address, self.inside, DESTINATION)
    }

    fn ports(flow: u32) -> (u16, u16) {
        let source = FIRST_SOURCE_PORT + (flow & (SOCKETS - 1));
        (source as u16, (FIRST_DESTINATION_PORT + flow / SOCKETS) as u16)
    }

    /// A datagram of a flow.
    pub fn datagram(&self, flow: u32) -> Vec<u8> {
        let (source, destination) = Self::ports(flow);
        self.of_guest(flow).udp(source, destination, b"")
    }

    /// What the world answers to a datagram that has left: addresses and ports the other way round.
    pub fn answer(&self, sent: &[u8]) -> Option<Vec<u8>> {
        let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(sent.get(at..at + 4)?).ok()?));
        let port = |at: usize| Some(u16::from_be_bytes(sent.get(at..at + 2)?.try_into().ok()?));
        let back = Craft::new(ROUTER_MAC, address(30)?, self.outside, address(26)?);
        Some(back.udp(port(36)?, port(34)?, b""))
    }

    /// Different SYNs, in the order of their flows or not.
    pub fn syns(&self, count: usize, random: bool) -> Vec<Vec<u8>> {
        // An odd factor is a permutation.
        let scatter = if random { 0x9e37_79b1 } else { 1 };
        (0..count as u32)
            .map(|i| {
                let flow = i.wrapping_mul(scatter) & (SYNS - 1);
                let (source, destination) = Self::ports(flow);
                self.of_guest(flow).tcp(source, destination, TcpFlags::SYN, 1, 0, b"")
            })
            .collect()
    }

    /// One of the SYNs of one guest that all go to one destination.
    pub fn crowded(&self, number: u16) -> Vec<u8> {
        self.of_guest(0).tcp(number.wrapping_add(1024).max(1), CROWDED_PORT, TcpFlags::SYN, 1, 0, b"")
    }

    /// No IP at all: given up at the first look.
    pub fn nothing(&self) -> Vec<u8> {
        let mut frame = self.datagram(0);
        frame[12..14].copy_from_slice(&[0x88, 0xcc]);
        frame
    }
}
