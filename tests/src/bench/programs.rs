//! The bench's eBPF object, once loaded: told what to send, asked what arrived.

use std::time::Duration;

use anyhow::{Context as _, bail};
use aya::maps::{Array, HashMap, MapData, PerCpuArray, PerCpuValues};
use aya::programs::{Program, Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader, Pod, TestRun as _, TestRunAttrs, TestRunOptions};
use portcullis_common::layout::{Bucket, FlowKey};

use super::layout::{Bare, Entry, Expected, FRAME_BYTES, Generator, Hero, HeroSent, Picked, Seen, Table};
use super::table::Capacity;
use crate::lab::Namespace;

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("PORTCULLIS_TESTS_EBPF_OBJECT_PATH"));

// SAFETY: `repr(C)`, plain integers, padding spelt out, valid for any bit pattern.
unsafe impl Pod for Generator {}
// SAFETY: as above; 4 + 6 + 6 bytes leave no padding.
unsafe impl Pod for Bare {}
// SAFETY: as above.
unsafe impl Pod for Expected {}
// SAFETY: as above.
unsafe impl Pod for Seen {}
// SAFETY: as above.
unsafe impl Pod for Picked {}
// SAFETY: as above.
unsafe impl Pod for Hero {}
// SAFETY: as above.
unsafe impl Pod for HeroSent {}
// SAFETY: as above.
unsafe impl Pod for Table {}
// SAFETY: as above.
unsafe impl Pod for Entry {}

/// Frames that a processor's page pool keeps going.
const BATCH: u32 = 64;

/// Which generator sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sending {
    /// As fast as it can, or each flow once.
    Flows,
    /// By the clock ([`Hero`]).
    Hero,
}

impl Sending {
    fn program(self) -> &'static str {
        match self {
            Sending::Flows => "pcb_generate",
            Sending::Hero => "pcb_hero",
        }
    }
}

/// The loaded programs of one rig. Detached when dropped.
pub(super) struct Programs {
    ebpf: Ebpf,
}

impl Programs {
    pub fn load(capacity: Capacity) -> anyhow::Result<Self> {
        let mut loader = EbpfLoader::new();
        loader.map_max_entries("TABLE_HASH", capacity.entries);
        loader.map_max_entries("TABLE_RECORDS", capacity.buckets);
        let mut ebpf = loader.load(OBJECT).context("loading the bench's object")?;
        for name in
            ["pcb_generate", "pcb_hero", "pcb_bare", "pcb_sink", "pcb_table_hash", "pcb_table_records"]
        {
            xdp_mut(&mut ebpf, name)?.load().with_context(|| format!("loading {name}"))?;
        }
        Ok(Self { ebpf })
    }

    /// Attaches a program to a device, in the driver.
    pub fn attach(&mut self, name: &str, namespace: &Namespace, ifindex: u32) -> anyhow::Result<()> {
        let program = xdp_mut(&mut self.ebpf, name)?;
        let attached = namespace.enter(|| program.attach_to_if_index(ifindex, XdpMode::Driver).map(drop));
        attached.with_context(|| format!("attaching {name} to device {ifindex} of {}", namespace.name()))
    }

    pub fn tell_generator(&mut self, told: &Generator) -> anyhow::Result<()> {
        self.tell("GENERATOR", told)
    }

    pub fn tell_bare(&mut self, told: &Bare) -> anyhow::Result<()> {
        self.tell("BARE", told)
    }

    pub fn tell_table(&mut self, told: &Table) -> anyhow::Result<()> {
        self.tell("TABLE", told)
    }

    /// Tells the hero run's generator what to send from now on; it has sent nothing yet.
    pub fn tell_hero(&mut self, told: &Hero) -> anyhow::Result<()> {
        let map = self.ebpf.map("ARRIVED").context("the object has no map ARRIVED")?;
        let map: Array<&MapData, u64> = map.try_into().context("ARRIVED")?;
        let sent = HeroSent { arrived_before: map.get(&0, 0).context("ARRIVED")?, ..HeroSent::default() };
        let map = self.ebpf.map_mut("HERO_SENT").context("the object has no map HERO_SENT")?;
        let mut map: PerCpuArray<&mut MapData, HeroSent> = map.try_into().context("HERO_SENT")?;
        let processors = aya::util::nr_cpus().map_err(|(path, error)| anyhow::anyhow!("{path}: {error}"))?;
        map.set(0, PerCpuValues::try_from(vec![sent; processors])?, 0).context("HERO_SENT")?;
        self.tell("HERO", told)
    }

    /// What the hero run's generator has sent since.
    pub fn hero_sent(&self) -> anyhow::Result<HeroSent> {
        let map = self.ebpf.map("HERO_SENT").context("the object has no map HERO_SENT")?;
        let map: PerCpuArray<&MapData, HeroSent> = map.try_into().context("HERO_SENT")?;
        let values = map.get(&0, 0).context("HERO_SENT")?;
        Ok(values.iter().max_by_key(|sent| sent.last_ns).copied().unwrap_or_default())
    }

