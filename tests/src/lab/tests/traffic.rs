//! Traffic: what servers see and clients are told.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use super::super::{
    Crowd, CrowdEcho, HttpServer, IperfOptions, TcpEcho, TcpHold, UdpEcho, bits_per_second, curl, eventually,
    iperf3, tcp_exchange, udp_exchange,
};
use super::{NEVER, Pair, SOON, needs_root};

#[test]
fn a_tcp_server_sees_the_address_and_port_of_its_peer() {
    needs_root!();
    let pair = Pair::create();
    let server = TcpEcho::start(&pair.far, Pair::far_socket(0)).expect("a server");
    let outcome = tcp_exchange(&pair.near, Some(4321), server.address(), b"hello", SOON).expect("an echo");
    assert_eq!(outcome.local, SocketAddr::new(Pair::NEAR, 4321));
    assert_eq!(outcome.echoed, b"hello");
    assert_eq!(server.peers(), [outcome.local]);

    let large = vec![7; 3 << 20];
    let second = tcp_exchange(&pair.near, None, server.address(), &large, SOON).expect("a large echo");
    assert_eq!(server.peers(), [outcome.local, second.local]);
    assert!(eventually(SOON, || server.open_connections() == 0));
}

#[test]
fn each_of_a_crowd_hears_its_own_word_and_who_leaves_is_gone() {
    needs_root!();
    let pair = Pair::create();
    let server = CrowdEcho::start(&pair.far, Pair::far_socket(80)).expect("a server");
    let crowd = Crowd::new(&pair.near).expect("a crowd");
    let sources: Vec<(u32, SocketAddr)> =
        (0..300).map(|number| (number % 100, SocketAddr::new(Pair::NEAR, 0))).collect();
    crowd.connect(&sources, Pair::far_socket(80)).expect("they connect");
    assert_eq!(crowd.settle(SOON, 300).expect("and are counted"), 300);
    let expected: BTreeMap<u32, usize> = (0..100).map(|who| (who, 3)).collect();
    assert_eq!(crowd.established(), expected);
    assert_eq!(crowd.echo(SOON).expect("they speak"), expected);
    let heard = server.heard();
    assert_eq!((heard.open.len(), heard.mixed.len()), (300, 0));
    assert!(heard.open.values().all(|word| Crowd::who(*word) < 100));

    crowd.close_below(40);
    assert_eq!(crowd.echo(SOON).expect("the others speak").len(), 60);
    assert!(eventually(SOON, || server.heard().open.len() == 180), "{:?}", server.heard().open.len());
    assert!(server.heard().open.values().all(|word| Crowd::who(*word) >= 40));

    // Nobody listens there: begun, refused, and not counted.
    let before = crowd.settle(NEVER, 181).expect("they are counted");
    crowd.connect(&[(500, SocketAddr::new(Pair::NEAR, 0))], Pair::far_socket(81)).expect("it is begun");
    assert_eq!(crowd.settle(NEVER, before + 1).expect("they are counted"), 180);
}

#[test]
fn a_udp_server_sees_the_address_and_port_of_its_peer() {
    needs_root!();
    let pair = Pair::create();
    let server = UdpEcho::start(&pair.far, Pair::far_socket(5353)).expect("a server");
    for _ in 0..2 {
        let outcome =
            udp_exchange(&pair.near, Some(4321), server.address(), b"hello", SOON).expect("an echo");
        assert_eq!(outcome.local, SocketAddr::new(Pair::NEAR, 4321));
    }
    assert_eq!(server.peers(), [SocketAddr::new(Pair::NEAR, 4321)]);
    assert_eq!(server.datagrams(), 2);
}

#[test]
fn refusals_and_silence_are_told_apart() {
    needs_root!();
    let pair = Pair::create();
    let kind = tcp_exchange(&pair.near, None, Pair::far_socket(9), b"", SOON).map_err(|error| error.kind());
    assert_eq!(kind, Err(ErrorKind::ConnectionRefused));
    let kind = udp_exchange(&pair.near, None, Pair::far_socket(9), b"?", SOON).map_err(|error| error.kind());
    assert_eq!(kind, Err(ErrorKind::ConnectionRefused));

    // On the link, but nobody is there to answer ARP before the time is up.
    let nobody: SocketAddr = "192.0.2.77:9".parse().expect("an address");
    let kind = tcp_exchange(&pair.near, None, nobody, b"", NEVER).map_err(|error| error.kind());
    assert_eq!(kind, Err(ErrorKind::TimedOut));
    let kind = udp_exchange(&pair.near, None, nobody, b"?", NEVER).map_err(|error| error.kind());
    assert_eq!(kind, Err(ErrorKind::TimedOut));
}

