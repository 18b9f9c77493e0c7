//! Random policies, written once as Azure's YAML and once as nftables rules, and packets from the corners of their rules.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use portcullis_tests::random::Random;

use super::Packet;

/// A guest with both families.
pub struct Guest {
    pub name: &'static str,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    subnet: &'static str,
    /// Groups it meets: its subnet's and its interface's.
    groups: (usize, Option<usize>),
}

impl Guest {
    pub fn has(&self, address: IpAddr) -> bool {
        self.address(address.is_ipv6()) == address
    }

    fn address(&self, six: bool) -> IpAddr {
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
const RULES: usize = 16;
const TAGS: usize = 3;
const ASGS: usize = 3;

/// One side of a rule: any of these.
type Side = Vec<Term>;

#[derive(Clone, Debug, PartialEq)]
enum Term {
    Any,
    Prefix(IpNet),
    VirtualNetwork,
    Internet,
    Tag(usize),
    Asg(usize),
}

struct Rule {
    inbound: bool,
    allow: bool,
    /// `Tcp`, `Udp`, `Icmp` or `*`.
    protocol: &'static str,
    source: Side,
    destination: Side,
    source_ports: Vec<(u16, u16)>,
    destination_ports: Vec<(u16, u16)>,
}

/// Groups 0 and 1 stand at the subnets, 2 and 3 at interfaces.
pub struct Policy {
    groups: [Vec<Rule>; 4],
    tags: [Vec<IpNet>; TAGS],
    /// Who is in an application group, by guest and, as configurations are, by family.
    members: [Vec<(usize, bool)>; ASGS],
}

const SPACE: [&str; 2] = ["10.0.0.0/16", "fd00:1::/48"];
/// What Azure's tag Internet leaves out, beside the virtual network.
const NOT_INTERNET: &str = "0.0.0.0/8, 10.0.0.0/8, 100.64.0.0/10, 127.0.0.0/8, 169.254.0.0/16, 172.16.0.0/12, \
                            192.168.0.0/16, 224.0.0.0/4, 240.0.0.0/4, 168.63.129.16/32";
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

    pub fn rules(&self) -> usize {
        self.groups.iter().map(Vec::len).sum()
    }

    /// A packet near some rule that a guest of that rule's group sends or gets; `None` where the draw has none that the
    /// groups would be asked about.
    pub fn corner(&self, random: &mut Random) -> Option<Packet> {
        let group = random.below(self.groups.len());
        let rule = &self.groups[group][random.below(RULES)];
        let prefixes = rule.source.iter().chain(&rule.destination).filter_map(|term| match term {
            Term::Prefix(net) => Some(matches!(net, IpNet::V6(_))),
            _ => None,
        });
        let six = prefixes.last().unwrap_or_else(|| random.chance(25));
        let mine = |guest: &&Guest| guest.groups.0 == group || guest.groups.1 == Some(group);
        let mine: Vec<IpAddr> = GUESTS.iter().filter(mine).map(|guest| guest.address(six)).collect();
        let (near, far) =
            if rule.inbound { (&rule.destination, &rule.source) } else { (&rule.source, &rule.destination) };
        let fits: Vec<IpAddr> =
            mine.iter().copied().filter(|guest| near.iter().any(|term| self.holds(term, *guest))).collect();
        let near = if fits.is_empty() { &mine } else { &fits };
        let near = near[random.below(near.len())];
        let term = &far[random.below(far.len())];
        let far = self.address(random, term, six)?;
        let (source, destination) = if rule.inbound { (far, near) } else { (near, far) };
        let protocol = match rule.protocol {
            "Tcp" => 6,
            "Udp" => 17,
            "Icmp" => 1,
            _ => [6, 17, 1][random.below(3)],
        };
        let (source_port, destination_port) = if protocol == 1 {
            // The identifier: what keeps two of them apart.
            (random.next() as u16, 0)
        } else {
            (corner_port(random, &rule.source_ports), corner_port(random, &rule.destination_ports))
        };
        // DHCP is decided before the groups.
        let dhcp = |port: u16| matches!(port, 67 | 68 | 546 | 547);
        if source == destination || protocol == 17 && (dhcp(source_port) || dhcp(destination_port)) {
            return None;
        }
        let protocol = if protocol == 1 && six { 58 } else { protocol };
        Some(Packet { protocol, source, destination, source_port, destination_port })
    }

    /// Does a term hold an address? Only to draw packets that are worth it.
    fn holds(&self, term: &Term, address: IpAddr) -> bool {
        match term {
            Term::Any | Term::VirtualNetwork => true,
            Term::Internet => false,
            Term::Prefix(net) => net.contains(&address),
            Term::Tag(tag) => self.tags[*tag].iter().any(|net| net.contains(&address)),
            Term::Asg(asg) => self.members[*asg].iter().any(|(guest, _)| GUESTS[*guest].has(address)),
        }
    }

    /// An address at a corner of a term: a guest's, or one outside that packets may have.
    fn address(&self, random: &mut Random, term: &Term, six: bool) -> Option<IpAddr> {
        let any = |random: &mut Random| GUESTS[random.below(GUESTS.len())].address(six);
        let outside =
            ["198.51.100.200", "8.8.8.8", "100.63.255.255", "100.64.0.0", "172.32.0.0", "192.168.7.7"];
        let nets: Vec<IpNet> = match term {
            Term::Prefix(net) => vec![*net],
            Term::Tag(tag) => {
                self.tags[*tag].iter().copied().filter(|net| net.addr().is_ipv6() == six).collect()
            }
            Term::Asg(asg) => {
                let members: Vec<&Guest> =
                    self.members[*asg].iter().map(|(guest, _)| &GUESTS[*guest]).collect();
                let outsider = members.is_empty() || random.chance(20);
                return Some(if outsider {
                    any(random)
                } else {
                    members[random.below(members.len())].address(six)
                });
            }
            Term::VirtualNetwork => return Some(any(random)),
            Term::Any | Term::Internet => {
                let guest = six || random.chance(if *term == Term::Any { 50 } else { 10 });
                return Some(if guest {
                    any(random)
                } else {
                    random.pick(&outside).parse().expect("a literal")
                });
            }
        };
        let net = nets.get(random.below(nets.len().max(1)))?;
        let guests: Vec<IpAddr> =
            GUESTS.iter().map(|guest| guest.address(six)).filter(|guest| net.contains(guest)).collect();
        let address = if !guests.is_empty() && random.chance(60) {
            guests[random.below(guests.len())]
        } else {
            match net {
                IpNet::V4(net) => {
                    let (first, last) = (u32::from(net.network()), u32::from(net.broadcast()));
                    let inside = first + (random.next() as u32) % (last - first).max(1);
                    let corners = [first, last, inside, first - 1, last + 1];
                    Ipv4Addr::from(corners[random.below(corners.len())]).into()
                }
                // Between guests only: the world of IPv6 is not translated to.
                IpNet::V6(_) => any(random),
            }
        };
        usable(address).then_some(address)
    }

    /// As Portcullis reads it.
    pub fn yaml(&self) -> String {
        let mut yaml = format!(
            "virtualNetworks:\n  - name: v\n    addressSpace: {{ addressPrefixes: [{}, '{}'] }}\n    subnets:\n",
            SPACE[0], SPACE[1]
        );
        for (subnet, number, group) in [("a", 1, "g0"), ("b", 2, "g1")] {
            let _ = writeln!(
                yaml,
                "      - {{ name: {subnet}, addressPrefixes: [10.0.{number}.0/24, 'fd00:1:0:{number}::/64'], networkSecurityGroup: {group} }}"
            );
        }
        yaml.push_str("networkInterfaces:\n");
        for (number, guest) in GUESTS.iter().enumerate() {
            let asgs = |six: bool| {
                let member = |asg: &usize| self.members[*asg].contains(&(number, six));
                (0..ASGS).filter(member).map(|asg| format!("Asg{asg}")).collect::<Vec<_>>().join(", ")
            };
            let nic =
                guest.groups.1.map_or(String::new(), |group| format!("    networkSecurityGroup: g{group}\n"));
            let _ = write!(
                yaml,
                "  - name: {0}\n    device: {0}\n    macAddress: 02:00:00:00:00:0{number}\n{nic}    ipConfigurations:\n      \
                 - {{ name: v4, subnet: {1}, privateIPAddress: {2}, publicIPAddress: p{number}, applicationSecurityGroups: [{3}] }}\n      \
                 - {{ name: v6, subnet: {1}, privateIPAddress: '{4}', applicationSecurityGroups: [{5}] }}\n",
                guest.name,
                guest.subnet,
                guest.v4,
                asgs(false),
                guest.v6,
                asgs(true)
            );
        }
        yaml.push_str("publicIPAddresses:\n");
        for number in 0..GUESTS.len() {
            let _ = writeln!(
                yaml,
                "  - {{ name: p{number}, ipAddress: 203.0.113.{}, announce: proxy }}",
                20 + number
            );
        }
        yaml.push_str("uplinks: [{ device: up }]\napplicationSecurityGroups: [{ name: Asg0 }, { name: Asg1 }, { name: Asg2 }]\nserviceTags:\n  tags:\n");
        for (tag, nets) in self.tags.iter().enumerate() {
            let _ = writeln!(yaml, "    - {{ name: Tag{tag}, addressPrefixes: [{}] }}", quoted(nets));
        }
        yaml.push_str("networkSecurityGroups:\n");
        for (group, rules) in self.groups.iter().enumerate() {
            let _ = write!(yaml, "  - name: g{group}\n    securityRules:\n");
            for (number, rule) in rules.iter().enumerate() {
                let _ = writeln!(
                    yaml,
                    "      - {{ name: r{number}, priority: {}, direction: {}, access: {}, protocol: '{}', source{}, \
                     destination{}, sourcePortRanges: [{}], destinationPortRanges: [{}] }}",
                    100 + number * 7,
                    if rule.inbound { "Inbound" } else { "Outbound" },
                    if rule.allow { "Allow" } else { "Deny" },
                    rule.protocol,
                    azure_side(&rule.source),
                    azure_side(&rule.destination),
                    azure_ports(&rule.source_ports),
                    azure_ports(&rule.destination_ports),
                );
            }
        }
        yaml
    }

    /// The same for nftables: a chain for each group and direction, that drops or returns; they are called in Azure's
    /// order.
    pub fn ruleset(&self) -> String {
        let mut text = String::from("table inet groups {\n  counter judged { }\n  counter passed { }\n");
        let mut set = |name: &str, elements: [String; 2]| {
            for (family, kind, elements) in
                [("4", "ipv4_addr", &elements[0]), ("6", "ipv6_addr", &elements[1])]
            {
                let elements =
                    if elements.is_empty() { String::new() } else { format!("elements = {{ {elements} }};") };
                let _ = writeln!(
                    text,
                    "  set {name}{family} {{ type {kind}; flags interval; auto-merge; {elements} }}"
                );
            }
        };
        set("VirtualNetwork", [format!("{}, 168.63.129.16", SPACE[0]), SPACE[1].to_owned()]);
        set("NotInternet", [NOT_INTERNET.to_owned(), SPACE[1].to_owned()]);
        for (tag, nets) in self.tags.iter().enumerate() {
            let of = |six: bool| {
                let nets = nets.iter().filter(|net| net.addr().is_ipv6() == six).map(IpNet::to_string);
                nets.collect::<Vec<_>>().join(", ")
            };
            set(&format!("Tag{tag}_"), [of(false), of(true)]);
        }
        for (asg, members) in self.members.iter().enumerate() {
            let of = |six: bool| {
                let members = members.iter().filter(|(_, family)| *family == six);
                members
                    .map(|(guest, _)| GUESTS[*guest].address(six).to_string())
                    .collect::<Vec<_>>()
                    .join(", ")
            };
            set(&format!("Asg{asg}_"), [of(false), of(true)]);
        }
        for (group, rules) in self.groups.iter().enumerate() {
            for inbound in [true, false] {
                let _ = writeln!(text, "  chain g{group}_{} {{", way(inbound));
                rules
                    .iter()
                    .filter(|rule| rule.inbound == inbound)
                    .for_each(|rule| text.push_str(&nft_rule(rule)));
                for (ip, six) in [("ip", 4), ("ip6", 6)] {
                    let _ = writeln!(
                        text,
                        "    {ip} saddr @VirtualNetwork{six} {ip} daddr @VirtualNetwork{six} return"
                    );
                }
                text.push_str(if inbound {
                    "    ip saddr 168.63.129.16 return\n"
                } else {
                    "    ip daddr != @NotInternet4 return\n    ip6 daddr 2000::/3 ip6 daddr != @NotInternet6 return\n"
                });
                text.push_str("    drop\n  }\n");
            }
        }
        text.push_str("  chain forward {\n    type filter hook forward priority 0; policy accept;\n    counter name judged\n");
        for inbound in [false, true] {
            for guest in &GUESTS {
                for (ip, address) in [("ip", guest.address(false)), ("ip6", guest.address(true))] {
                    let (subnet, nic) = (Some(guest.groups.0), guest.groups.1);
                    let order = if inbound { [subnet, nic] } else { [nic, subnet] };
                    for group in order.into_iter().flatten() {
                        let side = if inbound { "daddr" } else { "saddr" };
                        let _ = writeln!(text, "    {ip} {side} {address} jump g{group}_{}", way(inbound));
                    }
                }
            }
        }
        text + "    counter name passed\n  }\n}\n"
    }
}

fn way(inbound: bool) -> &'static str {
    if inbound { "in" } else { "out" }
}

