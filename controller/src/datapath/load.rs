//! From an object file to programs ready to attach: adopt or make the tables, load, fill the stages.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use aya::maps::{Map, MapData, ProgramArray};
use aya::programs::{Program, ProgramFd};
use aya::{Ebpf, EbpfLoader};
use nix::fcntl::Flock;
use portcullis_common::layout::{
    HOP_HOST, HOP_LOOP, NEXT_HOP_HOST, NEXT_HOP_LOOP, NextHop, RuleCount, half_open_mask,
};

use portcullis_common::quota::PLACE_SLOTS;

use super::control::ControlWord;
use super::kernel_types::Namespace;
use super::migrate::{Found, Old};
use super::object::{self, GENERATION, PINNED, SIZED, STAGED, Shapes};
use super::pins::{self, Pins};
use super::sys;
use super::table::Table;

/// What can be chosen when the datapath is made.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// Buckets of the flow table, eight half-records of 64 bytes each; rounded up to a power of two. A flow takes two
    /// half-records and the table works well up to half full, so this is `max_flows * 2 * 2 / 8`.
    pub flow_buckets: u32,
    /// The same for IPv6, whose half-records are 128 bytes.
    pub flow_buckets6: u32,
    /// What the programs themselves log; off costs nothing, anything else costs every packet.
    pub log_level: log::LevelFilter,
    /// Tables of another layout are thrown away instead of being copied, or the start refused.
    pub reset: bool,
}

/// A place in the ring of half-open flows has 28 bits for a slot.
const MOST_BUCKETS: u64 = (PLACE_SLOTS / 8) as u64;

impl LoadOptions {
    /// Options for at most this many flows of either family at once.
    pub fn for_flows(max_flows: u32, max_flows6: u32) -> Self {
        let buckets = |flows: u32| (u64::from(flows) * 4).div_ceil(8).next_power_of_two();
        Self {
            flow_buckets: buckets(max_flows).min(MOST_BUCKETS) as u32,
            flow_buckets6: buckets(max_flows6).min(MOST_BUCKETS) as u32,
            ..Self::default()
        }
    }
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { flow_buckets: 1 << 16, flow_buckets6: 1 << 12, log_level: log::LevelFilter::Off, reset: false }
    }
}

/// The tables, by name.
#[derive(Debug)]
pub(super) struct Tables {
    pub control: Table,
    pub devices: Table,
    pub next_hops: Table,
    pub flows: Table,
    pub flows6: Table,
    pub guest_flows: Table,
    pub pages: Table,
    pub prefixes: Table,
    pub spaces: Table,
    pub endpoints: Table,
    pub prefixes6: Table,
    pub spaces6: Table,
    pub endpoints6: Table,
    pub routes: Table,
    pub routes6: Table,
    pub reasons: Table,
    pub rule_counts: Table,
    pub lost: Table,
    pub tried: Table,
}

/// The datapath: its tables, its programs and what is attached where. One per machine (or network namespace) and pin
/// directory. Dropping it leaves everything running; [`super::down`] takes it away.
pub struct Datapath {
    pub(super) pins: Pins,
    pub(super) ebpf: Ebpf,
    pub(super) shapes: Shapes,
    pub(super) tables: Tables,
    pub(super) control: ControlWord,
    /// Number of this load's program arrays.
    pub(super) stage_number: u32,
    /// Counts of rules when the generation in force began; those not in here began with it.
    pub(super) counted_before: HashMap<u32, RuleCount>,
    /// The pages that this process put in force last.
    pub(super) pages_in_force: Option<Table>,
    /// Something attached may call into them.
    pub(super) stages_in_use: bool,
    pub(super) adopted: bool,
    /// Tables of another layout whose flows are on their way here.
    pub(super) old: Option<Box<Old>>,
    notes: Vec<String>,
    _lock: Flock<File>,
}

