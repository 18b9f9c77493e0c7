//! What is sent, and what has to become of it: written by hand from `examples/quickstart.yaml`.

use std::fmt;
use std::net::Ipv4Addr;

use serde::Serialize;

/// The address of the load balancer's frontend, which vm1 and vm2 leave under.
pub(super) const FRONTEND: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// vm3's own public address.
pub(super) const INSTANCE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 20);
/// A server on the internet.
pub(super) const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// Whoever on the internet sends first.
pub(super) const CLIENT: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 100);
pub(super) const VM1: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 4);
pub(super) const VM2: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 5);
pub(super) const VM3: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 4);

/// What a step sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Protocol {
    Tcp,
    Udp,
    Icmp,
}

impl From<Protocol> for portcullis::api::Protocol {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => Self::Tcp,
            Protocol::Udp => Self::Udp,
            Protocol::Icmp => Self::Icmp,
        }
    }
}

/// Somebody who sends or receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Party {
    Guest(&'static str),
    Internet,
}

/// One step: something is sent, and what has to become of it.
#[derive(Debug, Clone)]
pub(super) struct Step {
    /// In words.
    pub what: &'static str,
    pub from: Party,
    pub protocol: Protocol,
    /// The sender's address: its own, but for who lies.
    pub source: Ipv4Addr,
    /// The sender's port; none for ping.
    pub source_port: u16,
    pub to: (Ipv4Addr, u16),
    /// Who serves, and at which address: the same as `to` but where that is translated.
    pub server: (Party, Ipv4Addr),
    pub expect: Expect,
}

/// What has to become of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Expect {
    pub arrives: Arrives,
    pub decided: Decided,
}

/// As whom the server sees the sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrives {
    /// From the frontend, with a port this guest owns.
    WithPortOf(&'static str),
    /// From this address, with the sender's own port.
    KeepingPort(Ipv4Addr),
    /// It does not arrive.
    Not,
}

/// Who has to decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decided {
    /// `group/Direction/rule`
    Rule(&'static str),
    /// No rule was asked: the reason's label.
    Reason(&'static str),
}

impl Party {
    pub fn name(self) -> &'static str {
        match self {
            Party::Guest(name) => name,
            Party::Internet => "internet",
        }
    }

    /// The address it sends from.
    fn address(self) -> Ipv4Addr {
        match self {
            Party::Guest("vm1") => VM1,
            Party::Guest("vm2") => VM2,
            Party::Guest(_) => VM3,
            Party::Internet => CLIENT,
        }
    }
}

impl Expect {
    /// The reason the packet has to be counted under.
    pub fn reason(self) -> &'static str {
        match (self.decided, self.arrives) {
            (Decided::Reason(reason), _) => reason,
            (Decided::Rule(_), Arrives::Not) => "denied_by_rule",
            (Decided::Rule(_), _) => "new_flow",
        }
    }
}

impl Decided {
    /// The rule's or the reason's name.
    pub fn name(self) -> &'static str {
        match self {
            Decided::Rule(name) | Decided::Reason(name) => name,
        }
    }
}

impl fmt::Display for Arrives {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Arrives::WithPortOf(guest) => write!(f, "{FRONTEND}, a port of {guest}'s"),
            Arrives::KeepingPort(address) => write!(f, "{address}, the sender's port"),
            Arrives::Not => f.write_str("nothing"),
        }
    }
}

