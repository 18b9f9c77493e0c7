//! Making, adopting and removing the datapath's tables.

mod datapath_image;
mod datapath_support;

use std::fs;

use aya::maps::{HashMap, MapData};
use datapath_image::image;
use datapath_support::in_a_place_of_its_own;
use portcullis::datapath::{DEFAULT_PINS, Datapath, LoadOptions, Route, down, in_use};
use portcullis_common::layout::{HOP_FLAG_RESOLVED, HOP_HOST, HOP_WORLD, NextHop};

fn small() -> LoadOptions {
    LoadOptions { flow_buckets: 64, ..LoadOptions::default() }
}

#[test]
fn every_program_passes_the_verifier_and_says_how_many_instructions_it_took() {
    in_a_place_of_its_own(|place| {
        let datapath = Datapath::open(&place.pins(), &small()).expect("opens");
        let programs = datapath.program_info().expect("info");
        assert_eq!(programs.len(), 37, "{programs:#?}");
        for program in &programs {
            let instructions = program.verified_instructions.expect("known since 5.16");
            println!("{:>20} {instructions:>7} instructions", program.name);
            assert!(instructions > 0 && instructions < 1_000_000, "{program:?}");
        }
    });
}

#[test]
fn a_second_open_adopts_the_tables_with_their_contents_and_generation() {
    in_a_place_of_its_own(|place| {
        let mut first = Datapath::open(&place.pins(), &small()).expect("opens");
        assert!(!first.adopted());
        assert_eq!(first.generation(), 0);
        first.install(&image(1, 10, 11)).expect("installs");
        let hop = NextHop { ifindex: 3, kind: HOP_WORLD, mac: [1; 6], ..NextHop::default() };
        first.set_next_hop(77, &hop).expect("sets");
        let route = Route { destination: [0, 0, 0, 0].into(), prefix_length: 0, next_hop: 77 };
        first.set_route(&route).expect("sets");
        drop(first);

        let second = Datapath::open(&place.pins(), &small()).expect("opens again");
        assert!(second.adopted());
        assert_eq!(second.generation(), 1);
        assert_eq!(second.next_hop(77).expect("reads"), hop);
        assert_eq!(second.next_hop(1).expect("reads").kind, HOP_HOST);
        assert_eq!(second.routes().expect("reads"), [route]);
        assert!(second.remove_route(route.destination, 0).expect("removes"));
        assert!(!second.remove_route(route.destination, 0).expect("removes"));
        assert!(second.notes().is_empty(), "{:?}", second.notes());
    });
}

#[test]
fn another_wish_for_the_flow_table_is_told_and_not_followed_while_there_is_one() {
    in_a_place_of_its_own(|place| {
        let first = Datapath::open(&place.pins(), &small()).expect("opens");
        assert_eq!(first.flow_buckets(), 64);
        assert_eq!(first.flow_table().expect("maps").slots(), 512);
        drop(first);
        let options = LoadOptions { flow_buckets: 100, ..LoadOptions::default() };
        let second = Datapath::open(&place.pins(), &options).expect("opens again");
        assert_eq!(second.flow_buckets(), 64);
        assert!(second.notes()[0].contains("64 buckets instead of 128"), "{:?}", second.notes());
    });
}

#[test]
fn a_table_of_another_shape_is_refused_and_left_alone() {
    in_a_place_of_its_own(|place| {
        let maps = place.pins().join("v4/maps");
        fs::create_dir_all(&maps).expect("makes");
        let odd = HashMap::<MapData, u32, u64>::create(16, 0).expect("creates");
        odd.pin(maps.join("NEXT_HOPS")).expect("pins");
        let error = Datapath::open(&place.pins(), &small()).err().expect("refuses");
        let text = format!("{error:#}");
        assert!(
            text.contains("NEXT_HOPS: the pinned table is hash of 16 with keys of 4, values of 8"),
            "{text}"
        );
        assert!(text.contains("array of 4096 with keys of 4, values of 64"), "{text}");
        assert!(text.contains("portcullis down"), "{text}");
        assert!(maps.join("NEXT_HOPS").exists());
    });
}

#[test]
fn pins_outside_a_bpf_filesystem_are_refused_with_advice() {
    in_a_place_of_its_own(|place| {
        let error = Datapath::open(&place.plain_directory().join("pins"), &small()).err().expect("refuses");
        assert!(format!("{error:#}").contains("mount -t bpf bpf"), "{error:#}");
    });
}