impl Datapath {
    /// Opens the datapath below `pins`: adopts the tables that are there, makes those that are not, and loads this
    /// build's programs over them. Nothing is attached and no running program is touched.
    ///
    /// # Errors
    /// If `pins` is not in a bpf filesystem, is in use, holds tables of another shape, or if a program is refused;
    /// a datapath that was not there before is removed again.
    pub fn open(pins: &Path, options: &LoadOptions) -> anyhow::Result<Self> {
        let pins = Pins::new(pins);
        pins.prepare()?;
        let lock = pins.lock()?;
        let fresh = pins::names(&pins.maps_dir())?.is_empty();
        let load = || {
            let (old, note) = Self::other_layout(&pins, options)?;
            let mut datapath = Self::load(&pins, options, lock, !fresh)?;
            datapath.notes.extend(note);
            if let Some(old) = old {
                datapath.adopted = true;
                datapath.begin_migration(old)?;
            }
            Ok(datapath)
        };
        load().inspect_err(|_| {
            // Only what is of this layout: another's programs may be running.
            if fresh && let Err(error) = super::down::abandon(pins.root()) {
                log::warn!("removing what was made before the error: {error:#}");
            }
        })
    }

    /// The tables of another layout that are to be migrated, or what is said about their being thrown away.
    fn other_layout(
        pins: &Pins,
        options: &LoadOptions,
    ) -> anyhow::Result<(Option<Box<Old>>, Option<String>)> {
        Ok(match (Old::find(pins)?, options.reset) {
            (Found::Nothing, _) => (None, None),
            (Found::Readable(old), false) => (Some(old), None),
            (Found::Readable(old), true) => {
                let note = format!("told to reset: the {} live flows of another layout are lost", old.live());
                (None, Some(note))
            }
            (Found::Unreadable(error), true) => {
                (None, Some(format!("told to reset: the live flows of another layout are lost ({error:#})")))
            }
            (Found::Unreadable(error), false) => bail!(
                "{error:#}; what runs goes on as it is. Either run a build that knows it, or start this one with \
                 `--reset`, which throws every live flow away"
            ),
        })
    }

    fn load(pins: &Pins, options: &LoadOptions, lock: Flock<File>, adopted: bool) -> anyhow::Result<Self> {
        let mut notes = Vec::new();
        let shapes = Shapes::read()?;
        let buckets = flow_buckets(pins, &shapes, "FLOWS", options.flow_buckets, &mut notes)?;
        let buckets6 = flow_buckets(pins, &shapes, "FLOWS6", options.flow_buckets6, &mut notes)?;
        for name in PINNED {
            pins::open_checked(name, &pins.map(name), &shapes.map(name)?, SIZED.contains(&name))?;
        }
        let log_level = options.log_level as u8;
        let mut loader = EbpfLoader::new();
        size(&mut loader, buckets, buckets6).override_global(aya_log::LEVEL, &log_level, false);
        let (namespace, note) = match Namespace::here() {
            Ok(namespace) => (namespace, None),
            // The counters then tell of the whole machine; nothing else depends on it.
            Err(error) => (
                Namespace { inode: 0, device_net: 0, net_inode: 0 },
                Some(format!("losses are counted for the whole machine: {error:#}")),
            ),
        };
        notes.extend(note);
        loader
            .override_global("NETNS_INODE", &namespace.inode, true)
            .override_global("DEVICE_NET_OFFSET", &namespace.device_net, true)
            .override_global("NET_INODE_OFFSET", &namespace.net_inode, true);
        for name in PINNED {
            loader.map_pin_path(name, pins.map(name));
        }
        let mut ebpf = loader.load(object::bytes()).context("loading the kernel object")?;
        let tables = Tables::open(pins, &shapes)?;
        check_inner(&tables, &shapes)?;
        let control = ControlWord::new(&tables.control)?;
        control.adopt(buckets, buckets6)?;
        for (index, kind) in [(NEXT_HOP_HOST, HOP_HOST), (NEXT_HOP_LOOP, HOP_LOOP)] {
            let index = u32::from(index);
            if tables.next_hops.lookup::<u32, NextHop>(&index)?.is_none_or(|hop| hop.kind != kind) {
                tables.next_hops.update(&index, &NextHop { kind, ..NextHop::default() }, 0)?;
            }
        }
        load_programs(&mut ebpf)?;
        let stage_number = pins.stage_numbers()?.last().map_or(1, |last| last + 1);
        fill_stages(&mut ebpf, pins, stage_number)?;
        Ok(Self {
            pins: pins.clone(),
            ebpf,
            shapes,
            tables,
            control,
            stage_number,
            counted_before: HashMap::new(),
            pages_in_force: None,
            stages_in_use: false,
            adopted,
            old: None,
            notes,
            _lock: lock,
        })
    }

