//! Packets from the corners of a policy's rules.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use portcullis_tests::random::Random;

use super::Packet;
use super::policy::{GUESTS, Guest, Policy, RULES, Term};

impl Policy {
    /// A packet near some rule that a guest of that rule's group sends or gets; `None` where the draw has none that the
    /// groups would be asked about.
    pub fn corner(&self, random: &mut Random) -> Option<Packet> {
        let group = random.below(self.groups.len());
        let rule = &self.groups[group][random.below(RULES)];
        let mut prefixes = rule.source.iter().chain(&rule.destination).filter_map(|term| match term {
            Term::Prefix(net) => Some(matches!(net, IpNet::V6(_))),
            _ => None,
        });
        let six = prefixes.next().unwrap_or_else(|| random.chance(25));
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

fn corner_port(random: &mut Random, ranges: &[(u16, u16)]) -> u16 {
    let (low, high) = ranges[random.below(ranges.len())];
    let inside = low + (random.next() % (u64::from(high - low) + 1)) as u16;
    [low, low, high, high, inside, inside, low.wrapping_sub(1), high.wrapping_add(1)][random.below(8)]
}
