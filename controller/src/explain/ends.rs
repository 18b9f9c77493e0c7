//! Who sends to whom: from the words of the question to addresses and a device.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use portcullis_common::layout::DEVICE_UPLINK;

use super::Question;
use super::words::{self, Word, short};
use crate::api::{Failure, Protocol};
use crate::daemon::InForce;
use crate::daemon::shared::Guest;
use crate::flows::no_guest;

/// The sender's port when the question has none.
pub const SOME_PORT: u16 = 40_000;

/// Who sends.
#[derive(Debug, Clone)]
pub enum Sender<'a> {
    Guest(Box<Guest<'a>>),
    /// This host itself, to a guest.
    Host,
    /// Anybody else, by an uplink.
    World,
}

/// The packet that the question is about. Both addresses are of one family.
#[derive(Debug, Clone)]
pub struct Ends<'a> {
    pub from: Sender<'a>,
    pub source: IpAddr,
    /// Identifier of an echo request; 0 where the protocol has no ports.
    pub source_port: u16,
    pub destination: IpAddr,
    pub destination_port: u16,
    /// IANA number.
    pub protocol: u8,
    /// Where it comes in, or (from the host) where it leaves.
    pub ifindex: u32,
    /// The device does not exist: explained as if it did.
    pub missing_device: Option<String>,
    /// Network id the packet is seen in.
    pub network: u16,
}

/// One end while the family is not known yet.
enum Named<'a> {
    Host,
    Address(IpAddr),
    /// All configurations of that name; at least one.
    Guests(Vec<Guest<'a>>),
}

/// Finds out what the question means under the policy in force.
pub fn ends<'a>(in_force: &'a InForce, question: &Question) -> Result<Ends<'a>, Failure> {
    let (from, from_port) = words::read(&question.from)?;
    let (to, to_port) = words::read(&question.to)?;
    let (source_port, destination_port) = ports(question, from_port, to_port)?;
    let (from, to) = (named(in_force, from)?, named(in_force, to)?);
    let v6 = family(question, &from, &to)?;
    let protocol = question.protocol.number(v6);
    if v6 && matches!(protocol, 0 | 43 | 44 | 60) {
        return Err(Failure::input(format!(
            "{protocol} is an extension header of IPv6, behind which the protocol stands: ask about that"
        )));
    }
    let (from, source, given) = sender(in_force, from, v6)?;
    let finish = |from, source, destination, (ifindex, missing_device): Where, network| Ends {
        from,
        source,
        source_port,
        destination,
        destination_port,
        protocol,
        ifindex,
        missing_device,
        network,
    };
    match from {
        Sender::Guest(guest) => {
            let destination = match to {
                Named::Address(address) => address,
                Named::Host => gateway(in_force, &guest, v6)?,
                Named::Guests(guests) => {
                    let other = of_family(guests, v6)?;
                    if connected(in_force, &guest, &other) { other.address } else { public_address(&other)? }
                }
            };
            let (source, device) = (guest.address, guest_device(in_force, &guest));
            let network = guest.endpoint.network;
            Ok(finish(Sender::Guest(guest), source, destination, device, network))
        }
        Sender::Host => {
            let guest = match to {
                Named::Guests(guests) => of_family(guests, v6)?,
                Named::Address(address) => only_guest_at(in_force, address)?.ok_or_else(of_the_kernel)?,
                Named::Host => return Err(of_the_kernel()),
            };
            let source = match given {
                Some(address) => address,
                None => gateway(in_force, &guest, v6)?,
            };
            let device = guest_device(in_force, &guest);
            Ok(finish(Sender::Host, source, guest.address, device, guest.endpoint.network))
        }
        Sender::World => {
            let destination = match to {
                Named::Address(address) => address,
                Named::Guests(guests) => public_address(&of_family(guests, v6)?)?,
                Named::Host => host_address(in_force, v6)?,
            };
            Ok(finish(Sender::World, source, destination, uplink(in_force)?, 0))
        }
    }
}

fn of_the_kernel() -> Failure {
    Failure::input("what the host sends to the world is the kernel's business: ask about a guest at one end")
}

/// Source and destination port of the packet.
fn ports(question: &Question, from: Option<u16>, to: Option<u16>) -> Result<(u16, u16), Failure> {
    let protocol = question.protocol;
    let from = match (question.from_port, from) {
        (Some(one), Some(other)) if one != other => {
            return Err(Failure::input(format!("--from says port {other} and --from-port {one}")));
        }
        (one, other) => one.or(other),
    };
    match (protocol.has_ports(), to) {
        (true, Some(to)) => Ok((from.unwrap_or(SOME_PORT), to)),
        (true, None) => Err(Failure::input(format!(
            "--to needs a port, such as {}:443 (or ask about --protocol icmp)",
            short(&question.to)
        ))),
        (false, Some(_)) => {
            Err(Failure::input(format!("protocol {protocol} has no ports: leave the one of --to out")))
        }
        (false, None) if protocol.is_icmp() => Ok((from.unwrap_or(SOME_PORT), 0)),
        (false, None) if from.is_some() => {
            Err(Failure::input(format!("protocol {protocol} has no ports: leave the sender's out")))
        }
        (false, None) => Ok((0, 0)),
    }
}

