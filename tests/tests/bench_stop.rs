//! Ctrl-C while the bench runs: what was measured is told, and nothing stays behind.

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use portcullis_tests::lab::why_unavailable;
use serde_json::Value;

/// Runs the bench, presses Ctrl-C when it has said `moment`, and returns its report.
fn interrupted_at(moment: &str) -> Value {
    // A terminal signals the whole group.
    let mut bench = Command::new(env!("CARGO_BIN_EXE_portcullis-lab"))
        .args(["bench", "--rounds", "50", "--seconds", "0.1", "--output", "json"])
        .args(["--only", "established_1k", "--only", "kernel_forward_1k", "--only", "new_flows"])
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the lab starts");
    let group = Pid::from_raw(bench.id() as i32);
    let mut lines = BufReader::new(bench.stderr.take().expect("piped")).lines().map_while(Result::ok);
    let mut said = Vec::new();
    let found = lines.by_ref().any(|line| {
        let found = line.contains(moment);
        said.push(line);
        found
    });
    assert!(found, "the bench never said `{moment}`: {said:#?}");
    killpg(group, Signal::SIGINT).expect("it runs");
    let after: Vec<String> = lines.collect();
    let mut output = String::new();
    bench.stdout.take().expect("piped").read_to_string(&mut output).expect("text");
    let code = bench.wait().expect("it ends").code();
    assert_eq!(code, Some(130), "{said:#?} {after:#?} {output}");

    let ours = format!("pc-{group}-");
    let namespaces: Vec<String> =
        names("/run/netns").into_iter().filter(|name| name.starts_with(&ours)).collect();
    assert_eq!(namespaces, [] as [String; 0]);
    let scratch = format!("portcullis-lab-{group}-");
    let scratch: Vec<String> = names("/run").into_iter().filter(|name| name.starts_with(&scratch)).collect();
    assert_eq!(scratch, [] as [String; 0]);
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("readable");
    assert!(!mounts.contains(&format!("portcullis-lab-{group}-")), "{mounts}");
    assert!(killpg(group, None).is_err(), "a process of the bench still runs");
    serde_json::from_str(&output).expect("the report is JSON")
}

fn names(directory: &str) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn figures(report: &Value) -> Vec<&str> {
    report["figures"].as_array().into_iter().flatten().filter_map(|figure| figure["name"].as_str()).collect()
}

#[test]
fn ctrl_c_while_the_bench_builds_and_opens_flows_ends_with_130_and_leaves_nothing_behind() {
    if let Some(reason) = why_unavailable() {
        eprintln!("skipped: {reason}");
        return;
    }
    for moment in ["Packets of established flows", "established_1k: opening"] {
        let report = interrupted_at(moment);
        assert_eq!((&report["interrupted"], figures(&report).len()), (&Value::Bool(true), 0), "{report}");
    }
}

#[test]
fn ctrl_c_between_rounds_tells_what_was_measured_until_then() {
    if let Some(reason) = why_unavailable() {
        eprintln!("skipped: {reason}");
        return;
    }
    let report = interrupted_at("1k flows: round 3 of 50");
    assert_eq!(report["interrupted"], true);
    assert_eq!(figures(&report), ["kernel_forward_1k", "established_1k"]);
    let rounds = report["figures"][1]["rounds"].as_u64().expect("a number");
    assert!((2..50).contains(&rounds), "{rounds} rounds");

    let report = interrupted_at("SYNs: round 2 of 50");
    assert_eq!(report["interrupted"], true);
    let figures = figures(&report);
    assert!(figures.contains(&"established_1k") && figures.contains(&"new_flow"), "{figures:?}");
}
