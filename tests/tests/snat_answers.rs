//! The answers about SNAT ports through the running daemon, held against what real sockets did: `snat`, `whois`, `plan`,
//! metrics and health events.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use portcullis_tests::edge::{Edge, LabPolicy, WithHook, binary};
use portcullis_tests::lab::{
    TcpEcho, TcpHold, TopologySpec, UdpEcho, eventually, ping, tcp_connect, udp_exchange,
};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_millis(700);
const SERVER: [u8; 4] = [198, 51, 100, 1];
const FRONTEND: &str = "203.0.113.10";

fn server(port: u16) -> SocketAddr {
    (SERVER, port).into()
}

/// vm1 and vm2 with eight ports each, vm3 with an address of its own.
fn policy(spec: &TopologySpec) -> String {
    let mut policy = LabPolicy::new(WithHook::Tc);
    policy.ports = 8;
    policy.instances.insert("vm3", "203.0.113.20");
    policy.yaml(spec)
}

fn start() -> Edge {
    let spec = TopologySpec::clean_veth(3);
    let edge = Edge::start(&spec, &policy(&spec)).unwrap();
    for guest in ["vm1", "vm2", "vm3"] {
        let guest = edge.topology.guest(guest);
        assert!(eventually(LIMIT, || ping(guest, IpAddr::from(SERVER), 1, SOON).unwrap().received == 1));
    }
    edge.ask(&["flows", "flush"]).unwrap();
    edge
}

/// The row of a guest for a protocol.
fn row(answer: &Value, guest: &str, protocol: &str) -> Value {
    let guest = guest_row(answer, guest);
    let rows = guest["ports"].as_array().unwrap();
    rows.iter().find(|on| on["protocol"] == protocol).unwrap_or_else(|| panic!("{protocol}: {guest}")).clone()
}

fn guest_row(answer: &Value, guest: &str) -> Value {
    let named = |row: &&Value| row["guest"].as_str().unwrap().split('/').next() == Some(guest);
    let rows = answer["guests"].as_array().unwrap();
    rows.iter().find(named).unwrap_or_else(|| panic!("{guest}: {answer}")).clone()
}

fn numbers(row: &Value) -> [u64; 4] {
    ["allocated", "used", "holding", "free"].map(|key| row[key].as_u64().unwrap())
}

/// Ports of connections the server saw.
fn ports_of(echo: &TcpEcho) -> BTreeSet<u16> {
    echo.peers().iter().map(|peer| peer.port()).collect()
}

