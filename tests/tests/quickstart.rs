//! The quickstart as a process: what it prints, how it ends, and that nothing stays behind.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, setsid};
use portcullis_tests::lab::why_unavailable;

const LIMIT: Duration = Duration::from_secs(90);

#[test]
fn once_shows_every_step_as_the_policy_says_and_leaves_nothing() {
    let Some((output, pid)) = once(&[]) else { return };
    let out = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{out}{}", text(&output.stderr));
    // From, to, seen from (a port of the guest's where there is none here), decided by.
    let rows = [
        ("vm1:", "198.51.100.1:443", "203.0.113.10:", "web-nsg/Outbound/AllowInternetOutBound"),
        ("vm1:", "198.51.100.1:53", "203.0.113.10:", "web-nsg/Outbound/AllowInternetOutBound"),
        ("vm1 ", "198.51.100.1 ", "203.0.113.10 id ", "web-nsg/Outbound/AllowInternetOutBound"),
        ("vm1:", "198.51.100.1:25", "nothing", "web-nsg/Outbound/DenySmtp"),
        ("vm2:", "198.51.100.1:443", "203.0.113.10:", "web-nsg/Outbound/AllowInternetOutBound"),
        ("vm2:", "198.51.100.1:5353", "nothing", "vm2-nic-nsg/Outbound/DenyMdns"),
        ("vm1:", "10.0.1.5:8080", "10.0.1.4:", "vm2-nic-nsg/Inbound/AllowVnetInBound"),
        ("vm1:", "10.0.2.4:5432", "10.0.1.4:", "db-nsg/Inbound/AllowPostgresFromWeb"),
        ("vm1:", "10.0.2.4:22", "nothing", "db-nsg/Inbound/DenyVnet"),
        ("vm3:50010 ", "198.51.100.1:443", "203.0.113.20:50010 ", "db-nsg/Outbound/AllowInternetOutBound"),
        ("internet:", "203.0.113.20:443", "203.0.113.100:", "db-nsg/Inbound/AllowHttps"),
        ("internet:", "203.0.113.20:22", "nothing", "db-nsg/Inbound/DenyAllInBound"),
        ("internet:", "203.0.113.10:80", "nothing", "no_listener"),
        ("vm1 as 10.0.1.5:", "198.51.100.1:53", "nothing", "spoofed_source"),
    ];
    let table: Vec<&str> =
        out.lines().skip_while(|line| !line.starts_with("FROM")).skip(1).take(rows.len()).collect();
    assert_eq!(table.len(), rows.len(), "{out}");
    for (line, (from, to, seen, decided)) in table.iter().zip(rows) {
        let wanted = line.starts_with(from) && [to, seen, decided].iter().all(|cell| line.contains(cell));
        assert!(wanted && line.ends_with("OK"), "{line}\n{out}");
    }
    assert!(out.contains("15 of 15 checks are as the policy says"), "{out}");
    assert_eq!(left_behind(pid), Vec::<String>::new());
}

#[test]
fn a_policy_that_lets_mail_out_is_told_from_the_one_shown() {
    let example = include_str!("../../examples/quickstart.yaml");
    let (before, rule) = example.split_once("- name: DenySmtp").expect("the example denies mail");
    let sabotaged = format!("{before}- name: DenySmtp{}", rule.replacen("access: Deny", "access: Allow", 1));
    let file = Scratch::write("sabotaged.yaml", &sabotaged);
    let Some((output, pid)) = once(&["--output", "json", "--policy", file.path()]) else { return };
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{out}{err}");
    let report: serde_json::Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}"));
    assert_eq!(report["ok"], false);
    let steps = report["steps"].as_array().expect("steps");
    let wrong: Vec<_> = steps.iter().filter(|step| step["problems"] != serde_json::json!([])).collect();
    assert_eq!(wrong.len(), 1, "only what was changed is wrong: {wrong:?}");
    assert_eq!(wrong[0]["destinationPort"], 25);
    assert_eq!(wrong[0]["arrived"]["address"], "203.0.113.10");
    assert!(err.contains("1 of 15 checks"), "{err}");
    assert_eq!(left_behind(pid), Vec::<String>::new());
}

#[test]
fn a_policy_with_errors_is_shown_with_its_errors_and_leaves_nothing() {
    let file = Scratch::write("broken.yaml", "virtualNetworks:\n  - nmae: lab\n");
    let Some((output, pid)) = once(&["--policy", file.path()]) else { return };
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("nmae"), "{}", text(&output.stderr));
    assert_eq!(left_behind(pid), Vec::<String>::new());
}