    /// The policy generation in force; 0 before the first.
    pub fn generation(&self) -> u32 {
        self.control.generation()
    }

    /// The secrets of the flow hash, which also choose ports and backends.
    pub fn seed(&self) -> [u64; 2] {
        self.control.read().seed
    }

    /// Were there tables of an earlier controller, of this layout or of one that was migrated?
    pub fn adopted(&self) -> bool {
        self.adopted
    }

    /// What the operator should know about how the datapath was opened, such as a wish that could not be met.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The directory of the pins.
    pub fn pins(&self) -> &Path {
        self.pins.root()
    }

    /// Buckets of the flow table.
    pub fn flow_buckets(&self) -> u32 {
        self.tables.flows.shape.max_entries
    }
}

impl Drop for Datapath {
    /// Only tidies: a load that never came to run takes its program arrays, and with them its programs, along.
    fn drop(&mut self) {
        if !self.stages_in_use {
            for (hook, _) in STAGED {
                if let Err(error) = pins::unpin(&self.pins.stages(self.stage_number, hook)) {
                    log::warn!("{error:#}");
                }
            }
        }
    }
}

impl Tables {
    fn open(pins: &Pins, shapes: &Shapes) -> anyhow::Result<Self> {
        let open = |name: &str| {
            pins::open_checked(name, &pins.map(name), &shapes.map(name)?, SIZED.contains(&name))?
                .with_context(|| format!("{} is gone", pins.map(name).display()))
        };
        Ok(Self {
            control: open("CONTROL")?,
            devices: open("DEVICES")?,
            next_hops: open("NEXT_HOPS")?,
            flows: open("FLOWS")?,
            flows6: open("FLOWS6")?,
            guest_flows: open("GUEST_FLOWS")?,
            pages: open("PAGES")?,
            prefixes: open("PREFIXES")?,
            spaces: open("SPACES")?,
            endpoints: open("ENDPOINTS")?,
            prefixes6: open("PREFIXES6")?,
            spaces6: open("SPACES6")?,
            endpoints6: open("ENDPOINTS6")?,
            routes: open("ROUTES")?,
            routes6: open("ROUTES6")?,
            reasons: open("REASONS")?,
            rule_counts: open("RULE_COUNTS")?,
            lost: open("LOST")?,
            tried: open("TRIED")?,
        })
    }

    /// The tables of tables, in the order of [`GENERATION`].
    pub fn of_generation(&self) -> [&Table; 7] {
        [
            &self.pages,
            &self.prefixes,
            &self.spaces,
            &self.endpoints,
            &self.prefixes6,
            &self.spaces6,
            &self.endpoints6,
        ]
    }
}

/// Buckets a flow table gets: what was asked for, or what it already has.
fn flow_buckets(
    pins: &Pins,
    shapes: &Shapes,
    name: &str,
    wish: u32,
    notes: &mut Vec<String>,
) -> anyhow::Result<u32> {
    let wish = wish.max(8).checked_next_power_of_two().context("flow_buckets is above 2^31")?;
    let Some(flows) = pins::open_checked(name, &pins.map(name), &shapes.map(name)?, true)? else {
        return Ok(wish);
    };
    let have = flows.shape.max_entries;
    ensure!(have.is_power_of_two(), "{} has {have} buckets, not a power of two", pins.map(name).display());
    if have != wish {
        notes.push(format!(
            "the flow table {name} keeps its {have} buckets instead of {wish}: another size needs `portcullis down` \
             first, which ends every live flow"
        ));
    }
    Ok(have)
}

