//! The kernel object: its bytes, and what it says its tables look like.
//!
//! Shapes are read from the object itself, so that what is compared with the pins is what the programs were compiled
//! against, not a second list.

use std::collections::BTreeMap;

use anyhow::Context as _;
use aya_obj::Object;
use aya_obj::generated::bpf_map_type;

use super::sys::Shape;

/// The programs and maps, compiled by build.rs.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("PORTCULLIS_EBPF_OBJECT_PATH"));

/// Tables that outlive the controller.
pub(super) const PINNED: [&str; 25] = [
    "CONTROL",
    "DEVICES",
    "NEXT_HOPS",
    "FLOWS",
    "FLOWS6",
    "GUEST_FLOWS",
    "CURSORS",
    "HALF_OPEN",
    "HALF_OPEN6",
    "PAGES",
    "PREFIXES",
    "SPACES",
    "ENDPOINTS",
    "PREFIXES6",
    "SPACES6",
    "ENDPOINTS6",
    "ROUTES",
    "ROUTES6",
    "REASONS",
    "RULE_COUNTS",
    "EVENTS",
    "REFUSALS",
    "DATAGRAMS",
    "TRIED",
    "LOST",
];

/// Tables of the tables of a generation; two slots each, by parity.
pub(super) const GENERATION: [&str; 7] =
    ["PAGES", "PREFIXES", "SPACES", "ENDPOINTS", "PREFIXES6", "SPACES6", "ENDPOINTS6"];

/// Tables whose size the operator chooses.
pub(super) const SIZED: [&str; 4] = ["FLOWS", "FLOWS6", "HALF_OPEN", "HALF_OPEN6"];

/// The hooks that have stages: what the program array and the program names are made of.
pub(super) const STAGED: [(&str, &str); 2] = [("xdp", "STAGES_XDP"), ("tc", "STAGES_TC")];

/// Stage programs (`pc_<hook>_<name>`) and their places in the program array.
const STAGES: [(&str, u32); 15] = [
    ("classify", 1),
    ("claim", 2),
    ("icmp", 3),
    ("fragment", 4),
    ("entry6", 5),
    ("classify6", 6),
    ("claim6", 7),
    ("nd", 8),
    ("fragment6", 9),
    ("refuse", 10),
    ("refuse6", 11),
    ("icmp6", 13),
    ("relieve", 14),
    ("adopt", 20),
    ("adopt6", 21),
];

/// The same of one hook: under TC packets may come back in.
pub(super) fn stages(hook: &str) -> impl Iterator<Item = (&'static str, u32)> {
    STAGES.into_iter().chain((hook == "tc").then_some(("loop", 12)))
}

/// Tracepoints behind which redirected packets are lost, and the programs that count them.
pub(super) const TRACEPOINTS: [(&str, &str); 2] =
    [("xdp_redirect_err", "pc_redirect_err"), ("xdp_devmap_xmit", "pc_devmap_xmit")];

/// The object's bytes, aligned for the ELF parser.
pub(super) fn bytes() -> &'static [u8] {
    OBJECT
}

/// What the object says of its maps.
#[derive(Debug)]
pub(super) struct Shapes {
    maps: BTreeMap<String, Shape>,
    inner: BTreeMap<String, Shape>,
}

impl Shapes {
    /// Reads them from the object.
    pub fn read() -> anyhow::Result<Self> {
        let object = Object::parse(bytes()).context("parsing the kernel object of this build")?;
        let shape = |map: &aya_obj::Map| Shape {
            kind: map.map_type(),
            key: map.key_size(),
            value: map.value_size(),
            max_entries: map.max_entries(),
            flags: map.map_flags(),
        };
        let maps = object.maps.iter().map(|(name, map)| (name.clone(), shape(map))).collect();
        let inner =
            object.maps.iter().filter_map(|(name, map)| Some((name.clone(), shape(&map.inner()?)))).collect();
        Ok(Self { maps, inner })
    }

    /// Shape of the map `name`.
    pub fn map(&self, name: &str) -> anyhow::Result<Shape> {
        self.maps.get(name).copied().with_context(|| format!("the kernel object has no map {name}"))
    }

    /// Shape of the template of the maps inside `name`.
    pub fn inner(&self, name: &str) -> anyhow::Result<Shape> {
        self.inner.get(name).copied().with_context(|| format!("{name} of the kernel object holds no maps"))
    }
}

/// A shape for people.
pub(super) fn describe_shape(shape: &Shape) -> String {
    let kind = match bpf_map_type::try_from(shape.kind) {
        Ok(kind) => format!("{kind:?}").trim_start_matches("BPF_MAP_TYPE_").to_lowercase(),
        Err(_) => format!("type {}", shape.kind),
    };
    format!(
        "{kind} of {} with keys of {}, values of {} bytes and flags {:#x}",
        shape.max_entries, shape.key, shape.value, shape.flags
    )
}

/// A verifier's refusal with the lines that say why: the last ones. The log before them is the way there, thousands
/// of lines of it.
pub(super) fn verifier_error(program: &str, error: aya::programs::ProgramError) -> anyhow::Error {
    const LINES: usize = 24;
    let aya::programs::ProgramError::LoadError { io_error, verifier_log } = error else {
        return anyhow::Error::new(error).context(format!("loading program {program}"));
    };
    let log = verifier_log.to_string();
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    let tail = lines.iter().skip(lines.len().saturating_sub(LINES)).map(|line| format!("    {line}\n"));
    let skipped = lines.len().saturating_sub(LINES);
    anyhow::Error::new(io_error).context(format!(
        "the kernel's verifier refused program {program}; the end of its log ({skipped} lines before it):\n{}",
        tail.collect::<String>()
    ))
}
