//! Namespaces: what they are, and that none stays behind.

use std::path::{Path, PathBuf};

use super::super::{BpfFs, Namespace, ProcessGuard, eventually, ping, sweep_stale};
use super::{Pair, SOON, needs_root, rerun};

/// Where the helper of the sweeping test says what it made.
const REPORT: &str = "PORTCULLIS_LAB_TEST_REPORT";

#[test]
fn two_namespaces_joined_by_veth_ping_each_other() {
    needs_root!();
    let pair = Pair::create();
    let outcome = ping(&pair.near, Pair::FAR, 3, SOON).expect("ping runs");
    assert_eq!((outcome.sent, outcome.received, outcome.duplicates), (3, 3, 0));
    let outcome = ping(&pair.far, Pair::NEAR, 3, SOON).expect("ping runs");
    assert_eq!(outcome.received, 3);
}

#[test]
fn a_command_that_fails_says_why() {
    needs_root!();
    let namespace = Namespace::create("fails").expect("a namespace");
    let error = namespace.run(&["ip", "link", "show", "nowhere"]).expect_err("there is no such device");
    assert!(error.to_string().contains("does not exist"), "{error}");
    let error = namespace.run(&["portcullis-no-such-tool"]).expect_err("there is no such tool");
    assert!(format!("{error:#}").contains("installed"), "{error:#}");
}

#[test]
fn devices_and_sysctls_are_those_of_the_namespace() {
    needs_root!();
    let namespace = Namespace::create("devices").expect("a namespace");
    namespace.ip("link add x0 address 02:00:00:00:00:2a type veth peer name x1").expect("a veth");
    let index: u32 = namespace
        .run(&["ip", "-o", "link", "show", "x0"])
        .expect("it is there")
        .split(':')
        .next()
        .and_then(|index| index.parse().ok())
        .expect("an index");
    assert_eq!(namespace.ifindex("x0").expect("an index"), index);
    assert_eq!(namespace.mac("x0").expect("an address"), [2, 0, 0, 0, 0, 0x2a]);
    assert!(namespace.ifindex("x2").is_err());

    assert_eq!(namespace.sysctl("net.ipv4.ip_forward").expect("a value"), "0");
    namespace.set_sysctl("net.ipv4.ip_forward", "1").expect("it may be set");
    assert_eq!(namespace.sysctl("net/ipv4/ip_forward").expect("a value"), "1");
    let other = Namespace::create("other").expect("a namespace");
    assert_eq!(other.sysctl("net.ipv4.ip_forward").expect("a value"), "0");
    assert!(namespace.set_sysctl("kernel.pid_max", "1").is_err(), "that one is the machine's");
}

#[test]
fn the_thread_that_entered_a_namespace_is_the_only_one_in_it() {
    needs_root!();
    let namespace = Namespace::create("enter").expect("a namespace");
    let here = std::fs::read_link("/proc/thread-self/ns/net").expect("our namespace");
    let there = namespace.enter(|| std::fs::read_link("/proc/thread-self/ns/net")).expect("its namespace");
    assert_ne!(here, there);
    assert_eq!(std::fs::read_link("/proc/thread-self/ns/net").expect("our namespace"), here);
}

#[test]
fn a_lab_that_panics_leaves_no_namespace_behind() {
    needs_root!();
    let (path, pid) = std::panic::catch_unwind(|| {
        let namespace = Namespace::create("panics").expect("a namespace");
        let process = namespace.spawn(&["sleep", "600"]).expect("sleep runs");
        assert!(namespace.path().exists());
        std::panic::panic_any((namespace.path().to_owned(), process.pid()));
    })
    .map_err(|payload| *payload.downcast::<(PathBuf, u32)>().expect("our own panic"))
    .expect_err("it panicked");
    assert!(!path.exists());
    assert!(!process_exists(pid));
}

#[test]
fn a_process_that_nobody_guards_is_killed_with_its_namespace() {
    needs_root!();
    let namespace = Namespace::create("orphan").expect("a namespace");
    // The shell ends at once; its child goes on, and is nobody's in particular.
    let pid = namespace.run(&["sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!"]).expect("sh runs");
    let pid: u32 = pid.trim().parse().expect("a process id");
    assert!(process_exists(pid));
    drop(namespace);
    assert!(eventually(SOON, || !process_exists(pid)));
}

#[test]
fn what_a_killed_run_left_is_swept() {
    needs_root!();
    let report = std::env::temp_dir().join(format!("portcullis-lab-test-{}", std::process::id()));
    let mut command = rerun(module_path!(), "helper_that_leaves_things_behind");
    command.env(REPORT, &report);
    let mut run = ProcessGuard::spawn(&mut command).expect("this program runs again");
    // Complete with its last line.
    let made = || std::fs::read_to_string(&report).ok().filter(|text| text.ends_with("end\n"));
    assert!(eventually(SOON, || made().is_some()), "the helper made its things");
    let made = made().expect("just seen");
    let lines: Vec<&str> = made.lines().collect();
    let (namespace, scratch) = (Path::new(lines[0]), Path::new(lines[1]));
    let orphan: u32 = lines[2].parse().expect("a process id");

    // Its process lives: nothing of it may be touched.
    sweep_stale().expect("sweeping");
    assert!(namespace.exists() && scratch.exists() && process_exists(orphan));

    run.kill();
    assert!(
        namespace.exists() && scratch.exists() && process_exists(orphan),
        "a killed run cleans up nothing"
    );
    sweep_stale().expect("sweeping");
    assert!(!namespace.exists());
    assert!(!scratch.exists());
    assert!(eventually(SOON, || !process_exists(orphan)));
    std::fs::remove_file(&report).expect("the report goes");
}

#[test]
#[ignore = "run by what_a_killed_run_left_is_swept"]
fn helper_that_leaves_things_behind() {
    let Some(report) = std::env::var_os(REPORT) else { return };
    let namespace = Namespace::create("left").expect("a namespace");
    let bpffs = BpfFs::mount().expect("a bpffs");
    let process = namespace.spawn(&["sleep", "600"]).expect("sleep runs");
    let (path, scratch, pid) = (namespace.path().display(), bpffs.scratch().path().display(), process.pid());
    std::fs::write(report, format!("{path}\n{scratch}\n{pid}\nend\n")).expect("the report is written");
    loop {
        std::thread::park();
    }
}

fn process_exists(pid: u32) -> bool {
    // A zombie still has its directory until its parent, or init, has read its status; it is gone all the
    // same.
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or("").trim_start().starts_with('Z'))
}
