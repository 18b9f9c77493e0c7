//! Random policies of four guests: groups at both levels, tags, application groups and port ranges.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use portcullis_tests::random::Random;

/// A guest with both families.
pub struct Guest {
    pub name: &'static str,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    pub subnet: &'static str,
    /// Groups it meets: its subnet's and its interface's.
    pub groups: (usize, Option<usize>),
}

impl Guest {
    pub fn has(&self, address: IpAddr) -> bool {
        self.address(address.is_ipv6()) == address
    }

    pub fn address(&self, six: bool) -> IpAddr {
        if six { self.v6.into() } else { self.v4.into() }
    }
}

const fn guest(name: &'static str, subnet: u8, last: u8, nic: Option<usize>) -> Guest {
    Guest {
        name,
        v4: Ipv4Addr::new(10, 0, subnet, last),
        v6: Ipv6Addr::new(0xfd00, 1, 0, subnet as u16, 0, 0, 0, last as u16),
        subnet: if subnet == 1 { "a" } else { "b" },
        groups: (subnet as usize - 1, nic),
    }
}

pub const GUESTS: [Guest; 4] = [
    guest("vm1", 1, 4, Some(2)),
    guest("vm2", 1, 5, None),
    guest("vm3", 2, 4, Some(3)),
    guest("vm4", 2, 132, None),
];

/// Rules of a group.
pub const RULES: usize = 16;
const TAGS: usize = 3;
pub const ASGS: usize = 3;

/// One side of a rule: any of these.
pub type Side = Vec<Term>;

#[derive(Clone, Debug, PartialEq)]
pub enum Term {
    Any,
    Prefix(IpNet),
    VirtualNetwork,
    Internet,
    Tag(usize),
    Asg(usize),
}

pub struct Rule {
    pub inbound: bool,
    pub allow: bool,
    /// `Tcp`, `Udp`, `Icmp` or `*`.
    pub protocol: &'static str,
    pub source: Side,
    pub destination: Side,
    pub source_ports: Vec<(u16, u16)>,
    pub destination_ports: Vec<(u16, u16)>,
}

/// Groups 0 and 1 stand at the subnets, 2 and 3 at interfaces.
pub struct Policy {
    pub groups: [Vec<Rule>; 4],
    pub tags: [Vec<IpNet>; TAGS],
    /// Who is in an application group, by guest and, as configurations are, by family.
    pub members: [Vec<(usize, bool)>; ASGS],
}

pub const SPACE: [&str; 2] = ["10.0.0.0/16", "fd00:1::/48"];
/// Prefixes that tags and rules are made of. Those of the inside are as good for tags as any.
const PREFIXES4: [&str; 16] = [
    "10.0.1.4/32",
    "10.0.1.4/31",
    "10.0.1.0/24",
    "10.0.2.0/25",
    "10.0.2.128/25",
    "10.0.2.4/32",
    "10.0.0.0/16",
    "198.51.100.7/32",
    "198.51.100.0/25",
    "198.51.100.128/25",
    "192.0.2.0/24",
    "192.0.2.1/32",
    "8.0.0.0/7",
    "100.0.0.0/10",
    "172.16.0.0/12",
    "1.2.3.0/28",
];
const PREFIXES6: [&str; 7] = [
    "fd00:1:0:1::4/128",
    "fd00:1:0:1::4/127",
    "fd00:1:0:1::/64",
    "fd00:1:0:2::/64",
    "fd00:1:0:2::80/121",
    "fd00:1:0:2::4/128",
    "2001:db8::/32",
];

fn net(text: &str) -> IpNet {
    text.parse().expect("a literal")
}

fn prefix(random: &mut Random, six: bool) -> IpNet {
    net(if six { random.pick(&PREFIXES6) } else { random.pick(&PREFIXES4) })
}

impl Policy {
    pub fn random(random: &mut Random) -> Self {
        let tags = std::array::from_fn(|_| {
            let mut tag: Vec<IpNet> = (0..2 + random.below(3)).map(|_| prefix(random, false)).collect();
            tag.extend((0..1 + random.below(2)).map(|_| prefix(random, true)));
            tag.sort();
            tag.dedup();
            tag
        });
        let members = std::array::from_fn(|_| {
            let all = (0..GUESTS.len()).flat_map(|guest| [(guest, false), (guest, true)]);
            all.filter(|_| random.chance(40)).collect()
        });
        let groups = std::array::from_fn(|group| {
            let mut rules: Vec<(usize, Rule)> = (0..RULES).map(|_| rule(random, group)).collect();
            // Narrow rules first, mostly, or the wide ones leave them nothing.
            rules.sort_by_key(|(width, _)| *width);
            rules.into_iter().map(|(_, rule)| rule).collect()
        });
        Self { groups, tags, members }
    }