/// Every step, in order.
pub(super) fn steps() -> Vec<Step> {
    use Arrives::{KeepingPort, Not, WithPortOf};
    use Decided::{Reason, Rule};
    use Party::{Guest, Internet};
    use Protocol::{Icmp, Tcp, Udp};
    const VM1: Party = Party::Guest("vm1");
    const VM2: Party = Party::Guest("vm2");
    const VM3: Party = Party::Guest("vm3");
    let mut port = 50_000;
    let mut step = |what, from: Party, protocol, to, server, arrives, decided| {
        port += 1;
        let source_port = if protocol == Icmp { 0 } else { port };
        let expect = Expect { arrives, decided };
        Step { what, from, protocol, source: from.address(), source_port, to, server, expect }
    };
    let world = (Internet, SERVER);
    let inside = |guest: &'static str| (Guest(guest), Guest(guest).address());
    let at = |guest: Party, port| (guest.address(), port);
    let mut steps = vec![
        step(
            "a guest without a public address browses the web",
            VM1,
            Tcp,
            (SERVER, 443),
            world,
            WithPortOf("vm1"),
            Rule("web-nsg/Outbound/AllowInternetOutBound"),
        ),
        step(
            "and asks a name server",
            VM1,
            Udp,
            (SERVER, 53),
            world,
            WithPortOf("vm1"),
            Rule("web-nsg/Outbound/AllowInternetOutBound"),
        ),
        step(
            "and pings",
            VM1,
            Icmp,
            (SERVER, 0),
            world,
            WithPortOf("vm1"),
            Rule("web-nsg/Outbound/AllowInternetOutBound"),
        ),
        step(
            "web servers send no mail",
            VM1,
            Tcp,
            (SERVER, 25),
            world,
            Not,
            Rule("web-nsg/Outbound/DenySmtp"),
        ),
        step(
            "the other guest shares the address, with ports of its own",
            VM2,
            Tcp,
            (SERVER, 443),
            world,
            WithPortOf("vm2"),
            Rule("web-nsg/Outbound/AllowInternetOutBound"),
        ),
        step(
            "its interface's group denies what the subnet's allows",
            VM2,
            Udp,
            (SERVER, 5353),
            world,
            Not,
            Rule("vm2-nic-nsg/Outbound/DenyMdns"),
        ),
        step(
            "neighbours in one subnet, untranslated",
            VM1,
            Tcp,
            at(VM2, 8080),
            inside("vm2"),
            KeepingPort(VM1.address()),
            Rule("vm2-nic-nsg/Inbound/AllowVnetInBound"),
        ),
        step(
            "a web server asks the database",
            VM1,
            Tcp,
            at(VM3, 5432),
            inside("vm3"),
            KeepingPort(VM1.address()),
            Rule("db-nsg/Inbound/AllowPostgresFromWeb"),
        ),
        step(
            "but may not log in there",
            VM1,
            Tcp,
            at(VM3, 22),
            inside("vm3"),
            Not,
            Rule("db-nsg/Inbound/DenyVnet"),
        ),
        step(
            "a public address of its own: the port stays",
            VM3,
            Tcp,
            (SERVER, 443),
            world,
            KeepingPort(INSTANCE),
            Rule("db-nsg/Outbound/AllowInternetOutBound"),
        ),
        step(
            "the world reaches the web console",
            Internet,
            Tcp,
            (INSTANCE, 443),
            inside("vm3"),
            KeepingPort(CLIENT),
            Rule("db-nsg/Inbound/AllowHttps"),
        ),
        step(
            "and nothing else: a default rule",
            Internet,
            Tcp,
            (INSTANCE, 22),
            inside("vm3"),
            Not,
            Rule("db-nsg/Inbound/DenyAllInBound"),
        ),
        step(
            "nobody listens on the shared address",
            Internet,
            Tcp,
            (FRONTEND, 80),
            inside("vm1"),
            Not,
            Reason("no_listener"),
        ),
        step(
            "a guest that lies about its address",
            VM1,
            Udp,
            (SERVER, 53),
            world,
            Not,
            Reason("spoofed_source"),
        ),
    ];
    if let Some(liar) = steps.last_mut() {
        liar.source = VM2.address();
    }
    steps
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_steps_could_be_taken_for_each_other() {
        let steps = steps();
        let ports: BTreeSet<u16> = steps.iter().map(|step| step.source_port).collect();
        assert_eq!(ports.len(), steps.len(), "only ping has none");
        assert!(steps.iter().any(|step| step.source != step.from.address()), "somebody lies");
    }

    #[test]
    fn every_kind_of_outcome_is_shown() {
        let steps = steps();
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Icmp] {
            assert!(steps.iter().any(|s| s.protocol == protocol && s.expect.arrives != Arrives::Not));
        }
        let reasons: BTreeSet<&str> = steps.iter().map(|step| step.expect.reason()).collect();
        assert_eq!(reasons, BTreeSet::from(["denied_by_rule", "new_flow", "no_listener", "spoofed_source"]));
    }
}
