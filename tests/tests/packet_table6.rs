//! IPv6 on the host engine, under XDP and under TC, beside IPv4 of the same guests: verdict, packet out, every counter,
//! every rule.

use std::net::Ipv6Addr;

use portcullis_common::Reason::{self, *};
use portcullis_common::engine::Hook;
use portcullis_tests::backend::{Action, At, Backend, HostBackend, KernelBackend, ROUTER_MAC};
use portcullis_tests::lab::{ALL_NODES, Checksum, Craft, Craft6, Frame, Mac, TcpFlags, solicited_node};
use portcullis_tests::ledger::Ledger;

const POLICY: &str = include_str!("policies/both-families.yaml");

const DEVICES: [&str; 4] = ["vm1", "vm2", "vm3", "up"];
const VM1: Mac = [2, 0, 0, 0, 0, 1];
const VM2: Mac = [2, 0, 0, 0, 0, 2];
const VM3: Mac = [2, 0, 0, 0, 0, 3];
const STRANGER: Mac = [2, 0, 0, 0, 0, 9];
const GATEWAY: Mac = [2, 0, 0, 0, 0xaa, 0];
const WEB_OUT: &str = "web/Outbound/defaultSecurityRules/AllowVnetOutBound";
const WEB_IN: &str = "web/Inbound/defaultSecurityRules/AllowVnetInBound";

fn ip(text: &str) -> Ipv6Addr {
    text.parse().expect("a literal")
}

fn from(mac: Mac, source: &str, destination: &str) -> Craft6 {
    Craft6::new(mac, ip(source), GATEWAY, ip(destination))
}

struct Table<'a>(Ledger<'a>);

impl Table<'_> {
    fn drops(&mut self, name: &str, device: &'static str, frame: &[u8], reason: Reason, rules: &[&str]) {
        let outcome = self.0.run(name, At::Ingress(device), frame, reason, rules);
        assert_eq!(outcome.action, Action::Drop, "{name} on {}", self.0.backend.name());
    }

    fn passes(&mut self, name: &str, at: At, frame: &[u8], reason: Reason, rules: &[&str]) {
        let outcome = self.0.run(name, at, frame, reason, rules);
        let who = format!("{name} on {}", self.0.backend.name());
        assert_eq!(outcome.action, Action::Pass, "{who}");
        assert_eq!(outcome.frame, frame, "{who}: a passed packet is untouched");
    }

    /// Sent on to `mac`, one hop older and otherwise as it was.
    fn sends(
        &mut self,
        name: &str,
        device: &'static str,
        frame: &[u8],
        mac: Mac,
        reason: Reason,
        rules: &[&str],
    ) {
        let outcome = self.0.run(name, At::Ingress(device), frame, reason, rules);
        let who = format!("{name} on {}", self.0.backend.name());
        assert_eq!(outcome.action, Action::Send, "{who}");
        let (before, after) = (Frame::parse(frame.to_vec()), Frame::parse(outcome.frame.clone()));
        assert_eq!(after.destination_mac, mac, "{who}");
        assert_eq!(after.source_mac[..5], GATEWAY[..5], "{who}: from the gateway");
        let (was, is) = (before.ip.expect("is IP"), after.ip.clone().expect("is IP"));
        assert_eq!(is.ttl, was.ttl - 1, "{who}: hop limit");
        assert_eq!((is.source, is.destination, is.transport), (was.source, was.destination, was.transport));
        let mut older = frame[14..].to_vec();
        older[7] -= 1;
        assert_eq!(outcome.frame[14..], older, "{who}: nothing else changed");
        assert_ne!(after.checksums().transport, Checksum::Bad, "{who}");
    }

    /// Answered with an advertisement about `target` from the device's own address.
    fn advertised(&mut self, name: &str, device: &'static str, frame: &[u8], target: Ipv6Addr, option: bool) {
        let outcome = self.0.run(name, At::Ingress(device), frame, NdAnswered, &[]);
        let who = format!("{name} on {}", self.0.backend.name());
        assert_eq!(outcome.action, Action::Send, "{who}");
        let (asked, answer) = (Frame::parse(frame.to_vec()), Frame::parse(outcome.frame.clone()));
        let ip = answer.ip.clone().expect("is IP");
        assert_eq!(answer.destination_mac, asked.source_mac, "{who}");
        assert_eq!(answer.source_mac[..5], GATEWAY[..5], "{who}");
        assert_eq!(ip.source, std::net::IpAddr::V6(target), "{who}");
        assert_eq!(ip.destination, asked.ip.expect("is IP").source, "{who}");
        assert_eq!((ip.ttl, answer.checksums().transport), (255, Checksum::Good), "{who}");
        let message = &outcome.frame[54..];
        assert_eq!(
            (message[0], message[1], message[4]),
            (136, 0, 0xe0),
            "{who}: router, solicited, override"
        );
        assert_eq!(message[8..24], target.octets(), "{who}");
        if option {
            assert_eq!(message[24..26], [2, 1], "{who}: target link-layer address");
            assert_eq!(message[26..32], answer.source_mac, "{who}");
        }
        assert_eq!(outcome.frame.len(), frame.len(), "{who}");
    }
}

