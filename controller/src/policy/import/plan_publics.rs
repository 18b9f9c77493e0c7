//! Public addresses of the policy: those of the input, its prefixes, and placeholders.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net};

use super::draft;
use super::names::Unique;
use super::object::Reference;
use super::plan::{Plan, renamed, unknown};
use super::plan_networks::overlap;
use super::publics::Prefix;
use super::report::{Level, Place, Report};
use super::sources::{Named, Sources};
use crate::policy::allocation::MAX_POOL;
use crate::policy::prefixes;
use crate::policy::publics::{GLOBAL_UNICAST, MAX_PREFIX};

/// Where made-up public addresses are from: for documentation and benchmarks, nobody has them (RFC 5737, RFC 2544).
const PLACEHOLDERS: [&str; 4] = ["203.0.113.0/24", "198.51.100.0/24", "192.0.2.0/24", "198.18.0.0/15"];

/// The same for IPv6 (RFC 3849): addresses that follow this one.
const PLACEHOLDERS_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 0);

/// What a frontend may have.
pub enum Taken {
    /// Position of an address in the draft.
    Address(usize),
    /// Position of a prefix in the draft.
    Prefix(usize),
}

impl Plan {
    /// The public addresses and prefixes of the input.
    pub fn publics(&mut self, sources: &Sources, report: &mut Report) {
        for public in &sources.publics {
            self.public_ids.add(&public.named.id);
            let v6 = public.address.map_or(public.v6, |address| address.is_ipv6());
            let added = self.add_public(&public.named, public.address, v6, report);
            self.publics.push(added.into_iter().map(Taken::Address).collect());
        }
        let mut names = Unique::default();
        for prefix in &sources.prefixes {
            self.public_ids.add(&prefix.named.id);
            let all = self.add_prefix(prefix, &mut names, report);
            self.publics.push(all);
        }
    }

    /// A prefix as a whole; or address by address, where the input also has some of them by name.
    fn add_prefix(&mut self, prefix: &Prefix, names: &mut Unique, report: &mut Report) -> Vec<Taken> {
        let named = &prefix.named;
        let mut lost = |why: String| {
            let action = "add the addresses you need by hand";
            report.add(Level::Warning, &named.place, &named.title, "ipPrefix", why, action);
            Vec::new()
        };
        let Some(net) = prefix.prefix.map(|net| net.trunc()) else {
            return lost("the prefix is not known".to_owned());
        };
        let bits = u32::from(net.max_prefix_len() - net.prefix_len());
        if bits > MAX_PREFIX.ilog2() {
            return lost(format!("{net} has more than {MAX_PREFIX} addresses"));
        }
        let inside = |public: &draft::Public| net.contains(&public.address);
        let whole = !self.draft.publics.iter().any(inside)
            && !self.draft.prefixes.iter().any(|other| overlap(&other.prefix, &net));
        if whole && self.possible(net) {
            let name = names.take(&named.name, "prefix");
            renamed(named, &name, report);
            self.draft.prefixes.push(draft::PublicPrefix { name, prefix: net });
            return vec![Taken::Prefix(self.draft.prefixes.len() - 1)];
        }
        let mut all = Vec::new();
        for at in 0..1_u32 << bits {
            let address = match net.network() {
                IpAddr::V4(first) => IpAddr::V4(Ipv4Addr::from(u32::from(first) + at)),
                IpAddr::V6(first) => IpAddr::V6(Ipv6Addr::from(u128::from(first) + u128::from(at))),
            };
            if let Some(known) = self.draft.publics.iter().position(|public| public.address == address) {
                all.push(Taken::Address(known));
                continue;
            }
            let own = Named { name: format!("{}-{at}", named.name), ..named.clone() };
            all.extend(self.add_public(&own, Some(address), address.is_ipv6(), report).map(Taken::Address));
        }
        all
    }

