//! The tables of SNAT ports: for each endpoint the units it claims from, for each unit whose it is.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use portcullis_common::policy::{
    ADDRESS_UNITS, ALLOC_ECHO, ALLOC_RESET, ALLOC_TCP, ALLOC_UDP, Alloc, Segment, UNIT_PORTS, owner_entry,
};
use portcullis_common::snat::SEGMENTS;

use super::edge::{Edge, guests};
use super::outbound::{AllocationOf, OutboundOf, Pools};
use super::ports::{self, TCP, UDP};
use crate::policy::network::FrontendUse;

/// Units of one endpoint for one protocol.
#[derive(Default)]
struct Held {
    /// Words of the `units` table.
    in_use: BTreeMap<IpAddr, Vec<u32>>,
    draining: u32,
}

impl Edge<'_> {
    /// The same ownership twice: by endpoint, to find a port for it, and by port, to find whose it is.
    pub fn unit_tables(&mut self, pools: &Pools, allocated: &ports::Allocated) {
        let by_name: HashMap<&str, usize> =
            self.names.iter().enumerate().map(|(number, name)| (name.as_str(), number)).collect();
        self.owners = vec![0; self.frontends.len() * 2 * ADDRESS_UNITS as usize];
        let mut units: HashMap<(usize, u8), Held> = HashMap::new();
        for (address, protocol, unit, owner) in allocated.ownership.iter() {
            let frontend = self.frontend_numbers[&address];
            let endpoint = by_name[owner.member.as_str()];
            let at = owner_entry(frontend, protocol == UDP, unit.into());
            self.owners[at as usize] = endpoint as u16 + 1;
            let held = units.entry((endpoint, protocol)).or_default();
            match owner.draining_until {
                None => held.in_use.entry(address).or_default().push(frontend << 16 | u32::from(unit)),
                Some(_) => held.draining += 1,
            }
        }
        self.outbound = guests(self.network)
            .filter(|place| self.numbers.contains_key(place))
            .map(|(i, c)| OutboundOf {
                instance: self.instance(i, c).map(|public| public.address),
                allocations: [const { None }; 3],
            })
            .collect();
        for endpoint in 0..self.endpoints.len() {
            for (which, protocol) in [(ALLOC_TCP, TCP), (ALLOC_UDP, UDP)] {
                let Some(&pool) = pools.of.get(&(endpoint as u32, protocol)) else { continue };
                let (way, (frontends, entitled)) = (&pools.ways[pool], &allocated.pools[pool]);
                let held = units.remove(&(endpoint, protocol)).unwrap_or_default();
                let parts: Vec<&[u32]> =
                    frontends.iter().filter_map(|a| held.in_use.get(a)).map(Vec::as_slice).collect();
                let mut alloc = self.segments(&parts, way.frontend_use);
                alloc.idle_class = way.idle_class;
                if way.tcp_reset && which == ALLOC_TCP {
                    alloc.flags |= ALLOC_RESET;
                }
                self.outbound[endpoint].allocations[which] = Some(AllocationOf {
                    scenario: way.scenario,
                    place: pools.pools[pool].place.clone(),
                    frontends: frontends.clone(),
                    ports: alloc.ports,
                    entitled: *entitled,
                    draining: held.draining * UNIT_PORTS,
                });
                self.endpoints[endpoint].alloc[which] = alloc;
            }
            let (allocs, of) = (&mut self.endpoints[endpoint].alloc, &mut self.outbound[endpoint]);
            if allocs[ALLOC_TCP].segments != 0 && allocs[ALLOC_UDP].segments != 0 {
                // Identifiers have 16 bits like ports; those of the units for TCP are as good as any.
                allocs[ALLOC_ECHO] = Alloc { idle_class: 0, flags: 0, ..allocs[ALLOC_TCP] };
                of.allocations[ALLOC_ECHO].clone_from(&of.allocations[ALLOC_TCP].clone());
            }
        }
    }

    /// Lays out units that come address by address in the order of the pool's frontends. There is always a segment, or the
    /// guest would seem to have no way out while it waits for its first port.
    fn segments(&mut self, parts: &[&[u32]], frontend_use: FrontendUse) -> Alloc {
        let first_segment = self.segments.len() as u32;
        // One after the other; or all at once.
        let apart = match frontend_use {
            FrontendUse::Sequential => parts.len().min(SEGMENTS as usize).saturating_sub(1),
            FrontendUse::Spread => 0,
        };
        let (apart, joined) = parts.split_at(apart);
        let joined = joined.concat();
        for part in apart.iter().copied().chain([joined.as_slice()]) {
            self.segments.push(Segment { first_unit: self.units.len() as u32, units: part.len() as u32 });
            self.units.extend(part);
        }
        Alloc {
            first_segment,
            segments: apart.len() as u16 + 1,
            ports: parts.iter().map(|part| part.len() as u32).sum::<u32>() * UNIT_PORTS,
            ..Alloc::default()
        }
    }
}