    pub fn rules(&self) -> impl Iterator<Item = &Rule> {
        self.groups.iter().flatten()
    }

    /// The rule of a key as the registry has it, `g1/Inbound/securityRules/r7`; `None` for default rules.
    pub fn rule(&self, key: &str) -> Option<&Rule> {
        let (group, rest) = key.strip_prefix('g')?.split_once('/')?;
        let number = rest.split_once("/securityRules/r")?.1;
        self.groups.get(group.parse::<usize>().ok()?)?.get(number.parse::<usize>().ok()?)
    }
}

impl Rule {
    /// What a policy has to have rules with.
    pub const KINDS: [&str; 5] =
        ["VirtualNetwork", "Internet", "a custom tag", "an application group", "a port range"];

    /// Which of them this rule has.
    pub fn kinds(&self) -> [bool; 5] {
        let has = |wanted: fn(&Term) -> bool| self.source.iter().chain(&self.destination).any(wanted);
        let range = |(low, high): &(u16, u16)| low < high && (*low, *high) != (0, 65535);
        [
            has(|term| *term == Term::VirtualNetwork),
            has(|term| *term == Term::Internet),
            has(|term| matches!(term, Term::Tag(_))),
            has(|term| matches!(term, Term::Asg(_))),
            self.source_ports.iter().chain(&self.destination_ports).any(range),
        ]
    }
}

/// A rule and how wide it is, about.
fn rule(random: &mut Random, group: usize) -> (usize, Rule) {
    let inbound = random.chance(50);
    let six = random.chance(20);
    let mut width = random.below(4);
    let guests = |random: &mut Random| -> Side {
        let subnet = 1 + group % 2;
        let own = GUESTS
            .iter()
            .find(|guest| guest.groups.0 == group || guest.groups.1 == Some(group))
            .expect("a guest");
        match random.below(6) {
            0 => vec![Term::Asg(random.below(ASGS))],
            1 => vec![Term::Prefix(IpNet::from(own.address(six)))],
            2 if six => vec![Term::Prefix(net(&format!("fd00:1:0:{subnet}::/64")))],
            2 => vec![Term::Prefix(net(&format!("10.0.{subnet}.0/24")))],
            3 => vec![Term::VirtualNetwork],
            _ => vec![Term::Any],
        }
    };
    let near = guests(random);
    let far = match random.below(12) {
        0 | 1 => vec![Term::Asg(0), Term::Asg(1 + random.below(ASGS - 1))].split_off(random.below(2)),
        2..=4 => vec![Term::Tag(random.below(TAGS))],
        5 => vec![Term::Internet],
        6 => vec![Term::VirtualNetwork],
        7 => vec![Term::Any],
        8 => vec![Term::Prefix(prefix(random, six)), Term::Tag(random.below(TAGS))],
        _ => {
            let mut nets: Vec<IpNet> = (0..1 + random.below(3)).map(|_| prefix(random, six)).collect();
            nets.sort();
            nets.dedup();
            nets.into_iter().map(Term::Prefix).collect()
        }
    };
    let wide = |side: &Side| match side[0] {
        Term::Any | Term::Internet | Term::VirtualNetwork => 4,
        Term::Tag(_) => 2,
        _ => 0,
    };
    width += wide(&near) + wide(&far);
    let protocol = random.pick(&["Tcp", "Tcp", "Udp", "Udp", "Icmp", "*"]);
    let any = vec![(0, 65535)];
    let (source_ports, destination_ports) = if protocol == "Icmp" {
        (any.clone(), any)
    } else {
        (if random.chance(75) { any } else { ports(random) }, ports(random))
    };
    width += destination_ports.iter().filter(|(low, high)| high - low > 10_000).count() * 3;
    let (source, destination) = if inbound { (far, near) } else { (near, far) };
    let allow = random.chance(55);
    (width, Rule { inbound, allow, protocol, source, destination, source_ports, destination_ports })
}

/// Ranges that do not touch. None but "all" has port 0, which to groups is the port of protocols without any.
fn ports(random: &mut Random) -> Vec<(u16, u16)> {
    if random.chance(15) {
        return vec![(0, 65535)];
    }
    let mut bounds: Vec<u16> = (0..2 * (1 + random.below(3)))
        .map(|_| {
            if random.chance(30) {
                [21, 79, 442, 1433, 5432, 65534][random.below(6)]
            } else {
                1 + (random.next() % 65_000) as u16
            }
        })
        .collect();
    bounds.sort_unstable();
    bounds.dedup();
    let pairs = bounds.chunks_exact(2).map(|pair| (pair[0], pair[1].saturating_sub(1).max(pair[0])));
    let ranges: Vec<(u16, u16)> = pairs.collect();
    if ranges.is_empty() { vec![(80, 80)] } else { ranges }
}
