//! How much of the flow tables each guest holds, in memory shared with the kernel, by next hop; see
//! [`portcullis_common::quota`].

use std::sync::atomic::{AtomicU64, Ordering};

use portcullis_common::flow::{Ctl, FLAG_FORWARD};
use portcullis_common::layout::{GuestFlows, HalfRecord, NEXT_HOP_SLOTS};
use portcullis_common::quota::{counts_for, held};

use super::control::Mapping;
use super::load::Datapath;
use super::table::Table;

/// What one guest has of the flow tables.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GuestUse {
    /// Flows: those that live, and dead ones that nobody has come by.
    pub held: u32,
    /// Places in the ring of flows opened from outside.
    pub half_open: u32,
    /// Packets that opened no flow because the guest had as many as it may, since the tables were made.
    pub refused: u64,
    /// Half-open flows ended to make room for new ones, since then.
    pub replaced: u64,
}

/// The counts of all guests. Stays valid without the [`Datapath`] it came from.
#[derive(Debug)]
pub struct GuestUses(Mapping);

impl Datapath {
    /// Maps the counts.
    pub fn guest_uses(&self) -> anyhow::Result<GuestUses> {
        GuestUses::map(&self.tables.guest_flows)
    }
}

impl GuestUses {
    pub(super) fn map(table: &Table) -> anyhow::Result<Self> {
        table.check::<u32, GuestFlows>(1);
        Ok(Self(Mapping::new(table)?))
    }

    /// Counts of nobody's, for tables in which guests' flows were not counted.
    pub(super) fn detached() -> anyhow::Result<Self> {
        Ok(Self(Mapping::detached(NEXT_HOP_SLOTS as usize * size_of::<GuestFlows>())?))
    }

    fn at(&self, hop: u16) -> *mut GuestFlows {
        let hop = u32::from(hop) % NEXT_HOP_SLOTS;
        // SAFETY: the mapping holds an element for each next hop.
        unsafe { self.0.as_ptr().cast::<GuestFlows>().add(hop as usize) }
    }

    /// The element of this next hop, in memory that the kernel writes too: by the rules of [`portcullis_common::quota`].
    pub fn element(&self, hop: u32) -> Option<*mut GuestFlows> {
        u16::try_from(hop).ok().filter(|&hop| u32::from(hop) < NEXT_HOP_SLOTS).map(|hop| self.at(hop))
    }

    fn held(&self, hop: u16) -> &AtomicU64 {
        // SAFETY: in the element, aligned; the kernel writes it too, atomically.
        unsafe { AtomicU64::from_ptr(&raw mut (*self.at(hop)).held) }
    }

    /// What this guest has now.
    pub fn read(&self, hop: u16) -> GuestUse {
        // SAFETY: in the mapping; words that are written whole.
        let now = unsafe { self.at(hop).read_volatile() };
        GuestUse {
            held: held(now.held).max(0) as u32,
            half_open: (now.waiting as i64).clamp(0, u32::MAX.into()) as u32,
            refused: now.refused,
            replaced: now.replaced,
        }
    }

    /// Gives back the place of a record whose control word was taken away from it just now, if it is the one that counts.
    pub fn recycled(&self, record: &HalfRecord) {
        if Ctl(record.ctl).flags() & FLAG_FORWARD != 0
            && let Some(hop) = counts_for(record)
        {
            self.held(hop).fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// The words of all guests, for [`GuestUses::correct`].
    pub fn words(&self) -> Vec<u64> {
        (0..NEXT_HOP_SLOTS as u16).map(|hop| self.held(hop).load(Ordering::SeqCst)).collect()
    }

    /// Sets what a guest holds to `really`, if nothing has happened to it since its word was this one. Whether it was.
    pub fn correct(&self, hop: u16, word: u64, really: u32) -> bool {
        let right = word >> 32 << 32 | u64::from(really);
        self.held(hop).compare_exchange(word, right, Ordering::SeqCst, Ordering::Relaxed).is_ok()
    }
}
