//! Security groups beyond plain rules, packet by packet on the host engine, under XDP and under TC: application groups,
//! tags, peerings, routes, the platform's rules and services, protocols by number, and what a change of rules does to
//! flows that live. Verdict, receiver, *all* counters, *all* rule hits.

use std::net::Ipv4Addr;

use portcullis_common::Reason::{self, *};
use portcullis_common::engine::Hook;
use portcullis_common::packet::checksum;
use portcullis_tests::backend::{Action, At, Backend, HostBackend, KernelBackend, ROUTER_MAC};
use portcullis_tests::lab::{Craft, Mac, TcpFlags};
use portcullis_tests::ledger::Ledger;

const POLICY: &str = include_str!("policies/groups.yaml");
const DEVICES: [&str; 7] = ["vm1", "vm2", "nva", "vm4", "vm5", "vm6", "up"];
const VM1: Mac = [2, 0, 0, 0, 0, 1];
const VM2: Mac = [2, 0, 0, 0, 0, 2];
const NVA: Mac = [2, 0, 0, 0, 0, 3];
const VM4: Mac = [2, 0, 0, 0, 0, 4];
const VM5: Mac = [2, 0, 0, 0, 0, 5];
const VM6: Mac = [2, 0, 0, 0, 0, 6];
const GATEWAY: Mac = [2, 0, 0, 0, 0xaa, 0];
const VNET_OUT: &str = "web/Outbound/securityRules/AllowSctp";
const INTERNET_OUT: &str = "web/Outbound/defaultSecurityRules/AllowInternetOutBound";

fn policy(on_rule_change: &str, ssh: &str) -> String {
    POLICY.replace("@ON_RULE_CHANGE@", on_rule_change).replace("@RULE@", ssh)
}

fn ip(text: &str) -> Ipv4Addr {
    text.parse().expect("a literal")
}

fn from(mac: Mac, source: &str, destination: &str) -> Craft {
    Craft::new(mac, ip(source), GATEWAY, ip(destination))
}

/// A packet of this protocol without anything we would read in it.
fn protocol(craft: &Craft, number: u8) -> Vec<u8> {
    let mut frame = craft.udp(0, 0, b"12345678");
    frame[23] = number;
    frame[24..26].fill(0);
    let sum = checksum::of(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_ne_bytes());
    frame
}

struct Table<'a>(Ledger<'a>);

impl Table<'_> {
    fn drops(&mut self, name: &str, at: At, frame: &[u8], reason: Reason, rules: &[&str]) {
        let outcome = self.0.run(name, at, frame, reason, rules);
        assert_eq!(outcome.action, Action::Drop, "{name} on {}", self.0.backend.name());
    }

    fn passes(&mut self, name: &str, at: At, frame: &[u8], reason: Reason, rules: &[&str]) {
        let outcome = self.0.run(name, at, frame, reason, rules);
        assert_eq!(outcome.action, Action::Pass, "{name} on {}", self.0.backend.name());
    }

    /// Sent on to this hardware address.
    fn sends(&mut self, name: &str, at: At, frame: &[u8], mac: Mac, reason: Reason, rules: &[&str]) {
        let outcome = self.0.run(name, at, frame, reason, rules);
        let who = format!("{name} on {}", self.0.backend.name());
        assert_eq!(outcome.action, Action::Send, "{who}");
        assert_eq!(outcome.frame[..6], mac, "{who}: receiver");
    }
}

use At::Ingress;

fn table(backend: &mut dyn Backend) {
    let mut t = Table(Ledger::new(backend));
    application_groups(&mut t);
    tags_and_peers(&mut t);
    routes(&mut t);
    platform(&mut t);
    trusted_sources(&mut t);
    protocols(&mut t);
}

