//! What a packet of an established flow costs, by the number of guests: each has one flow, and packets come from all of them
//! by chance.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use anyhow::{Context as _, ensure};
use portcullis_common::engine::Hook;

use super::options::Options;
use super::report::{Report, Series};
use super::section::Section;
use super::statistics::median;
use crate::backend::{Backend as _, KernelBackend};
use crate::lab::Craft;
use crate::random::Random;

pub(super) const SECTION: Section = Section {
    name: "guests",
    title: "An established packet, by the number of guests",
    figures: Vec::new,
    measure,
};

const GUESTS: [u16; 7] = [1, 4, 16, 64, 256, 500, 1000];
const DESTINATION: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const GATEWAY: [u8; 6] = [2, 0, 0, 0, 0xaa, 0];
/// XDP_REDIRECT, and XDP_DROP.
const SENT: u32 = 4;
const DROPPED: u32 = 1;

fn measure(options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let sizes = options.scale.pick(&GUESTS[..3], &GUESTS[..], &GUESTS[..]);
    let packets = options.scale.pick(50, 2000, 10_000);
    let mut samples = vec![Vec::new(); sizes.len()];
    options.each_round("guests", |_| {
        let round = measure_round(sizes, packets)?;
        samples.iter_mut().zip(round).for_each(|(samples, sample)| samples.push(sample));
        Ok(())
    })?;
    for (value, name) in ["packets of all guests by chance", "packets of one guest"].into_iter().enumerate() {
        let mut points = Vec::new();
        for (&guests, samples) in sizes.iter().zip(&samples) {
            let values: Vec<f64> = samples.iter().map(|sample: &[f64; 2]| sample[value]).collect();
            points.push((f64::from(guests), median(&values).context("there is a round")?));
        }
        report.series.push(Series {
            plot: "established_by_guests".to_owned(),
            title: "A packet of an established flow, by the number of guests with a flow each".to_owned(),
            name: name.to_owned(),
            x_label: "guests".to_owned(),
            unit: "ns a packet".to_owned(),
            logarithmic: true,
            points,
        });
    }
    Ok(())
}

/// For each number of guests the mean of packets from all by chance, and from one of them, in nanoseconds; less what a
/// packet takes that is given up at the first look.
fn measure_round(sizes: &[u16], packets: usize) -> anyhow::Result<Vec<[f64; 2]>> {
    KernelBackend::with(&policy(sizes[0]), &["lan", "up"], Hook::Xdp, |backend| {
        let mut values = Vec::new();
        for (at, &guests) in sizes.iter().enumerate() {
            if at > 0 {
                backend.change(&policy(guests))?;
            }
            let frames: Vec<Vec<u8>> = (0..guests).map(frame).collect();
            // The first packet of each flow, and a look at the second.
            for frame in frames.iter().chain(&frames) {
                time(backend, frame, SENT)?;
            }
            let mut random = Random(7);
            let mut by_chance = Vec::new();
            let mut of_one = Vec::new();
            let mut nothing = Vec::new();
            // No IP at all from a guest.
            let mut no_ip = frames[0].clone();
            no_ip[12..14].copy_from_slice(&[0x88, 0xcc]);
            // In turns, so that a disturbance meets all three.
            for _ in 0..packets {
                by_chance.push(time(backend, &frames[random.below(frames.len())], SENT)?);
                of_one.push(time(backend, &frames[0], SENT)?);
                nothing.push(time(backend, &no_ip, DROPPED)?);
            }
            let nothing = mean(nothing);
            values.push([mean(by_chance) - nothing, mean(of_one) - nothing]);
        }
        Ok(values)
    })
}

/// Of all but the twentieth that took longest: those were interrupted.
fn mean(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.truncate((values.len() * 19).div_ceil(20));
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Nanoseconds of one run.
fn time(backend: &KernelBackend, frame: &[u8], verdict: u32) -> anyhow::Result<f64> {
    let (outcome, span) = backend.datapath.time_xdp(frame, backend.ifindex("lan")?, 1)?;
    ensure!(
        outcome.verdict == verdict,
        "verdict {} instead of {verdict}: {:?}",
        outcome.verdict,
        backend.counters()?
    );
    Ok(span.as_nanos() as f64)
}

fn mac(guest: u16) -> [u8; 6] {
    let [high, low] = guest.to_be_bytes();
    [2, 0, 0, 1, high, low]
}

fn address(guest: u16) -> Ipv4Addr {
    // The first three of a subnet are not for guests.
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 0, 0, 4).to_bits() + u32::from(guest))
}

fn frame(guest: u16) -> Vec<u8> {
    Craft::new(mac(guest), address(guest), GATEWAY, DESTINATION).udp(5000, 53, b"")
}

/// Guests behind one device, with as many ports each as a thousand of them can have.
fn policy(guests: u16) -> String {
    let mut yaml = String::from(
        "virtualNetworks: [{ name: bench, addressSpace: { addressPrefixes: [10.0.0.0/16] }, \
         subnets: [{ name: guests, addressPrefix: 10.0.0.0/21 }] }]\nnetworkInterfaces:\n",
    );
    for guest in 0..guests {
        let mac = mac(guest).map(|byte| format!("{byte:02x}")).join(":");
        let _ = writeln!(
            yaml,
            "  - {{ name: g{guest}, device: lan, macAddress: '{mac}', ipConfigurations: [{{ subnet: guests, \
             privateIPAddress: {} }}] }}",
            address(guest)
        );
    }
    let members: Vec<String> = (0..guests).map(|guest| format!("g{guest}")).collect();
    let _ = write!(
        yaml,
        "publicIPAddresses: [{{ name: pip, ipAddress: 203.0.113.10, announce: proxy }}]\n\
         loadBalancers:\n  - name: lb\n    frontendIPConfigurations: [{{ name: fe, publicIPAddress: pip }}]\n    \
         backendAddressPools: [{{ name: pool, backendIPConfigurations: [{}] }}]\n    \
         outboundRules: [{{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All, \
         allocatedOutboundPorts: 32 }}]\nuplinks: [{{ device: up }}]\n",
        members.join(", ")
    );
    yaml
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_of_a_thousand_guests_is_in_order() {
        let loaded = portcullis::policy::parse("bench", &policy(1000));
        let loaded = loaded.unwrap_or_else(|problems| panic!("{problems:?}"));
        assert_eq!(loaded.network.interfaces.len(), 1000);
    }
}
