//! Putting a policy in force: whole, or not at all (design §1, promise 3).
//!
//! Every table of a policy has two places, one for each parity of the generation. Only the place that no packet looks
//! at is filled; then one store to the control word changes them all. A packet reads the generation once, at entry,
//! so what stood in force before the store is only given back after a grace period.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd as _, AsRawFd as _};

use anyhow::{Context as _, ensure};
use aya::Pod;
use aya::maps::lpm_trie::Key;
use portcullis_common::layout::{
    DEVICE_SLOTS, Device, HOP_FLAG_PINNED, HOP_FLAG_RESOLVED, HOP_GUEST, NEXT_HOP_HOST, NEXT_HOP_SLOTS,
    NextHop, RuleCount, Settings,
};
use portcullis_common::policy::{EndpointKey, EndpointKey6, Page};

use super::load::Datapath;
use super::object::GENERATION;
use super::table::Table;

/// One compiled policy, as the kernel is to have it.
#[derive(Debug, Clone, Default)]
pub struct PolicyImage {
    /// Its number; the parity differs from that of the generation in force.
    pub generation: u32,
    /// The image; page 0 is the header.
    pub pages: Vec<Page>,
    /// Prefix length, address in packet order, global address class.
    pub prefixes: Vec<(u8, [u8; 4], u32)>,
    pub prefixes6: Vec<(u8, [u8; 16], u32)>,
    /// Routing id (0: the union of all), prefix length of the address, address in packet order, what is there.
    pub spaces: Vec<(u16, u8, [u8; 4], u32)>,
    pub spaces6: Vec<(u16, u8, [u8; 16], u32)>,
    pub endpoints: Vec<(EndpointKey, u32)>,
    pub endpoints6: Vec<(EndpointKey6, u32)>,
    pub devices: Vec<Device>,
    /// Next hops of the guests: index and content. What the datapath has learned for a hop (its hardware address)
    /// stays as long as device and address do. Guests' hops that are not listed are cleared.
    pub guest_hops: Vec<(u16, NextHop)>,
    pub settings: Settings,
    /// Rules in force; the counters of others are taken away.
    pub rule_ids: Vec<u32>,
}

/// What [`Datapath::install`] has to tell.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Installed {
    pub generation: u32,
    /// Last counts of the rules that are in force no more, summed over CPUs.
    pub retired_rules: Vec<(u32, RuleCount)>,
    /// Counts at the flip of the rules that stay in force.
    pub kept_rules: Vec<(u32, RuleCount)>,
    /// What could not be tidied after the flip. The policy is in force all the same.
    pub notes: Vec<String>,
}

/// What has to be taken back if the generation is not reached.
#[derive(Default)]
struct Undo {
    hops: Vec<(u32, NextHop)>,
    slots: Vec<usize>,
}

impl Datapath {
    /// Puts a policy in force. On any error the one before stays in force, untouched.
    ///
    /// Takes about a hundred milliseconds besides the copying: the kernel waits for running programs at every change
    /// of a table's slot.
    pub fn install(&mut self, image: &PolicyImage) -> anyhow::Result<Installed> {
        self.check_image(image)?;
        let mut undo = Undo::default();
        let inner = match self.prepare_generation(image, &mut undo) {
            Ok(inner) => inner,
            Err(error) => {
                self.take_back(image, undo);
                return Err(error.context(format!("generation {} was not put in force", image.generation)));
            }
        };
        self.control.flip(image.generation);
        let mut installed = Installed { generation: image.generation, ..Installed::default() };
        if let Err(error) = self.retire_previous(image, &inner, &mut installed) {
            installed.notes.push(format!("tidying after the change of policy: {error:#}"));
        }
        self.counted_before = installed.kept_rules.iter().copied().collect();
        let [pages, ..] = inner;
        self.pages_in_force = Some(pages);
        Ok(installed)
    }

    /// Returns once every program that was running when it was called has ended: setting a slot of a table of tables, even
    /// to what it holds, waits for that (the kernel's maybe_wait_bpf_programs). At once before the first generation.
    pub(super) fn wait_for_running_programs(&self) -> anyhow::Result<()> {
        match &self.pages_in_force {
            Some(pages) => set_slot(&self.tables.pages, self.generation() & 1, pages),
            None => Ok(()),
        }
    }