/// The documentation's three rules (`reference/azure.md` §1.5).
fn application_groups(t: &mut Table<'_>) {
    let logic = from(VM1, "10.0.1.4", "10.0.1.5");
    let sql = |craft: &Craft, port| craft.tcp(40_000, port, TcpFlags::SYN, 1, 0, b"");
    t.sends(
        "from the logic to the database",
        Ingress("vm1"),
        &sql(&logic, 1433),
        VM2,
        NewFlow,
        &[VNET_OUT, "web/Inbound/securityRules/LogicToDb"],
    );
    let other = from(VM5, "10.0.3.4", "10.0.1.5");
    let vm5_out = "vm5-nic/Outbound/defaultSecurityRules/AllowVnetOutBound";
    t.drops(
        "from anybody else of the network",
        Ingress("vm5"),
        &sql(&other, 1433),
        DeniedByRule,
        &[vm5_out, VNET_OUT, "web/Inbound/securityRules/DenyDb"],
    );
    t.sends(
        "another port",
        Ingress("vm5"),
        &sql(&other, 1434),
        VM2,
        NewFlow,
        &[vm5_out, VNET_OUT, "web/Inbound/defaultSecurityRules/AllowVnetInBound"],
    );
    let back = from(VM2, "10.0.1.5", "10.0.1.4");
    t.sends(
        "who is no member is not concerned",
        Ingress("vm2"),
        &sql(&back, 1433),
        VM1,
        NewFlow,
        &[VNET_OUT, "web/Inbound/defaultSecurityRules/AllowVnetInBound"],
    );
}

fn tags_and_peers(t: &mut Table<'_>) {
    let to_peer = from(VM1, "10.0.1.4", "10.1.1.4");
    let ssh = to_peer.tcp(40_000, 22, TcpFlags::SYN, 1, 0, b"");
    t.sends(
        "a peer's guest, which sees us as VirtualNetwork",
        Ingress("vm1"),
        &ssh,
        VM4,
        NewFlow,
        &[VNET_OUT, "db/Inbound/securityRules/Ssh"],
    );
    let answer = from(VM4, "10.1.1.4", "10.0.1.4").tcp(22, 40_000, TcpFlags::SYN_ACK, 9, 2, b"");
    t.sends("and its answer", Ingress("vm4"), &answer, VM1, Forwarded, &[]);
    t.drops(
        "an address of the peer that nobody has",
        Ingress("vm1"),
        &from(VM1, "10.0.1.4", "10.1.9.9").udp(1, 2, b""),
        NoGuest,
        &[],
    );
    t.drops(
        "the peer's gateway is not ours to ask",
        Ingress("vm1"),
        &from(VM1, "10.0.1.4", "10.1.1.1").echo_request(1, 1, b""),
        NoGuest,
        &[],
    );
    let island = from(VM1, "10.0.1.4", "10.2.1.4").udp(1, 2, b"");
    t.drops(
        "a network that is no peer is private space to nobody",
        Ingress("vm1"),
        &island,
        DeniedByRule,
        &["web/Outbound/defaultSecurityRules/DenyAllOutBound"],
    );
    let from_island = from(VM6, "10.2.1.4", "10.0.1.4").udp(1, 2, b"");
    t.drops(
        "nor from there, without any group: there is no way out",
        Ingress("vm6"),
        &from_island,
        NoOutboundMethod,
        &[],
    );

    let partner = |last: u8| from(VM1, "10.0.1.4", &format!("198.51.100.{last}")).udp(5000, 53, b"");
    t.drops(
        "a tag of the policy's own, in any case",
        Ingress("vm1"),
        &partner(127),
        DeniedByRule,
        &["web/Outbound/securityRules/DenyPartner"],
    );
    t.drops(
        "just outside of it another rule",
        Ingress("vm1"),
        &partner(128),
        DeniedByRule,
        &["web/Outbound/securityRules/DenyKmsNet"],
    );
    let beyond = from(VM1, "10.0.1.4", "198.51.101.1").udp(5000, 53, b"");
    t.sends("and beyond it the Internet", Ingress("vm1"), &beyond, ROUTER_MAC, NewFlow, &[INTERNET_OUT]);
    let web = Craft::new(ROUTER_MAC, ip("198.51.100.7"), GATEWAY, ip("203.0.113.20"));
    t.drops(
        "Internet is not VirtualNetwork",
        Ingress("up"),
        &web.tcp(40_000, 22, TcpFlags::SYN, 1, 0, b""),
        DeniedByRule,
        &["db/Inbound/defaultSecurityRules/DenyAllInBound"],
    );
}