    /// Puts flows into the kernel hash.
    pub fn fill_hash(&mut self, flows: impl Iterator<Item = (FlowKey, Entry)>) -> anyhow::Result<()> {
        let map = self.ebpf.map_mut("TABLE_HASH").context("the object has no map TABLE_HASH")?;
        let mut map: HashMap<&mut MapData, FlowKey, Entry> = map.try_into().context("TABLE_HASH")?;
        for (key, entry) in flows {
            map.insert(key, entry, 0).context("TABLE_HASH")?;
        }
        Ok(())
    }

    /// Writes all buckets of records.
    pub fn fill_records(&mut self, buckets: &[Bucket]) -> anyhow::Result<()> {
        let map = self.ebpf.map_mut("TABLE_RECORDS").context("the object has no map TABLE_RECORDS")?;
        let mut map: Array<&mut MapData, Bucket> = map.try_into().context("TABLE_RECORDS")?;
        for (index, bucket) in (0..).zip(buckets) {
            map.set(index, bucket, 0).context("TABLE_RECORDS")?;
        }
        Ok(())
    }

    pub fn tell_sink(&mut self, told: &Expected) -> anyhow::Result<()> {
        self.tell("EXPECTED", told)
    }

    /// Where the generator begins: a position in the order, or a state of its random numbers.
    pub fn seek(&mut self, state: u64) -> anyhow::Result<()> {
        let map = self.ebpf.map("ARRIVED").context("the object has no map ARRIVED")?;
        let map: Array<&MapData, u64> = map.try_into().context("ARRIVED")?;
        let picked =
            Picked { state, arrived_before: map.get(&0, 0).context("ARRIVED")?, ..Picked::default() };
        let map = self.ebpf.map_mut("PICKED").context("the object has no map PICKED")?;
        let mut map: PerCpuArray<&mut MapData, Picked> = map.try_into().context("PICKED")?;
        let processors = aya::util::nr_cpus().map_err(|(path, error)| anyhow::anyhow!("{path}: {error}"))?;
        map.set(0, PerCpuValues::try_from(vec![picked; processors])?, 0).context("PICKED")
    }

    /// How far the generator has come in the order of the flows, on the processor where it runs, and how long that took.
    pub fn position(&self) -> anyhow::Result<(u64, Duration)> {
        let map = self.ebpf.map("PICKED").context("the object has no map PICKED")?;
        let map: PerCpuArray<&MapData, Picked> = map.try_into().context("PICKED")?;
        let values = map.get(&0, 0).context("PICKED")?;
        let furthest = values.iter().max_by_key(|picked| picked.state).copied().unwrap_or_default();
        let took = furthest.last_ns.saturating_sub(furthest.first_ns);
        Ok((furthest.state, Duration::from_nanos(took)))
    }

    /// What the sink saw so far, on all processors.
    pub fn seen(&self) -> anyhow::Result<Seen> {
        let map = self.ebpf.map("SEEN").context("the object has no map SEEN")?;
        let map: PerCpuArray<&MapData, Seen> = map.try_into().context("SEEN")?;
        let values = map.get(&0, 0).context("SEEN")?;
        Ok(values.iter().fold(Seen::default(), |sum, seen| Seen {
            packets: sum.packets + seen.packets,
            connections: sum.connections + seen.connections,
            translated: sum.translated + seen.translated,
            sound: sum.sound + seen.sound,
            other: sum.other + seen.other,
        }))
    }

    /// Runs the generator for this many frames, or until a signal comes (EINTR). To be called in the client's
    /// namespace: that is where the redirect looks for its device.
    pub fn generate(&self, generator: Sending, frames: u32) -> anyhow::Result<()> {
        let name = generator.program();
        let Some(Program::Xdp(program)) = self.ebpf.program(name) else {
            bail!("the object has no program {name}")
        };
        let options = TestRunOptions {
            data_in: Some(&[0; FRAME_BYTES]),
            repeat: frames,
            attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
            ..TestRunOptions::default()
        };
        program.test_run(options).map(drop).context("BPF_PROG_TEST_RUN of the generator with live frames")
    }

    /// Runs of the bare redirect and time in them, while the kernel keeps statistics.
    pub fn bare_statistics(&self) -> anyhow::Result<(u64, Duration)> {
        let Some(Program::Xdp(program)) = self.ebpf.program("pcb_bare") else {
            bail!("the object has no program pcb_bare")
        };
        let info = program.info().context("info of pcb_bare")?;
        Ok((info.run_count(), info.run_time()))
    }

    /// Writes the one element of an array.
    fn tell<V: Pod>(&mut self, name: &str, told: &V) -> anyhow::Result<()> {
        let map = self.ebpf.map_mut(name).with_context(|| format!("the object has no map {name}"))?;
        let mut map: Array<&mut MapData, V> = map.try_into().with_context(|| name.to_owned())?;
        map.set(0, told, 0).with_context(|| name.to_owned())
    }
}

fn xdp_mut<'a>(ebpf: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut Xdp> {
    match ebpf.program_mut(name) {
        Some(Program::Xdp(program)) => Ok(program),
        _ => bail!("the object has no XDP program {name}"),
    }
}