/// What the gateway asks its groups about: guests' addresses, and outside ones that may be on a wire.
fn usable(address: IpAddr) -> bool {
    let IpAddr::V4(v4) = address else { return GUESTS.iter().any(|guest| guest.has(address)) };
    let [a, b, c, _] = v4.octets();
    let never = matches!(a, 0 | 127 | 224..)
        || [a, b] == [10, 0]
        || [a, b] == [169, 254]
        || [a, b, c] == [203, 0, 113];
    !never || GUESTS.iter().any(|guest| guest.has(address))
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

fn corner_port(random: &mut Random, ranges: &[(u16, u16)]) -> u16 {
    let (low, high) = ranges[random.below(ranges.len())];
    let inside = low + (random.next() % (u64::from(high - low) + 1)) as u16;
    [low, low, high, high, inside, inside, low.wrapping_sub(1), high.wrapping_add(1)][random.below(8)]
}

fn quoted(nets: &[IpNet]) -> String {
    nets.iter().map(|net| format!("'{net}'")).collect::<Vec<_>>().join(", ")
}

fn azure_side(side: &Side) -> String {
    let name = |term: &Term| match term {
        Term::Any => "'*'".to_owned(),
        Term::Prefix(net) => format!("'{net}'"),
        Term::VirtualNetwork => "VirtualNetwork".to_owned(),
        Term::Internet => "Internet".to_owned(),
        Term::Tag(tag) => format!("Tag{tag}"),
        Term::Asg(asg) => format!("Asg{asg}"),
    };
    let names = side.iter().map(name).collect::<Vec<_>>().join(", ");
    match side[..] {
        [Term::Asg(_), ..] => format!("ApplicationSecurityGroups: [{names}]"),
        [_] => format!("AddressPrefix: {names}"),
        _ => format!("AddressPrefixes: [{names}]"),
    }
}

fn azure_ports(ranges: &[(u16, u16)]) -> String {
    let range = |(low, high): &(u16, u16)| match (low, high) {
        (0, 65535) => "'*'".to_owned(),
        (low, high) if low == high => low.to_string(),
        (low, high) => format!("{low}-{high}"),
    };
    ranges.iter().map(range).collect::<Vec<_>>().join(", ")
}

/// The lines of one rule: one for each pair of terms and family.
fn nft_rule(rule: &Rule) -> String {
    let mut lines = String::new();
    let ports = |side: &str, ranges: &[(u16, u16)]| match ranges {
        [(0, 65535)] => String::new(),
        ranges => {
            let ranges: Vec<String> = ranges.iter().map(|(low, high)| format!("{low}-{high}")).collect();
            format!("th {side} {{ {} }} ", ranges.join(", "))
        }
    };
    let ports = ports("sport", &rule.source_ports) + &ports("dport", &rule.destination_ports);
    let protocol = match rule.protocol {
        "Tcp" => "meta l4proto tcp ",
        "Udp" => "meta l4proto udp ",
        "Icmp" => "meta l4proto { icmp, ipv6-icmp } ",
        _ if ports.is_empty() => "",
        _ => "meta l4proto { tcp, udp } ",
    };
    let verdict = if rule.allow { "return" } else { "drop" };
    for six in [false, true] {
        let family = if six { "ipv6" } else { "ipv4" };
        for source in rule.source.iter().filter_map(|term| nft_term(term, "saddr", six)) {
            for destination in rule.destination.iter().filter_map(|term| nft_term(term, "daddr", six)) {
                let _ = writeln!(
                    lines,
                    "    meta nfproto {family} {source}{destination}{protocol}{ports}{verdict}"
                );
            }
        }
    }
    lines
}

/// A term for one family; `None` if it has no address of it.
fn nft_term(term: &Term, side: &str, six: bool) -> Option<String> {
    let (ip, number) = if six { ("ip6", 6) } else { ("ip", 4) };
    Some(match term {
        Term::Any => String::new(),
        Term::Prefix(net) if net.addr().is_ipv6() == six => format!("{ip} {side} {net} "),
        Term::Prefix(_) => return None,
        Term::VirtualNetwork => format!("{ip} {side} @VirtualNetwork{number} "),
        Term::Internet if six => format!("ip6 {side} 2000::/3 ip6 {side} != @NotInternet6 "),
        Term::Internet => format!("ip {side} != @NotInternet4 "),
        Term::Tag(tag) => format!("{ip} {side} @Tag{tag}_{number} "),
        Term::Asg(asg) => format!("{ip} {side} @Asg{asg}_{number} "),
    })
}
