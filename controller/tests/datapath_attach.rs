//! Programs on devices: attached, replaced in place, taken away.

mod datapath_image;
mod datapath_support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};

use aya::programs::{SchedClassifier, TcAttachType};
use datapath_image::{guest, image, uplink};
use datapath_support::{Place, frame, ifindex, in_a_place_of_its_own, run};
use portcullis::datapath::{
    AttachPlan, Datapath, FlowTable, Hook, HookState, LoadOptions, TcBackend, Written, down, now_tick, whole,
};
use portcullis_common::flow::{Ctl, FLAG_FORWARD, FLAG_SNAT, LIVE};
use portcullis_common::layout::{
    ABI, FlowKey, HalfRecord, HalfRecord6, IDLE_TCP, KIND_FLOW, WORLD, hops, words6,
};
use portcullis_common::packet::headers::TCP;
use portcullis_common::tcp_state::{ACKED_FORWARD, ANSWERED, FIN_FORWARD, OPENED};

const SMALL: LoadOptions =
    LoadOptions { flow_buckets: 64, flow_buckets6: 64, log_level: log::LevelFilter::Off, reset: false };

fn open(place: &Place) -> Datapath {
    Datapath::open(&place.pins(), &SMALL).expect("opens")
}

/// A guest on `guest0` and an uplink on `up0`; the indices, and the plan.
fn devices(place: &Place, xdp: bool) -> (u32, u32, AttachPlan) {
    let (g, _) = place.veth("guest0", "guest1");
    let (u, _) = place.veth("up0", "up1");
    let devices = vec![guest(g, "guest0"), uplink(u, "up0", xdp)];
    (g, u, AttachPlan { devices, tc: TcBackend::Auto })
}

fn programs(hooks: &[HookState]) -> Vec<(u32, Hook, &str)> {
    hooks.iter().map(|h| (h.ifindex, h.hook, h.program.as_str())).collect()
}

#[test]
fn guests_get_host_and_tc_programs_and_uplinks_the_guard_too() {
    in_a_place_of_its_own(|place| {
        let (g, u, plan) = devices(place, true);
        let mut datapath = open(place);
        let attached = datapath.attach(&plan).expect("attaches");
        assert!(
            attached.describe()[0].starts_with("pc_guard on up0"),
            "guards first: {:?}",
            attached.describe()
        );
        assert_eq!(attached.notes(), Vec::<String>::new());
        datapath.commit(attached).expect("commits");
        let hooks = datapath.hooks().expect("asks");
        assert_eq!(
            programs(&hooks),
            [
                (g, Hook::Ingress, "pc_tc"),
                (g, Hook::Egress, "pc_host"),
                (u, Hook::Xdp, "pc_xdp"),
                (u, Hook::Ingress, "pc_tc"),
                (u, Hook::Egress, "pc_guard"),
            ]
        );
        assert!(hooks.iter().all(|h| h.chain == [h.program_id] && !h.dead && h.kind == "link"), "{hooks:#?}");
        assert!(run("ip -d link show up0").contains("prog/xdp"), "in the driver");
    });
}

#[test]
fn our_programs_run_before_those_that_were_there() {
    in_a_place_of_its_own(|place| {
        let (_, u, plan) = devices(place, false);
        let mut datapath = open(place);
        // Somebody else's classifier, for which one of ours stands in, attached the way most do: last.
        let attached = datapath.attach(&plan).expect("attaches");
        let ours = datapath
            .hooks()
            .expect("asks")
            .iter()
            .find(|h| h.ifindex == u && h.hook == Hook::Egress)
            .map(|h| h.program_id)
            .expect("attached");
        datapath.undo(attached);
        let info =
            aya::programs::loaded_programs().filter_map(Result::ok).find(|p| p.id() == ours).expect("loaded");
        let mut classifier =
            SchedClassifier::from_program_info(info, "pc_guard".into()).expect("is a classifier");
        classifier.attach("up0", TcAttachType::Egress).expect("attaches");
        // The same program cannot be at a hook twice, so a second load stands for us.
        drop(datapath);
        let mut datapath = open(place);
        datapath.attach(&plan).map(|a| datapath.commit(a)).expect("attaches").expect("commits");
        let guard = datapath
            .hooks()
            .expect("asks")
            .into_iter()
            .find(|h| h.ifindex == u && h.hook == Hook::Egress)
            .expect("attached");
        assert_eq!(guard.chain, [guard.program_id, ours]);
    });
}