#[test]
fn the_columns_of_snat_are_what_real_sockets_did() {
    let edge = start();
    let guest = edge.topology.guest("vm1");
    let internet = edge.topology.internet();
    let (https, http) =
        (TcpEcho::start(internet, server(443)).unwrap(), TcpEcho::start(internet, server(80)).unwrap());
    let dns = UdpEcho::start(internet, server(53)).unwrap();
    let mut secure = TcpHold::open(guest, server(443), 4, LIMIT).unwrap();
    let plain = TcpHold::open(guest, server(80), 2, LIMIT).unwrap();
    assert_eq!((secure.established(), plain.established()), (4, 2));
    for _ in 0..2 {
        udp_exchange(guest, None, server(53), b"?", LIMIT).unwrap();
    }
    let (to_https, to_http) = (ports_of(&https), ports_of(&http));
    assert_eq!((to_https.len(), to_http.len()), (4, 2), "no port twice towards one destination");
    let taken: BTreeSet<u16> = to_https.union(&to_http).copied().collect();

    let answer = edge.ask(&["snat"]).unwrap();
    let tcp = row(&answer, "vm1", "tcp");
    assert_eq!(numbers(&tcp), [8, taken.len() as u64, 0, 8 - taken.len() as u64], "{tcp}");
    assert_eq!(tcp["frontend"], FRONTEND);
    assert_eq!(
        (&tcp["busiest"]["destination"], &tcp["busiest"]["ports"]),
        (&"198.51.100.1:443".into(), &4.into())
    );
    assert_eq!(numbers(&row(&answer, "vm1", "udp")), [8, 2, 0, 6], "one for each socket");
    assert_eq!(dns.peers().iter().map(SocketAddr::port).collect::<BTreeSet<_>>().len(), 2);
    assert_eq!(numbers(&row(&answer, "vm2", "tcp")), [8, 0, 0, 8]);
    let without = guest_row(&answer, "vm3");
    let because = without["noDataBecause"].as_str().unwrap();
    assert!(because.contains("instance-level public IP 203.0.113.20"), "{because}");
    let total = answer["totals"].as_array().unwrap().iter().find(|total| total["protocol"] == "tcp").unwrap();
    assert_eq!(numbers(total)[..2], [16, taken.len() as u64]);

    // Closed: the port is held back, unless another flow is on it.
    assert_eq!(secure.close(2), 2);
    let flows = |state: &str| -> BTreeSet<u64> {
        let flows = edge.ask(&["flows", "--guest", "vm1"]).unwrap();
        let all = flows["flows"].as_array().unwrap().iter().filter(|flow| flow["protocol"] == "tcp");
        all.filter(|flow| flow["state"] == state)
            .map(|f| f["translatedSourcePort"].as_u64().unwrap())
            .collect()
    };
    assert!(eventually(LIMIT, || flows("closed").len() == 2), "{:?}", edge.ask(&["flows"]));
    let (live, closed) = (flows("established"), flows("closed"));
    let held = closed.difference(&live).count() as u64;
    let tcp = row(&edge.ask(&["snat", "--guest", "vm1", "--frontend", "lb/fe"]).unwrap(), "vm1", "tcp");
    assert_eq!(numbers(&tcp), [8, live.len() as u64, held, 8 - live.len() as u64 - held], "{tcp}");

    // Where they go, and who holds one.
    let answer = edge.ask(&["snat", "--by", "destination", "--guest", "vm1", "--limit", "1"]).unwrap();
    let first = &answer["destinations"][0];
    assert_eq!(
        (&first["destination"], &first["ports"], &first["of"]),
        (&"198.51.100.1:443".into(), &4.into(), &8.into())
    );
    assert_eq!((first["sharePercent"].as_f64(), answer["total"].as_u64()), (Some(50.0), Some(3)));
    let port = *to_http.iter().next().unwrap();
    let answer = edge.ask(&["snat", "--port", &format!("{FRONTEND}:{port}/tcp")]).unwrap();
    assert!(answer["holders"][0]["guest"].as_str().unwrap().starts_with("vm1/"), "{answer}");
    assert_eq!(answer["holders"][0]["draining"], false);
    let flows = answer["flows"].as_array().unwrap();
    assert!(
        flows.iter().any(|flow| flow["destinationPort"] == 80 && flow["state"] == "established"),
        "{answer}"
    );
    assert!(flows.iter().all(|flow| flow["translatedSourcePort"] == port), "{answer}");
    let nobody = edge.ask(&["snat", "--port", "203.0.113.20:5000"]).unwrap();
    assert!(nobody["holders"][0]["text"].as_str().unwrap().contains("vm3"), "{nobody}");

    // For people.
    let text = edge.daemon.ask_text(&["snat"]).unwrap();
    for part in
        ["HOLDING", "no data because it leaves under its instance-level", "total", "4 to 198.51.100.1:443"]
    {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    let (status, _, said) = edge.daemon.client(&["snat", "--frontend", "nothing"]).unwrap();
    assert!(status.code() == Some(2) && said.contains("no frontend `nothing`"), "{said}");
}

#[test]
fn whois_knows_who_had_a_port_across_a_restart_and_without_a_daemon() {
    let mut edge = start();
    let first = edge.port_ranges("vm2").unwrap()[0].0;
    let port = format!("{FRONTEND}:{first}/tcp");
    let guest = |answer: &Value| answer["answers"][0]["guest"].as_str().unwrap_or("nobody").to_owned();
    let before = edge.ask(&["whois", &port]).unwrap();
    assert!(guest(&before).starts_with("vm2/"), "{before}");
    let then = before["at"].as_str().unwrap().to_owned();
    let own = edge.ask(&["whois", "203.0.113.20:7/udp"]).unwrap();
    assert_eq!(
        (own["answers"][0]["kind"].as_str(), guest(&own).as_str()),
        (Some("instance"), "vm3/ipconfig1"),
        "{own}"
    );

    // vm2 leaves the pool; it has no flow that would keep its ports.
    std::thread::sleep(Duration::from_millis(1100));
    let spec = TopologySpec::clean_veth(3);
    let (applied, said) = edge.apply(&policy(&spec).replace("[vm1, vm2]", "[vm1]")).unwrap();
    assert!(applied, "{said}");
    let now = edge.ask(&["whois", &port]).unwrap();
    assert!(!guest(&now).starts_with("vm2/") || now["answers"][0]["draining"] == true, "{now}");
    edge.daemon.terminate().unwrap();
    edge.restart().unwrap();
    let said = edge.ask(&["whois", &port, "--at", &then]).unwrap();
    assert_eq!(guest(&said), guest(&before), "{said}");
    assert_eq!(said["answers"][0]["since"], before["answers"][0]["since"]);
    assert_eq!(guest(&edge.ask(&["whois", &port]).unwrap()), guest(&now));
    let long_ago = edge.ask(&["whois", &port, "--at", "3d ago"]).unwrap();
    assert_eq!(long_ago["answers"][0]["kind"], "unknown");
    assert!(long_ago["notes"][0].as_str().unwrap().contains("begins at"), "{long_ago}");

    // Without a daemon, from the directory alone; and behind a line that a crash tore.
    edge.daemon.terminate().unwrap();
    let state = edge.daemon.spec().state_dir.clone();
    let history = state.join("history.jsonl");
    let mut file = std::fs::OpenOptions::new().append(true).open(&history).unwrap();
    file.write_all(b"{\"time\":\"2026-").unwrap();
    let output = Command::new(binary().unwrap())
        .args(["--output", "json", "--socket"])
        .arg(&edge.daemon.spec().socket)
        .args(["whois", &port, "--at", &then, "--state-dir"])
        .arg(&state)
        .output()
        .unwrap();
    let offline: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    assert_eq!(guest(&offline), guest(&before), "{offline}");
    edge.restart().unwrap();
    let said = edge.ask(&["whois", &port]).unwrap();
    assert_eq!(guest(&said), guest(&now), "{said}");
    assert!(said["notes"].to_string().contains("1 lines of the history are torn"), "{said}");
}

/// The policy with `members` guests in the pool, of which all but three have no device.
fn crowded(spec: &TopologySpec, members: usize) -> String {
    let mut policy = LabPolicy::new(WithHook::Tc);
    policy.ports = 0;
    let names: Vec<String> = (4..=members).map(|number| format!("ghost{number}")).collect();
    let ghosts: String = names
        .iter()
        .enumerate()
        .map(|(i, name)| {
            format!(
                "  - {{ name: {name}, device: pc-no{i}, ipConfigurations: [{{ subnet: guests, privateIPAddress: 10.0.0.{} }}] }}\n",
                100 + i
            )
        })
        .collect();
    policy
        .yaml(spec)
        .replace("publicIPAddresses:\n", &format!("{ghosts}publicIPAddresses:\n"))
        .replace("[vm1, vm2, vm3]", &format!("[vm1, vm2, vm3, {}]", names.join(", ")))
}

#[test]
fn plan_tells_who_loses_which_ports_and_changes_nothing() {
    let spec = TopologySpec::clean_veth(3);
    let edge = Edge::start(&spec, &crowded(&spec, 50)).unwrap();
    let guest = edge.topology.guest("vm1");
    let _https = TcpEcho::start(edge.topology.internet(), server(443)).unwrap();
    // By another guest: a connection that has ended is on a port as well for a while, and counts for `plan`.
    let other = edge.topology.guest("vm2");
    assert!(eventually(LIMIT, || tcp_connect(other, None, server(443), LIMIT).is_ok()));
    // On more than half of its units a flow, so that some have to be on those that drain.
    let mut hold = TcpHold::open(guest, server(443), 600, LIMIT).unwrap();
    assert_eq!(hold.established(), 600);
    let before = edge.ask(&["snat", "--guest", "vm1"]).unwrap();
    assert_eq!(row(&before, "vm1", "tcp")["allocated"], 1024);
    let generation = edge.generation().unwrap();
    let plan = |yaml: &str| {
        let file = edge.bpffs.scratch().write("planned.yaml", yaml).unwrap();
        let (status, out, err) =
            edge.daemon.client(&["--output", "json", "plan", file.to_str().unwrap()]).unwrap();
        let answer: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}"));
        (status.code().unwrap(), answer)
    };
    let (code, same) = plan(&crowded(&spec, 50));
    assert_eq!(
        (code, &same["changes"], same["things"].as_array().unwrap().len()),
        (0, &false.into(), 0),
        "{same}"
    );

    let (code, said) = plan(&crowded(&spec, 51));
    assert_eq!((code, &said["changes"], &said["flowsCutNow"]), (3, &true.into(), &0.into()), "{said}");
    let things = said["things"].as_array().unwrap();
    let change = |path: &str| things.iter().find(|thing| thing["path"] == path).map(|t| t["change"].clone());
    assert_eq!(change("networkInterfaces/ghost51"), Some("added".into()), "{things:?}");
    assert_eq!(change("loadBalancers/lb/backendAddressPools/pool"), Some("changed".into()));
    let ports = said["ports"].as_array().unwrap();
    let of = |guest: &str, change: &str| {
        ports.iter().find(|moved| {
            moved["guest"].as_str().unwrap().split('/').next() == Some(guest)
                && moved["protocol"] == "tcp"
                && moved["change"] == change
        })
    };
    let drains = of("vm1", "drains").unwrap_or_else(|| panic!("{ports:?}"));
    // Units on which by chance no flow stands are free at once.
    let freed = of("vm1", "frees").map_or(0, |moved| moved["ports"].as_u64().unwrap());
    assert_eq!(drains["ports"].as_u64(), Some(512 - freed), "{ports:?}");
    let flows = drains["flows"].as_u64().unwrap();
    // 600 flows on 1,024 ports, 512 of which go: at least 88 flows do not fit on those that stay.
    assert!((88..=300).contains(&flows), "the half with the fewest flows: {flows}");
    let totals = ports.iter().filter(|moved| moved["change"] == "drains");
    assert_eq!(said["drainingFlows"], totals.map(|moved| moved["flows"].as_u64().unwrap()).sum::<u64>());

    // Nothing was done.
    assert_eq!(edge.generation().unwrap(), generation);
    assert_eq!(row(&edge.ask(&["snat", "--guest", "vm1"]).unwrap(), "vm1", "tcp")["allocated"], 1024);

    // Applied, it comes to what was told, and no flow is cut.
    let (applied, out) = edge.apply(&crowded(&spec, 51)).unwrap();
    assert!(applied, "{out}");
    assert_eq!(hold.alive(LIMIT), 600);
    let tcp = row(&edge.ask(&["snat", "--guest", "vm1"]).unwrap(), "vm1", "tcp");
    assert_eq!((&tcp["allocated"], &tcp["draining"]), (&512.into(), &drains["ports"]), "{tcp}");
    assert_eq!(tcp["drainingFlows"].as_u64(), Some(flows), "{tcp}");
    assert!(tcp["drainingUntil"].as_str().is_some(), "{tcp}");
    assert_eq!(plan(&crowded(&spec, 51)).1["changes"], false);
    let wrong = edge.bpffs.scratch().write("wrong.yaml", "uplinks: 7").unwrap();
    let (status, _, said) = edge.daemon.client(&["plan", wrong.to_str().unwrap()]).unwrap();
    assert_eq!(status.code(), Some(2), "{said}");
}