/// The other half of the shape guard: what stands in the slots of an adopted table of tables. The kernel compares it
/// with the template of the *pinned* table whenever a slot is set, and only here with the one of this build.
fn check_inner(tables: &Tables, shapes: &Shapes) -> anyhow::Result<()> {
    for (table, name) in tables.of_generation().into_iter().zip(GENERATION) {
        let want = shapes.inner(name)?;
        for slot in 0..2u32 {
            let Some(id) = table.lookup::<u32, u32>(&slot)? else { continue };
            let fd = sys::map_by_id(id).with_context(|| format!("BPF_MAP_GET_FD_BY_ID of {name}[{slot}]"))?;
            let (_, have) = sys::map_info(fd.as_fd()).with_context(|| format!("shape of {name}[{slot}]"))?;
            ensure!(
                (have.kind, have.key, have.value, have.flags)
                    == (want.kind, want.key, want.value, want.flags),
                "{name}[{slot}] is {}, this build expects {} (of any size); it was left by another build: \
                 `portcullis down` removes it, and with it every live flow",
                object::describe_shape(&have),
                object::describe_shape(&want)
            );
        }
    }
    Ok(())
}

/// Gives the tables whose size the operator chooses theirs: the flow tables their buckets, and each its ring of half-open flows.
pub(super) fn size<'a, 'b>(
    loader: &'a mut EbpfLoader<'b>,
    buckets: u32,
    buckets6: u32,
) -> &'a mut EbpfLoader<'b> {
    let ring = |buckets: u32| half_open_mask(buckets - 1) + 1;
    loader
        .map_max_entries("FLOWS", buckets)
        .map_max_entries("FLOWS6", buckets6)
        .map_max_entries("HALF_OPEN", ring(buckets))
        .map_max_entries("HALF_OPEN6", ring(buckets6))
}

pub(super) fn load_programs(ebpf: &mut Ebpf) -> anyhow::Result<()> {
    let mut names: Vec<String> = ebpf.programs().map(|(name, _)| name.to_owned()).collect();
    names.sort_unstable();
    for name in names {
        let loaded = match ebpf.program_mut(&name) {
            Some(Program::Xdp(program)) => program.load(),
            Some(Program::SchedClassifier(program)) => program.load(),
            Some(Program::RawTracePoint(program)) => program.load(),
            _ => bail!("program {name} of the kernel object is of a kind this build does not know"),
        };
        loaded.map_err(|error| object::verifier_error(&name, error))?;
    }
    Ok(())
}

/// Fills this load's program arrays and pins them: the kernel empties a program array when its last descriptor or pin
/// goes, and the programs have to find their stages after this process has ended.
fn fill_stages(ebpf: &mut Ebpf, pins: &Pins, number: u32) -> anyhow::Result<()> {
    for (hook, map) in STAGED {
        let stages: Vec<(String, u32, ProgramFd)> = object::stages(hook)
            .map(|(stage, index)| {
                let name = format!("pc_{hook}_{stage}");
                let fd = program_fd(ebpf, &name)?.try_clone().with_context(|| format!("dup of {name}"))?;
                Ok((name, index, fd))
            })
            .collect::<anyhow::Result<_>>()?;
        let array = ebpf.map_mut(map).with_context(|| format!("the kernel object has no map {map}"))?;
        let mut array: ProgramArray<&mut MapData> = array.try_into().context(map)?;
        for (name, index, fd) in stages {
            array.set(index, &fd, 0).with_context(|| format!("setting {map}[{index}] to {name}"))?;
        }
        let pin = pins.stages(number, hook);
        let Some(Map::ProgramArray(data)) = ebpf.map(map) else { bail!("{map} is not a program array") };
        sys::pin(data.fd().as_fd(), &pin).with_context(|| format!("BPF_OBJ_PIN {}", pin.display()))?;
    }
    Ok(())
}

/// Descriptor of the loaded program `name`.
pub(super) fn program_fd<'a>(ebpf: &'a Ebpf, name: &str) -> anyhow::Result<&'a ProgramFd> {
    let fd = match ebpf.program(name) {
        Some(Program::Xdp(program)) => program.fd(),
        Some(Program::SchedClassifier(program)) => program.fd(),
        Some(Program::RawTracePoint(program)) => program.fd(),
        Some(_) => bail!("program {name} is of a kind this build does not know"),
        None => bail!("the kernel object has no program {name}"),
    };
    fd.with_context(|| format!("program {name} is not loaded"))
}
