//! Flows, ports and verdicts.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use super::packet::{Body, Device, Packet};
use super::tcp::{CHECKED, Connection, Timer, impossible, opens};

/// What must become of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    Drop,
    /// Left to the kernel, untouched.
    Pass,
    /// Dropped, or left to the kernel untouched.
    Ignored,
    /// Not forwarded; whoever sent it may be told why.
    Refused,
    Send(Device, Packet),
    /// What the product did with it breaks a rule.
    Wrong(String),
}

/// What the product chose, where the choice is its own.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// Port or identifier under which the packet left for the world, if it did.
    pub port: Option<u16>,
}

/// One end of a flow: where it is, what it calls itself, and what the other end calls it.
#[derive(Clone, Copy, Debug)]
pub(super) struct End {
    pub device: Device,
    pub own: (IpAddr, u16),
    pub shown: (IpAddr, u16),
}

/// A flow. It has certainly not ended up to `earliest`, and certainly has after `latest` (ticks).
#[derive(Clone, Debug)]
pub(super) struct Flow {
    pub protocol: u8,
    pub ends: [End; 2],
    pub tcp: Option<Connection>,
    earliest: u32,
    pub latest: u32,
}

/// The port that an inside socket has, whatever it sends to (RFC 4787 REQ-1).
#[derive(Clone, Copy, Debug)]
struct Mapping {
    port: u16,
    /// It may still be there up to then.
    latest: u32,
}

/// Of timers, in seconds: `timeouts` of `docs/policy.md`.
const HALF_OPEN: u32 = 30;
const ESTABLISHED: u32 = 240;
const RESET: u32 = 15;
const UDP: u32 = 240;
const ICMP: u32 = 60;
/// The longest of the timers, the transitory one of RFC 7857 §2.1 among them.
const LONGEST: u32 = 240;

/// Ticks are 2^26 ns.
fn ticks(seconds: u32) -> u32 {
    ((u64::from(seconds) * 1_000_000_000) >> 26) as u32
}

/// The ports of vm1 at the frontends, by protocol (TCP or UDP; ping takes those of TCP) and whether of IPv6.
pub type Owned = BTreeMap<(u8, bool), BTreeSet<u16>>;

/// The gateway of [`super::POLICY`].
pub struct Gateway {
    pub now: u32,
    owned: Owned,
    pub(super) flows: Vec<Flow>,
    mappings: HashMap<(u8, IpAddr, u16), Mapping>,
    /// Fragments whose first one was accepted, with where the next one has to begin.
    fragments: HashMap<(Device, IpAddr, IpAddr, u8, u16), usize>,
}

impl Gateway {
    /// Without flows.
    pub fn new(now: u32, owned: Owned) -> Self {
        Gateway { now, owned, flows: Vec::new(), mappings: HashMap::new(), fragments: HashMap::new() }
    }

    /// Can anybody say at this time which flows live? Also keeps away from the moments at which slots are taken over.
    pub fn settled_at(&self, now: u32) -> bool {
        self.flows.iter().all(|flow| now + 20 < flow.earliest || now > flow.latest + 20)
    }

    /// The clock moves on.
    pub fn set_now(&mut self, now: u32) {
        self.now = now;
        self.fragments.clear();
    }

    /// Says what has to become of a packet that arrives, and changes the state accordingly.
    pub fn judge(&mut self, device: Device, packet: &Packet, seen: Seen) -> Expect {
        let v6 = packet.v6();
        let spoofed = match device {
            Device::World => inside(packet.source) || ours(packet.source).is_some(),
            guest => packet.source != address(guest, v6),
        };
        if spoofed {
            return Expect::Drop;
        }
        if let Body::Error { quote, behind, .. } = &packet.body {
            return self.error(device, packet, quote, *behind);
        }
        let fragment = packet
            .piece
            .map(|piece| (piece, (device, packet.source, packet.destination, packet.protocol(), piece.id)));
        if let Some((piece, key)) = fragment
            && piece.start != 0
        {
            if self.fragments.get(&key) != Some(&piece.start) {
                return Expect::Drop;
            }
            match piece.end {
                Some(end) => self.fragments.insert(key, end),
                None => self.fragments.remove(&key),
            };
            let Some((number, end)) = self.find(device, packet) else { return Expect::Drop };
            return self.translated(number, end, packet);
        }
        if let Body::Tcp { flags, .. } = packet.body
            && impossible(flags)
        {
            return if CHECKED || device != Device::World { Expect::Drop } else { Expect::Ignored };
        }
        if packet.ttl <= 1 {
            return Expect::Refused;
        }
        let expected = match self.find(device, packet) {
            Some((number, end)) => {
                self.advance(number, end, packet);
                self.translated(number, end, packet)
            }
            None => self.open(device, packet, seen),
        };
        if let (Expect::Send(..), Some((piece, key))) = (&expected, fragment)
            && let Some(end) = piece.end
        {
            self.fragments.insert(key, end);
        }
        expected
    }