    /// Writes these pages, by number, over those of the generation in force. A packet under way sees each word of them as it
    /// was or as it is.
    ///
    /// # Errors
    /// Also if another generation than `generation` is in force: the pages are not of its image.
    pub fn write_pages(&mut self, generation: u32, pages: &[(u32, Page)]) -> anyhow::Result<()> {
        let current = self.generation();
        ensure!(generation == current, "generation {current} is in force, the pages are of {generation}");
        if pages.is_empty() {
            return Ok(());
        }
        // Not asked of the kernel, which opens a table by its number only for who may do everything.
        let inner = self.pages_in_force.as_ref().context("this process has put no generation in force")?;
        let (keys, values): (Vec<u32>, Vec<Page>) = pages.iter().copied().unzip();
        inner.update_batch(&keys, &values)
    }

    fn check_image(&self, image: &PolicyImage) -> anyhow::Result<()> {
        let current = self.generation();
        ensure!(image.generation != 0, "generation 0 means \"none\"");
        ensure!(
            image.generation & 1 != current & 1 || current == 0,
            "generation {} has the parity of {current}, which is in force",
            image.generation
        );
        let header = image.pages.first().context("the image has no header page")?.words[0];
        ensure!(
            header as u32 == image.generation && (header >> 32) as usize == image.pages.len(),
            "the image's header says generation {} with {} pages, it is {} with {}",
            header as u32,
            header >> 32,
            image.generation,
            image.pages.len()
        );
        let mut slots = HashMap::new();
        for device in &image.devices {
            ensure!(device.ifindex != 0, "a device without index");
            if let Some(other) = slots.insert(device.ifindex % DEVICE_SLOTS, device.ifindex) {
                anyhow::bail!(
                    "devices {other} and {} share a place in the device table (interface index modulo \
                     {DEVICE_SLOTS}); recreate one of them",
                    device.ifindex
                );
            }
        }
        for (index, _) in &image.guest_hops {
            ensure!(
                u32::from(*index) < NEXT_HOP_SLOTS && *index > NEXT_HOP_HOST,
                "next hop {index} is not between 2 and {}",
                NEXT_HOP_SLOTS - 1
            );
        }
        Ok(())
    }

    /// Everything before the flip; what it returns are the new inner tables, in the order of [`GENERATION`].
    fn prepare_generation(&self, image: &PolicyImage, undo: &mut Undo) -> anyhow::Result<[Table; 7]> {
        let inner = [
            self.make_pages(&image.pages)?,
            self.make_prefixes("PREFIXES", &image.prefixes)?,
            self.make_spaces(&image.spaces)?,
            self.make_map("ENDPOINTS", &image.endpoints)?,
            self.make_prefixes("PREFIXES6", &image.prefixes6)?,
            self.make_spaces6(&image.spaces6)?,
            self.make_map("ENDPOINTS6", &image.endpoints6)?,
        ];
        undo.slots = (0..inner.len()).collect();
        let outers = self.tables.of_generation();
        at_once(|number| set_slot(outers[number], image.generation & 1, &inner[number]))?;
        self.write_devices(image)?;
        self.control.write_settings((image.generation & 1) as usize, &image.settings);
        // Last, because the generation in force sees them too.
        self.write_guest_hops(&image.guest_hops, undo)?;
        Ok(inner)
    }

    fn inner_table(&self, name: &str, entries: usize) -> anyhow::Result<Table> {
        let mut shape = self.shapes.inner(name)?;
        shape.max_entries =
            u32::try_from(entries.max(1)).with_context(|| format!("{name}: {entries} entries"))?;
        Table::create(name, &shape)
    }

    fn make_pages(&self, pages: &[Page]) -> anyhow::Result<Table> {
        let table = self.inner_table("PAGES", pages.len())?;
        let keys: Vec<u32> = (0..pages.len() as u32).collect();
        table.update_batch(&keys, pages)?;
        Ok(table)
    }

    fn make_prefixes<A: Pod>(&self, name: &str, prefixes: &[(u8, A, u32)]) -> anyhow::Result<Table> {
        let entries: Vec<_> = prefixes.iter().map(|&(len, a, v)| (Key::new(u32::from(len), a), v)).collect();
        self.make_map(name, &entries)
    }

