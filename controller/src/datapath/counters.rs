//! What the kernel counted: reasons, rules, losses, summed over CPUs when read.

use std::collections::HashMap;

use anyhow::Context as _;
use portcullis_common::layout::{Count, RuleCount};
use portcullis_common::reason::REASON_SLOTS;
use portcullis_common::snat::TRIED_BUCKETS;

use super::load::Datapath;

/// Kinds of loss that the tracepoint programs tell apart.
pub const LOST_SLOTS: usize = 8;

impl Datapath {
    /// Packets and bytes by reason, in the order of [`portcullis_common::Reason`]; a packet in flight may be missing.
    pub fn reasons(&self) -> anyhow::Result<Vec<Count>> {
        (0..REASON_SLOTS as u32)
            .map(|index| {
                let counts = self
                    .tables
                    .reasons
                    .lookup_per_cpu::<u32, Count>(&index)?
                    .context("REASONS is too short")?;
                Ok(counts.iter().fold(Count::default(), |sum, c| Count {
                    packets: sum.packets.wrapping_add(c.packets),
                    bytes: sum.bytes.wrapping_add(c.bytes),
                }))
            })
            .collect()
    }

    /// Hits of the rules in force, by id.
    pub fn rule_counts(&self) -> anyhow::Result<HashMap<u32, RuleCount>> {
        let counts = self.tables.rule_counts.entries_per_cpu::<u32, RuleCount>()?;
        Ok(counts.into_iter().map(|(id, counts)| (id, sum_rule(&counts))).collect())
    }

    /// What a rule had counted when the generation in force began.
    pub fn counted_before(&self, rule: u32) -> RuleCount {
        self.counted_before.get(&rule).copied().unwrap_or_default()
    }

    /// Claims by the number of ports tried, in the buckets of [`portcullis_common::snat::tried_bucket`].
    pub fn tried(&self) -> anyhow::Result<Vec<u64>> {
        (0..TRIED_BUCKETS)
            .map(|bucket| {
                let counts =
                    self.tables.tried.lookup_per_cpu::<u32, u64>(&bucket)?.context("TRIED is too short")?;
                Ok(counts.iter().fold(0, |sum: u64, n| sum.wrapping_add(*n)))
            })
            .collect()
    }

    /// Packets that the kernel lost after our verdict, by the programs' own kinds.
    pub fn lost(&self) -> anyhow::Result<Vec<u64>> {
        (0..LOST_SLOTS as u32)
            .map(|index| {
                let counts =
                    self.tables.lost.lookup_per_cpu::<u32, u64>(&index)?.context("LOST is too short")?;
                Ok(counts.iter().fold(0, |sum: u64, n| sum.wrapping_add(*n)))
            })
            .collect()
    }
}

/// All CPUs' counts of one rule: the hits together, the last hit of any.
pub(super) fn sum_rule(counts: &[RuleCount]) -> RuleCount {
    counts.iter().fold(RuleCount::default(), |sum, c| RuleCount {
        hits: sum.hits.wrapping_add(c.hits),
        bytes: sum.bytes.wrapping_add(c.bytes),
        last: sum.last.max(c.last),
    })
}