#[test]
fn a_restart_replaces_programs_under_the_same_links_and_every_packet_is_counted_once() {
    in_a_place_of_its_own(|place| {
        let (g, u, plan) = devices(place, false);
        let mut datapath = open(place);
        datapath.install(&image(1, g, u)).expect("installs");
        datapath.attach(&plan).map(|a| datapath.commit(a)).expect("attaches").expect("commits");
        let before = datapath.hooks().expect("asks");
        let counted = |datapath: &Datapath| -> u64 {
            datapath.reasons().expect("reads").iter().map(|count| count.packets).sum()
        };
        let at_start = counted(&datapath);

        let stop = AtomicBool::new(false);
        drop(datapath);
        let (sent, datapath) = std::thread::scope(|scope| {
            // A thread begins in the network namespace of the one that made it.
            let sender = scope.spawn(|| send_until(&stop));
            let mut last = None;
            for _ in 0..5 {
                drop(last.take());
                let mut datapath = open(place);
                let attached = datapath.attach(&plan).expect("attaches");
                assert!(attached.describe().iter().all(|line| line.ends_with("program replaced")));
                datapath.commit(attached).expect("commits");
                last = Some(datapath);
            }
            stop.store(true, Ordering::Relaxed);
            (sender.join().expect("sends"), last.expect("restarted"))
        });
        let after = datapath.hooks().expect("asks");
        assert!(before.iter().zip(&after).all(|(b, a)| b.program_id != a.program_id && b.hook == a.hook));
        assert!(sent > 100, "{sent} packets in five restarts");
        assert_eq!(counted(&datapath) - at_start, sent);
        // Only the last load's program arrays are left.
        let stages = std::fs::read_dir(place.pins().join("v4")).expect("lists").flatten();
        let stages: Vec<_> =
            stages.map(|e| e.file_name()).filter(|n| n.to_string_lossy().starts_with("stages")).collect();
        assert_eq!(stages.len(), 2, "{stages:?}");
    });
}

/// Sends frames into the peer of `up0` until told to stop; how many.
fn send_until(stop: &AtomicBool) -> u64 {
    let all = libc::ETH_P_ALL as u16;
    // SAFETY: integers only.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    assert!(socket >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: plain integers; zeroes are an empty address.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = all.to_be();
    address.sll_ifindex = ifindex("up1") as i32;
    let frame = frame();
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) {
        let length = size_of::<libc::sockaddr_ll>() as u32;
        // SAFETY: frame and address are readable for the lengths given.
        let n = unsafe {
            libc::sendto(socket, frame.as_ptr().cast(), frame.len(), 0, (&raw const address).cast(), length)
        };
        assert_eq!(n, frame.len() as isize, "{}", std::io::Error::last_os_error());
        sent += 1;
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
    // What is still in the backlog of the receiving CPU.
    std::thread::sleep(std::time::Duration::from_millis(100));
    // SAFETY: ours, and not used after.
    unsafe { libc::close(socket) };
    sent
}

