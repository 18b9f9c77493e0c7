//! Connections that are older than the first start (ADR 0011): the kernel's NAT is asked for those it translates before a
//! program of ours meets a packet, and again afterwards for what has begun in between. Only then do guests hear that others
//! are gone.

use serde::{Deserialize, Serialize};
use tokio::task::block_in_place;

use super::plan::Plan;
use crate::conntrack::{self, TakenOver, Takeover};
use crate::datapath::{Datapath, Migrated};
use crate::hosts::Host;
use portcullis_common::layout::{HOP_FLAG_RESOLVED, HOP_GUEST};

/// What became of flows that are older than this daemon's tables.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Before {
    /// From the kernel's NAT, at a first start.
    pub taken_over: Option<TakenOver>,
    /// From tables of another layout, at an upgrade.
    pub migrated: Option<Migrated>,
}

/// Looks at the kernel's table of connections again; what cannot be asked is no reason not to start.
pub fn look(takeover: &mut Takeover) {
    if let Err(error) = block_in_place(|| conntrack::for_each(|connection| takeover.take(connection))) {
        log::info!("nothing is taken over from the kernel's NAT: {error:#}");
    }
}

/// Writes down the hardware addresses of guests that the kernel knows, where neither policy nor packets have told: the
/// packets of flows that are taken over are checked against them from the first on.
///
/// # Errors
/// If neighbours or next hops cannot be read or written.
pub async fn know_guests(host: &Host, datapath: &Datapath, plan: &Plan) -> anyhow::Result<()> {
    let neighbours = host.neighbours().await?;
    block_in_place(|| {
        for guest in &plan.compiled.guest_hops {
            let mut hop = datapath.next_hop(guest.index)?;
            if hop.kind != HOP_GUEST || hop.flags & HOP_FLAG_RESOLVED != 0 {
                continue;
            }
            // On a bridge the kernel knows the guest by the bridge, not by its port.
            let master = plan.links.by_index(guest.ifindex).and_then(|link| link.master);
            let known = neighbours.iter().find(|neighbour| {
                neighbour.address == guest.address
                    && (neighbour.ifindex == guest.ifindex || Some(neighbour.ifindex) == master)
                    && neighbour.state.is_valid()
            });
            if let Some(mac) = known.and_then(|neighbour| neighbour.mac) {
                hop.mac = mac;
                hop.flags |= HOP_FLAG_RESOLVED;
                datapath.set_next_hop(guest.index, &hop)?;
            }
        }
        Ok(())
    })
}