#[test]
fn the_bpf_filesystem_is_mounted_where_it_belongs_if_nobody_has() {
    in_a_place_of_its_own(|_| {
        // This thread's mounts are its own: the machine's bpf filesystem stays where it is.
        while nix::mount::umount2("/sys/fs/bpf", nix::mount::MntFlags::MNT_DETACH).is_ok() {}
        let pins = std::path::Path::new(DEFAULT_PINS);
        assert!(!pins.exists());
        drop(Datapath::open(pins, &small()).expect("opens"));
        assert!(pins.join("v4/maps/CONTROL").exists());
        down(pins).expect("goes down");
        assert!(!pins.exists());
    });
}

#[test]
fn two_controllers_do_not_share_pins() {
    in_a_place_of_its_own(|place| {
        assert!(!in_use(&place.pins()));
        let first = Datapath::open(&place.pins(), &small()).expect("opens");
        assert!(in_use(&place.pins()));
        let error = Datapath::open(&place.pins(), &small()).err().expect("refuses");
        assert!(format!("{error:#}").contains("in use by another portcullis"), "{error:#}");
        drop(first);
        assert!(!in_use(&place.pins()));
    });
}

#[test]
fn down_removes_everything_also_when_half_of_it_is_missing_and_nothing_the_second_time() {
    in_a_place_of_its_own(|place| {
        let mut datapath = Datapath::open(&place.pins(), &small()).expect("opens");
        datapath.install(&image(1, 10, 11)).expect("installs");
        fs::remove_file(place.pins().join("v4/maps/CONTROL")).expect("removes");
        fs::remove_file(place.pins().join("v4/stages-1-tc")).expect("removes");
        let removed = down(&place.pins()).expect("goes down");
        assert!(removed.contains(&"table FLOWS".to_owned()), "{removed:?}");
        assert!(removed.contains(&"program array stages-1-xdp".to_owned()), "{removed:?}");
        assert!(!place.pins().exists());
        drop(datapath);
        assert_eq!(down(&place.pins()).expect("goes down"), Vec::<String>::new());
    });
}

#[test]
fn a_learned_hardware_address_outlives_policies_until_the_guest_leaves() {
    in_a_place_of_its_own(|place| {
        let mut datapath = Datapath::open(&place.pins(), &small()).expect("opens");
        datapath.install(&image(1, 10, 11)).expect("installs");
        let mut hop = datapath.next_hop(2).expect("reads");
        hop.mac = [2, 0, 0, 0, 0, 4];
        hop.flags |= HOP_FLAG_RESOLVED;
        datapath.set_next_hop(2, &hop).expect("learns");
        let installed = datapath.install(&image(2, 10, 11)).expect("installs");
        assert_eq!(datapath.next_hop(2).expect("reads"), hop);
        assert!(installed.retired_rules.is_empty(), "no rule was ever hit");
        assert_eq!(installed.notes, Vec::<String>::new());
        let mut without = image(3, 10, 11);
        without.guest_hops.clear();
        datapath.install(&without).expect("installs");
        assert_eq!(datapath.next_hop(2).expect("reads"), NextHop::default());
    });
}

#[test]
fn a_load_that_was_never_attached_leaves_no_program_arrays() {
    in_a_place_of_its_own(|place| {
        drop(Datapath::open(&place.pins(), &small()).expect("opens"));
        let left: Vec<_> = fs::read_dir(place.pins().join("v4")).expect("lists").flatten().collect();
        assert!(left.iter().all(|e| !e.file_name().to_string_lossy().starts_with("stages")), "{left:?}");
    });
}

#[test]
fn the_first_generation_may_be_even() {
    in_a_place_of_its_own(|place| {
        let mut datapath = Datapath::open(&place.pins(), &small()).expect("opens");
        datapath.install(&image(2, 10, 11)).expect("installs");
        datapath.install(&image(3, 10, 11)).expect("installs");
        assert_eq!(datapath.generation(), 3);
    });
}

#[test]
fn an_image_that_contradicts_itself_or_the_generation_in_force_is_refused() {
    in_a_place_of_its_own(|place| {
        let mut datapath = Datapath::open(&place.pins(), &small()).expect("opens");
        datapath.install(&image(5, 10, 11)).expect("any number may be the first");
        let mut refused = |image, why: &str| {
            let error = datapath.install(&image).expect_err(why);
            assert!(format!("{error:#}").contains(why), "{error:#}");
            assert_eq!(datapath.generation(), 5);
        };
        refused(image(7, 10, 11), "parity");
        let mut short = image(6, 10, 11);
        short.pages.pop();
        refused(short, "header says");
        refused(image(6, 10, 10 + 4096), "share a place");
        let mut hop = image(6, 10, 11);
        hop.guest_hops[0].0 = 1;
        refused(hop, "next hop 1");
    });
}