fn named<'a>(in_force: &'a InForce, word: Word<'_>) -> Result<Named<'a>, Failure> {
    Ok(match word {
        Word::Host => Named::Host,
        Word::Address(address) => Named::Address(address),
        Word::Name(name) => {
            let guests: Vec<Guest<'a>> = in_force.guests().filter(|guest| guest.is_named(name)).collect();
            if guests.is_empty() {
                return Err(no_guest(in_force, &short(name)));
            }
            Named::Guests(guests)
        }
    })
}

/// Is it a packet of IPv6? What is named by address says so; between names it is IPv4 unless `--ipv6` asks for the other
/// or one of them has no IPv4 address.
fn family(question: &Question, from: &Named<'_>, to: &Named<'_>) -> Result<bool, Failure> {
    let asked = question.ipv6 || question.protocol == Protocol::Icmp6;
    let fixed = |end: &Named<'_>| match end {
        Named::Address(address) => Some(address.is_ipv6()),
        Named::Host | Named::Guests(_) => None,
    };
    match (fixed(from), fixed(to)) {
        (Some(one), Some(other)) if one != other => Err(Failure::input(
            "one end is an IPv4 address and the other one of IPv6: no packet goes between them",
        )),
        (Some(false), _) | (_, Some(false)) if asked => {
            Err(Failure::input("an IPv4 address was given, but --ipv6 or ICMPv6 asks for IPv6"))
        }
        (Some(v6), _) | (_, Some(v6)) => Ok(v6),
        (None, None) => {
            let only_v6 = |end: &Named<'_>| match end {
                Named::Guests(guests) => guests.iter().all(|guest| guest.address.is_ipv6()),
                Named::Host | Named::Address(_) => false,
            };
            Ok(asked || only_v6(from) || only_v6(to))
        }
    }
}

/// The sender, its address (unspecified for the host) and, of the host, the one that was given.
fn sender<'a>(
    in_force: &'a InForce,
    from: Named<'a>,
    v6: bool,
) -> Result<(Sender<'a>, IpAddr, Option<IpAddr>), Failure> {
    let nobody = if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    match from {
        Named::Host => Ok((Sender::Host, nobody, None)),
        Named::Guests(guests) => {
            let guest = of_family(guests, v6)?;
            let address = guest.address;
            Ok((Sender::Guest(Box::new(guest)), address, None))
        }
        Named::Address(address) => {
            if let Some(guest) = only_guest_at(in_force, address)? {
                return Ok((Sender::Guest(Box::new(guest)), address, None));
            }
            let network = &in_force.loaded.network;
            let gateway = network.subnets.iter().any(|subnet| subnet.gateways.contains(&address));
            if gateway || in_force.facts.addresses.contains(&address) {
                return Ok((Sender::Host, nobody, Some(address)));
            }
            let mut spaces = network.virtual_networks.iter().flat_map(|network| &network.address_space);
            if spaces.any(|space| space.contains(&address)) {
                return Err(Failure::input(format!(
                    "no guest has {address}, which is inside a virtual network: nobody can send from there"
                )));
            }
            Ok((Sender::World, address, None))
        }
    }
}

/// The guest that has an address, if any; an error if several do, in networks apart.
fn only_guest_at<'a>(in_force: &'a InForce, address: IpAddr) -> Result<Option<Guest<'a>>, Failure> {
    let mut guests: Vec<Guest<'a>> = in_force.guests_at(address).collect();
    if guests.len() > 1 {
        let names: Vec<&str> = guests.iter().map(|guest| guest.name).collect();
        let names = names.join(" and ");
        return Err(Failure::input(format!("{address} is the address of {names}: name the one you mean")));
    }
    Ok(guests.pop())
}

/// The first configuration of the family.
fn of_family(guests: Vec<Guest<'_>>, v6: bool) -> Result<Guest<'_>, Failure> {
    let name = guests.first().map_or("the guest", |guest| guest.interface).to_owned();
    guests.into_iter().find(|guest| guest.address.is_ipv6() == v6).ok_or_else(|| {
        let (has_not, other) = if v6 { ("IPv6", "IPv4") } else { ("IPv4", "IPv6") };
        Failure::input(format!("{name} has no {has_not} address: ask about {other}"))
    })
}

/// Are they in one virtual network, or in two that are peered?
fn connected(in_force: &InForce, one: &Guest<'_>, other: &Guest<'_>) -> bool {
    let network = &in_force.loaded.network;
    let of = |guest: &Guest<'_>| {
        let subnet = network.interfaces[guest.place.0].addresses[guest.place.1].subnet;
        network.subnets[subnet].network
    };
    let (one, other) = (of(one), of(other));
    one == other || network.virtual_networks[one].peers.contains(&other)
}

