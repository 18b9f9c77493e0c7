//! The kernel's own answer to "what would happen": a second load of the programs over the same tables, with `DRY_RUN`
//! set (design §6). It looks everything up and changes nothing: no claim, no deadline, no learned address, and its
//! counters and its scratch are its own.

use std::cell::Cell;
use std::marker::PhantomData;

use anyhow::{Context as _, ensure};
use aya::maps::{MapData, PerCpuArray, ProgramArray};
use aya::{Ebpf, EbpfLoader, TestRun as _, TestRunOptions};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use portcullis_common::Reason;
use portcullis_common::engine::{Context, Hook};
use portcullis_common::layout::Count;

use super::load::{self, Datapath};
use super::object::{self, PINNED, STAGED};
use super::test_run::{self, Outcome};

/// Of the tables that outlive a controller those that a dry run has for itself; the others it reads as they are.
const OWN: [&str; 4] = ["REASONS", "RULE_COUNTS", "EVENTS", "LOST"];

/// Programs that may be asked, over the tables of a running datapath. Stays on one processor for its life, because
/// scratch and counters are per processor; so it is not to be sent to another thread.
pub struct DryRun {
    ebpf: Ebpf,
    processor: usize,
    affinity: CpuSet,
    counted: Cell<[u64; Reason::ALL.len()]>,
    _thread: PhantomData<*const ()>,
}

/// What would have happened.
#[derive(Debug, Clone)]
pub struct Answer {
    pub outcome: Outcome,
    /// The last word on the packet: of the counter that would have moved. `None` when XDP leaves it to TC.
    pub reason: Option<Reason>,
    /// What the stages found out.
    pub context: Context,
}

impl Datapath {
    /// Loads the programs once more, to ask them. Takes as long as a start does, some tenths of a second.
    pub fn dry_run(&self) -> anyhow::Result<DryRun> {
        let mut loader = EbpfLoader::new();
        let (buckets, buckets6) = (self.tables.flows.shape.max_entries, self.tables.flows6.shape.max_entries);
        load::size(&mut loader, buckets, buckets6).override_global("DRY_RUN", &1u32, true);
        for name in PINNED.into_iter().filter(|name| !OWN.contains(name)) {
            loader.map_pin_path(name, self.pins.map(name));
        }
        let mut ebpf = loader.load(object::bytes()).context("loading the kernel object for a dry run")?;
        load::load_programs(&mut ebpf)?;
        for (hook, map) in STAGED {
            for (stage, index) in object::stages(hook) {
                let name = format!("pc_{hook}_{stage}");
                let fd =
                    load::program_fd(&ebpf, &name)?.try_clone().with_context(|| format!("dup of {name}"))?;
                let array =
                    ebpf.map_mut(map).with_context(|| format!("the kernel object has no map {map}"))?;
                let mut array: ProgramArray<&mut MapData> = array.try_into().context(map)?;
                array.set(index, &fd, 0).with_context(|| format!("setting {map}[{index}] to {name}"))?;
            }
        }
        let affinity = sched_getaffinity(Pid::from_raw(0)).context("sched_getaffinity")?;
        let processor = (0..CpuSet::count())
            .find(|&n| affinity.is_set(n).unwrap_or(false))
            .context("this thread may run on no processor")?;
        let mut only = CpuSet::new();
        only.set(processor).context("choosing a processor")?;
        sched_setaffinity(Pid::from_raw(0), &only).context("sched_setaffinity")?;
        Ok(DryRun {
            ebpf,
            processor,
            affinity,
            counted: Cell::new([0; Reason::ALL.len()]),
            _thread: PhantomData,
        })
    }
}

impl Drop for DryRun {
    fn drop(&mut self) {
        let _ = sched_setaffinity(Pid::from_raw(0), &self.affinity);
    }
}

impl DryRun {
    /// A frame received on device `ifindex` of this network namespace, met by this hook.
    pub fn ingress(&self, hook: Hook, frame: &[u8], ifindex: u32) -> anyhow::Result<Answer> {
        match hook {
            Hook::Xdp => self.run(0, "pc_xdp", frame, |frame| test_run::xdp_bytes(frame, ifindex)),
            Hook::Tc => self.run(1, "pc_tc", frame, |_| test_run::skb_bytes(ifindex)),
        }
    }

    /// A frame this host sends to the guest behind device `ifindex`.
    pub fn from_host(&self, frame: &[u8], ifindex: u32) -> anyhow::Result<Answer> {
        self.run(1, "pc_host", frame, |_| test_run::skb_bytes(ifindex))
    }

    fn run(
        &self,
        slot: u32,
        program: &str,
        frame: &[u8],
        context: impl Fn(&[u8]) -> Vec<u8>,
    ) -> anyhow::Result<Answer> {
        let mut out = vec![0; frame.len() + test_run::GROWTH];
        let context = context(frame);
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::default()
        };
        let result = match self.ebpf.program(program) {
            Some(aya::programs::Program::Xdp(program)) => program.test_run(options),
            Some(aya::programs::Program::SchedClassifier(program)) => program.test_run(options),
            _ => anyhow::bail!("the kernel object has no program {program}"),
        };
        let result = result.with_context(|| format!("BPF_PROG_TEST_RUN {program}, dry"))?;
        out.truncate(result.data_size_out as usize);
        let scratch: PerCpuArray<&MapData, Context> = self.map("SCRATCH")?.try_into().context("SCRATCH")?;
        let contexts = scratch.get(&slot, 0).context("reading the scratch of a dry run")?;
        ensure!(self.processor < contexts.len(), "the kernel has no processor {}", self.processor);
        Ok(Answer {
            outcome: Outcome { verdict: result.return_value, packet: out },
            reason: self.moved()?,
            context: contexts[self.processor],
        })
    }

    fn map(&self, name: &str) -> anyhow::Result<&aya::maps::Map> {
        self.ebpf.map(name).with_context(|| format!("the kernel object has no map {name}"))
    }

    /// The counter that has moved since the last question: a packet moves at most one.
    fn moved(&self) -> anyhow::Result<Option<Reason>> {
        let counts: PerCpuArray<&MapData, Count> = self.map("REASONS")?.try_into().context("REASONS")?;
        let mut before = self.counted.get();
        let mut moved = None;
        for (reason, seen) in Reason::ALL.iter().zip(&mut before) {
            let all = counts.get(&(*reason as u32), 0).context("reading the counters of a dry run")?;
            let now = all.iter().map(|count| count.packets).sum();
            if now != *seen {
                moved = Some(*reason);
                *seen = now;
            }
        }
        self.counted.set(before);
        Ok(moved)
    }
}
