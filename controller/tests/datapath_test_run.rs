//! One packet through the loaded programs, and what comes out at the other end of the tables.

mod datapath_image;
mod datapath_support;

use datapath_image::image;
use datapath_support::{frame, in_a_place_of_its_own};
use portcullis::datapath::{Datapath, LoadOptions, now_tick};
use portcullis_common::Reason;

const SMALL: LoadOptions =
    LoadOptions { flow_buckets: 64, flow_buckets6: 64, log_level: log::LevelFilter::Off, reset: false };
const XDP_PASS: u32 = 2;
const TC_NEXT: u32 = u32::MAX;
const TC_SHOT: u32 = 2;

#[test]
fn a_packet_on_an_uplink_for_nobody_of_ours_is_left_alone_by_both_hooks_and_counted() {
    in_a_place_of_its_own(|place| {
        let (guest, _) = place.veth("guest0", "guest1");
        let (up, _) = place.veth("up0", "up1");
        let mut datapath = Datapath::open(&place.pins(), &SMALL).expect("opens");
        datapath.install(&image(1, guest, up)).expect("installs");
        let not_ours = || datapath.reasons().expect("reads")[Reason::NotOurs as usize].packets;
        let xdp = datapath.run_xdp(&frame(), up).expect("runs");
        assert_eq!((xdp.verdict, xdp.packet), (XDP_PASS, frame()));
        let before = not_ours();
        let tc = datapath.run_tc(&frame(), up).expect("runs");
        assert_eq!((tc.verdict, tc.packet), (TC_NEXT, frame()));
        assert_eq!(not_ours(), before + 1);
    });
}

#[test]
fn a_packet_on_a_device_without_policy_is_left_alone() {
    in_a_place_of_its_own(|place| {
        let (_, peer) = place.veth("up0", "up1");
        let (guest, up) = place.veth("guest0", "guest1");
        let mut datapath = Datapath::open(&place.pins(), &SMALL).expect("opens");
        assert_eq!(datapath.run_xdp(&frame(), peer).expect("runs").verdict, XDP_PASS);
        datapath.install(&image(1, guest, up)).expect("installs");
        assert_eq!(datapath.run_xdp(&frame(), peer).expect("runs").verdict, XDP_PASS);
    });
}

#[test]
fn a_sampled_drop_arrives_as_an_event() {
    in_a_place_of_its_own(|place| {
        let (guest, _) = place.veth("guest0", "guest1");
        let (up, _) = place.veth("up0", "up1");
        let mut datapath = Datapath::open(&place.pins(), &SMALL).expect("opens");
        let mut image = image(1, guest, up);
        image.settings.event_rate = 10;
        datapath.install(&image).expect("installs");
        // Nobody there has this source address.
        assert_eq!(datapath.run_tc(&frame(), guest).expect("runs").verdict, TC_SHOT);
        let mut events = datapath.events().expect("opens");
        let event = events.try_next().expect("one event");
        let reason = Reason::from_index(u32::from(event.reason)).expect("known");
        assert!(reason.is_drop(), "{reason:?}");
        assert_eq!((event.ifindex, event.source), (guest, u32::from_ne_bytes([198, 51, 100, 7])));
        assert_eq!(datapath.reasons().expect("reads")[event.reason as usize].packets, 1);
        assert!(events.try_next().is_none());

        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let mut events = events.into_async().expect("registers");
            let one = events.next();
            datapath.run_tc(&frame(), guest).expect("runs");
            assert_eq!(one.await.expect("reads").reason, event.reason);
        });
    });
}

#[test]
fn the_flow_table_is_read_and_swept_from_memory() {
    in_a_place_of_its_own(|place| {
        let datapath = Datapath::open(&place.pins(), &SMALL).expect("opens");
        let flows = datapath.flow_table().expect("maps");
        assert_eq!(flows.iter().count(), 0);
        assert!(flows.bucket(63).is_some() && flows.bucket(64).is_none());
        let swept = flows.sweep(now_tick(), |_, _| panic!("nothing to free"));
        assert_eq!((swept.live, swept.waiting, swept.freed), (0, 0, 0));
    });
}
