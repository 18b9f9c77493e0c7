//! The flow table in our own memory: every live flow can be read without a system call.
//!
//! The kernel writes while we read. A copy counts only if the control word, which changes with every new life of a
//! slot, was the same before and after.

use std::mem;
use std::net::Ipv6Addr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use portcullis_common::clock::{GRACE, TICK_SHIFT, passed};
use portcullis_common::flow::{BUSY, Ctl, ENDED, FLAG_FORWARD, FREE, LIVE, TENTATIVE};
use portcullis_common::layout::{BUCKET_SLOTS, Bucket, Bucket6, HalfRecord, HalfRecord6};
use portcullis_common::quota::counts_for;

use super::control::Mapping;
use super::guest_flows::GuestUses;
use super::load::Datapath;
use super::table::Table;

const WORDS: usize = mem::size_of::<HalfRecord>() / 8;
const CTL_WORD: usize = mem::offset_of!(HalfRecord, ctl) / 8;
/// Silent halves whose peers are looked at together: their cache lines come side by side, not one after the other.
const TOGETHER: usize = 64;

/// The table, shared with the kernel. It counts as resident memory of this process once it has been read. Stays valid
/// without the [`Datapath`] it came from.
#[derive(Debug)]
pub struct FlowTable {
    mapping: Mapping,
    slots: u32,
    /// Bytes from one half-record to the next.
    stride: usize,
    /// Flows ended by [`FlowTable::end`].
    ended: AtomicU32,
    guests: GuestUses,
}

/// What a sweep found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Swept {
    /// Half-records of flows that are alive.
    pub live: u32,
    /// Half-records dead, but not for long enough to touch.
    pub waiting: u32,
    /// Half-records freed now.
    pub freed: u32,
    /// Ticks until the first of those left can be freed, unless a packet prolongs its life; nothing if none is left.
    pub due: Option<u32>,
}

impl Swept {
    fn due_in(&mut self, ticks: u32) {
        self.due = Some(self.due.map_or(ticks, |due| due.min(ticks)));
    }
}

impl Datapath {
    /// Maps the flow table for IPv4.
    pub fn flow_table(&self) -> anyhow::Result<FlowTable> {
        self.tables.flows.check::<u32, Bucket>(1);
        FlowTable::map(&self.tables.flows, size_of::<HalfRecord>(), self.guest_uses()?)
    }

    /// Maps the flow table for IPv6.
    pub fn flow_table6(&self) -> anyhow::Result<FlowTable> {
        self.tables.flows6.check::<u32, Bucket6>(1);
        FlowTable::map(&self.tables.flows6, size_of::<HalfRecord6>(), self.guest_uses()?)
    }
}

impl FlowTable {
    pub(super) fn map(table: &Table, stride: usize, guests: GuestUses) -> anyhow::Result<Self> {
        let slots = table.shape.max_entries * BUCKET_SLOTS as u32;
        Ok(Self { mapping: Mapping::new(table)?, slots, stride, ended: AtomicU32::new(0), guests })
    }

    /// Are these the flows of IPv6?
    pub fn is_v6(&self) -> bool {
        self.stride == size_of::<HalfRecord6>()
    }

