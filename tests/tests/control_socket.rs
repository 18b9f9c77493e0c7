//! The control socket of a running daemon: whatever comes in, it goes on answering.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use portcullis::api::MAX_REQUEST;
use portcullis_tests::edge::{Edge, LabPolicy, WithHook};
use portcullis_tests::lab::TopologySpec;
use portcullis_tests::random::Random;
use serde_json::Value;

/// Longer than a client may take for its line.
const PATIENCE: Duration = Duration::from_secs(30);

/// Questions that change nothing, to be damaged.
const QUESTIONS: [&str; 14] = [
    r#"{"command":"status"}"#,
    r#"{"command":"flows","guest":"vm1","limit":10}"#,
    r#"{"command":"killFlows","guest":"vm1","dryRun":true}"#,
    r#"{"command":"drops","all":true}"#,
    r#"{"command":"snat","guest":"vm1"}"#,
    r#"{"command":"snatDestinations","guest":null,"limit":3}"#,
    r#"{"command":"snatPort","port":"203.0.113.10:23456/tcp"}"#,
    r#"{"command":"whois","port":"203.0.113.10:23456","at":"2h ago"}"#,
    r#"{"command":"rules","group":"x","shadowed":true}"#,
    r#"{"command":"explain","from":"vm1","to":"1.1.1.1:443","protocol":"tcp"}"#,
    r#"{"command":"effective","nic":"vm1"}"#,
    r#"{"command":"lint"}"#,
    r#"{"command":"tags","show":"Internet"}"#,
    r#"{"command":"plan","file":"/dev/null"}"#,
];

fn start() -> Edge {
    let spec = TopologySpec::clean_veth(1);
    Edge::start(&spec, &LabPolicy::new(WithHook::Tc).yaml(&spec)).unwrap()
}

/// The same process answers, and nothing in it panicked.
fn goes_on(edge: &mut Edge, when: &str) {
    let pid = edge.daemon.pid().unwrap();
    let status = edge.ask(&["status"]).unwrap_or_else(|error| panic!("{when}: {error:#}"));
    assert_eq!(status["pid"].as_u64(), Some(pid.into()), "{when}");
    assert!(edge.daemon.is_running(), "{when}");
    assert!(!edge.daemon.log().contains("panicked"), "{when}: {}", edge.daemon.log());
}

/// Sends bytes, half-closes, and reads what comes back.
fn say(socket: &Path, bytes: &[u8]) -> String {
    let mut client = UnixStream::connect(socket).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.set_write_timeout(Some(PATIENCE)).unwrap();
    // It may have answered and gone before all of it is written.
    let _ = client.write_all(bytes);
    let _ = client.shutdown(Shutdown::Write);
    let mut answer = String::new();
    match client.read_to_string(&mut answer) {
        Ok(_) => answer,
        // Gone with something of ours unread: what came before that is its answer.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => answer,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn no_bytes_make_the_daemon_stop_answering() {
    let mut edge = start();
    let socket = edge.daemon.spec().socket.clone();
    let mut random = Random(0x5eed_0003);
    let (mut refused, mut answered) = (0, 0);
    for round in 0..3000 {
        let mut bytes: Vec<u8> = match round % 3 {
            // Nonsense.
            0 => (0..random.below(400)).map(|_| random.next() as u8).collect(),
            // A question with some of its bytes changed, missing, or twice.
            1 => {
                let mut bytes = QUESTIONS[random.below(QUESTIONS.len())].as_bytes().to_vec();
                for _ in 0..=random.below(4) {
                    let at = random.below(bytes.len());
                    match random.below(3) {
                        0 => bytes[at] = random.next() as u8,
                        1 if bytes.len() > 1 => _ = bytes.remove(at),
                        _ => bytes.insert(at, bytes[at]),
                    }
                }
                bytes
            }
            // A question with a value that nobody expects.
            _ => {
                let question = QUESTIONS[random.below(QUESTIONS.len())];
                let values = [
                    "null",
                    "-1",
                    "1e308",
                    "18446744073709551616",
                    "[[[[[]]]]]",
                    "{}",
                    "\"\\u0000\"",
                    "\"\\ud800\"",
                ];
                let mut value: Value = serde_json::from_str(question).unwrap();
                let fields: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
                let field = fields[random.below(fields.len())].clone();
                value[field] = Value::from("HERE");
                value.to_string().replace("\"HERE\"", values[random.below(values.len())]).into_bytes()
            }
        };
        let empty = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len()) == 0;
        if round % 2 == 0 {
            bytes.push(b'\n');
        }
        let said = say(&socket, &bytes);
        // Nothing at all is not a question.
        if said.is_empty() {
            assert!(empty, "{:?} has no answer", String::from_utf8_lossy(&bytes));
            continue;
        }
        let answer: Value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said:?}"));
        match answer["ok"].as_bool() {
            Some(true) => answered += 1,
            Some(false) => refused += 1,
            None => panic!("neither yes nor no: {said}"),
        }
    }
    println!("{refused} refused, {answered} answered");
    assert!(refused > 1000 && answered > 10, "{refused}, {answered}");
    goes_on(&mut edge, "after three thousand lines");
}

