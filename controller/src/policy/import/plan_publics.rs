//! Public addresses of the policy: those of the input, those of its prefixes, and placeholders.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};

use super::draft;
use super::object::Reference;
use super::plan::{Plan, renamed, unknown};
use super::report::{Level, Report};
use super::sources::{Named, Sources};
use crate::policy::prefixes;

/// Where made-up public addresses are from: for documentation and benchmarks, nobody has them (RFC 5737, RFC 2544).
const PLACEHOLDERS: [&str; 4] = ["203.0.113.0/24", "198.51.100.0/24", "192.0.2.0/24", "198.18.0.0/15"];

/// The largest public prefix that is written out address by address; Azure's own limit.
const LONGEST_LIST: usize = 16;

impl Plan {
    /// The public addresses of the input, and those of its prefixes.
    pub fn publics(&mut self, sources: &Sources, report: &mut Report) {
        for public in &sources.publics {
            self.public_ids.add(&public.named.id);
            let v6 = public.v6 || public.address.is_some_and(|address| address.is_ipv6());
            if v6 {
                let why = "public IPv6 addresses are not available yet";
                report.add(
                    Level::Warning,
                    &public.named.place,
                    &public.named.title,
                    "ipAddress",
                    why,
                    "give guests IPv6 addresses that are routed to them",
                );
                self.publics.push(Vec::new());
                continue;
            }
            let address = match public.address {
                Some(IpAddr::V4(address)) => Some(address),
                _ => None,
            };
            let added = self.add_public(&public.named, address, report);
            self.publics.push(added.into_iter().collect());
        }
        for prefix in &sources.prefixes {
            self.public_ids.add(&prefix.named.id);
            let mut all = Vec::new();
            match prefix.prefix {
                Some(IpNet::V4(net)) if net.prefix_len() >= 28 => {
                    for (at, address) in
                        (u32::from(net.network())..=u32::from(net.broadcast())).enumerate().take(LONGEST_LIST)
                    {
                        let address = Ipv4Addr::from(address);
                        // Addresses from the prefix that the input also has by name.
                        if let Some(known) =
                            self.draft.publics.iter().position(|public| public.address == address)
                        {
                            all.push(known);
                            continue;
                        }
                        let name = format!("{}-{at}", prefix.named.name);
                        let named = Named { name, ..prefix.named.clone() };
                        all.extend(self.add_public(&named, Some(address), report));
                    }
                }
                Some(net) => {
                    let why = format!("{net} is IPv6, or more than {LONGEST_LIST} addresses");
                    report.add(
                        Level::Warning,
                        &prefix.named.place,
                        &prefix.named.title,
                        "ipPrefix",
                        why,
                        "add the addresses you need by hand",
                    );
                }
                None => {
                    let why = "the prefix is not known";
                    report.add(
                        Level::Warning,
                        &prefix.named.place,
                        &prefix.named.title,
                        "ipPrefix",
                        why,
                        "add the addresses you need by hand",
                    );
                }
            }
            self.publics.push(all);
        }
    }

    fn add_public(&mut self, named: &Named, given: Option<Ipv4Addr>, report: &mut Report) -> Option<usize> {
        let usable = given.filter(|address| self.usable(*address));
        let mut comment = None;
        let address = match usable {
            Some(address) => address,
            None => {
                let Some(made_up) = self.placeholder() else {
                    report.add(
                        Level::Warning,
                        &named.place,
                        &named.title,
                        "ipAddress",
                        "there is no placeholder left",
                        "add the address by hand",
                    );
                    return None;
                };
                let why = match given {
                    Some(given) => format!(
                        "{given} is inside a virtual network, taken, or no public address; {made_up} is made up"
                    ),
                    None => format!("the address is not known; {made_up} is made up"),
                };
                report.add(
                    Level::Note,
                    &named.place,
                    &named.title,
                    "ipAddress",
                    why,
                    "write an address that the world routes here",
                );
                comment = Some("REPLACE: the address is made up".to_owned());
                made_up
            }
        };
        self.public_addresses.insert(address);
        let name = self.public_names.take(&named.name, "pip");
        renamed(named, &name, report);
        self.draft.publics.push(draft::Public { name, address, comment });
        Some(self.draft.publics.len() - 1)
    }

    fn usable(&self, address: Ipv4Addr) -> bool {
        let net = IpNet::V4(Ipv4Net::from(address));
        !self.public_addresses.contains(&address)
            && prefixes::forbidden(&net).is_none()
            && !self.networks.contains(address.into())
    }

    fn placeholder(&mut self) -> Option<Ipv4Addr> {
        let nets = PLACEHOLDERS.iter().filter_map(|net| net.parse::<Ipv4Net>().ok());
        let hosts = nets.flat_map(|net| net.hosts());
        for (at, address) in (0..).zip(hosts).skip(self.placeholder as usize) {
            self.placeholder = at + 1;
            if self.usable(address) {
                return Some(address);
            }
        }
        None
    }

    /// The addresses that a reference means, for one user alone; made up if it is not in the input.
    pub fn take_public(
        &mut self,
        reference: &Reference,
        user: &str,
        property: &str,
        report: &mut Report,
    ) -> Vec<usize> {
        let at = match self.public_ids.find(&reference.id) {
            Some(at) => at,
            None => {
                let why = format!("{} is not in the input", reference.id.title());
                report.add(Level::Note, &reference.place, user, property, why, "import the address too");
                self.public_ids.add(&reference.id);
                let added = self.add_public(&unknown(reference), None, report);
                self.publics.push(added.into_iter().collect());
                self.publics.len() - 1
            }
        };
        let all = self.publics[at].clone();
        let free: Vec<usize> =
            all.iter().copied().filter(|public| self.public_users.insert(*public)).collect();
        if free.is_empty() {
            let why = match all.is_empty() {
                true => "the address was not carried over",
                false => "the address has another user already",
            };
            report.add(
                Level::Warning,
                &reference.place,
                user,
                property,
                why,
                "give it an address of its own",
            );
        }
        free
    }
}
