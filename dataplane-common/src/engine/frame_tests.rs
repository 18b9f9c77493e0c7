//! Frames and fragments that the engine decides about before it asks a policy.

use super::host::{HostEnv, HostPacket};
use super::{Context, Hook, Verdict};
use crate::layout::{DEVICE_GUEST, DEVICE_UPLINK, Device};
use crate::packet::cut::Cut;
use crate::packet::{Packet as _, checksum};
use crate::reason::Reason::{self, *};
use std::vec::Vec;

const OWN: [u8; 6] = [2, 0, 0, 0, 0, 9];
const GUEST: u32 = 5;
const SHARED: u32 = 6;
const UPLINK: u32 = 7;

fn env() -> HostEnv {
    let mut env = HostEnv::new(1, [1, 2]);
    for (ifindex, kind, strict) in
        [(GUEST, DEVICE_GUEST, 0), (SHARED, DEVICE_GUEST, u32::MAX), (UPLINK, DEVICE_UPLINK, u32::MAX)]
    {
        env.set_device(0, Device { ifindex, kind, strict, network: 1, mac: OWN, ..Device::default() });
    }
    env
}

/// An IPv4 packet of UDP for a station; `field` is that of the fragment.
fn udp(to: [u8; 6], field: u16, payload: usize) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend(to);
    frame.extend([2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0]);
    frame.extend(((28 + payload) as u16).to_be_bytes());
    frame.extend([0, 77]);
    frame.extend(field.to_be_bytes());
    frame.extend([64, 17, 0, 0, 10, 0, 0, 4, 192, 0, 2, 1]);
    frame.extend([0x13, 0x88, 0, 53]);
    frame.extend(((8 + payload) as u16).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend((0..payload).map(|i| (i % 251) as u8));
    let sum = checksum::of(&frame[14..34]).to_ne_bytes();
    frame[24..26].copy_from_slice(&sum);
    frame
}

fn ends(env: &HostEnv, ifindex: u32, frame: &[u8], verdict: Verdict, reason: Reason) {
    let before = env.counted(reason).packets;
    let all: u64 = env.counters().iter().map(|(_, n)| n).sum();
    let (said, out, _) = env.packet(frame, ifindex, Hook::Tc, false);
    assert_eq!(said, verdict, "{reason:?}");
    assert_eq!(out, frame, "{reason:?}: untouched");
    assert_eq!(env.counted(reason).packets, before + 1, "{:?}", env.counters());
    assert_eq!(env.counters().iter().map(|(_, n)| n).sum::<u64>(), all + 1, "{:?}", env.counters());
}

#[test]
fn a_frame_for_another_station_is_left_alone_on_an_uplink_and_dropped_where_guests_share_a_device() {
    let env = env();
    for other in [[2, 0, 0, 0, 0, 8], [2, 0, 0, 0, 1, 9], [4, 0, 0, 0, 0, 9], [2, 0, 0, 1, 0, 9]] {
        ends(&env, UPLINK, &udp(other, 0, 8), Verdict::Pass, NotOurs);
        ends(&env, SHARED, &udp(other, 0, 8), Verdict::Drop, NotForUs);
        // Whatever arrives from the one guest is for us. The policy knows nobody.
        assert_eq!(env.packet(&udp(other, 0, 8), GUEST, Hook::Tc, false).0, Verdict::Drop);
    }
    assert_eq!(env.counted(NotForUs).packets, 4);
    ends(&env, UPLINK, &udp([0xff; 6], 0, 8), Verdict::Pass, NotOurs);
}

#[test]
fn what_bridges_say_to_each_other_passes_and_other_protocols_do_not() {
    let env = env();
    for (last, passes) in [(0, true), (2, true), (3, true), (14, true), (15, true), (16, false), (32, false)]
    {
        let mut frame = udp([0x01, 0x80, 0xc2, 0, 0, last], 0, 20);
        frame[12..14].copy_from_slice(&[0x88, 0xcc]);
        for device in [GUEST, SHARED] {
            if passes {
                ends(&env, device, &frame, Verdict::Pass, NotOurs);
            } else {
                ends(&env, device, &frame, Verdict::Drop, EtherType);
            }
        }
    }
}

#[test]
fn fragments_that_follow_nothing_are_too_long_or_are_cut_to_deceive_have_names_of_their_own() {
    let env = env();
    for (field, payload, reason) in [
        (0x2001, 72, FragmentOutOfOrder),
        (0x0005, 72, FragmentOutOfOrder),
        (0x2005, 73, Malformed),
        (0x1fff, 72, Malformed),
    ] {
        ends(&env, GUEST, &udp(OWN, field, payload), Verdict::Drop, reason);
    }
    let mut segment = udp(OWN, 0x2001, 72);
    segment[23] = 6;
    let sum = checksum::of(&[&segment[14..24], &[0, 0][..], &segment[26..34]].concat()).to_ne_bytes();
    segment[24..26].copy_from_slice(&sum);
    ends(&env, GUEST, &segment, Verdict::Drop, Fragment);
}

#[test]
fn a_packet_is_cut_into_pieces_that_make_it_whole_and_a_fragment_keeps_its_number() {
    for (field, payload, mtu, pieces) in
        [(0, 2992, 1500, 3), (0, 1473, 1500, 2), (0x2010, 2992, 1400, 3), (0x0010, 100, 68, 3)]
    {
        let frame = udp(OWN, field, payload);
        let packet = HostPacket::new(&frame);
        let ctx = Context { ifindex: GUEST, l3: 14, l4: 34, ..Context::default() };
        let cut = Cut::plan(&packet, &ctx, mtu, 0x1234).unwrap();
        assert!(packet.cut(&cut));
        let made = packet.pieces();
        assert_eq!(made.len(), pieces);
        let mut whole: Vec<u8> = Vec::new();
        for (number, piece) in made.iter().enumerate() {
            assert!(piece.len() <= 14 + mtu as usize);
            assert_eq!(checksum::of(&piece[14..34]), 0);
            assert_eq!(usize::from(u16::from_be_bytes([piece[16], piece[17]])), piece.len() - 14);
            let said = u16::from_be_bytes([piece[20], piece[21]]);
            assert_eq!(usize::from(said & 0x1fff), usize::from(field & 0x1fff) + whole.len() / 8);
            assert_eq!(said & 0xe000 != 0, field & 0x2000 != 0 || number + 1 < pieces);
            let id = if field == 0 { 0x1234u16.to_ne_bytes() } else { [0, 77] };
            assert_eq!(piece[18..20], id);
            whole.extend(&piece[34..]);
        }
        assert_eq!(whole, frame[34..]);
    }
    let plan = |frame: &[u8], mtu| {
        let ctx = Context { l3: 14, l4: 34, ..Context::default() };
        Cut::plan(&HostPacket::new(frame), &ctx, mtu, 1)
    };
    assert!(plan(&udp(OWN, 0x4000, 3000), 1500).is_none(), "it must not be fragmented");
    assert!(plan(&udp(OWN, 0, 17_000), 1500).is_none(), "too long");
    assert!(plan(&udp(OWN, 0, 3000), 68).is_none(), "too many pieces");
    assert!(plan(&udp(OWN, 0, 3000), 20).is_none(), "no such link");
}
