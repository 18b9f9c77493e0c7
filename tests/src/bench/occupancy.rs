//! What a claim costs, by how much of a guest's block of ports is taken towards the destination.

use std::time::Duration;

use anyhow::Context as _;
use portcullis_common::engine::Hook;

use super::options::Options;
use super::report::{Report, Series};
use super::section::Section;
use super::statistics::median;
use crate::claiming::PORTS;
use crate::occupancy::{Filled, fill_in_kernel};

pub(super) const SECTION: Section = Section {
    name: "occupancy",
    title: "A claim, by the occupancy of the block",
    figures: Vec::new,
    measure,
};

/// The last one leaves one port.
const OCCUPANCIES: [u16; 12] = [0, 128, 256, 384, 512, 640, 768, 896, 973, 1013, 1018, 1023];

fn measure(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let occupancies = options.scale.pick(&OCCUPANCIES[10..], &OCCUPANCIES[..], &OCCUPANCIES[..]);
    let claims = options.scale.pick(20, 300, 1000);
    let mut rounds: Vec<Filled> = Vec::new();
    options.each_round("claims", |_| {
        rounds.push(fill_in_kernel(Hook::Xdp, occupancies, claims)?);
        Ok(())
    })?;
    for (name, share) in [("median", 0.5), ("99 of 100 are faster", 0.99)] {
        let mut points = Vec::new();
        for (at, &occupancy) in occupancies.iter().enumerate() {
            let values: Vec<f64> =
                rounds.iter().map(|filled| percentile(&filled.claims[at].1, share)).collect();
            let value = median(&values).context("there is a round")?;
            points.push((f64::from(occupancy) / f64::from(PORTS) * 100.0, value));
        }
        report.series.push(Series {
            plot: "claim_by_occupancy".to_owned(),
            title: "The first packet of a TCP flow, by the occupancy of the guest's 1,024 ports towards its destination"
                .to_owned(),
            name: name.to_owned(),
            x_label: "ports taken, %".to_owned(),
            unit: "ns a packet".to_owned(),
            logarithmic: false,
            points,
        });
    }
    let refused: Vec<f64> = rounds.iter().map(|filled| percentile(&filled.refused_again, 0.5)).collect();
    report.note(format!(
        "occupancy: of {PORTS} ports the last was claimed in each of {} rounds; with none left a SYN is refused in {:.0} ns",
        rounds.len(),
        median(&refused).context("there is a round")?
    ));
    Ok(())
}

fn percentile(spans: &[Duration], share: f64) -> f64 {
    let mut sorted = spans.to_vec();
    sorted.sort_unstable();
    let at = (sorted.len() as f64 * share) as usize;
    sorted.get(at.min(sorted.len().saturating_sub(1))).map_or(0.0, |span| span.as_nanos() as f64)
}
