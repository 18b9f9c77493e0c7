//! TCP with real sockets, under XDP and under TC: a stranger on the internet who knows addresses and ports of a connection, and
//! everything but its sequence numbers, sends RSTs into it; connections that really end are told as what they are and give
//! their ports back.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use portcullis_tests::edge::{Edge, HookCheck, LabPolicy, WithHook, under_both};
use portcullis_tests::lab::{
    Craft, RawSender, Sniffer, TcpEcho, TcpFlags, TopologySpec, Transport, eventually, ping, tcp_connect,
};
use portcullis_tests::random::Random;
use portcullis_tests::site::{LIMIT, SERVER, SOON, at};

const FRONTEND: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// On a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
const RESETS: usize = 10_000;
const BATCH: usize = 250;

fn start(hook: WithHook) -> Edge {
    let spec = TopologySpec::clean_veth(1);
    let mut policy = LabPolicy::new(hook);
    policy.ports = 8;
    policy.extra = "timeouts: { tcpEstablishedSeconds: 3600, tcpTransitorySeconds: 1800, tcpResetSeconds: 15, tcpFinSeconds: 15 }\n".to_owned();
    let edge = Edge::start(&spec, &policy.yaml(&spec)).unwrap();
    ping(edge.topology.guest("vm1"), SERVER.into(), 1, SOON).unwrap();
    edge
}

/// State of every TCP flow, by its destination's port.
fn states(edge: &Edge) -> BTreeMap<u64, String> {
    let answer = edge.ask(&["flows"]).unwrap();
    let flows = answer["flows"].as_array().unwrap().iter().filter(|flow| flow["protocol"] == "tcp");
    flows
        .map(|flow| {
            (flow["destinationPort"].as_u64().unwrap(), flow["state"].as_str().unwrap_or_default().to_owned())
        })
        .collect()
}

fn is(edge: &Edge, port: u64, state: &str) -> bool {
    eventually(PATIENCE, || states(edge).get(&port).is_some_and(|is| is == state))
}

#[test]
fn a_transfer_goes_on_while_a_stranger_sends_ten_thousand_resets_into_it() {
    under_both(|hook| {
        let edge = start(hook);
        let check = HookCheck::begin(&edge, hook).unwrap();
        let (guest, internet) = (edge.topology.guest("vm1"), edge.topology.internet());
        let server = TcpEcho::start(internet, at(SERVER, 443)).unwrap();
        let mut client = tcp_connect(guest, None, at(SERVER, 443), LIMIT).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.set_nodelay(true).unwrap();
        assert!(eventually(LIMIT, || server.peers().len() == 1));
        let public = server.peers()[0];
        assert_eq!(public.ip(), FRONTEND, "{hook:?}");
        let resets = Sniffer::start_filtered(guest, "eth0", |frame| {
            !frame.outgoing && frame.is_tcp_with(TcpFlags::RST)
        })
        .unwrap();
        // He is where the server is; that he is not the server nobody can see.
        let stranger = RawSender::open(internet, "eth0").unwrap();
        let craft = Craft::new(TopologySpec::INTERNET_MAC, SERVER, TopologySpec::UPLINK_MAC, FRONTEND);
        let reset = |sequence| craft.tcp(443, public.port(), TcpFlags::RST, sequence, 0, b"");
        let mut exchange = |what: &str| {
            let mut echo = [0; 4096];
            client.write_all(&[0x5a; 4096]).unwrap_or_else(|e| panic!("{hook:?}, {what}: {e}"));
            client.read_exact(&mut echo).unwrap_or_else(|e| panic!("{hook:?}, {what}: {e}"));
            assert_eq!(echo, [0x5a; 4096]);
        };
        let mut times = 0;
        std::thread::scope(|scope| {
            let flood = scope.spawn(|| {
                let mut random = Random(0x5eed + hook as u64);
                for sent in 1..=RESETS {
                    stranger.send(&reset((random.next() >> 32) as u32)).unwrap();
                    // Not more at once than a veth queues. All are passed on: the guest judges them itself (RFC 7857 §2.2).
                    if sent % BATCH == 0 {
                        assert!(
                            eventually(PATIENCE, || resets.frames().len() == sent),
                            "{hook:?}: {sent} sent"
                        );
                    }
                }
            });
            while !flood.is_finished() || times < 100 {
                exchange("under the flood");
                times += 1;
            }
        });
        println!("{hook:?}: {times} times 4 KiB each way meanwhile");
        exchange("after it");
        assert!(is(&edge, 443, "established"), "{hook:?}: {:?}", states(&edge));

        // Silence. Where the guest is, its last acknowledgement says.
        let eyes = edge.topology.sniff_guest("vm1").unwrap();
        exchange("seen");
        let acknowledged = || {
            let frames = eyes.frames();
            let transports =
                frames.iter().rev().filter(|frame| frame.outgoing).filter_map(|frame| frame.ip.as_ref());
            let mut acknowledgments = transports.filter_map(|ip| match ip.transport {
                Transport::Tcp { acknowledgment, .. } => Some(acknowledgment),
                _ => None,
            });
            acknowledgments.next().expect("it has acknowledged something")
        };
        // The answer to the last exchange may be acknowledged late, and alone.
        let rests = || {
            eventually(PATIENCE, || {
                let before = acknowledged();
                std::thread::sleep(SOON);
                before == acknowledged()
            })
        };
        assert!(rests());
        let exact = acknowledged();
        // Far from the guest's window, so that it says nothing to it.
        stranger.send(&reset(exact.wrapping_sub(1 << 30))).unwrap();
        assert!(is(&edge, 443, "transitory"), "{hook:?}: {:?}", states(&edge));
        exchange("in the transitory state");
        assert!(is(&edge, 443, "established"), "{hook:?}: {:?}", states(&edge));
        // The one number of 2^32.
        assert!(rests());
        stranger.send(&reset(acknowledged())).unwrap();
        assert!(is(&edge, 443, "reset"), "{hook:?}: {:?}", states(&edge));
        check.end(&edge).unwrap();
    });
}

