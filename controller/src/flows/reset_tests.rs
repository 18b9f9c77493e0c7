//! RSTs to idle connections: the frame byte by byte, and which flows they are for, on tables of real maps.

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use portcullis_common::flow::{ENDED, FLAG_SNAT};
use portcullis_common::tcp_state::{ANSWERED, FIN_FORWARD, FIN_REVERSE, OPENED, RESET};

use super::*;
use crate::datapath::now_tick;
use crate::flows::kill::tests::{Put, TCP as FLOW, put, with_tables};

fn hop() -> NextHop {
    NextHop {
        ifindex: 3,
        kind: HOP_GUEST,
        flags: HOP_FLAG_RESOLVED,
        mac: [2, 0, 0, 0, 0, 4],
        source_mac: [2, 0, 0, 0, 0, 1],
        ..NextHop::default()
    }
}

fn reset(source: &str, destination: &str) -> Reset {
    Reset {
        source: (source.parse().unwrap(), 443),
        destination: (destination.parse().unwrap(), 40000),
        sequence: 0xfedc_ba98,
        acknowledgement: 0x0123_4567,
        next_hop: 7,
    }
}

#[test]
fn a_frame_has_the_hops_addresses_right_checksums_and_exactly_the_expected_sequence_number() {
    for (source, destination) in [("198.51.100.1", "10.0.0.4"), ("2001:db8::1", "fd00:1::4")] {
        let reset = reset(source, destination);
        let frame = reset.frame(&hop()).unwrap();
        assert_eq!(frame[..12], [2, 0, 0, 0, 0, 4, 2, 0, 0, 0, 0, 1]);
        let packet = SlicedPacket::from_ethernet(&frame).unwrap();
        let Some(TransportSlice::Tcp(tcp)) = packet.transport else { panic!("no TCP in {frame:?}") };
        let (sum, from, to): (u16, IpAddr, IpAddr) = match packet.net.unwrap() {
            NetSlice::Ipv4(ip) => {
                let header = ip.header().to_header();
                assert_eq!(header.header_checksum, header.calc_header_checksum());
                assert_eq!((header.total_len, header.time_to_live, header.dont_fragment), (40, 64, true));
                let sum = tcp.to_header().calc_checksum_ipv4(&header, &[]).unwrap();
                (sum, header.source.into(), header.destination.into())
            }
            NetSlice::Ipv6(ip) => {
                let header = ip.header().to_header();
                assert_eq!((header.payload_length, header.hop_limit), (20, 64));
                let sum = tcp.to_header().calc_checksum_ipv6(&header, &[]).unwrap();
                (sum, header.source.into(), header.destination.into())
            }
            NetSlice::Arp(_) => unreachable!(),
        };
        assert_eq!((from, to, sum), (reset.source.0, reset.destination.0, tcp.checksum()));
        assert_eq!((tcp.source_port(), tcp.destination_port()), (443, 40000));
        assert_eq!((tcp.sequence_number(), tcp.acknowledgment_number()), (0xfedc_ba98, 0x0123_4567));
        assert!(tcp.rst() && tcp.ack() && !tcp.syn() && !tcp.fin() && tcp.window_size() == 0);
    }
}

#[test]
fn a_hop_without_a_hardware_address_and_the_host_get_no_frame() {
    let reset = reset("198.51.100.1", "10.0.0.4");
    assert_eq!(reset.frame(&NextHop { flags: 0, ..hop() }), None);
    for kind in [0, portcullis_common::layout::HOP_HOST, portcullis_common::layout::HOP_LOOP] {
        assert_eq!(reset.frame(&NextHop { kind, ..hop() }), None);
    }
}

/// A flow in slots 0 and 1, with these bits, flags and deadline; and what the reaper would send for it.
fn told(table: &FlowTable, what: Put, tcp: u8, flags: u8, phase: u8, ago: u32) -> Vec<Reset> {
    put(table, what);
    let now = now_tick();
    for (slot, ack) in [(0, 1000u32), (1, 2000)] {
        let record = table.slot(slot);
        // SAFETY: in bounds, and nobody else uses this table.
        unsafe {
            let ctl = Ctl((*record).ctl);
            let own = ctl.flags() | flags;
            (*record).ctl = Ctl::new(ctl.generation(), phase, tcp, 0, own).0;
            (*record).ack = ack.to_be();
            (*record).deadline = now.wrapping_sub(ago);
        }
    }
    let mut told = Vec::new();
    let swept = table
        .sweep(now, |index, record| told.extend(resets(table, index, record, now).into_iter().flatten()));
    assert_eq!(swept.freed, 2, "both halves are freed, whatever is said of them");
    told
}

const ESTABLISHED: u8 = OPENED | ANSWERED;

#[test]
fn an_established_flow_that_idles_out_is_told_to_both_sides_once_and_no_other_flow_is() {
    with_tables(|flows, _| {
        let told_of = |tcp, flags, phase, ago| told(flows, FLOW, tcp, flags, phase, ago);
        let guest = ("10.0.0.4".parse().unwrap(), 40000);
        let server = ("198.51.100.1".parse().unwrap(), 443);
        let public: IpAddr = "203.0.113.10".parse().unwrap();
        // The reverse half of the table's flow keeps the guest's port in its key; addresses are what matters here.
        let both = told_of(ESTABLISHED, FLAG_RESET, LIVE, 10);
        assert_eq!(both.len(), 2, "{both:?}");
        assert_eq!(
            (both[0].source, both[0].destination),
            (server, guest),
            "the server, as the guest knows it"
        );
        assert_eq!((both[0].sequence, both[0].acknowledgement, both[0].next_hop), (1000, 2000, 7));
        assert_eq!(both[1].source.0, public, "the guest, as the server knows it");
        assert_eq!(both[1].destination.0, server.0);
        assert_eq!((both[1].sequence, both[1].acknowledgement, both[1].next_hop), (2000, 1000, 2));

        let silent = [
            ("without the flag", ESTABLISHED, FLAG_SNAT, LIVE, 10),
            ("never answered", OPENED, FLAG_RESET, LIVE, 10),
            ("closed by both", ESTABLISHED | FIN_FORWARD | FIN_REVERSE, FLAG_RESET, LIVE, 10),
            ("reset by one", ESTABLISHED | RESET, FLAG_RESET, LIVE, 10),
            ("ended by the operator", ESTABLISHED, FLAG_RESET, ENDED, 10),
            ("ended while nobody looked", ESTABLISHED, FLAG_RESET, LIVE, ticks(FRESH) + 10),
        ];
        for (why, tcp, flags, phase, ago) in silent {
            assert_eq!(told_of(tcp, flags, phase, ago), [], "{why}");
        }
    });
}

#[test]
fn a_flow_of_ipv6_is_told_with_its_whole_addresses() {
    with_tables(|_, flows6| {
        let flow = Put {
            from: ("fd00:1::4", 40000),
            to: ("2001:db8::1", 443),
            outside: ("2001:db8:ffff::10", 1024),
            ..FLOW
        };
        let both = told(flows6, flow, ESTABLISHED, FLAG_RESET, LIVE, 10);
        assert_eq!(both.len(), 2);
        assert_eq!(both[0].destination, ("fd00:1::4".parse().unwrap(), 40000));
        assert_eq!(both[0].source, ("2001:db8::1".parse().unwrap(), 443));
    });
}