fn table(backend: &mut dyn Backend) {
    let mut t = Table(Ledger::new(backend));
    neighbours(&mut t);
    flows(&mut t);
    shapes(&mut t);
    edges(&mut t);
}

/// Never broken by a rule, never spoofable.
fn neighbours(t: &mut Table<'_>) {
    let (v1, v2, gateway) = (ip("fd00:1:0:1::4"), ip("fd00:1:0:1::5"), ip("fd00:1:0:1::1"));
    let ask = |mac: Mac, source: Ipv6Addr, target: Ipv6Addr| {
        let (group, group_mac) = solicited_node(target);
        Craft6::new(mac, source, group_mac, group)
    };
    let question = ask(VM1, v1, gateway).solicitation(gateway, Some(VM1));
    t.advertised("a question for the gateway", "vm1", &question, gateway, true);
    let question = ask(VM1, v1, v2).solicitation(v2, Some(VM1));
    t.advertised("a question for a neighbour is answered by the gateway", "vm1", &question, v2, true);
    let question = ask(VM1, ip("fe80::4"), gateway).solicitation(gateway, Some(VM1));
    t.advertised("a question from a link-local address", "vm1", &question, gateway, true);
    let probe = Craft6::new(VM1, v1, GATEWAY, gateway).solicitation(gateway, None);
    t.advertised("a probe to the gateway alone, without option", "vm1", &probe, gateway, false);
    let bare = ask(VM1, v1, gateway).solicitation(gateway, None);
    t.drops("a question to many without the asker's address", "vm1", &bare, Malformed, &[]);
    let question = ask(VM2, v2, gateway).solicitation(gateway, Some(VM2));
    t.advertised(
        "a guest that may send no ICMP at all, and is learned by it",
        "vm2",
        &question,
        gateway,
        true,
    );
    let outside = ask(VM1, v1, ip("2001:db8::1")).solicitation(ip("2001:db8::1"), Some(VM1));
    t.passes("a question for an address outside", At::Ingress("vm1"), &outside, ToHost, &[]);

    let detection = ask(VM1, Ipv6Addr::UNSPECIFIED, v1).solicitation(v1, None);
    t.drops("duplicate address detection meets silence", "vm1", &detection, NdLearned, &[]);
    let theft = ask(VM2, v1, gateway).solicitation(gateway, Some(VM2));
    t.drops("a question in another's name", "vm2", &theft, SpoofedNd, &[]);
    let lie = ask(VM1, v1, gateway).solicitation(gateway, Some(STRANGER));
    t.drops("a question with another's hardware address", "vm1", &lie, SpoofedNd, &[]);
    let far = {
        let mut frame = ask(VM1, v1, gateway).solicitation(gateway, Some(VM1));
        frame[21] = 254;
        frame
    };
    t.drops("a question that has crossed a router", "vm1", &far, Malformed, &[]);

    let answer = Craft6::new(VM2, v2, GATEWAY, gateway).advertisement(v2, Some(VM2));
    t.passes("an answer about oneself goes to the kernel", At::Ingress("vm2"), &answer, NdLearned, &[]);
    let theft = Craft6::new(VM2, v2, [0x33, 0x33, 0, 0, 0, 1], ALL_NODES).advertisement(v1, Some(VM2));
    t.drops("an answer about another", "vm2", &theft, SpoofedNd, &[]);
    let theft = Craft6::new(VM2, v2, GATEWAY, gateway).advertisement(gateway, Some(VM2));
    t.drops("an answer about the gateway", "vm2", &theft, SpoofedNd, &[]);

    let router = Craft6::new(VM1, ip("fe80::4"), [0x33, 0x33, 0, 0, 0, 1], ALL_NODES);
    t.drops(
        "a guest that says it is a router",
        "vm1",
        &router.icmp(134, 0, [64, 0, 7, 8], &[0; 8]),
        RouterAdvertisement,
        &[],
    );
    t.drops(
        "a guest that redirects",
        "vm1",
        &router.icmp(137, 0, [0; 4], &[0; 32]),
        RouterAdvertisement,
        &[],
    );
    let routers = Craft6::new(VM1, ip("fe80::4"), [0x33, 0x33, 0, 0, 0, 2], ip("ff02::2"));
    t.passes(
        "a question for routers goes to the host",
        At::Ingress("vm1"),
        &routers.icmp(133, 0, [0; 4], &[]),
        ToHost,
        &[],
    );
    let theft = Craft6 { source: v2, ..routers };
    t.drops("the same in another's name", "vm1", &theft.icmp(133, 0, [0; 4], &[]), SpoofedNd, &[]);
    t.drops("a multicast report", "vm1", &router.icmp(143, 0, [0; 4], &[0; 4]), Broadcast, &[]);
    let host = Craft6::new(GATEWAY, gateway, VM1, v1);
    t.passes(
        "the host asks for a guest",
        At::HostEgress("vm1"),
        &host.solicitation(v1, Some(GATEWAY)),
        FromHost,
        &[],
    );
    t.passes(
        "the host's own advertisement",
        At::HostEgress("vm1"),
        &host.icmp(134, 0, [64, 0, 7, 8], &[0; 8]),
        FromHost,
        &[],
    );
    let world = Craft6::new(ROUTER_MAC, ip("fe80::ff"), [0x33, 0x33, 0, 0, 0, 1], ALL_NODES);
    t.passes(
        "routers outside are the kernel's business",
        At::Ingress("up"),
        &world.icmp(134, 0, [64, 0, 7, 8], &[0; 8]),
        NotOurs,
        &[],
    );
}

