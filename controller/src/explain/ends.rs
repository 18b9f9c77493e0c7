//! Who sends to whom: from the words of the question to addresses and a device.

use std::net::{IpAddr, Ipv4Addr};

use portcullis_common::layout::DEVICE_UPLINK;

use super::Question;
use crate::api::{Failure, Protocol};
use crate::daemon::InForce;
use crate::daemon::shared::Guest;
use crate::flows::no_guest;

/// The sender's port when the question has none.
pub const SOME_PORT: u16 = 40_000;

/// One end of the packet.
#[derive(Debug, Clone)]
pub enum End<'a> {
    Guest(Guest<'a>),
    /// This host itself.
    Host,
    /// Anybody else, by address.
    Address(Ipv4Addr),
}

/// The packet that the question is about.
#[derive(Debug, Clone)]
pub struct Ends<'a> {
    pub from: End<'a>,
    pub source: Ipv4Addr,
    pub source_port: u16,
    pub destination: Ipv4Addr,
    pub destination_port: u16,
    /// Where it comes in, or (from the host) where it leaves.
    pub ifindex: u32,
    /// The device does not exist: explained as if it did.
    pub missing_device: Option<String>,
    /// Network id the packet is seen in.
    pub network: u16,
}

/// Finds out what the question means under the policy in force.
pub fn ends<'a>(in_force: &'a InForce, question: &Question) -> Result<Ends<'a>, Failure> {
    let (to_text, to_port) = split_port(&question.to)?;
    let from = end(in_force, &question.from, None)?;
    let network = match &from {
        End::Guest(guest) => Some(guest.endpoint.network),
        _ => None,
    };
    let to = end(in_force, to_text, network)?;
    let destination_port = match (question.protocol, to_port) {
        (Protocol::Icmp, Some(_)) => {
            return Err(Failure::input("ICMP has no ports: leave the one of --to out"));
        }
        (Protocol::Icmp, None) => 0,
        (_, Some(port)) => port,
        (_, None) => {
            return Err(Failure::input(format!(
                "--to needs a port, such as {to_text}:443 (or ask about --protocol icmp)"
            )));
        }
    };
    let source_port = question.from_port.unwrap_or(SOME_PORT);
    let finish = |source, destination, device: Where, network| Ends {
        from: from.clone(),
        source,
        source_port,
        destination,
        destination_port,
        ifindex: device.0,
        missing_device: device.1,
        network,
    };
    match (&from, &to) {
        (End::Guest(guest), to) => {
            let destination = match to {
                End::Guest(other) if other.endpoint.network == guest.endpoint.network => {
                    private_address(other)?
                }
                End::Guest(other) => public_address(other)?,
                End::Host => gateway(in_force, guest)?,
                End::Address(address) => *address,
            };
            Ok(finish(
                private_address(guest)?,
                destination,
                guest_device(in_force, guest),
                guest.endpoint.network,
            ))
        }
        (End::Host, End::Guest(guest)) => Ok(finish(
            gateway(in_force, guest)?,
            private_address(guest)?,
            guest_device(in_force, guest),
            guest.endpoint.network,
        )),
        (End::Host, _) => Err(Failure::input(
            "what the host sends to the world is the kernel's business: ask about a guest at one end",
        )),
        (End::Address(source), to) => {
            let destination = match to {
                End::Guest(guest) => public_address(guest)?,
                End::Host => {
                    let mut known = in_force.facts.addresses.iter().filter_map(|address| match address {
                        IpAddr::V4(address) => Some(*address),
                        IpAddr::V6(_) => None,
                    });
                    known.find(|a| !a.is_loopback()).ok_or_else(|| {
                        Failure::input("this host has no address: name the one that is asked")
                    })?
                }
                End::Address(address) => *address,
            };
            Ok(finish(*source, destination, uplink(in_force)?, 0))
        }
    }
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