#[test]
fn a_server_that_is_dropped_gives_its_port_back() {
    needs_root!();
    let pair = Pair::create();
    for _ in 0..2 {
        let server = TcpEcho::start(&pair.far, Pair::far_socket(80)).expect("the port is free");
        tcp_exchange(&pair.near, None, server.address(), b"x", SOON).expect("an echo");
    }
    let kind = tcp_exchange(&pair.near, None, Pair::far_socket(80), b"", SOON).map_err(|error| error.kind());
    assert_eq!(kind, Err(ErrorKind::ConnectionRefused));
}

#[test]
fn a_thousand_and_twenty_five_connections_are_held_at_once() {
    needs_root!();
    let pair = Pair::create();
    let server = TcpEcho::start(&pair.far, Pair::far_socket(80)).expect("a server");
    let mut hold = TcpHold::open(&pair.near, server.address(), 1025, SOON).expect("connections");
    assert_eq!((hold.established(), hold.failures().len()), (1025, 0));
    assert_eq!(hold.alive(SOON), 1025);
    assert_eq!(server.open_connections(), 1025);
    let mut peers = server.peers();
    let mut locals = hold.locals();
    peers.sort();
    locals.sort();
    assert_eq!(peers, locals);
    assert_eq!(hold.close(25), 25);
    assert!(eventually(SOON, || server.open_connections() == 1000));
    drop(hold);
    assert!(eventually(SOON, || server.open_connections() == 0));
}

#[test]
fn connections_that_get_no_answer_are_reported() {
    needs_root!();
    let pair = Pair::create();
    let server = TcpEcho::start(&pair.far, Pair::far_socket(80)).expect("a server");
    let mut hold = TcpHold::open(&pair.near, server.address(), 5, SOON).expect("connections");
    pair.far.ip("link set link0 down").expect("the link goes down");
    hold.open_more(&pair.near, server.address(), 3, NEVER).expect("sockets");
    assert_eq!(hold.established(), 5);
    assert_eq!(
        hold.failures().iter().map(|error| error.kind()).collect::<Vec<_>>(),
        [ErrorKind::TimedOut; 3]
    );
    assert_eq!(hold.alive(NEVER), 0);
}

#[test]
fn curl_gets_what_the_server_says() {
    needs_root!();
    let pair = Pair::create();
    let server = HttpServer::start(&pair.far, Pair::far_socket(80), "it works\n").expect("a server");
    let url = format!("http://{}/path", server.address());
    let reply = curl(&pair.near, &url, SOON, &["--local-port", "4000"]).expect("a reply");
    assert_eq!((reply.status, reply.body.as_str()), (200, "it works\n"));
    assert_eq!(reply.local, SocketAddr::new(Pair::NEAR, 4000));
    assert_eq!(server.requests(), [(reply.local, "GET /path HTTP/1.1".to_owned())]);
    server.set_status(503);
    assert_eq!(curl(&pair.near, &url, SOON, &[]).expect("a reply").status, 503);
    drop(server);
    let error = curl(&pair.near, &url, SOON, &[]).expect_err("nobody listens");
    assert!(error.to_string().contains("connect"), "{error}");
}

#[test]
fn iperf3_moves_data_both_ways() {
    needs_root!();
    let pair = Pair::create();
    let address = Pair::far_socket(5201);
    let mut options = IperfOptions { seconds: 1, ..Default::default() };
    let report = iperf3(&pair.far, address, &pair.near, address, &options).expect("a report");
    assert!(bits_per_second(&report).expect("a rate") > 1e6);
    options.reverse = true;
    let report = iperf3(&pair.far, address, &pair.near, address, &options).expect("a report");
    assert!(bits_per_second(&report).expect("a rate") > 1e6);
    (options.reverse, options.udp_rate) = (false, Some("10M".to_owned()));
    let report = iperf3(&pair.far, address, &pair.near, address, &options).expect("a report");
    assert!(bits_per_second(&report).expect("a rate") > 1e6);
}

#[test]
fn eventually_gives_up_and_looks_once_more_at_the_end() {
    let mut looks = 0;
    assert!(!eventually(Duration::from_millis(50), || {
        looks += 1;
        false
    }));
    assert!(looks >= 2, "looked {looks} times");
    assert!(eventually(Duration::ZERO, || true));
}