    /// The living flow that a packet belongs to, and the end that sent it.
    fn find(&self, device: Device, packet: &Packet) -> Option<(usize, usize)> {
        let (from, to) = packet.ports();
        let (from, to) = ((packet.source, from), (packet.destination, to));
        let protocol = packet.protocol();
        let echo = matches!(packet.body, Body::Echo { .. });
        for (number, flow) in self.flows.iter().enumerate() {
            if flow.protocol != protocol || self.now > flow.latest {
                continue;
            }
            for end in 0..2 {
                let (sender, receiver) = (&flow.ends[end], &flow.ends[1 - end]);
                let same = if echo {
                    // The identifier is the asker's.
                    let id = if end == 0 { sender.own.1 == from.1 } else { receiver.shown.1 == from.1 };
                    id && sender.own.0 == from.0 && receiver.shown.0 == to.0
                } else {
                    sender.own == from && receiver.shown == to
                };
                if same && sender.device == device {
                    return Some((number, end));
                }
            }
        }
        None
    }

    /// The packet as the other end of its flow gets it.
    fn translated(&self, number: usize, end: usize, packet: &Packet) -> Expect {
        let flow = &self.flows[number];
        let (sender, receiver) = (&flow.ends[end], &flow.ends[1 - end]);
        let id = if end == 0 { sender.shown.1 } else { receiver.own.1 };
        let mut sent = packet.readdressed(sender.shown, receiver.own, id);
        sent.ttl -= 1;
        Expect::Send(receiver.device, sent)
    }

    fn advance(&mut self, number: usize, end: usize, packet: &Packet) {
        let now = self.now;
        let flow = &mut self.flows[number];
        let (earliest, latest) = match (&mut flow.tcp, &packet.body) {
            (Some(tcp), Body::Tcp { flags, sequence, acknowledgment, .. }) => {
                let exactly = |seconds| (now + ticks(seconds), now + ticks(seconds));
                match tcp.segment(end, *flags, *sequence, *acknowledgment) {
                    Timer::Keep => (flow.earliest, flow.latest),
                    Timer::Established => exactly(ESTABLISHED),
                    Timer::Later => (flow.earliest, now + ticks(ESTABLISHED)),
                    Timer::Reset => exactly(RESET),
                    Timer::Doubted => (flow.earliest, (now + ticks(LONGEST)).max(flow.latest)),
                    Timer::Any => {
                        (flow.earliest.min(now + ticks(RESET)), (now + ticks(LONGEST)).max(flow.latest))
                    }
                }
            }
            _ => {
                let end = now + ticks(if flow.protocol == 17 { UDP } else { ICMP });
                (end, end)
            }
        };
        (flow.earliest, flow.latest) = (earliest, latest);
        let inside = self.flows[number].ends[0].own;
        let protocol = self.flows[number].protocol;
        if let Some(mapping) = self.mappings.get_mut(&(protocol, inside.0, inside.1)) {
            mapping.latest = latest + ticks(LONGEST);
        }
    }