/// Both ends of a connection in which each has acknowledged all the other said: who ends it is to speak last but one.
fn connection(edge: &Edge, port: u16, server_ends: bool) -> [TcpStream; 2] {
    let listener = edge.topology.internet().enter(|| TcpListener::bind(at(SERVER, port))).unwrap();
    let mut client = tcp_connect(edge.topology.guest("vm1"), None, at(SERVER, port), LIMIT).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    let say = |from: &mut TcpStream, to: &mut TcpStream| {
        from.write_all(b"word").unwrap();
        to.read_exact(&mut [0; 4]).unwrap();
    };
    say(&mut client, &mut server);
    say(&mut server, &mut client);
    if server_ends {
        say(&mut client, &mut server);
    }
    [client, server]
}

fn abort(stream: TcpStream) {
    setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).unwrap();
    drop(stream);
}

#[test]
fn a_connection_that_is_reset_closed_or_refused_is_told_so_and_gives_its_port_back() {
    under_both(|hook| {
        let edge = start(hook);
        let check = HookCheck::begin(&edge, hook).unwrap();
        let guest = edge.topology.guest("vm1");
        // By the server, by the guest, one after the other, not at all.
        let [by_server, by_guest, closed, live] = [(4001, true), (4002, false), (4003, true), (4004, false)]
            .map(|(port, server_ends)| connection(&edge, port, server_ends));
        let [mut client, server] = by_server;
        abort(server);
        assert_eq!(client.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset, "{hook:?}");
        let [client, mut server] = by_guest;
        abort(client);
        assert_eq!(server.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset, "{hook:?}");
        let [client, mut server] = closed;
        drop(client);
        assert_eq!(server.read(&mut [0; 1]).unwrap(), 0, "{hook:?}");
        drop(server);
        let refused = tcp_connect(guest, None, at(SERVER, 4005), LIMIT).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{hook:?}");
        for (port, state) in
            [(4001, "reset"), (4002, "reset"), (4003, "closed"), (4004, "established"), (4005, "reset")]
        {
            assert!(is(&edge, port, state), "{hook:?}: {port} is not {state} but {:?}", states(&edge));
        }
        assert!(
            eventually(PATIENCE, || states(&edge).into_keys().eq([4004])),
            "{hook:?}: after fifteen seconds only the live one is left: {:?}",
            states(&edge)
        );
        // All eight ports towards a destination that had one.
        let listener = edge.topology.internet().enter(|| TcpListener::bind(at(SERVER, 4001))).unwrap();
        let again: Vec<TcpStream> =
            (0..8).map(|_| tcp_connect(guest, None, at(SERVER, 4001), LIMIT).unwrap()).collect();
        let peers: std::collections::BTreeSet<SocketAddr> =
            (0..8).map(|_| listener.accept().unwrap().1).collect();
        assert_eq!((again.len(), peers.len()), (8, 8), "{hook:?}");
        check.end(&edge).unwrap();
        drop(live);
    });
}