fn routes(t: &mut Table<'_>) {
    let to = |address: &str| from(VM1, "10.0.1.4", address).udp(7000, 7000, b"");
    t.drops("a route to nowhere", Ingress("vm1"), &to("192.0.2.200"), RouteNone, &[]);
    t.drops(
        "a route that overrides a part of the own space",
        Ingress("vm1"),
        &to("10.0.2.70"),
        RouteNone,
        &[],
    );
    t.drops("a gateway this host is not", Ingress("vm1"), &to("172.20.1.1"), NoGateway, &[]);
    t.sends(
        "an appliance gets what is for behind it; its subnet has no group",
        Ingress("vm1"),
        &to("192.0.2.9"),
        NVA,
        NewFlow,
        &[VNET_OUT],
    );
    let answer = from(NVA, "192.0.2.9", "10.0.1.4").udp(7000, 7000, b"");
    t.sends("its answer comes back through it", Ingress("nva"), &answer, VM1, Forwarded, &[]);
    let fresh = from(NVA, "192.0.2.9", "10.0.1.4").udp(7001, 7001, b"");
    t.drops("but it opens nothing in another's name", Ingress("nva"), &fresh, Spoofed, &[]);
    let elsewhere = from(VM5, "10.0.3.4", "192.0.2.200").udp(7000, 7000, b"");
    let vm5_out = "vm5-nic/Outbound/defaultSecurityRules/AllowInternetOutBound";
    t.sends(
        "another subnet has other routes",
        Ingress("vm5"),
        &elsewhere,
        ROUTER_MAC,
        NewFlow,
        &[vm5_out, INTERNET_OUT],
    );
    let routed = from(VM5, "10.0.3.4", "172.20.1.1").udp(7000, 7000, b"");
    t.drops(
        "to which the routed space is not VirtualNetwork",
        Ingress("vm5"),
        &routed,
        DeniedByRule,
        &["vm5-nic/Outbound/defaultSecurityRules/DenyAllOutBound"],
    );
}

fn platform(t: &mut Table<'_>) {
    let to = |destination: &str| from(VM1, "10.0.1.4", destination);
    let dns = to("168.63.129.16").udp(5353, 53, b"?");
    t.passes(
        "a platform service, whatever the groups say of its address",
        Ingress("vm1"),
        &dns,
        NewFlow,
        &["platformRules/AllowPlatformService-dns"],
    );
    let metadata = to("169.254.169.254").tcp(40_000, 80, TcpFlags::SYN, 1, 0, b"");
    t.passes(
        "the metadata service",
        Ingress("vm1"),
        &metadata,
        NewFlow,
        &["platformRules/AllowPlatformService-metadata"],
    );
    t.drops(
        "a port nobody serves there",
        Ingress("vm1"),
        &to("169.254.169.254").tcp(40_000, 443, TcpFlags::SYN, 1, 0, b""),
        PlatformAddress,
        &[],
    );
    t.drops(
        "nor without a group",
        Ingress("vm6"),
        &from(VM6, "10.2.1.4", "169.254.169.254").tcp(40_000, 443, TcpFlags::SYN, 1, 0, b""),
        PlatformAddress,
        &[],
    );

    let five = |destination: &str| from(VM5, "10.0.3.4", destination);
    let metadata = five("169.254.169.254").tcp(40_000, 80, TcpFlags::SYN, 1, 0, b"");
    t.drops(
        "a rule that names the platform's tag",
        Ingress("vm5"),
        &metadata,
        DeniedByRule,
        &["platformRules/AllowPlatformService-metadata", "vm5-nic/Outbound/securityRules/NoMetadata"],
    );
    t.drops(
        "the same of DNS",
        Ingress("vm5"),
        &five("168.63.129.16").udp(5353, 53, b"?"),
        DeniedByRule,
        &["platformRules/AllowPlatformService-dns", "vm5-nic/Outbound/securityRules/NoDns"],
    );
    t.passes(
        "which is about UDP alone",
        Ingress("vm5"),
        &five("168.63.129.16").tcp(40_000, 53, TcpFlags::SYN, 1, 0, b""),
        NewFlow,
        &["platformRules/AllowPlatformService-dns"],
    );
    t.passes(
        "and not about other services there",
        Ingress("vm5"),
        &five("168.63.129.16").tcp(40_000, 32526, TcpFlags::SYN, 1, 0, b""),
        NewFlow,
        &["platformRules/AllowPlatformService-agent"],
    );

    let kms = |craft: Craft| craft.tcp(41_000, 1688, TcpFlags::SYN, 1, 0, b"");
    t.sends(
        "KMS, though a group denies its address",
        Ingress("vm1"),
        &kms(to("198.51.100.200")),
        ROUTER_MAC,
        NewFlow,
        &["platformRules/AllowKms"],
    );
    let vm5_out = "vm5-nic/Outbound/defaultSecurityRules/AllowInternetOutBound";
    t.drops(
        "not where a default route takes it elsewhere",
        Ingress("vm5"),
        &kms(five("198.51.100.200")),
        DeniedByRule,
        &[vm5_out, "web/Outbound/securityRules/DenyKmsNet"],
    );
    let mail = |craft: Craft| craft.tcp(42_000, 25, TcpFlags::SYN, 1, 0, b"");
    t.drops(
        "mail to the Internet",
        Ingress("vm1"),
        &mail(to("198.51.101.1")),
        DeniedByPlatform,
        &["platformRules/BlockSmtp25"],
    );
    t.sends(
        "mail within the network",
        Ingress("vm1"),
        &mail(to("10.0.1.5")),
        VM2,
        NewFlow,
        &[VNET_OUT, "web/Inbound/defaultSecurityRules/AllowVnetInBound"],
    );
    t.sends(
        "submission is never blocked",
        Ingress("vm1"),
        &to("198.51.101.1").tcp(42_000, 587, TcpFlags::SYN, 1, 0, b""),
        ROUTER_MAC,
        NewFlow,
        &[INTERNET_OUT],
    );
}