#[test]
fn a_failed_attach_leaves_everything_as_it_was() {
    in_a_place_of_its_own(|place| {
        let (g, u, mut plan) = devices(place, false);
        let mut datapath = open(place);
        plan.devices.push(guest(9999, "gone0"));
        let error = datapath.attach(&plan).expect_err("there is no such device");
        assert!(format!("{error:#}").contains("no device 9999"), "{error:#}");
        assert_eq!(datapath.hooks().expect("asks"), []);

        plan.devices.pop();
        datapath.attach(&plan).map(|a| datapath.commit(a)).expect("attaches").expect("commits");
        let before = datapath.hooks().expect("asks");
        drop(datapath);
        let mut datapath = open(place);
        plan.devices.push(guest(9999, "gone0"));
        datapath.attach(&plan).expect_err("there is no such device");
        assert_eq!(datapath.hooks().expect("asks"), before, "the programs of the load before are back");
        assert_eq!(before.len(), 4, "{g} {u}");
    });
}

#[test]
fn another_xdp_program_on_the_uplink_is_respected_and_named() {
    in_a_place_of_its_own(|place| {
        let (_, u, plan) = devices(place, true);
        let mut first = open(place);
        first.attach(&plan).map(|a| first.commit(a)).expect("attaches").expect("commits");
        let other = place.pins().with_file_name("second");
        let mut second = Datapath::open(&other, &SMALL).expect("opens");
        let error = second.attach(&plan).expect_err("refuses");
        assert!(format!("{error:#}").contains("another XDP program runs on up0"), "{error:#}");
        assert_eq!(second.hooks().expect("asks"), []);
        assert!(first.hooks().expect("asks").iter().any(|h| h.ifindex == u && h.hook == Hook::Xdp));
    });
}

#[test]
fn hooks_that_left_the_plan_are_detached() {
    in_a_place_of_its_own(|place| {
        let (g, u, mut plan) = devices(place, true);
        let mut datapath = open(place);
        datapath.attach(&plan).map(|a| datapath.commit(a)).expect("attaches").expect("commits");
        plan.devices[1].xdp = false;
        plan.devices.remove(0);
        let removed = datapath.detach_stale(&plan.hooks()).expect("detaches");
        assert_eq!(
            removed,
            [format!("xdp of device {u}"), format!("ingress of device {g}"), format!("egress of device {g}")]
        );
        let left = datapath.hooks().expect("asks");
        assert_eq!(programs(&left), [(u, Hook::Ingress, "pc_tc"), (u, Hook::Egress, "pc_guard")]);
        assert!(!run("ip -d link show up0").contains("prog/xdp"));
    });
}

#[test]
fn a_device_made_again_under_the_same_index_is_attached_to_again() {
    in_a_place_of_its_own(|place| {
        let (g, _, plan) = devices(place, false);
        let mut datapath = open(place);
        datapath.attach(&plan).map(|a| datapath.commit(a)).expect("attaches").expect("commits");
        run("ip link del guest0");
        let dead: Vec<bool> = datapath.hooks().expect("asks").iter().map(|h| h.dead).collect();
        assert_eq!(dead, [true, true, false, false]);
        run(&format!("ip link add guest0 index {g} type veth peer name guest1"));
        let attached = datapath.attach(&plan).expect("attaches");
        assert_eq!(attached.describe().iter().filter(|line| line.ends_with(": attached")).count(), 2);
        datapath.commit(attached).expect("commits");
        assert!(datapath.hooks().expect("asks").iter().all(|h| !h.dead && h.chain == [h.program_id]));
        run("ip link del guest0");
        let keep: BTreeSet<_> = plan.hooks().into_iter().filter(|(index, _)| *index != g).collect();
        assert_eq!(datapath.detach_stale(&keep).expect("detaches").len(), 2);
    });
}

