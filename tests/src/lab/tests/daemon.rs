//! The daemon's keeper, with a script for a controller, and the bpffs.

use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use super::super::{BpfFs, Daemon, DaemonSpec, Namespace, ScratchDir, eventually};
use super::{SOON, needs_root, rerun};

/// What the script's `run` hands to the helper below.
const SOCKET: &str = "PORTCULLIS_LAB_TEST_SOCKET";

#[test]
fn a_bpffs_is_seen_from_every_namespace_and_keeps_what_is_put_in_it() {
    needs_root!();
    let namespace = Namespace::create("bpffs").expect("a namespace");
    let bpffs = BpfFs::mount().expect("a bpffs");
    let inside = bpffs.path().join("by-setns");
    namespace.run(&["mkdir", inside.to_str().expect("text")]).expect("a directory in the bpffs");
    // With a mount namespace of its own.
    let other = bpffs.path().join("by-ip-netns-exec");
    let exec = ["ip", "netns", "exec", namespace.name(), "mkdir", other.to_str().expect("text")];
    namespace.run(&exec).expect("a directory in the bpffs");
    let mut pins = bpffs.pins().expect("a listing");
    pins.sort();
    assert_eq!(pins, ["by-ip-netns-exec", "by-setns"]);
    let kind =
        namespace.run(&["stat", "-f", "-c", "%T", bpffs.path().to_str().expect("text")]).expect("stat");
    assert_eq!(kind.trim(), "bpf_fs");

    let scratch = bpffs.scratch().path().to_owned();
    drop(bpffs);
    assert!(!scratch.exists());
}

#[test]
fn two_bpf_filesystems_are_apart() {
    needs_root!();
    let (first, second) = (BpfFs::mount().expect("a bpffs"), BpfFs::mount().expect("a bpffs"));
    std::fs::create_dir(first.path().join("mine")).expect("a directory");
    assert_eq!(second.pins().expect("a listing"), [""; 0]);
}

#[test]
fn a_daemon_is_started_asked_stopped_killed_and_taken_down() {
    needs_root!();
    let namespace = Namespace::create("daemon").expect("a namespace");
    let bpffs = BpfFs::mount().expect("a bpffs");
    let spec = script(&bpffs, "exec \"$LAB_TEST_PROGRAM\" --exact \"$LAB_TEST\" --ignored --nocapture");
    let mut daemon = Daemon::spawn(&namespace, &spec).expect("it starts");
    daemon.wait_ready(SOON).expect("it gets ready");
    assert!(daemon.start().is_err(), "it runs already");
    let pid = daemon.pid().expect("a process");
    let inside = std::fs::read_link(format!("/proc/{pid}/ns/net")).expect("its namespace");
    let expected = namespace.enter(|| std::fs::read_link("/proc/thread-self/ns/net")).expect("the namespace");
    assert_eq!(inside, expected);

    let status = daemon.ask(&["status", "--output", "json"]).expect("an answer");
    assert_eq!(status["asked"], format!("--socket {} status --output json", spec.socket.display()));
    let error = daemon.ask(&["nonsense"]).expect_err("refused");
    assert!(error.to_string().contains("what is nonsense"), "{error}");

    assert!(!daemon.terminate().expect("it ends").success(), "the helper does not catch SIGTERM");
    assert!(!daemon.is_running());
    assert!(daemon.terminate().is_err());
    daemon.start().expect("it starts again");
    daemon.wait_ready(SOON).expect("it gets ready again");
    daemon.kill();
    assert!(!daemon.is_running());
    let places = format!(
        "down --state-dir {} --pin-dir {} --socket {}",
        spec.state_dir.display(),
        spec.pin_dir.display(),
        spec.socket.display()
    );
    assert_eq!(daemon.down().expect("it goes down").trim(), places);
    let policy = spec.policy.display();
    let run = places.replacen("down", &format!("run --policy {policy}"), 1);
    assert_eq!(daemon.log().matches(&run).count(), 2, "{}", daemon.log());
}

#[test]
fn a_daemon_that_ends_early_shows_its_log() {
    needs_root!();
    let namespace = Namespace::create("early").expect("a namespace");
    let bpffs = BpfFs::mount().expect("a bpffs");
    let spec = script(&bpffs, "echo 'policy.yaml:3: no such subnet' >&2; exit 1");
    let mut daemon = Daemon::spawn(&namespace, &spec).expect("it starts");
    let error = daemon.wait_ready(SOON).expect_err("it ends");
    assert!(error.to_string().contains("no such subnet"), "{error}");
}

#[test]
fn a_dropped_daemon_is_taken_down() {
    needs_root!();
    let namespace = Namespace::create("dropped").expect("a namespace");
    let bpffs = BpfFs::mount().expect("a bpffs");
    let spec = script(&bpffs, "exec sleep 600");
    let daemon = Daemon::spawn(&namespace, &spec).expect("it starts");
    let pid = daemon.pid().expect("a process");
    let down = spec.state_dir.join("went-down");
    assert!(!down.exists());
    drop(daemon);
    assert!(down.exists());
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn a_scratch_directory_goes_with_its_contents() {
    needs_root!();
    let scratch = ScratchDir::create().expect("a directory");
    let file = scratch.write("policy.yaml", "version: 1\n").expect("a file");
    assert!(file.exists());
    let path = scratch.path().to_owned();
    drop(scratch);
    assert!(!path.exists());
}

/// A controller that is a shell script: `run` does what `body` says, `down` leaves a mark in the state
/// directory,
/// `status` repeats what it was asked, everything else is an error.
fn script(bpffs: &BpfFs, body: &str) -> DaemonSpec {
    let text = format!(
        "#!/bin/sh\n\
         arguments=\"$*\"\n\
         case \"$1\" in\n\
         run) echo \"$arguments\"; {body} ;;\n\
         down) echo \"$arguments\"; touch \"$3/went-down\"; exit ;;\n\
         esac\n\
         case \"$3\" in\n\
         status) echo \"{{\\\"asked\\\": \\\"$arguments\\\"}}\" ;;\n\
         *) echo \"what is $3?\" >&2; exit 2 ;;\n\
         esac\n"
    );
    let binary = bpffs.scratch().write("portcullis", &text).expect("the script");
    std::fs::set_permissions(&binary, std::fs::Permissions::from_mode(0o700)).expect("it may be run");
    let policy = bpffs.scratch().write("policy.yaml", "").expect("a policy");
    let mut spec = DaemonSpec::beside(bpffs, &binary, &policy);
    let helper = rerun(module_path!(), "helper_that_listens");
    let test = helper.get_args().nth(1).expect("the test's name").to_string_lossy().into_owned();
    let program = helper.get_program().to_string_lossy().into_owned();
    spec.environment = vec![
        ("LAB_TEST_PROGRAM".to_owned(), program),
        ("LAB_TEST".to_owned(), test),
        (SOCKET.to_owned(), spec.socket.display().to_string()),
    ];
    spec
}

#[test]
#[ignore = "run as the controller of other tests"]
fn helper_that_listens() {
    let Some(socket) = std::env::var_os(SOCKET) else { return };
    let _ = std::fs::remove_file(&socket);
    let _listener = UnixListener::bind(&socket).expect("the socket");
    // As long as a test may take, should nobody kill it.
    eventually(Duration::from_secs(120), || false);
}