/// What rules trust by its address nobody outside may claim to be.
fn trusted_sources(t: &mut Table<'_>) {
    for source in ["168.63.129.16", "169.254.169.254", "10.1.1.9", "10.2.1.4", "127.0.0.1"] {
        let lie = Craft::new(ROUTER_MAC, ip(source), GATEWAY, ip("203.0.113.20"));
        let syn = lie.tcp(40_000, 22, TcpFlags::SYN, 1, 0, b"");
        t.drops(&format!("{source} from the uplink"), Ingress("up"), &syn, Martian, &[]);
    }
    // A host that forwards sends packets from outside to a guest's private address as its own.
    let forwarded = |source: &str| {
        Craft::new(GATEWAY, ip(source), VM4, ip("10.1.1.4")).tcp(40_000, 22, TcpFlags::SYN, 1, 0, b"")
    };
    for source in ["10.1.1.9", "10.0.1.9", "10.2.1.4", "168.63.129.16"] {
        t.drops(
            &format!("{source} through the host"),
            At::HostEgress("vm4"),
            &forwarded(source),
            Martian,
            &[],
        );
    }
    let in_a_flow = Craft::new(GATEWAY, ip("10.0.1.4"), VM2, ip("10.0.1.5"));
    let data = in_a_flow.tcp(40_000, 1433, TcpFlags::ACK, 2, 2, b"x");
    t.drops("through the host in a live flow of two guests", At::HostEgress("vm2"), &data, Spoofed, &[]);
    let world = forwarded("198.51.100.7");
    t.drops(
        "the world through the host",
        At::HostEgress("vm4"),
        &world,
        DeniedByRule,
        &["db/Inbound/defaultSecurityRules/DenyAllInBound"],
    );
    t.passes(
        "the host itself, by the gateway's address",
        At::HostEgress("vm4"),
        &forwarded("10.1.1.1"),
        NewFlow,
        &["db/Inbound/securityRules/Ssh"],
    );
}

fn protocols(t: &mut Table<'_>) {
    let there = from(VM1, "10.0.1.4", "10.0.1.5");
    let back = from(VM2, "10.0.1.5", "10.0.1.4");
    let vnet_in = "web/Inbound/defaultSecurityRules/AllowVnetInBound";
    for number in [132, 47, 50, 51, 2, 255] {
        let name = format!("protocol {number}");
        t.sends(&name, Ingress("vm1"), &protocol(&there, number), VM2, NewFlow, &[VNET_OUT, vnet_in]);
        t.sends(
            &format!("{name}, the answer"),
            Ingress("vm2"),
            &protocol(&back, number),
            VM1,
            Forwarded,
            &[],
        );
    }
    let world = Craft::new(ROUTER_MAC, ip("198.51.100.7"), GATEWAY, ip("203.0.113.20"));
    t.sends(
        "AH from the Internet by its own rule",
        Ingress("up"),
        &protocol(&world, 51),
        VM4,
        NewFlow,
        &["db/Inbound/securityRules/Ah"],
    );
    t.drops(
        "ESP has none",
        Ingress("up"),
        &protocol(&world, 50),
        DeniedByRule,
        &["db/Inbound/defaultSecurityRules/DenyAllInBound"],
    );
}