    fn make_spaces(&self, spaces: &[(u16, u8, [u8; 4], u32)]) -> anyhow::Result<Table> {
        let entries: Vec<(Key<[u8; 8]>, u32)> = spaces
            .iter()
            .map(|&(routing, length, address, value)| {
                let mut key = [0; 8];
                key[..2].copy_from_slice(&routing.to_be_bytes());
                key[2..6].copy_from_slice(&address);
                (Key::new(16 + u32::from(length), key), value)
            })
            .collect();
        self.make_map("SPACES", &entries)
    }

    fn make_spaces6(&self, spaces: &[(u16, u8, [u8; 16], u32)]) -> anyhow::Result<Table> {
        let entries: Vec<(Key<[u8; 20]>, u32)> = spaces
            .iter()
            .map(|&(routing, length, address, value)| {
                let mut key = [0; 20];
                key[..2].copy_from_slice(&routing.to_be_bytes());
                key[2..18].copy_from_slice(&address);
                (Key::new(16 + u32::from(length), key), value)
            })
            .collect();
        self.make_map("SPACES6", &entries)
    }

    /// A table of the generation, made and filled.
    fn make_map<K: Pod>(&self, name: &str, entries: &[(K, u32)]) -> anyhow::Result<Table> {
        let table = self.inner_table(name, entries.len())?;
        let (keys, values): (Vec<K>, Vec<u32>) = entries.iter().copied().unzip();
        table.update_batch(&keys, &values)?;
        Ok(table)
    }

    /// Writes the idle halves. An element is one pair, so the half in force is rewritten too, with the bytes it has:
    /// whoever reads it meanwhile sees no difference.
    fn write_devices(&self, image: &PolicyImage) -> anyhow::Result<()> {
        let idle = (image.generation & 1) as usize;
        let wanted: HashMap<u32, Device> =
            image.devices.iter().map(|d| (d.ifindex % DEVICE_SLOTS, *d)).collect();
        let mut keys = Vec::new();
        let mut pairs = Vec::new();
        for (slot, mut pair) in self.tables.devices.entries::<u32, [Device; 2]>()? {
            let device = wanted.get(&slot).copied().unwrap_or_default();
            if pair[idle] != device {
                pair[idle] = device;
                keys.push(slot);
                pairs.push(pair);
            }
        }
        self.tables.devices.update_batch(&keys, &pairs)
    }

    fn write_guest_hops(&self, hops: &[(u16, NextHop)], undo: &mut Undo) -> anyhow::Result<()> {
        for (index, wanted) in hops {
            let index = u32::from(*index);
            let before = self.tables.next_hops.lookup::<u32, NextHop>(&index)?.unwrap_or_default();
            let hop = keep_learned(&before, *wanted);
            if hop != before {
                undo.hops.push((index, before));
                self.tables.next_hops.update(&index, &hop, 0)?;
            }
        }
        Ok(())
    }

    /// After a failure: nothing of the new generation stays.
    fn take_back(&self, image: &PolicyImage, undo: Undo) {
        let idle = image.generation & 1;
        let outers = self.tables.of_generation();
        let hops = undo.hops.iter().map(|(index, hop)| self.tables.next_hops.update(index, hop, 0));
        let slots = undo.slots.iter().map(|&number| outers[number].delete(&idle).map(drop));
        for error in hops.chain(slots).filter_map(Result::err) {
            log::warn!("taking back generation {}: {error:#}", image.generation);
        }
    }