fn gateway(in_force: &InForce, guest: &Guest<'_>) -> Result<Ipv4Addr, Failure> {
    let network = &in_force.loaded.network;
    let subnet = network.interfaces[guest.place.0].addresses[guest.place.1].subnet;
    let gateways = network.subnets[subnet].gateways.iter();
    gateways
        .filter_map(|gateway| match gateway {
            IpAddr::V4(gateway) => Some(*gateway),
            IpAddr::V6(_) => None,
        })
        .next()
        .ok_or_else(|| Failure::input(format!("the subnet of {} has no gateway address", guest.name)))
}

fn private_address(guest: &Guest<'_>) -> Result<Ipv4Addr, Failure> {
    match guest.address {
        IpAddr::V4(address) => Ok(address),
        IpAddr::V6(address) => Err(Failure::input(format!(
            "{} has the IPv6 address {address}, and explain answers for IPv4 only",
            guest.name
        ))),
    }
}

fn public_address(guest: &Guest<'_>) -> Result<Ipv4Addr, Failure> {
    match guest.endpoint.instance_address {
        0 => Err(Failure::input(format!(
            "{} has no public address of its own, so nobody outside its virtual network can send to it; give the \
             public address that is asked instead",
            guest.name
        ))),
        address => Ok(crate::flows::address(address)),
    }
}

/// `1.2.3.4:443`, `vm1:443`, `vm1`
fn split_port(text: &str) -> Result<(&str, Option<u16>), Failure> {
    if text.matches(':').count() > 1 {
        return Err(Failure::input(format!("{text}: IPv6 is not forwarded by this version")));
    }
    let Some((end, port)) = text.rsplit_once(':') else { return Ok((text, None)) };
    match port.parse() {
        Ok(port) => Ok((end, Some(port))),
        Err(_) => Err(Failure::input(format!("`{port}` in {text} is no port (0 to 65535)"))),
    }
}

fn end<'a>(in_force: &'a InForce, text: &str, network: Option<u16>) -> Result<End<'a>, Failure> {
    if text == "host" {
        return Ok(End::Host);
    }
    let address: Ipv4Addr = match text.parse::<IpAddr>() {
        Ok(IpAddr::V4(address)) => address,
        Ok(IpAddr::V6(_)) => {
            return Err(Failure::input(format!("{text}: IPv6 is not forwarded by this version")));
        }
        Err(_) => {
            let guest = in_force.guests().find(|guest| guest.is_named(text));
            return guest.map(End::Guest).ok_or_else(|| no_guest(in_force, text));
        }
    };
    let mut guests: Vec<Guest<'a>> = in_force.guests_at(address.into()).collect();
    if let Some(network) = network {
        // For a guest only its own network exists; the same address elsewhere is somebody it cannot reach.
        guests.retain(|guest| guest.endpoint.network == network);
        return Ok(guests.pop().map_or(End::Address(address), End::Guest));
    }
    match guests.len() {
        1 => Ok(End::Guest(guests.remove(0))),
        0 if inside(in_force, address) => Err(Failure::input(format!(
            "no guest has {address}, which is inside a virtual network: nobody can send from there"
        ))),
        0 => Ok(End::Address(address)),
        _ => {
            let names: Vec<&str> = guests.iter().map(|guest| guest.name).collect();
            Err(Failure::input(format!(
                "{address} is the address of {}: name the one you mean",
                names.join(" and ")
            )))
        }
    }
}

fn inside(in_force: &InForce, address: Ipv4Addr) -> bool {
    let spaces = in_force.loaded.network.virtual_networks.iter().flat_map(|network| &network.address_space);
    let gateway = in_force.loaded.network.subnets.iter().any(|s| s.gateways.contains(&IpAddr::V4(address)));
    !gateway && spaces.into_iter().any(|space| space.contains(&IpAddr::V4(address)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_of_to_is_what_stands_behind_the_colon() {
        assert_eq!(split_port("1.1.1.1:443").unwrap(), ("1.1.1.1", Some(443)));
        assert_eq!(split_port("vm1").unwrap(), ("vm1", None));
        assert!(split_port("vm1:http").unwrap_err().message.contains("`http`"));
        assert!(split_port("::1").unwrap_err().message.contains("IPv6"));
        assert!(split_port("1.1.1.1:70000").is_err());
    }
}