/// A sample of the text format: name and labels to value, and the types.
fn parse(text: &str) -> (BTreeMap<String, f64>, BTreeMap<String, String>) {
    let (mut samples, mut types) = (BTreeMap::new(), BTreeMap::new());
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(types.insert(name.to_owned(), kind.to_owned()).is_none(), "{name} twice");
        } else if !line.starts_with('#') {
            let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
            let value = value.parse().unwrap_or_else(|_| panic!("{line}"));
            assert!(samples.insert(series.to_owned(), value).is_none(), "{series} twice");
        }
    }
    (samples, types)
}

fn get(edge: &Edge, target: &str) -> (String, String) {
    let answer = edge.topology.gateway().enter(|| {
        let mut stream = TcpStream::connect("127.0.0.1:9464").unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

#[test]
fn metrics_are_scraped_under_azures_names() {
    let mut edge = start();
    let quiet = edge.topology.gateway().enter(|| TcpStream::connect("127.0.0.1:9464"));
    assert!(quiet.is_err(), "off unless asked for");
    edge.daemon.terminate().unwrap();
    edge.daemon.spec_mut().arguments = vec!["--metrics".into(), "127.0.0.1:9464".into()];
    edge.topology.gateway().ip("link set lo up").unwrap();
    edge.restart().unwrap();
    let _https = TcpEcho::start(edge.topology.internet(), server(443)).unwrap();
    let hold = TcpHold::open(edge.topology.guest("vm1"), server(443), 8, LIMIT).unwrap();
    assert_eq!(hold.established(), 8);
    assert!(tcp_connect(edge.topology.guest("vm1"), None, server(443), SOON).is_err(), "the ninth");
    let began = Instant::now();
    let (head, body) = get(&edge, "/metrics");
    println!("a scrape took {:?}, {} bytes", began.elapsed(), body.len());
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("text/plain; version=0.0.4"), "{head}");
    let (samples, types) = parse(&body);
    let ports = |name: &str, guest: &str, address: &str, awaiting: &str| {
        let series = format!(
            "{name}{{FrontendIPAddress=\"{FRONTEND}\",BackendIPAddress=\"{address}\",ProtocolType=\"Tcp\",IsAwaitingRemoval=\"{awaiting}\",Guest=\"{guest}\"}}"
        );
        *samples.get(&series).unwrap_or_else(|| panic!("{series} in {body}"))
    };
    assert_eq!(ports("AllocatedSnatPorts", "vm1/ipconfig1", "10.0.0.4", "false"), 8.0);
    assert_eq!(ports("AllocatedSnatPorts", "vm1/ipconfig1", "10.0.0.4", "true"), 0.0);
    assert_eq!(ports("UsedSnatPorts", "vm1/ipconfig1", "10.0.0.4", "false"), 8.0);
    assert_eq!(ports("UsedSnatPorts", "vm2/ipconfig1", "10.0.0.5", "false"), 0.0);
    let value = |series: &str| *samples.get(series).unwrap_or_else(|| panic!("{series} in {body}"));
    assert!(value("SnatConnectionCount{ConnectionState=\"Successful\"}") >= 8.0);
    assert!(value("SnatConnectionCount{ConnectionState=\"Failed\"}") >= 1.0);
    assert!(value("portcullis_packets_total{reason=\"snat_exhausted\"}") >= 1.0);
    assert!(value("portcullis_flows{family=\"ipv4\"}") >= 8.0);
    assert_eq!(value("portcullis_flows{family=\"ipv6\"}"), 0.0);
    let tried = value("portcullis_snat_candidates_tried_count");
    assert_eq!(tried, value("portcullis_snat_candidates_tried_bucket{le=\"+Inf\"}"));
    assert_eq!(tried, value("SnatConnectionCount{ConnectionState=\"Successful\"}"));
    assert!(
        value("portcullis_snat_candidates_tried_bucket{le=\"8\"}") >= 8.0,
        "eight ports, eight candidates"
    );
    assert!(body.contains("portcullis_health_event{event=\"SnatPortExhaustion\""), "{body}");
    for (name, kind) in [
        ("AllocatedSnatPorts", "gauge"),
        ("SnatConnectionCount", "counter"),
        ("portcullis_packets_total", "counter"),
        ("portcullis_snat_candidates_tried", "histogram"),
    ] {
        assert_eq!(types.get(name).map(String::as_str), Some(kind));
    }
    assert!(get(&edge, "/").0.starts_with("HTTP/1.1 404"));
    // Whoever says nothing keeps nobody out.
    let _mute = edge.topology.gateway().enter(|| TcpStream::connect("127.0.0.1:9464").unwrap());
    assert!(get(&edge, "/metrics").0.starts_with("HTTP/1.1 200"));
}

#[test]
fn a_guest_above_three_quarters_and_one_without_ports_are_events_with_guest_frontend_destination_and_since() {
    let edge = start();
    let guest = edge.topology.guest("vm1");
    let _https = TcpEcho::start(edge.topology.internet(), server(443)).unwrap();
    let events = || edge.ask(&["status"]).unwrap()["healthEvents"].as_array().unwrap().clone();
    let named = |name: &str| events().into_iter().find(|event| event["event"] == name);
    let mut hold = TcpHold::open(guest, server(443), 6, LIMIT).unwrap();
    // One look may have been under way; the next one after it was not.
    let looks = || edge.ask(&["status"]).unwrap()["healthLooks"].as_u64().unwrap();
    let before = looks();
    assert!(eventually(Duration::from_secs(60), || looks() >= before + 2), "the daemon looks no more");
    assert_eq!(events(), [] as [Value; 0], "three quarters are not more than three quarters");
    hold.open_more(guest, server(443), 1, LIMIT).unwrap();
    // A look comes every 15 s.
    let look = Duration::from_secs(60);
    assert!(eventually(look, || named("HighSnatPortUsage").is_some()), "{:?}", edge.ask(&["snat"]));
    let high = named("HighSnatPortUsage").unwrap();
    assert_eq!(high["guest"], "vm1/ipconfig1");
    assert_eq!(
        (&high["frontend"], &high["destination"], &high["protocol"], &high["severity"]),
        (&FRONTEND.into(), &"198.51.100.1:443".into(), &"tcp".into(), &"Warning".into())
    );
    assert_eq!((&high["portsTaken"], &high["portsAllocated"]), (&7.into(), &8.into()));
    assert!(high["since"].as_str().unwrap().ends_with('Z'));
    assert!(named("SnatPortExhaustion").is_none());

    // The ninth is refused, and told at once.
    hold.open_more(guest, server(443), 1, LIMIT).unwrap();
    assert_eq!(hold.established(), 8);
    assert!(tcp_connect(guest, None, server(443), SOON).is_err());
    assert!(eventually(LIMIT, || named("SnatPortExhaustion").is_some()), "{:?}", events());
    let worst = events()[0].clone();
    assert_eq!((&worst["event"], &worst["severity"]), (&"SnatPortExhaustion".into(), &"Critical".into()));
    assert_eq!(
        (&worst["guest"], &worst["destination"]),
        (&"vm1/ipconfig1".into(), &"198.51.100.1:443".into())
    );
    let log = edge.daemon.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("SnatPortExhaustion")).collect();
    assert_eq!(lines.len(), 1, "once, not with every packet: {lines:?}");
    for part in ["vm1/ipconfig1", FRONTEND, "198.51.100.1:443", "since"] {
        assert!(lines[0].contains(part), "{part} in {}", lines[0]);
    }
    assert!(edge.daemon.ask_text(&["status"]).unwrap().contains("SnatPortExhaustion (Critical)"));
    // Another destination is free, and another guest.
    let _http = TcpEcho::start(edge.topology.internet(), server(80)).unwrap();
    assert!(tcp_connect(guest, None, server(80), LIMIT).is_ok());
    assert!(tcp_connect(edge.topology.guest("vm2"), None, server(443), LIMIT).is_ok());

    // What `explain` says of it, and what to do.
    let told = edge.ask(&["explain", "--from", "vm1", "--to", "198.51.100.1:443"]).unwrap();
    let way = &told["wayOut"];
    assert_eq!((&way["scenario"], &way["rule"]), (&"outboundRule".into(), &"lb/out".into()), "{way}");
    assert_eq!((&way["ports"]["taken"], &way["ports"]["of"]), (&8.into(), &8.into()), "{way}");
    let advice = way["advice"].to_string();
    for word in ["reuse", "pool", "back off", "instance-level", "allocatedOutboundPorts", "keepalives"] {
        assert!(advice.contains(word), "{word} in {advice}");
    }
    let told = edge.ask(&["explain", "--from", "vm3", "--to", "198.51.100.1:443"]).unwrap();
    assert_eq!(
        (&told["wayOut"]["scenario"], &told["wayOut"]["ports"]),
        (&"instance".into(), &Value::Null),
        "{told}"
    );

    // Over.
    drop(hold);
    edge.ask(&["flows", "flush"]).unwrap();
    assert!(eventually(look, || named("HighSnatPortUsage").is_none()), "{:?}", events());
    assert!(edge.daemon.log().contains("HighSnatPortUsage ended after"));
}