#[test]
fn sigterm_in_the_middle_leaves_nothing() {
    if unavailable() {
        return;
    }
    let mut child = lab(&["--once"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("it starts");
    let pid = child.id();
    let mut err = BufReader::new(child.stderr.take().expect("piped"));
    let mut line = String::new();
    while !line.starts_with("sending") {
        line.clear();
        assert_ne!(err.read_line(&mut line).expect("it says what it does"), 0, "it ended early");
    }
    signal(&child, Signal::SIGTERM);
    let mut rest = String::new();
    err.read_to_string(&mut rest).expect("text");
    assert_eq!(child.wait().expect("it ends").code(), Some(1), "{rest}");
    assert!(rest.contains("interrupted"), "{rest}");
    assert_eq!(left_behind(pid), Vec::<String>::new());
}

#[test]
fn on_a_terminal_it_shows_live_counters_until_ctrl_c_and_leaves_nothing() {
    if unavailable() {
        return;
    }
    let size = Winsize { ws_row: 60, ws_col: 160, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(&size, None).expect("a terminal");
    let (slave, mut master) = (File::from(pty.slave), File::from(pty.master));
    let mut command = lab(&[]);
    command.stdin(copy(&slave)).stdout(copy(&slave)).stderr(copy(&slave));
    let terminal = slave.as_raw_fd();
    // SAFETY: between fork and exec only two system calls are made. The terminal becomes the child's own, so that Ctrl-C
    // reaches it and its children as it would in a shell.
    unsafe {
        command.pre_exec(move || {
            setsid()?;
            match libc::ioctl(terminal, libc::TIOCSCTTY, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        })
    };
    let mut child = command.spawn().expect("it starts");
    drop((command, slave));
    let pid = child.id();
    // Three pictures: two with rates.
    let mut shown = read_until(&mut master, |shown| shown.matches("FLOWS: ").count() >= 3);
    assert!(child.try_wait().expect("ours").is_none(), "it stays up: {shown}");
    master.write_all(b"\x03").expect("Ctrl-C");
    shown += &read_until(&mut master, |_| false);
    assert_eq!(child.wait().expect("it ends").code(), Some(0), "{shown}");
    assert!(shown.contains("15 of 15 checks are as the policy says"), "{shown}");
    for heading in ["SNAT PORTS IN USE", "REASONS", "RULES HIT", "forwarded", "A SECOND"] {
        assert!(shown.contains(heading), "{heading}: {shown}");
    }
    assert!(shown.contains("\x1b[?25h"), "the cursor is back");
    assert_eq!(left_behind(pid), Vec::<String>::new());
}

fn unavailable() -> bool {
    let reason = why_unavailable();
    if let Some(reason) = &reason {
        eprintln!("skipped: {reason}");
    }
    reason.is_some()
}

fn lab(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_portcullis-lab"));
    command.arg("quickstart").args(arguments).stdin(Stdio::null());
    command
}

/// Runs it with `--once`; its output and its process id.
fn once(arguments: &[&str]) -> Option<(Output, u32)> {
    if unavailable() {
        return None;
    }
    let mut command = lab(&["--once"]);
    let child =
        command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let pid = child.id();
    Some((child.wait_with_output().expect("it ends"), pid))
}

fn signal(child: &Child, signal: Signal) {
    let pid = i32::try_from(child.id()).expect("an id");
    kill(Pid::from_raw(pid), signal).expect("it runs");
}

fn copy(file: &File) -> Stdio {
    file.try_clone().expect("a descriptor").into()
}

/// Reads what the terminal shows until `enough`, or until nobody has it open any more.
fn read_until(master: &mut File, enough: impl Fn(&str) -> bool) -> String {
    let deadline = Instant::now() + LIMIT;
    let mut shown = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let so_far = String::from_utf8_lossy(&shown).into_owned();
        if enough(&so_far) {
            return so_far;
        }
        assert!(Instant::now() < deadline, "it takes too long: {so_far}");
        let ready = poll(
            &mut [PollFd::new(std::os::fd::AsFd::as_fd(master), PollFlags::POLLIN)],
            PollTimeout::from(500u16),
        );
        if ready.expect("poll") == 0 {
            continue;
        }
        match master.read(&mut buffer) {
            Ok(read) if read > 0 => shown.extend(&buffer[..read]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // The other end is closed.
            _ => return so_far,
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Namespaces, directories, mounts and processes that a run made: their names carry its process id.
fn left_behind(pid: u32) -> Vec<String> {
    let (namespace, scratch) = (format!("pc-{pid}-"), format!("portcullis-lab-{pid}-"));
    let mut left = Vec::new();
    for (dir, prefix) in [("/run/netns", &namespace), ("/run", &scratch)] {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        left.extend(names.filter(|name| name.starts_with(prefix.as_str())));
    }
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    left.extend(
        mounts.lines().filter(|line| line.contains(&scratch) || line.contains(&namespace)).map(str::to_owned),
    );
    for process in fs::read_dir("/proc").expect("processes").flatten() {
        // Its sockets, pins and policy are in its scratch directory, so the daemon's command line names it.
        let words = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let words = text(&words).replace('\0', " ");
        if words.contains(&scratch) {
            left.push(words);
        }
    }
    left
}

/// A file of this test.
struct Scratch(PathBuf);

impl Scratch {
    fn write(name: &str, contents: &str) -> Self {
        let path = std::env::temp_dir().join(format!("portcullis-quickstart-{}-{name}", std::process::id()));
        fs::write(&path, contents).expect("a temporary file");
        Scratch(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("text")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