    fn add_public(
        &mut self,
        named: &Named,
        given: Option<IpAddr>,
        v6: bool,
        report: &mut Report,
    ) -> Option<usize> {
        let usable = given.filter(|address| self.usable(*address));
        let mut comment = None;
        let address = match usable {
            Some(address) => address,
            None => {
                let Some(made_up) = self.placeholder(v6) else {
                    let why = "there is no placeholder left";
                    let action = "add the address by hand";
                    report.add(Level::Warning, &named.place, &named.title, "ipAddress", why, action);
                    return None;
                };
                let why = match given {
                    Some(given) => format!(
                        "{given} is inside a virtual network, taken, or no public address; {made_up} is made up"
                    ),
                    None => format!("the address is not known; {made_up} is made up"),
                };
                let action = "write an address that the world routes here";
                report.add(Level::Note, &named.place, &named.title, "ipAddress", why, action);
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

    fn usable(&self, address: IpAddr) -> bool {
        !self.public_addresses.contains(&address)
            && !self.draft.prefixes.iter().any(|prefix| prefix.prefix.contains(&address))
            && self.possible(IpNet::from(address))
    }

    /// Can these be public addresses, as far as the networks and the ranges that nobody has are concerned?
    fn possible(&self, net: IpNet) -> bool {
        let global = GLOBAL_UNICAST.parse::<IpNet>().is_ok_and(|global| global.contains(&net));
        let spaces = self.networks.networks.iter().flat_map(|network| &network.space);
        (net.addr().is_ipv4() || global)
            && prefixes::forbidden(&net).is_none()
            && !spaces.copied().any(|space| overlap(&space, &net))
    }

    fn placeholder(&mut self, v6: bool) -> Option<IpAddr> {
        if v6 {
            let first = u128::from(PLACEHOLDERS_V6);
            for at in self.placeholder_v6.saturating_add(1)..=u32::MAX {
                self.placeholder_v6 = at;
                let address = IpAddr::V6((first + u128::from(at)).into());
                if self.usable(address) {
                    return Some(address);
                }
                // A network around all of them: there is nothing to be found.
                if at > 1 << 16 {
                    return None;
                }
            }
            return None;
        }
        let nets = PLACEHOLDERS.iter().filter_map(|net| net.parse::<Ipv4Net>().ok());
        let hosts = nets.flat_map(|net| net.hosts());
        for (at, address) in (0..).zip(hosts).skip(self.placeholder as usize) {
            self.placeholder = at + 1;
            let address = IpAddr::V4(address);
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
        v6: bool,
        report: &mut Report,
    ) -> Vec<Taken> {
        let at = match self.public_ids.find(&reference.id) {
            Some(at) => at,
            None => {
                let why = format!("{} is not in the input", reference.id.title());
                report.add(Level::Note, &reference.place, user, property, why, "import the address too");
                self.public_ids.add(&reference.id);
                let added = self.add_public(&unknown(reference), None, v6, report);
                self.publics.push(added.into_iter().map(Taken::Address).collect());
                self.publics.len() - 1
            }
        };
        let mut free = Vec::new();
        for taken in &self.publics[at] {
            let (key, copy) = match taken {
                Taken::Address(at) => ((*at, false), Taken::Address(*at)),
                Taken::Prefix(at) => ((*at, true), Taken::Prefix(*at)),
            };
            if self.public_users.insert(key) {
                free.push(copy);
            }
        }
        if free.is_empty() {
            let why = match self.publics[at].is_empty() {
                true => "the address was not carried over",
                false => "the address has another user already",
            };
            let action = "give it an address of its own";
            report.add(Level::Warning, &reference.place, user, property, why, action);
        }
        free
    }

    /// Gives subnets that say so their way out: an address that is made up, as Azure does not tell which one it picked.
    pub fn default_outbound(&mut self, report: &mut Report) {
        let mut subnets: Vec<String> = Vec::new();
        for network in &self.networks.networks {
            let own = network.subnets.iter().filter(|subnet| subnet.default_outbound);
            subnets.extend(own.map(|subnet| format!("{}/{}", network.name, subnet.name)));
        }
        if subnets.is_empty() {
            return;
        }
        let all = self.draft.interfaces.iter().flat_map(|interface| &interface.configurations);
        let guests = all
            .filter(|own| own.address.is_ipv4() && own.public.is_none() && subnets.contains(&own.subnet))
            .count();
        let nowhere = Place::nowhere();
        let named = Named {
            id: Default::default(),
            name: "default-outbound".to_owned(),
            place: nowhere.clone(),
            title: "defaultOutbound".to_owned(),
        };
        let added = match guests > MAX_POOL {
            true => None,
            false => self.add_public(&named, None, false, report),
        };
        if let Some(at) = added {
            self.draft.default_outbound = Some(self.draft.publics[at].name.clone());
            return;
        }
        let why = format!("default outbound has ports for {MAX_POOL} guests, and needs an address");
        let action = "put the guests into pools with outbound rules";
        report.add(Level::Warning, &nowhere, "defaultOutbound", "defaultOutboundAccess", why, action);
        for network in &mut self.networks.networks {
            network.subnets.iter_mut().for_each(|subnet| subnet.default_outbound = false);
        }
    }
}