    /// Gives back what the previous generation held, once no program can be working with it.
    fn retire_previous(
        &self,
        image: &PolicyImage,
        inner: &[Table; 7],
        out: &mut Installed,
    ) -> anyhow::Result<()> {
        let parity = image.generation & 1;
        let outers = self.tables.of_generation();
        // The grace period: setting a slot, even to what it holds, returns only after every program that was running
        // at the flip has ended (the kernel's maybe_wait_bpf_programs).
        set_slot(outers[0], parity, &inner[0])?;
        at_once(|number| outers[number].delete(&(parity ^ 1)).map(drop))?;
        let listed: HashSet<u32> = image.guest_hops.iter().map(|(index, _)| u32::from(*index)).collect();
        for (index, hop) in self.tables.next_hops.entries::<u32, NextHop>()? {
            if hop.kind == HOP_GUEST && !listed.contains(&index) {
                self.tables.next_hops.update(&index, &NextHop::default(), 0)?;
            }
        }
        let wanted: HashSet<u32> = image.rule_ids.iter().copied().collect();
        for (id, counts) in self.tables.rule_counts.entries_per_cpu::<u32, RuleCount>()? {
            let counted = super::counters::sum_rule(&counts);
            if wanted.contains(&id) {
                out.kept_rules.push((id, counted));
            } else {
                self.tables.rule_counts.delete(&id)?;
                out.retired_rules.push((id, counted));
            }
        }
        Ok(())
    }
}

/// The hop as wanted, with the hardware address that was learned for the same guest on the same device.
fn keep_learned(before: &NextHop, mut wanted: NextHop) -> NextHop {
    let same = (before.kind, before.ifindex, before.address, before.address6)
        == (wanted.kind, wanted.ifindex, wanted.address, wanted.address6);
    let named = (before.flags | wanted.flags) & HOP_FLAG_PINNED != 0;
    if same && !named && before.flags & HOP_FLAG_RESOLVED != 0 && wanted.flags & HOP_FLAG_RESOLVED == 0 {
        wanted.mac = before.mac;
        wanted.flags |= HOP_FLAG_RESOLVED;
        wanted.fresh_until = before.fresh_until;
    }
    wanted
}

/// Does something to every table of tables. Each such change returns after a grace period of the kernel, some 20 ms; side
/// by side they wait for the same one (283 ms for a change of policy one after the other, measured over a thousand).
fn at_once(work: impl Fn(usize) -> anyhow::Result<()> + Sync) -> anyhow::Result<()> {
    if cfg!(test) {
        // Which call fails in a test is counted by thread.
        return (0..GENERATION.len()).try_for_each(work);
    }
    std::thread::scope(|scope| {
        let work = &work;
        let running: Vec<_> = (0..GENERATION.len()).map(|number| scope.spawn(move || work(number))).collect();
        let ended = running.into_iter().map(|thread| match thread.join() {
            Ok(ended) => ended,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        ended.collect::<Vec<_>>().into_iter().collect()
    })
}

/// Puts `inner` into a slot of a table of tables. Returns after a grace period.
fn set_slot(outer: &Table, slot: u32, inner: &Table) -> anyhow::Result<()> {
    let fd = inner.as_fd().as_raw_fd() as u32;
    outer.update(&slot, &fd, 0).with_context(|| format!("setting {}[{slot}]", outer.name))
}

const _: () = assert!(GENERATION.len() == 7);

#[cfg(test)]
mod tests {
    use super::*;

    fn hop(mac: u8, flags: u8) -> NextHop {
        NextHop {
            ifindex: 3,
            kind: HOP_GUEST,
            flags,
            mac: [mac; 6],
            address: 0x0400_000a,
            ..NextHop::default()
        }
    }

    #[test]
    fn a_learned_hardware_address_survives_a_change_of_policy() {
        let kept = keep_learned(&hop(7, HOP_FLAG_RESOLVED), hop(0, 0));
        assert_eq!(kept, hop(7, HOP_FLAG_RESOLVED));
    }

    #[test]
    fn a_learned_hardware_address_goes_when_the_guest_gets_another_device_or_address() {
        let elsewhere = NextHop { ifindex: 4, ..hop(0, 0) };
        assert_eq!(keep_learned(&hop(7, HOP_FLAG_RESOLVED), elsewhere), elsewhere);
        let renumbered = NextHop { address: 1, ..hop(0, 0) };
        assert_eq!(keep_learned(&hop(7, HOP_FLAG_RESOLVED), renumbered), renumbered);
    }

    #[test]
    fn an_address_named_by_the_policy_replaces_a_learned_one_and_is_not_kept_when_it_is_named_no_more() {
        let named = hop(9, HOP_FLAG_PINNED | HOP_FLAG_RESOLVED);
        assert_eq!(keep_learned(&hop(7, HOP_FLAG_RESOLVED), named), named);
        assert_eq!(keep_learned(&named, hop(0, 0)), hop(0, 0));
    }
}