#[test]
fn without_tcx_filters_of_clsact_are_attached_replaced_in_place_and_removed_with_the_qdisc() {
    in_a_place_of_its_own(|place| {
        let (g, _, mut plan) = devices(place, false);
        plan.tc = TcBackend::Clsact;
        let mut datapath = open(place);
        datapath.attach(&plan).map(|a| datapath.commit(a)).expect("attaches").expect("commits");
        let filters = run("tc filter show dev guest0 ingress");
        assert!(filters.contains("pc_tc"), "{filters}");
        assert!(run("tc filter show dev up0 egress").contains("pc_guard"));
        drop(datapath);

        let mut datapath = open(place);
        let attached = datapath.attach(&plan).expect("attaches");
        assert!(attached.describe().iter().all(|line| line.ends_with("replaced by netlink")), "{attached:?}");
        datapath.commit(attached).expect("commits");
        let replaced = run("tc filter show dev guest0 ingress");
        assert_ne!(filters, replaced, "another program");
        assert_eq!(replaced.matches("bpf chain 0 handle").count(), 1, "{replaced}");
        assert!(datapath.hooks().expect("asks").iter().all(|h| h.kind == "netlink" && !h.dead));

        plan.devices.remove(0);
        let removed = datapath.detach_stale(&plan.hooks()).expect("detaches");
        assert_eq!(
            removed,
            [format!("egress filter of device {g}"), format!("ingress filter of device {g}")]
        );
        assert!(!run("tc qdisc show dev guest0").contains("clsact"));
        drop(datapath);
        down(&place.pins()).expect("goes down");
        assert!(!run("tc qdisc show dev up0").contains("clsact"));
    });
}

#[test]
fn a_clsact_qdisc_that_was_there_stays() {
    in_a_place_of_its_own(|place| {
        let (_, _, mut plan) = devices(place, false);
        plan.tc = TcBackend::Clsact;
        run("tc qdisc add dev up0 clsact");
        let mut datapath = open(place);
        datapath.attach(&plan).map(|a| datapath.commit(a)).expect("attaches").expect("commits");
        drop(datapath);
        down(&place.pins()).expect("goes down");
        assert!(run("tc qdisc show dev up0").contains("clsact"));
        assert_eq!(run("tc filter show dev up0 ingress"), "");
        assert!(!run("tc qdisc show dev guest0").contains("clsact"));
    });
}

/// Programs in both tcx chains of a device, asked by other code than what is tested.
fn tcx(device: &str) -> Vec<String> {
    let chain = |side| SchedClassifier::query_tcx(device, side).expect("asks").1;
    let programs = chain(TcAttachType::Ingress).into_iter().chain(chain(TcAttachType::Egress));
    programs.map(|program| program.name_as_str().expect("named").to_owned()).collect()
}

#[test]
fn attaching_again_in_the_same_life_changes_nothing() {
    in_a_place_of_its_own(|place| {
        let (_, _, plan) = devices(place, true);
        let mut datapath = open(place);
        datapath.attach(&plan).map(|a| datapath.commit(a)).expect("attaches").expect("commits");
        let before = datapath.hooks().expect("asks");
        let again = datapath.attach(&plan).expect("attaches");
        assert!(
            again.describe().iter().all(|line| line.ends_with("attached already")),
            "{:?}",
            again.describe()
        );
        datapath.undo(again);
        assert_eq!(datapath.hooks().expect("asks"), before);
        drop(datapath);
        assert!(place.pins().join("v4/stages-1-xdp").exists(), "attached programs keep their stages");
    });
}

#[test]
fn down_detaches_what_a_killed_controller_left() {
    in_a_place_of_its_own(|place| {
        let (g, u, plan) = devices(place, true);
        let mut datapath = open(place);
        datapath.attach(&plan).map(|a| datapath.commit(a)).expect("attaches").expect("commits");
        drop(datapath);
        let removed = down(&place.pins()).expect("goes down");
        let expected = [
            format!("xdp of device {u}"),
            format!("ingress of device {g}"),
            format!("ingress of device {u}"),
            format!("egress of device {g}"),
            format!("egress of device {u}"),
            "tracepoint xdp_devmap_xmit".to_owned(),
            "tracepoint xdp_redirect_err".to_owned(),
        ];
        assert_eq!(removed[..7], expected);
        assert_eq!(tcx("up0"), Vec::<String>::new());
        assert!(!run("ip -d link show up0").contains("prog/xdp"));
    });
}

