//! What a flow takes of the kernel's memory.

use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;

use anyhow::Context as _;
use aya::maps::MapData;
use portcullis::datapath::{Datapath, LoadOptions};
use portcullis::policy::network::FlowTable;
use portcullis_common::layout::ABI;

use super::figure::{Better, By, Figure};
use super::options::Options;
use super::report::Report;
use super::section::Section;
use crate::lab::BpfFs;

pub(super) const SECTION: Section =
    Section { name: "memory", title: "Kernel memory of a flow", figures, measure };

fn figures() -> Vec<String> {
    FAMILIES.map(|family| family.figure.to_owned()).into()
}

struct Family {
    figure: &'static str,
    map: &'static str,
    flows: fn(&FlowTable) -> u32,
    must: f64,
}

const FAMILIES: [Family; 2] = [
    Family { figure: "bytes_per_flow_v4", map: "FLOWS", flows: |table| table.max_flows, must: 256.0 },
    Family { figure: "bytes_per_flow_v6", map: "FLOWS6", flows: |table| table.max_flows_v6, must: 512.0 },
];

fn measure(_: &Options, report: &mut Report) -> anyhow::Result<()> {
    let wanted = FlowTable::default();
    let pins = BpfFs::mount()?;
    let root = pins.path().join("portcullis");
    let datapath = Datapath::open(&root, &LoadOptions::for_flows(wanted.max_flows, wanted.max_flows_v6))?;
    for Family { figure, map, flows, must } in FAMILIES {
        let flows = flows(&wanted);
        let bytes = locked(&root.join(format!("v{ABI}/maps/{map}")))?;
        // The map's own header is a page, which no flow grows.
        let each = (bytes as f64 / f64::from(flows)).floor();
        report.figures.push(Figure::once(figure, "B", each).must(By::Value, Better::Less, must, must - 1.0));
        report.note(format!(
            "{figure}: {bytes} bytes of kernel memory, as the kernel tells of the map {map} (`memlock`), for the {flows} \
             flows that the default policy makes it for. In it are both directions of each flow, which are also the claim \
             of its port, the mappings of UDP sockets, and the half of all slots that is kept free so that no key is refused; \
             there is no other table that grows with flows.",
        ));
    }
    drop(datapath);
    Ok(())
}

/// Memory of a pinned map, bytes.
fn locked(pin: &Path) -> anyhow::Result<u64> {
    let map = MapData::from_pin(pin).with_context(|| format!("opening {}", pin.display()))?;
    let path = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let locked = text.lines().find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok());
    locked.with_context(|| format!("{path} says nothing of memlock: {text}"))
}