    /// A packet without a flow: may it open one, and as what?
    fn open(&mut self, device: Device, packet: &Packet, seen: Seen) -> Expect {
        let tcp = match packet.body {
            Body::Tcp { flags, sequence, .. } if opens(flags) => Some(Connection::new(sequence)),
            Body::Tcp { .. } => return Expect::Drop,
            Body::Echo { reply: true, .. } => return Expect::Drop,
            _ => None,
        };
        let (protocol, v6) = (packet.protocol(), packet.v6());
        let (from, to) = packet.ports();
        let (from, to) = ((packet.source, from), (packet.destination, to));
        let plain = |device, end| End { device, own: end, shown: end };
        let ends = match device {
            Device::World => {
                let receiver = match ours(to.0) {
                    None => return Expect::Pass,
                    Some(Device::Vm3) if matches!((protocol, to.1), (17, 53) | (6, 80) | (1 | 58, _)) => {
                        End { device: Device::Vm3, own: (address(Device::Vm3, v6), to.1), shown: to }
                    }
                    Some(Device::Vm1) if matches!((protocol, to.1), (17 | 6, 80)) => {
                        End { device: Device::Vm1, own: (address(Device::Vm1, v6), 8080), shown: to }
                    }
                    // No rule and no listener.
                    Some(_) => return Expect::Drop,
                };
                [plain(device, from), receiver]
            }
            guest if inside(to.0) => match guest_at(to.0) {
                Some(other) if other != guest => [plain(guest, from), plain(other, to)],
                _ => return Expect::Drop,
            },
            Device::Vm1 => match self.claim(packet, seen) {
                Ok(port) => {
                    let shown = (frontend(v6), port);
                    [End { device, own: from, shown }, plain(Device::World, to)]
                }
                Err(otherwise) => return otherwise,
            },
            Device::Vm2 => return Expect::Drop,
            Device::Vm3 => {
                let shown = (own_address(v6), from.1);
                [End { device, own: from, shown }, plain(Device::World, to)]
            }
        };
        // Two flows would look the same to the guest that receives this one (deviations: "contended").
        let receiver = ends[1];
        let clashes = |flow: &Flow| {
            flow.protocol == protocol
                && self.now <= flow.latest
                && flow.ends.iter().any(|end| end.device == receiver.device && end.own == receiver.own)
                && flow.ends.iter().any(|end| end.shown == ends[0].shown || end.own == ends[0].shown)
        };
        if !matches!(packet.body, Body::Echo { .. })
            && device == Device::World
            && self.flows.iter().any(clashes)
        {
            return Expect::Drop;
        }
        let seconds = match protocol {
            6 => HALF_OPEN,
            17 => UDP,
            _ => ICMP,
        };
        let end = self.now + ticks(seconds);
        self.flows.push(Flow { protocol, ends, tcp, earliest: end, latest: end });
        let number = self.flows.len() - 1;
        self.translated(number, 0, packet)
    }

    /// The port that vm1 leaves under: what was seen, if that was free, or nothing if none was.
    fn claim(&mut self, packet: &Packet, seen: Seen) -> Result<u16, Expect> {
        let (protocol, now) = (packet.protocol(), self.now);
        let inside = (packet.source, packet.ports().0);
        let owned = &self.owned[&(if protocol == 17 { 17 } else { 6 }, packet.v6())];
        let living = |flow: &&Flow| {
            flow.protocol == protocol && now <= flow.latest && flow.ends[0].shown.0 == frontend(packet.v6())
        };
        let living = || self.flows.iter().filter(living);
        if protocol == 6 {
            let to = (packet.destination, packet.ports().1);
            let taken: BTreeSet<u16> =
                living().filter(|flow| flow.ends[1].own == to).map(|flow| flow.ends[0].shown.1).collect();
            let free = owned.difference(&taken).count();
            return match seen.port {
                Some(port) if owned.contains(&port) && !taken.contains(&port) => Ok(port),
                Some(port) => {
                    Err(Expect::Wrong(format!("port {port} is not free towards {to:?}: {taken:?}")))
                }
                None if free == 0 => Err(Expect::Drop),
                None => {
                    Err(Expect::Wrong(format!("{free} ports are free towards {to:?}, and none was taken")))
                }
            };
        }
        let mine = living().find(|flow| flow.ends[0].own == inside).map(|flow| flow.ends[0].shown.1);
        let others: BTreeSet<u16> =
            living().filter(|flow| flow.ends[0].own != inside).map(|flow| flow.ends[0].shown.1).collect();
        // A socket may keep its port for a while after its last flow.
        let perhaps = self
            .mappings
            .iter()
            .filter(|((of, address, port), mapping)| {
                *of == protocol
                    && address.is_ipv6() == packet.v6()
                    && (*address, *port) != inside
                    && now <= mapping.latest
            })
            .map(|(_, mapping)| mapping.port)
            .collect::<BTreeSet<u16>>();
        let port = match (seen.port, mine) {
            (Some(port), Some(mine)) if port != mine => {
                let text = format!("the socket {inside:?} has port {mine} and now got {port}");
                return Err(Expect::Wrong(text));
            }
            (Some(port), _) if owned.contains(&port) && !others.contains(&port) => port,
            (Some(port), _) => {
                return Err(Expect::Wrong(format!("port {port} is not free: {others:?}")));
            }
            (None, None) if owned.iter().all(|port| others.contains(port) || perhaps.contains(port)) => {
                return Err(Expect::Drop);
            }
            // The port it had may just have been given up: for a fifth of a second it is neither its own nor anybody's.
            (None, None)
                if self.mappings.get(&(protocol, inside.0, inside.1)).is_some_and(|m| now <= m.latest) =>
            {
                return Err(Expect::Drop);
            }
            (None, _) => {
                let text = format!("of {:?} only {others:?} are taken, {inside:?} has {mine:?}", owned);
                return Err(Expect::Wrong(text));
            }
        };
        let latest = now + 2 * ticks(LONGEST);
        self.mappings.insert((protocol, inside.0, inside.1), Mapping { port, latest });
        Ok(port)
    }