/// Both halves of a connection of the guest with next hop [`GUEST`] to a server, from this port.
fn connection(v6: bool, port: u16, tcp: u8) -> [HalfRecord6; 2] {
    let (guest, server, public) = ([1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]);
    let half = |network, source: [u32; 4], source_port: u16, destination: [u32; 4], destination_port: u16| {
        HalfRecord {
            key: FlowKey {
                source: source[3],
                destination: destination[3],
                source_port,
                destination_port,
                network,
                protocol: TCP,
                kind: KIND_FLOW,
            },
            deadline: now_tick() + 10_000,
            rule: 77,
            packets: 3,
            bytes_low: 400,
            ..HalfRecord::default()
        }
    };
    let there = HalfRecord6 {
        half: HalfRecord {
            ctl: Ctl::new(0, LIVE, tcp, IDLE_TCP, FLAG_FORWARD | FLAG_SNAT).0,
            hops: hops(9, GUEST),
            new_source: public[3],
            new_destination: server[3],
            new_source_port: port + 1,
            new_destination_port: 443,
            ack: 1000u32.to_be(),
            ..half(1, guest, port, server, 443)
        },
        source: guest,
        destination: server,
        new_source: public,
        new_destination: server,
    };
    let back = HalfRecord6 {
        half: HalfRecord {
            ctl: Ctl::new(0, LIVE, tcp, IDLE_TCP, FLAG_SNAT).0,
            hops: hops(GUEST, 9),
            new_source: server[3],
            new_destination: guest[3],
            new_source_port: 443,
            new_destination_port: port,
            ack: 2000u32.to_be(),
            ..half(WORLD, server, 443, public, port + 1)
        },
        source: server,
        destination: public,
        new_source: server,
        new_destination: guest,
    };
    if v6 { [there, back] } else { [there, back].map(|record| whole(record.half)) }
}

const GUEST: u16 = 5;
const ESTABLISHED: u8 = OPENED | ANSWERED;

/// The connections in a table by port, both halves as [`connection`] makes them: without the slots they happen to have.
fn connections(table: &FlowTable) -> BTreeMap<u16, [HalfRecord6; 2]> {
    let records: BTreeMap<u32, HalfRecord> = table.iter().collect();
    let whole_record = |index: u32, record: HalfRecord| {
        let ctl = Ctl(record.ctl);
        let half = HalfRecord {
            ctl: Ctl::new(0, ctl.phase(), ctl.tcp(), ctl.idle(), ctl.flags()).0,
            peer: 0,
            ..record
        };
        let Some(addresses) = table.addresses6(index, &record) else { return whole(half) };
        let [source, destination, new_source, new_destination] = addresses.map(|a| words6(a.octets()));
        HalfRecord6 { half, source, destination, new_source, new_destination }
    };
    let forward = records.iter().filter(|(_, record)| Ctl(record.ctl).flags() & FLAG_FORWARD != 0);
    forward
        .map(|(&index, &record)| {
            let peer = records[&record.peer];
            assert_eq!(peer.peer, index, "the halves know each other");
            assert_eq!(Ctl(peer.ctl).generation(), Ctl(record.ctl).generation());
            (record.key.source_port, [whole_record(index, record), whole_record(record.peer, peer)])
        })
        .collect()
}