#[test]
fn huge_lines_deep_nesting_and_half_requests_are_refused_within_bounds() {
    let mut edge = start();
    let socket = edge.daemon.spec().socket.clone();
    for bytes in [
        vec![b'x'; MAX_REQUEST + 1],
        vec![b'x'; 64 << 20],
        [b"{\"command\":\"status\",\"x\":".as_slice(), &vec![b'['; MAX_REQUEST - 100], b"\n"].concat(),
        [b"{\"command\":\"", vec![b'a'; MAX_REQUEST - 20].as_slice(), b"\"}\n"].concat(),
        b"{\"command\":\"status\"".to_vec(),
        b"{\"command\":".to_vec(),
        b"{".to_vec(),
    ] {
        let said = say(&socket, &bytes);
        let answer: Value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said:?}"));
        assert_eq!(
            (&answer["ok"], &answer["error"]["kind"]),
            (&false.into(), &"input".into()),
            "{} bytes",
            bytes.len()
        );
        goes_on(&mut edge, "after a line that is none");
    }
    // A line that fits is answered although more follows.
    let said = say(&socket, b"{\"command\":\"lint\"}\n{\"command\":\"stop\"}\n");
    assert!(said.starts_with("{\"ok\":true"), "{said}");
    goes_on(&mut edge, "after two lines, of which the second is not read");
}

#[test]
fn hundreds_of_silent_and_slow_clients_keep_nobody_from_asking_and_are_sent_away() {
    let mut edge = start();
    let socket = edge.daemon.spec().socket.clone();
    // Some say nothing, some begin; fewer than may be connected, and many times as many as are answered at once.
    let mut clients: Vec<UnixStream> = (0..200).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    for client in clients.iter_mut().step_by(2) {
        client.write_all(b"{\"comm").unwrap();
    }
    for _ in 0..20 {
        goes_on(&mut edge, "beside two hundred clients that say nothing");
    }
    // Each is told so in the end, and the place is free.
    for client in &mut clients {
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut said = String::new();
        client.read_to_string(&mut said).unwrap();
        assert!(said.contains("no request came"), "{said:?}");
    }
    // More than may be connected: the others wait, and are served when those have gone.
    let many: Vec<UnixStream> = (0..400).filter_map(|_| UnixStream::connect(&socket).ok()).collect();
    assert!(many.len() > 256, "{}", many.len());
    drop(many);
    goes_on(&mut edge, "after four hundred that left");
    // Who asks and does not take the answer holds up nobody.
    let deaf: Vec<UnixStream> = (0..40)
        .map(|_| {
            let mut client = UnixStream::connect(&socket).unwrap();
            client.write_all(b"{\"command\":\"status\"}\n").unwrap();
            client
        })
        .collect();
    goes_on(&mut edge, "beside forty that do not listen");
    drop(deaf);
}

#[test]
fn who_is_not_root_is_refused_by_the_sockets_mode_and_again_by_who_it_says_it_is() {
    let mut edge = start();
    let socket = edge.daemon.spec().socket.clone();
    let mode = std::fs::metadata(&socket).unwrap();
    assert_eq!((mode.permissions().mode() & 0o777, mode.uid()), (0o600, 0));
    // The program may be where nobody else can look.
    let place = std::env::temp_dir().join(format!("pc-client-{}", std::process::id()));
    std::fs::create_dir_all(&place).unwrap();
    std::fs::set_permissions(&place, PermissionsExt::from_mode(0o755)).unwrap();
    let program = place.join("portcullis");
    std::fs::copy(&edge.daemon.spec().binary, &program).unwrap();
    let link = place.join("control.sock");
    std::fs::hard_link(&socket, &link).or_else(|_| std::os::unix::fs::symlink(&socket, &link)).unwrap();
    let as_nobody = || {
        let asked =
            Command::new(&program).arg("--socket").arg(&link).arg("status").uid(65534).gid(65534).output();
        let asked = asked.unwrap();
        (asked.status.success(), String::from_utf8_lossy(&asked.stderr).into_owned())
    };
    let (answered, said) = as_nobody();
    assert!(!answered && said.contains("only root may ask the daemon"), "{said}");
    // Somebody has opened it for all.
    std::fs::set_permissions(&socket, PermissionsExt::from_mode(0o666)).unwrap();
    for directory in socket.ancestors().skip(1).take_while(|directory| directory.starts_with("/tmp/")) {
        if directory != Path::new("/tmp") {
            std::fs::set_permissions(directory, PermissionsExt::from_mode(0o755)).unwrap();
        }
    }
    let (answered, said) = as_nobody();
    std::fs::remove_dir_all(&place).unwrap();
    assert!(!answered && said.contains("only root may ask, not user 65534"), "{said}");
    goes_on(&mut edge, "after strangers");
}