fn flows(t: &mut Table<'_>) {
    let there = from(VM1, "fd00:1:0:1::4", "fd00:1:0:1::5");
    let back = from(VM2, "fd00:1:0:1::5", "fd00:1:0:1::4");
    let syn = there.tcp(40000, 80, TcpFlags::SYN, 1);
    t.sends("guest to guest", "vm1", &syn, VM2, NewFlow, &[WEB_OUT, WEB_IN]);
    t.sends(
        "the answer needs no rule",
        "vm2",
        &back.tcp(80, 40000, TcpFlags::SYN_ACK, 9),
        VM1,
        Forwarded,
        &[],
    );
    t.sends("the stream goes on", "vm1", &there.tcp(40000, 80, TcpFlags::ACK, 2), VM2, Forwarded, &[]);
    t.drops("mid-stream without a flow", "vm1", &there.tcp(40001, 80, TcpFlags::ACK, 2), NoFlow, &[]);
    t.drops("an answer nobody asked for", "vm2", &back.tcp(80, 40002, TcpFlags::SYN_ACK, 2), NoFlow, &[]);
    t.drops("the flow of another interface", "vm3", &there.tcp(40000, 80, TcpFlags::ACK, 2), Spoofed, &[]);
    t.drops(
        "the right address from a wrong hardware address",
        "vm1",
        &Craft6 { source_mac: STRANGER, ..there.clone() }.udp(1, 2, b""),
        Spoofed,
        &[],
    );
    t.drops(
        "another guest's address",
        "vm1",
        &from(VM1, "fd00:1:0:1::5", "fd00:1:0:1::4").udp(1, 2, b""),
        Spoofed,
        &[],
    );
    t.sends("an echo request", "vm1", &there.echo_request(77, 1), VM2, NewFlow, &[WEB_OUT, WEB_IN]);
    t.sends(
        "its reply, though this guest may send no ICMP",
        "vm2",
        &back.echo_reply(77, 1),
        VM1,
        Forwarded,
        &[],
    );
    t.drops(
        "which its own request shows",
        "vm2",
        &back.echo_request(78, 1),
        DeniedByRule,
        &["web/Outbound/securityRules/DenyAll58"],
    );
    t.sends("UDP", "vm1", &there.udp(5000, 53, b"?"), VM2, NewFlow, &[WEB_OUT, WEB_IN]);

    // Across subnets: the receiver's subnet group.
    let to_db = from(VM1, "fd00:1:0:1::4", "fd00:1:0:2::4");
    let postgres = to_db.tcp(40000, 5432, TcpFlags::SYN, 1);
    t.sends(
        "a rule with IPv6 prefixes",
        "vm1",
        &postgres,
        VM3,
        NewFlow,
        &[
            WEB_OUT,
            "db/Inbound/securityRules/AllowPostgres",
            "vm3-nic/Inbound/defaultSecurityRules/AllowVnetInBound",
        ],
    );
    t.drops(
        "another port",
        "vm1",
        &to_db.tcp(40000, 22, TcpFlags::SYN, 1),
        DeniedByRule,
        &[WEB_OUT, "db/Inbound/securityRules/DenyV6"],
    );
    let from_vm2 = from(VM2, "fd00:1:0:1::5", "fd00:1:0:2::4");
    t.drops(
        "another sender, next to the one allowed",
        "vm2",
        &from_vm2.tcp(40000, 5432, TcpFlags::SYN, 1),
        DeniedByRule,
        &[WEB_OUT, "db/Inbound/securityRules/DenyV6"],
    );
    let from_db = from(VM3, "fd00:1:0:2::4", "fd00:1:0:1::4");
    t.drops(
        "an inbound rule for ICMP has ICMPv6 too",
        "vm3",
        &from_db.echo_request(1, 1),
        DeniedByRule,
        &[
            "vm3-nic/Outbound/defaultSecurityRules/AllowVnetOutBound",
            "db/Outbound/defaultSecurityRules/AllowVnetOutBound",
            "web/Inbound/securityRules/DenyIn58",
        ],
    );

    // Protocols without ports make flows too.
    let esp = to_db.protocol(50, &[0, 0, 0, 9, 0, 0, 0, 1]);
    t.sends(
        "ESP by its own rule",
        "vm1",
        &esp,
        VM3,
        NewFlow,
        &[
            WEB_OUT,
            "db/Inbound/securityRules/AllowEsp",
            "vm3-nic/Inbound/defaultSecurityRules/AllowVnetInBound",
        ],
    );
    t.sends("and its answer", "vm3", &from_db.protocol(50, &[0, 0, 0, 8, 0, 0, 0, 1]), VM1, Forwarded, &[]);
    t.drops(
        "SCTP has no rule there",
        "vm1",
        &to_db.protocol(132, &[0; 12]),
        DeniedByRule,
        &[WEB_OUT, "db/Inbound/securityRules/DenyV6"],
    );
    t.sends(
        "but passes where all protocols do",
        "vm1",
        &there.protocol(132, &[0; 12]),
        VM2,
        NewFlow,
        &[WEB_OUT, WEB_IN],
    );

    // IPv4 of the same guests is beside it.
    let four = Craft::new(VM2, [10, 0, 1, 5].into(), GATEWAY, [10, 0, 1, 4].into());
    let outcome = t.0.run(
        "IPv4 between the same guests",
        At::Ingress("vm2"),
        &four.udp(5000, 53, b"?"),
        NewFlow,
        &[WEB_OUT, WEB_IN],
    );
    assert_eq!(outcome.action, Action::Send);
}

