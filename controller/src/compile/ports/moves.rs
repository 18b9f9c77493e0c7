//! What a change of ownership does to members, for `plan` and the history.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::{LiveUnits, Owner, Ownership, TCP, UDP};

/// A unit that a member gains or loses.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Move {
    pub address: IpAddr,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    pub unit: u16,
    /// `vm1/ipconfig1`
    pub member: String,
    pub what: MoveKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum MoveKind {
    /// No new claims; so many flows run on until they end or the grace does.
    Drains { flows: u32 },
    /// It is not the member's any more.
    Frees,
    /// The member may claim its ports.
    Gains,
}

/// Every difference, by address, protocol and unit; who loses a unit before who gains it.
pub fn moves(before: &Ownership, after: &Ownership, live: &LiveUnits) -> Vec<Move> {
    let mut moves = Vec::new();
    let addresses: BTreeSet<&IpAddr> = before.frontends.keys().chain(after.frontends.keys()).collect();
    for &address in addresses {
        for protocol in [TCP, UDP] {
            let of = |ownership: &'_ Ownership| {
                ownership.frontends.get(&address).map(|units| units.of(protocol).clone()).unwrap_or_default()
            };
            let (then, now) = (of(before), of(after));
            let units: BTreeSet<u16> = then.keys().chain(now.keys()).copied().collect();
            for unit in units {
                let flows = live.get(&(address, protocol, unit)).copied().unwrap_or(0);
                let mut tell = |owner: &Owner, what| {
                    moves.push(Move { address, protocol, unit, member: owner.member.clone(), what });
                };
                match (then.get(&unit), now.get(&unit)) {
                    (Some(old), Some(new)) if old.member == new.member => {
                        match (old.draining_until, new.draining_until) {
                            (None, Some(_)) => tell(new, MoveKind::Drains { flows }),
                            (Some(_), None) => tell(new, MoveKind::Gains),
                            _ => {}
                        }
                    }
                    (old, new) => {
                        if let Some(old) = old {
                            tell(old, MoveKind::Frees);
                        }
                        if let Some(new) = new {
                            tell(new, MoveKind::Gains);
                        }
                    }
                }
            }
        }
    }
    moves
}