    /// An error belongs to the flow that it quotes, and changes nothing (RFC 5508 REQ-4 to REQ-6).
    fn error(&self, device: Device, packet: &Packet, quote: &Packet, behind: Option<usize>) -> Expect {
        if behind.is_some_and(|behind| behind < 8) {
            return Expect::Drop;
        }
        // The quote is what the receiving end of the flow was sent, so its answer has the same ends the other way around.
        let (from, to) = quote.ports();
        let (from, to) = ((quote.source, from), (quote.destination, to));
        let echo = matches!(quote.body, Body::Echo { .. });
        let found =
            self.flows.iter().filter(|flow| flow.protocol == quote.protocol() && self.now <= flow.latest);
        for flow in found {
            for end in 0..2 {
                let (sender, receiver) = (&flow.ends[end], &flow.ends[1 - end]);
                let same = if echo {
                    end == 0 && sender.shown.1 == from.1 && sender.shown.0 == from.0 && receiver.own.0 == to.0
                } else {
                    sender.shown == from && receiver.own == to
                };
                if !same || receiver.device != device {
                    continue;
                }
                let mut sent = packet.clone();
                sent.ttl -= 1;
                sent.destination = sender.own.0;
                if sent.source == receiver.own.0 {
                    sent.source = receiver.shown.0;
                }
                if let Body::Error { quote, .. } = &mut sent.body {
                    **quote = quote.readdressed(sender.own, receiver.shown, sender.own.1);
                }
                return Expect::Send(sender.device, sent);
            }
        }
        if device == Device::World && ours(packet.destination).is_none() {
            Expect::Pass
        } else {
            Expect::Drop
        }
    }
}

/// A guest's private address.
pub(super) fn address(guest: Device, v6: bool) -> IpAddr {
    let text = match (guest, v6) {
        (Device::Vm1, false) => "10.0.1.4",
        (Device::Vm1, true) => "fd00:1:0:1::4",
        (Device::Vm2, false) => "10.0.1.5",
        (Device::Vm2, true) => "fd00:1:0:1::5",
        (Device::Vm3, false) => "10.0.2.4",
        (Device::Vm3, true) => "fd00:1:0:2::4",
        (Device::World, false) => "198.51.100.7",
        (Device::World, true) => "2001:db8:7::7",
    };
    text.parse().expect("a literal")
}

/// The load balancer's public address.
pub(super) fn frontend(v6: bool) -> IpAddr {
    if v6 { "2001:db8:ffff::10" } else { "203.0.113.10" }.parse().expect("a literal")
}

/// The public address of vm3.
pub(super) fn own_address(v6: bool) -> IpAddr {
    if v6 { "2001:db8:ffff::20" } else { "203.0.113.20" }.parse().expect("a literal")
}

fn ours(address: IpAddr) -> Option<Device> {
    let v6 = address.is_ipv6();
    if address == frontend(v6) {
        return Some(Device::Vm1);
    }
    (address == own_address(v6)).then_some(Device::Vm3)
}

fn guest_at(of: IpAddr) -> Option<Device> {
    [Device::Vm1, Device::Vm2, Device::Vm3].into_iter().find(|guest| address(*guest, of.is_ipv6()) == of)
}

/// In the virtual network?
fn inside(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.octets()[..2] == [10, 0],
        IpAddr::V6(address) => address.segments()[..3] == [0xfd00, 1, 0],
    }
}