fn shapes(t: &mut Table<'_>) {
    let plain = from(VM1, "fd00:1:0:1::4", "fd00:1:0:1::5");
    let with = |extensions: &[(u8, usize)]| {
        let mut craft = plain.clone();
        craft.extensions = extensions
            .iter()
            .map(|&(kind, bytes)| {
                (kind, {
                    let mut e = vec![0; bytes];
                    e[1] = (bytes / 8 - 1) as u8;
                    e[2] = 4;
                    e
                })
            })
            .collect();
        craft
    };
    for (port, chain) in [(1, vec![(0, 8)]), (2, vec![(60, 16)]), (3, vec![(0, 8), (60, 24), (43, 8)])] {
        let frame = with(&chain).udp(5000 + port, 53, b"?");
        t.sends("behind extension headers", "vm1", &frame, VM2, NewFlow, &[WEB_OUT, WEB_IN]);
    }
    t.sends("the flow is the same without them", "vm1", &plain.udp(5001, 53, b"?"), VM2, Forwarded, &[]);
    let chain = vec![(60, 8); 6];
    t.drops("a chain of six", "vm1", &with(&chain).udp(1, 2, b""), ExtensionHeaders, &[]);
    t.drops(
        "a header as long as it can be",
        "vm1",
        &with(&[(60, 2048)]).udp(1, 2, b""),
        ExtensionHeaders,
        &[],
    );
    t.drops(
        "hop-by-hop options that stand second",
        "vm1",
        &with(&[(60, 8), (0, 8)]).udp(1, 2, b""),
        ExtensionHeaders,
        &[],
    );
    let mut source_routed = with(&[(43, 8)]);
    source_routed.extensions[0].1[2] = 0;
    t.drops("a routing header of type 0", "vm1", &source_routed.udp(1, 2, b""), ExtensionHeaders, &[]);
    t.drops("a fragment", "vm1", &with(&[(44, 8)]).udp(1, 2, b""), FragmentOutOfOrder, &[]);
    t.drops("an ICMPv6 error", "vm1", &plain.icmp(1, 4, [0; 4], &[0; 48]), IcmpError, &[]);
    t.drops("ICMPv6 of the link", "vm1", &plain.icmp(141, 0, [0; 4], &[]), IcmpType, &[]);
    let syn = plain.tcp(40009, 80, TcpFlags::SYN, 1);
    t.drops("a truncated header", "vm1", &syn[..60], Malformed, &[]);
    let mut version = syn.clone();
    version[14] = 0x40;
    t.drops("a wrong version", "vm1", &version, Malformed, &[]);
    let mut long = syn.clone();
    long[18..20].copy_from_slice(&200u16.to_be_bytes());
    t.drops("a length beyond the frame", "vm1", &long, Malformed, &[]);
    t.drops("TCP without flags", "vm1", &plain.tcp(1, 2, TcpFlags::default(), 1), Reason::TcpFlags, &[]);
}