    /// Number of half-records the table has room for.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Slot `index`, in memory that the kernel writes too: read it by [`FlowTable::read`], or by the rules of
    /// [`portcullis_common::flow`]. Valid for as long as the table is.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn slot(&self, index: u32) -> *mut HalfRecord {
        assert!(index < self.slots, "slot {index} of {}", self.slots);
        // SAFETY: the mapping holds `slots` records, bucket after bucket without gaps.
        unsafe { self.mapping.as_ptr().add(index as usize * self.stride).cast() }
    }

    /// Bucket `index` of the table for IPv4; `None` if there is no such bucket. As for [`FlowTable::slot`].
    pub fn bucket(&self, index: u32) -> Option<*mut Bucket> {
        assert!(!self.is_v6());
        let first = index.checked_mul(BUCKET_SLOTS as u32).filter(|&first| first < self.slots)?;
        Some(self.slot(first).cast())
    }

    /// The same of the table for IPv6.
    pub fn bucket6(&self, index: u32) -> Option<*mut Bucket6> {
        assert!(self.is_v6());
        let first = index.checked_mul(BUCKET_SLOTS as u32).filter(|&first| first < self.slots)?;
        Some(self.slot(first).cast())
    }

    fn word(&self, index: u32, word: usize) -> &AtomicU64 {
        assert!(word < WORDS);
        // SAFETY: in the record, aligned; the kernel writes these words too, but never in part.
        unsafe { AtomicU64::from_ptr(self.slot(index).cast::<u64>().add(word)) }
    }

    /// The control word of a slot.
    pub fn ctl(&self, index: u32) -> Ctl {
        Ctl(self.word(index, CTL_WORD).load(Ordering::Acquire))
    }

    /// A copy of a slot, whatever its phase; `None` if it began another life meanwhile. Deadline and counts may be a
    /// packet apart.
    pub fn read(&self, index: u32) -> Option<HalfRecord> {
        let before = self.ctl(index);
        let words: [u64; WORDS] = std::array::from_fn(|word| self.word(index, word).load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        // The TCP state in it moves without a new life.
        let after = Ctl(self.word(index, CTL_WORD).load(Ordering::Relaxed));
        let same = (before.generation(), before.phase()) == (after.generation(), after.phase());
        // SAFETY: 64 bytes of plain integers either way.
        same.then(|| unsafe { mem::transmute::<[u64; WORDS], HalfRecord>(words) })
    }

    /// Source and destination of an IPv6 slot, and both after translation, under the generation that `record` was read
    /// with.
    pub fn addresses6(&self, index: u32, record: &HalfRecord) -> Option<[Ipv6Addr; 4]> {
        if !self.is_v6() {
            return None;
        }
        let wide = self.slot(index).cast::<HalfRecord6>();
        // SAFETY: in the record; addresses are written before the slot is published and not while it lives, and the
        // generation says whether it is the same life.
        let addresses = unsafe {
            [
                (&raw const (*wide).source).read_volatile(),
                (&raw const (*wide).destination).read_volatile(),
                (&raw const (*wide).new_source).read_volatile(),
                (&raw const (*wide).new_destination).read_volatile(),
            ]
        };
        fence(Ordering::Acquire);
        (self.ctl(index).generation() == Ctl(record.ctl).generation()).then(|| addresses.map(address6))
    }

    /// Ends a flow of which `record` is one half: both directions are gone for the datapath at once, a mapping behind
    /// it stays until it is idle. `false` if the flow has ended already.
    pub fn end(&self, index: u32, record: &HalfRecord, now: u32) -> bool {
        let generation = Ctl(record.ctl).generation();
        let mut ended = false;
        self.ended.fetch_add(1, Ordering::Relaxed);
        for at in [index, record.peer] {
            if at >= self.slots {
                continue;
            }
            // The TCP state may move meanwhile: a few attempts.
            for _ in 0..16 {
                let seen = self.ctl(at);
                if seen.phase() != LIVE || seen.generation() != generation {
                    break;
                }
                // SAFETY: in the record; a word that is written whole, by the kernel too.
                unsafe { (&raw mut (*self.slot(at)).deadline).write_volatile(now) };
                let Some(half) = self.read(at) else { break };
                let gone = seen.ended();
                let word = self.word(at, CTL_WORD);
                if word.compare_exchange(seen.0, gone.0, Ordering::SeqCst, Ordering::Relaxed).is_ok() {
                    // Of the generation, which the copy has if the exchange has succeeded.
                    self.guests.recycled(&HalfRecord { ctl: seen.0, ..half });
                    ended = true;
                    break;
                }
            }
        }
        ended
    }

    /// How many flows [`FlowTable::end`] was called for.
    pub fn ended(&self) -> u32 {
        self.ended.load(Ordering::Relaxed)
    }

    /// Copies of all published half-records with their slots, the expired among them ([`FlowTable::is_alive`]). A
    /// million take some tens of milliseconds.
    pub fn iter(&self) -> impl Iterator<Item = (u32, HalfRecord)> + '_ {
        (0..self.slots).filter_map(|index| {
            if self.ctl(index).phase() != LIVE {
                return None;
            }
            Some((index, self.read(index)?)).filter(|(_, record)| Ctl(record.ctl).phase() == LIVE)
        })
    }

    /// Is the record's flow alive at `now`: has either of its directions time left?
    pub fn is_alive(&self, record: &HalfRecord, now: u32) -> bool {
        !passed(record.deadline, now) || self.peer_alive(record, now, 0)
    }

    fn peer_alive(&self, record: &HalfRecord, now: u32, slack: u32) -> bool {
        if record.peer >= self.slots {
            return false;
        }
        let Some(peer) = self.read(record.peer) else { return true };
        let ctl = Ctl(peer.ctl);
        ctl.phase() == LIVE
            && ctl.generation() == Ctl(record.ctl).generation()
            && !passed(peer.deadline.wrapping_add(slack), now)
    }

    /// Frees the slots that the kernel itself would take over: of flows dead for longer than [`GRACE`], and slots
    /// abandoned half-way. `freed` is given each published half-record that was freed. Only tidies: the kernel does not
    /// wait for it.
    ///
    /// The table is read from end to end, and of a half that is free or has time left only its one cache line. So a
    /// million live flows take some tens of milliseconds.
    pub fn sweep(&self, now: u32, freed: impl FnMut(u32, &HalfRecord)) -> Swept {
        self.sweep_counting(now, &mut [], freed)
    }

    /// The same, and adds what each guest holds after it to `held`, by next hop.
    pub fn sweep_counting(
        &self,
        now: u32,
        held: &mut [u32],
        mut freed: impl FnMut(u32, &HalfRecord),
    ) -> Swept {
        let mut swept = Swept::default();
        let mut silent = [0u32; TOGETHER];
        let mut count = 0;
        for index in 0..self.slots {
            let ctl = self.ctl(index);
            let phase = ctl.phase();
            if phase == FREE {
                continue;
            }
            let deadline = self.deadline(index);
            if phase == LIVE && !passed(deadline, now) {
                swept.live += 1;
                self.count(index, ctl, held);
                swept.due_in(deadline.wrapping_sub(now) + GRACE + 1);
                continue;
            }
            silent[count] = index;
            count += 1;
            if count == TOGETHER {
                self.sweep_silent(&silent, now, held, &mut swept, &mut freed);
                count = 0;
            }
        }
        self.sweep_silent(&silent[..count], now, held, &mut swept, &mut freed);
        swept
    }

    /// The last tick at which a slot's direction alone keeps its flow alive.
    fn deadline(&self, index: u32) -> u32 {
        // SAFETY: in the record; a word that is written whole, by the kernel too.
        unsafe { (&raw const (*self.slot(index)).deadline).read_volatile() }
    }

    /// Goes on with halves that have no time left themselves, or are not published.
    fn sweep_silent(
        &self,
        silent: &[u32],
        now: u32,
        held: &mut [u32],
        swept: &mut Swept,
        freed: &mut impl FnMut(u32, &HalfRecord),
    ) {
        let mut peers = [(0u32, Ctl(0), 0u32); TOGETHER];
        for (peer, &index) in peers.iter_mut().zip(silent) {
            // SAFETY: in the record; a word that is written whole. Of a slot that is being filled it may be anything.
            let at = unsafe { (&raw const (*self.slot(index)).peer).read_volatile() };
            // A half is not its own peer, so this one says nothing about the flow.
            peer.0 = if at < self.slots { at } else { index };
        }
        for peer in &mut peers[..silent.len()] {
            (peer.1, peer.2) = (self.ctl(peer.0), self.deadline(peer.0));
        }
        for (&index, &(at, peer, deadline)) in silent.iter().zip(&peers) {
            let ctl = self.ctl(index);
            let alive = at != index
                && ctl.phase() == LIVE
                && (peer.phase(), peer.generation()) == (LIVE, ctl.generation())
                && !passed(deadline, now);
            if alive {
                swept.live += 1;
                swept.due_in(deadline.wrapping_sub(now) + GRACE + 1);
            } else if self.sweep_dead(index, now, swept, freed) {
                continue;
            }
            self.count(index, ctl, held);
        }
    }

    /// Adds the record to what its guest holds, if it is the half that counts.
    fn count(&self, index: u32, ctl: Ctl, held: &mut [u32]) {
        if held.is_empty() || ctl.phase() != LIVE || ctl.flags() & FLAG_FORWARD == 0 {
            return;
        }
        let at = self.slot(index);
        // SAFETY: in the record; words that are written whole.
        let half = unsafe {
            HalfRecord {
                key: (&raw const (*at).key).read_volatile(),
                hops: (&raw const (*at).hops).read_volatile(),
                ..HalfRecord::default()
            }
        };
        if let Some(held) = counts_for(&half).and_then(|hop| held.get_mut(usize::from(hop))) {
            *held += 1;
        }
    }

    /// What each guest holds of both tables.
    pub fn guests(&self) -> &GuestUses {
        &self.guests
    }

    /// Frees a slot whose flow is dead, unless it is too early; whether it did.
    ///
    /// The rule is [`portcullis_common::flow::reusable`]. Nobody can revive the record between the look and the
    /// exchange: whoever saw it alive did so before its deadline, and has ended since.
    fn sweep_dead(
        &self,
        index: u32,
        now: u32,
        swept: &mut Swept,
        freed: &mut impl FnMut(u32, &HalfRecord),
    ) -> bool {
        let Some(record) = self.read(index) else {
            swept.waiting += 1;
            swept.due_in(1);
            return false;
        };
        let ctl = Ctl(record.ctl);
        let dead = passed(record.deadline.wrapping_add(GRACE), now)
            && match ctl.phase() {
                LIVE => !self.peer_alive(&record, now, GRACE),
                ENDED => true,
                BUSY | TENTATIVE => passed(record.deadline.wrapping_add(8 * GRACE), now),
                _ => false,
            };
        if !dead {
            let alive = ctl.phase() == LIVE && self.is_alive(&record, now);
            *(if alive { &mut swept.live } else { &mut swept.waiting }) += 1;
            swept.due_in(GRACE + 1);
            return false;
        }
        let free = Ctl::new(ctl.generation(), FREE, 0, 0, 0);
        let word = self.word(index, CTL_WORD);
        let done = word.compare_exchange(ctl.0, free.0, Ordering::SeqCst, Ordering::Relaxed).is_ok();
        if done {
            swept.freed += 1;
            self.guests.recycled(&record);
            if ctl.phase() == LIVE {
                freed(index, &record);
            }
        }
        done
    }
}

/// An IPv6 address as the tables have it.
pub fn address6(words: [u32; 4]) -> Ipv6Addr {
    let mut bytes = [0; 16];
    for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    bytes.into()
}

/// Now, in ticks of [`portcullis_common::clock`], by the clock the programs read.
pub fn now_tick() -> u32 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is writable; the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut time) };
    let nanoseconds = time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64;
    (nanoseconds >> TICK_SHIFT) as u32
}
