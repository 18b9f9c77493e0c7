//! Whole or not at all, whichever system call fails.

use portcullis_common::layout::{DEVICE_GUEST, Device, HOP_GUEST, NextHop};
use portcullis_common::policy::{EndpointKey, Page};

use super::faults::{fail_nth, struck};
use super::support::{Place, in_a_place_of_its_own};
use crate::datapath::{AttachDevice, AttachPlan, Datapath, LoadOptions, PolicyImage, Role};

fn open(place: &Place) -> Datapath {
    let options = LoadOptions { flow_buckets: 8, ..LoadOptions::default() };
    Datapath::open(&place.pins(), &options).expect("opens")
}

fn image(generation: u32) -> PolicyImage {
    let mut header = Page::default();
    header.words[0] = u64::from(generation) | 2 << 32;
    let hop = NextHop { ifindex: generation, kind: HOP_GUEST, address: generation, ..NextHop::default() };
    PolicyImage {
        generation,
        pages: vec![header, Page::default()],
        prefixes: vec![(0, [0; 4], 0)],
        spaces: vec![(1, 8, [10, 0, 0, 0], 1 << 24 | 1)],
        endpoints: vec![(EndpointKey { address: 1, network: 1, ..EndpointKey::default() }, generation)],
        devices: vec![Device {
            ifindex: 9,
            kind: DEVICE_GUEST,
            network: generation as u16,
            ..Device::default()
        }],
        guest_hops: vec![(2, hop), (3, hop)],
        rule_ids: vec![7, generation + 100],
        ..PolicyImage::default()
    }
}

/// Everything that the generation in force is made of, and whether the idle one holds anything.
#[derive(Debug, PartialEq)]
struct State {
    generation: u32,
    slots: Vec<Option<u32>>,
    idle: Vec<Option<u32>>,
    device: Device,
    hops: Vec<(u16, NextHop)>,
}

fn state(datapath: &Datapath) -> State {
    let generation = datapath.generation();
    let slot = |parity: u32| {
        datapath
            .tables
            .of_generation()
            .iter()
            .map(|t| t.lookup::<u32, u32>(&parity).expect("reads"))
            .collect()
    };
    let pair = datapath.tables.devices.lookup::<u32, [Device; 2]>(&9).expect("reads").expect("there");
    State {
        generation,
        slots: slot(generation & 1),
        idle: slot(generation & 1 ^ 1),
        device: pair[(generation & 1) as usize],
        hops: datapath.next_hops().expect("reads"),
    }
}

#[test]
fn a_policy_that_fails_half_way_leaves_the_old_one_in_force_whichever_call_fails() {
    in_a_place_of_its_own(|place| {
        let mut datapath = open(place);
        datapath.install(&image(1)).expect("installs");
        let before = state(&datapath);
        assert_eq!(before.device.network, 1);
        assert!(before.slots.iter().all(Option::is_some) && before.idle.iter().all(Option::is_none));
        let mut failed = 0;
        for n in 1.. {
            assert!(n < 200, "never got through");
            fail_nth(n);
            let outcome = datapath.install(&image(2));
            let struck = struck();
            match outcome {
                Err(error) => {
                    assert!(struck, "{error:#}");
                    assert!(format!("{error:#}").contains("generation 2 was not put in force"), "{error:#}");
                    assert_eq!(state(&datapath), before, "call {n}: {error:#}");
                    failed += 1;
                }
                // After the flip there is nothing to go back to.
                Ok(installed) if struck => {
                    assert_eq!(installed.notes.len(), 1, "call {n}");
                    assert_eq!(datapath.generation(), 2);
                    break;
                }
                Ok(_) => panic!("call {n} did not fail"),
            }
        }
        assert!(failed > 12, "{failed} calls before the flip");
        // The next generation tidies what the failure after the flip left.
        let installed = datapath.install(&image(3)).expect("installs");
        assert_eq!(installed.notes, Vec::<String>::new());
        let after = state(&datapath);
        assert_eq!((after.generation, after.device.network), (3, 3));
        assert!(after.idle.iter().all(Option::is_none));
    });
}

#[test]
fn an_attach_that_fails_half_way_undoes_itself_whichever_call_fails() {
    in_a_place_of_its_own(|place| {
        let (guest, uplink) = place.veth("guest0", "up0");
        let device =
            |ifindex, name: &str, role| AttachDevice { ifindex, name: name.to_owned(), role, xdp: true };
        let plan = AttachPlan {
            devices: vec![device(guest, "guest0", Role::Guest), device(uplink, "up0", Role::Uplink)],
            ..AttachPlan::default()
        };
        let mut datapath = open(place);
        let fail_each = |datapath: &mut Datapath| {
            let before = datapath.hooks().expect("asks");
            for n in 1.. {
                assert!(n < 200, "never got through");
                fail_nth(n);
                let outcome = datapath.attach(&plan);
                let struck = struck();
                match outcome {
                    Err(error) => assert_eq!(datapath.hooks().expect("asks"), before, "call {n}: {error:#}"),
                    Ok(attached) if struck => {
                        // Counting losses is not worth failing for.
                        assert!(!attached.notes().is_empty(), "call {n}");
                        datapath.undo(attached);
                    }
                    Ok(attached) => {
                        datapath.commit(attached).expect("commits");
                        return n;
                    }
                }
            }
            unreachable!()
        };
        assert!(fail_each(&mut datapath) > 6 * 2, "making a link and pinning it");
        assert_eq!(datapath.hooks().expect("asks").len(), 6);
        drop(datapath);
        let mut datapath = open(place);
        assert!(
            fail_each(&mut datapath) > 6 * 4,
            "opening a link, asking about it, its program, replacing that"
        );
    });
}

#[test]
fn an_open_that_fails_leaves_no_new_datapath_and_keeps_an_old_one() {
    in_a_place_of_its_own(|place| {
        let options = LoadOptions { flow_buckets: 8, ..LoadOptions::default() };
        let try_each = |adopts: bool| {
            // Every load takes a while; a sample of the calls will do.
            for n in (1..).step_by(7) {
                fail_nth(n);
                let outcome = Datapath::open(&place.pins(), &options);
                let struck = struck();
                match outcome {
                    Err(error) => {
                        assert!(struck, "{error:#}");
                        assert_eq!(place.pins().exists(), adopts, "call {n}: {error:#}");
                    }
                    Ok(datapath) => {
                        assert!(!struck, "call {n} went unnoticed");
                        assert_eq!(datapath.adopted(), adopts);
                        return datapath;
                    }
                }
            }
            unreachable!()
        };
        let mut first = try_each(false);
        first.install(&image(1)).expect("installs");
        let before = state(&first);
        drop(first);
        assert_eq!(state(&try_each(true)), before);
    });
}