fn edges(t: &mut Table<'_>) {
    let out = |destination: &str| from(VM1, "fd00:1:0:1::4", destination);
    let internet = "web/Outbound/defaultSecurityRules/AllowInternetOutBound";
    t.drops(
        "to the world there is no translation",
        "vm1",
        &out("2001:db8::7").udp(1, 2, b""),
        NoOutboundMethod,
        &[internet],
    );
    t.drops(
        "nor for a guest without group",
        "vm3",
        &from(VM3, "fd00:1:0:2::4", "2001:db8::7").udp(1, 53, b""),
        DeniedByRule,
        &["vm3-nic/Outbound/securityRules/DenyDns"],
    );
    t.drops(
        "a unique local address that is nobody's",
        "vm1",
        &out("fd00:2::1").udp(1, 2, b""),
        DeniedByRule,
        &["web/Outbound/defaultSecurityRules/DenyAllOutBound"],
    );
    t.drops(
        "an address of the network that no guest has",
        "vm1",
        &out("fd00:1:0:1::99").udp(1, 2, b""),
        NoGuest,
        &[],
    );
    t.drops("multicast", "vm1", &out("ff02::fb").udp(5353, 5353, b""), Broadcast, &[]);
    t.drops(
        "multicast from a link-local address",
        "vm1",
        &from(VM1, "fe80::4", "ff02::fb").udp(5353, 5353, b""),
        Broadcast,
        &[],
    );
    t.drops(
        "a link-local source",
        "vm1",
        &from(VM1, "fe80::4", "fd00:1:0:1::5").udp(1, 2, b""),
        Martian,
        &[],
    );
    for martian in ["::1", "::", "fe80::1", "::ffff:10.0.1.5"] {
        t.drops("a destination that is never forwarded", "vm1", &out(martian).udp(1, 2, b""), Martian, &[]);
    }
    t.drops(
        "an IPv4 address in IPv6 clothes as source",
        "vm1",
        &from(VM1, "::ffff:10.0.1.4", "fd00:1:0:1::5").udp(1, 2, b""),
        Martian,
        &[],
    );
    t.drops("land", "vm1", &out("fd00:1:0:1::4").tcp(80, 80, TcpFlags::SYN, 1), Martian, &[]);
    t.passes(
        "echo to the gateway",
        At::Ingress("vm1"),
        &out("fd00:1:0:1::1").echo_request(5, 1),
        NewFlow,
        &[],
    );
    t.passes("DNS of the host", At::Ingress("vm1"), &out("fd00:1:0:1::1").udp(5353, 53, b"?"), NewFlow, &[]);
    t.drops(
        "another service of the host",
        "vm1",
        &out("fd00:1:0:1::1").tcp(40000, 22, TcpFlags::SYN, 1),
        HostAccess,
        &[],
    );
    let client = from(VM1, "fe80::4", "ff02::1:2");
    t.passes("DHCPv6 goes to the host", At::Ingress("vm1"), &client.udp(546, 547, b"solicit"), ToHost, &[]);
    t.drops("a guest that serves DHCPv6", "vm1", &client.udp(547, 546, b"advertise"), DhcpServer, &[]);
    let server = Craft6::new(GATEWAY, ip("fe80::1"), VM1, ip("fe80::4"));
    t.passes(
        "the host's DHCPv6 answer",
        At::HostEgress("vm1"),
        &server.udp(547, 546, b"advertise"),
        FromHost,
        &[],
    );

    let host = Craft6::new(GATEWAY, ip("fd00:1:0:1::1"), VM1, ip("fd00:1:0:1::4"));
    t.passes(
        "the host to a guest",
        At::HostEgress("vm1"),
        &host.tcp(50000, 22, TcpFlags::SYN, 1),
        NewFlow,
        &[WEB_IN],
    );
    t.passes(
        "and back",
        At::Ingress("vm1"),
        &out("fd00:1:0:1::1").tcp(22, 50000, TcpFlags::SYN_ACK, 1),
        ToHost,
        &[],
    );

    let world = Craft6::new(ROUTER_MAC, ip("2001:db8::7"), GATEWAY, ip("2001:db8::1"));
    t.passes(
        "what comes for the host is the kernel's",
        At::Ingress("up"),
        &world.tcp(1, 22, TcpFlags::SYN, 1),
        NotOurs,
        &[],
    );
    let to_guest = Craft6 { destination: ip("fd00:1:0:1::4"), ..world.clone() };
    t.passes(
        "what comes for a private address too: no route leads there",
        At::Ingress("up"),
        &to_guest.udp(1, 2, b""),
        NotOurs,
        &[],
    );

    let leak = from(VM1, "fd00:1:0:1::4", "2001:db8::7").udp(1, 2, b"");
    let guarded = t.0.run("the guard sees a private source", At::Guard, &leak, Untranslated, &[]);
    assert_eq!(guarded.action, Action::Drop);
    let own = t.0.run("and lets the host's own pass", At::Guard, &world.udp(1, 2, b""), NotOurs, &[]);
    assert_eq!(own.action, Action::Pass);
}

#[test]
fn the_ipv6_packet_table_holds_on_the_host_engine() {
    table(&mut HostBackend::new(POLICY).unwrap());
}

#[test]
fn the_ipv6_packet_table_holds_under_xdp() {
    KernelBackend::with(POLICY, &DEVICES, Hook::Xdp, |backend| {
        table(backend);
        Ok(())
    })
    .unwrap();
}

#[test]
fn the_ipv6_packet_table_holds_under_tc() {
    KernelBackend::with(POLICY, &DEVICES, Hook::Tc, |backend| {
        table(backend);
        Ok(())
    })
    .unwrap();
}