#[test]
fn tables_of_another_layout_hand_their_hooks_over_and_their_flows() {
    in_a_place_of_its_own(|place| {
        let (_, _, plan) = devices(place, true);
        let mut datapath = open(place);
        datapath.attach(&plan).map(|a| datapath.commit(a)).expect("attaches").expect("commits");
        let before = datapath.flow_writer().expect("maps");
        let old_tables = [datapath.flow_table().expect("maps"), datapath.flow_table6().expect("maps")];
        for v6 in [false, true] {
            for (port, tcp) in [(1000, ESTABLISHED), (2000, ESTABLISHED | FIN_FORWARD)] {
                assert_eq!(before.write(v6, &connection(v6, port, tcp), now_tick()), Written::New);
            }
        }
        drop(datapath);
        // As if the build before had had another layout. (bpffs renames no directories that it does not own: by hand.)
        let (old, new) = (place.pins().join(format!("v{ABI}")), place.pins().join("v3"));
        std::fs::create_dir_all(new.join("links")).expect("makes");
        std::fs::create_dir_all(new.join("maps")).expect("makes");
        for directory in ["links", "maps"] {
            for entry in std::fs::read_dir(old.join(directory)).expect("lists").flatten() {
                std::fs::rename(entry.path(), new.join(directory).join(entry.file_name())).expect("moves");
            }
        }
        let mut datapath = open(place);
        assert!(datapath.adopted() && datapath.is_migrating());
        // The old programs are still at work: one more, and a packet of another.
        for (v6, table) in [false, true].into_iter().zip(&old_tables) {
            let one_more = connection(v6, 3000, ESTABLISHED);
            assert_eq!(before.write(v6, &one_more, now_tick()), Written::New);
            let (index, _) = table
                .iter()
                .find(|(_, record)| record.key.source_port == 1000)
                .expect("the first connection is there");
            // SAFETY: a slot of the table; words that are written whole.
            unsafe {
                (*table.slot(index)).ack = 1500u32.to_be();
                (*table.slot(index)).deadline += 500;
            }
        }
        let attached = datapath.attach(&plan).expect("attaches");
        let migrated = datapath.finish_migration().expect("copies").expect("there was something");
        assert_eq!((migrated.from, migrated.before, migrated.after, migrated.lost), (3, 4, 2, 0));
        assert!(!datapath.is_migrating());
        for (v6, table) in
            [(false, datapath.flow_table().expect("maps")), (true, datapath.flow_table6().expect("maps"))]
        {
            let mut found = connections(&table);
            assert_eq!(found.keys().copied().collect::<Vec<_>>(), [1000, 2000, 3000], "IPv6: {v6}");
            for (&port, halves) in &mut found {
                // A FIN that layout 3 let pass is taken for acknowledged.
                let tcp = if port == 2000 { ESTABLISHED | FIN_FORWARD | ACKED_FORWARD } else { ESTABLISHED };
                let mut expected = connection(v6, port, tcp);
                if port == 1000 {
                    expected[0].half.ack = 1500u32.to_be();
                    let later = halves[0].half.deadline - halves[1].half.deadline;
                    assert!((499..=501).contains(&later), "IPv6: {v6}: {later} ticks later");
                }
                for (half, expected) in halves.iter_mut().zip(&expected) {
                    half.half.deadline = expected.half.deadline;
                    assert_eq!(half, expected, "IPv6: {v6}, {port}");
                }
            }
        }
        let held = datapath.guest_uses().expect("maps").read(GUEST).held;
        assert_eq!(held, 6, "each counts for its guest");
        let replaced = attached.describe().iter().filter(|line| line.ends_with("program replaced")).count();
        assert_eq!(replaced, 5, "{:?}", attached.describe());
        datapath.commit(attached).expect("commits");
        assert!(!new.exists());
        assert_eq!(datapath.hooks().expect("asks").len(), 5);
    });
}

#[test]
fn statistics_count_runs_while_they_are_on() {
    in_a_place_of_its_own(|place| {
        let (_, u, _) = devices(place, false);
        let datapath = open(place);
        let runs = |datapath: &Datapath| {
            let programs = datapath.program_info().expect("info");
            programs.iter().find(|p| p.name == "pc_xdp").map(|p| p.run_count).expect("there")
        };
        datapath.run_xdp(&frame(), u).expect("runs");
        assert_eq!(runs(&datapath), 0);
        let on = datapath.enable_stats().expect("enables");
        datapath.run_xdp(&frame(), u).expect("runs");
        drop(on);
        // Test runs are not counted by the kernel, live ones are; either way it answers.
        assert!(runs(&datapath) <= 1);
    });
}