/// A device's index, and its name if it does not exist.
type Where = (u32, Option<String>);

/// Stands for a device that does not exist; real indices are this large on no machine that lives long enough.
const NO_DEVICE: u32 = i32::MAX as u32;

fn guest_device(in_force: &InForce, guest: &Guest<'_>) -> Where {
    match in_force.compiled.guest_hops.get(guest.number).map(|hop| hop.ifindex) {
        Some(ifindex) if ifindex != 0 => (ifindex, None),
        _ => (NO_DEVICE, Some(guest.device.to_owned())),
    }
}

fn uplink(in_force: &InForce) -> Result<Where, Failure> {
    let uplink = in_force.compiled.devices.iter().find(|device| device.kind == DEVICE_UPLINK);
    uplink
        .map(|device| (device.ifindex, None))
        .ok_or_else(|| Failure::input("the policy in force has no uplink: nothing comes from the world"))
}

fn gateway(in_force: &InForce, guest: &Guest<'_>, v6: bool) -> Result<IpAddr, Failure> {
    let network = &in_force.loaded.network;
    let subnet = network.interfaces[guest.place.0].addresses[guest.place.1].subnet;
    let gateway = network.subnets[subnet].gateways.iter().find(|gateway| gateway.is_ipv6() == v6);
    gateway
        .copied()
        .ok_or_else(|| Failure::input(format!("the subnet of {} has no gateway address", guest.name)))
}

fn host_address(in_force: &InForce, v6: bool) -> Result<IpAddr, Failure> {
    let network = &in_force.loaded.network;
    let gateway = |address: &IpAddr| network.subnets.iter().any(|subnet| subnet.gateways.contains(address));
    let mut known = in_force.facts.addresses.iter().filter(|address| address.is_ipv6() == v6);
    known
        .find(|address| !address.is_loopback() && !gateway(address))
        .copied()
        .ok_or_else(|| Failure::input("this host has no such address: name the one that is asked"))
}

/// What somebody outside of its network sends to.
fn public_address(guest: &Guest<'_>) -> Result<IpAddr, Failure> {
    match (guest.endpoint.instance, guest.address) {
        (0, _) => Err(Failure::input(format!(
            "{} has no public address of its own, so nobody outside its virtual network can send to it; give the \
             public address that is asked instead",
            guest.name
        ))),
        (_, IpAddr::V4(_)) => Ok(crate::flows::address(guest.endpoint.instance_address[0]).into()),
        (_, IpAddr::V6(_)) => Ok(crate::datapath::address6(guest.endpoint.instance_address).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(protocol: &str) -> Question {
        Question { to: "vm1".into(), protocol: protocol.parse().unwrap(), ..Question::default() }
    }

    #[test]
    fn only_tcp_and_udp_have_ports_and_an_echo_has_an_identifier() {
        assert_eq!(ports(&asked("tcp"), None, Some(443)).unwrap(), (SOME_PORT, 443));
        assert_eq!(ports(&asked("udp"), Some(5), Some(53)).unwrap(), (5, 53));
        assert_eq!(ports(&asked("icmp"), None, None).unwrap(), (SOME_PORT, 0));
        assert_eq!(ports(&asked("esp"), None, None).unwrap(), (0, 0));
        for (protocol, from, to, said) in [
            ("tcp", None, None, "needs a port"),
            ("icmp6", None, Some(1), "has no ports"),
            ("132", None, Some(1), "has no ports"),
            ("ah", Some(1), None, "leave the sender's out"),
        ] {
            let error = ports(&asked(protocol), from, to).unwrap_err();
            assert!(error.message.contains(said), "{protocol}: {}", error.message);
        }
        let twice = Question { from_port: Some(1), ..asked("tcp") };
        assert!(ports(&twice, Some(2), Some(80)).unwrap_err().message.contains("--from-port 1"));
    }

    #[test]
    fn the_family_is_that_of_an_address_that_was_given_and_never_both() {
        let four = || Named::Address("1.1.1.1".parse().unwrap());
        let six = || Named::Address("2001:db8::1".parse().unwrap());
        let ask = asked("tcp");
        assert!(!family(&ask, &Named::Host, &four()).unwrap());
        assert!(family(&ask, &six(), &Named::Host).unwrap());
        assert!(family(&ask, &six(), &four()).unwrap_err().message.contains("no packet"));
        let forced = Question { ipv6: true, ..asked("tcp") };
        assert!(family(&forced, &Named::Host, &Named::Host).unwrap());
        assert!(family(&forced, &Named::Host, &four()).unwrap_err().message.contains("--ipv6"));
        assert!(family(&asked("icmp6"), &Named::Host, &Named::Host).unwrap());
    }
}