/// A connection to the peer's database, and one that no change concerns; then the rule turns.
fn change_of_rules(backend: &mut dyn Backend, on_rule_change: &str) {
    let mut t = Table(Ledger::new(backend));
    let to_db = from(VM1, "10.0.1.4", "10.1.1.4");
    let to_web = from(VM1, "10.0.1.4", "10.0.1.5");
    let segment = |craft: &Craft, port, flags| craft.tcp(40_000, port, flags, 5, 5, b"data");
    let from_db = from(VM4, "10.1.1.4", "10.0.1.4");
    let web = &[VNET_OUT, "web/Inbound/defaultSecurityRules/AllowVnetInBound"];
    t.sends(
        "the connection opens",
        Ingress("vm1"),
        &segment(&to_db, 22, TcpFlags::SYN),
        VM4,
        NewFlow,
        &[VNET_OUT, "db/Inbound/securityRules/Ssh"],
    );
    t.sends(
        "and is answered",
        Ingress("vm4"),
        &from_db.tcp(22, 40_000, TcpFlags::SYN_ACK, 1, 2, b""),
        VM1,
        Forwarded,
        &[],
    );
    t.sends("another one", Ingress("vm1"), &segment(&to_web, 80, TcpFlags::SYN), VM2, NewFlow, web);
    t.0.change(&policy(on_rule_change, "Deny"));
    t.drops(
        "a new connection is denied at once",
        Ingress("vm1"),
        &to_db.tcp(40_001, 22, TcpFlags::SYN, 1, 0, b""),
        DeniedByRule,
        &[VNET_OUT, "db/Inbound/securityRules/Ssh"],
    );
    t.sends(
        "an answer of the live one passes: it cannot trigger anything",
        Ingress("vm4"),
        &from_db.tcp(22, 40_000, TcpFlags::ACK, 2, 9, b"x"),
        VM1,
        Forwarded,
        &[],
    );
    let next = segment(&to_db, 22, TcpFlags::ACK);
    if on_rule_change == "keep" {
        t.sends("the initiator goes on", Ingress("vm1"), &next, VM4, Forwarded, &[]);
        t.sends(
            "so does the other connection",
            Ingress("vm1"),
            &segment(&to_web, 80, TcpFlags::ACK),
            VM2,
            Forwarded,
            &[],
        );
        return;
    }
    t.drops(
        "the initiator's next packet is judged again",
        Ingress("vm1"),
        &next,
        DeniedByRule,
        &[VNET_OUT, "db/Inbound/securityRules/Ssh"],
    );
    t.drops("with it the flow has ended", Ingress("vm1"), &next, NoFlow, &[]);
    t.drops(
        "in both directions",
        Ingress("vm4"),
        &from_db.tcp(22, 40_000, TcpFlags::ACK, 2, 9, b"x"),
        NoFlow,
        &[],
    );
    t.sends(
        "the other one is judged again too, and lives on",
        Ingress("vm1"),
        &segment(&to_web, 80, TcpFlags::ACK),
        VM2,
        Forwarded,
        web,
    );
    t.sends("once", Ingress("vm1"), &segment(&to_web, 80, TcpFlags::ACK), VM2, Forwarded, &[]);
}

fn on_all_backends(yaml: &str, work: fn(&mut dyn Backend)) {
    work(&mut HostBackend::new(yaml).unwrap());
    for hook in [Hook::Xdp, Hook::Tc] {
        KernelBackend::with(yaml, &DEVICES, hook, |backend| {
            work(backend);
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn groups_tags_routes_and_platform_rules_hold_on_three_backends() {
    on_all_backends(&policy("keep", "Allow"), table);
}

#[test]
fn live_flows_stay_when_the_rules_change_unless_asked_otherwise() {
    on_all_backends(&policy("keep", "Allow"), |backend| change_of_rules(backend, "keep"));
}

#[test]
fn with_reevaluate_the_initiators_next_packet_is_judged_again() {
    on_all_backends(&policy("reevaluate", "Allow"), |backend| change_of_rules(backend, "reevaluate"));
}
