//! What `run --metrics` tells Prometheus: SNAT under the REST names of Azure's metrics (`reference/azure.md` §2.8), the
//! rest under our own.
//!
//! Azure also has `ByteCount`, `PacketCount` and `SYNCount` by frontend and port. The datapath counts by reason and by rule
//! only, and what a flow has counted goes with its record, so these cannot be told truly and are not told at all.

use std::net::IpAddr;

use anyhow::Context as _;
use portcullis_common::Reason;
use portcullis_common::layout::HOP_GUEST;
use prometheus::proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Encoder as _, TextEncoder};

use crate::daemon::Shared;
use crate::flows::ports::PortUse;
use crate::flows::snat::{GuestPorts, guests};

/// The content type of [`text`].
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// A backend of a listener, and whether it takes new flows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendHealth {
    pub frontend: IpAddr,
    pub frontend_port: u16,
    /// `Tcp` or `Udp`.
    pub protocol: &'static str,
    pub backend: IpAddr,
    pub backend_port: u16,
    /// `vm1/ipconfig1`: two virtual networks may have the same addresses.
    pub guest: String,
    pub healthy: bool,
}

/// Everything, as Prometheus reads it. Costs a look at the flow tables.
pub fn text(shared: &Shared) -> anyhow::Result<Vec<u8>> {
    let (reasons, tried) = {
        let datapath = shared.datapath();
        (datapath.reasons()?, datapath.tried()?)
    };
    let in_force = shared.in_force();
    let used = PortUse::look(shared.flow_tables());
    let mut families = snat(&guests(shared, &in_force, &used));
    let count = |reason: Reason| reasons.get(reason as usize).map_or(0, |count| count.packets);
    families.push(connections(tried.iter().sum(), count(Reason::SnatExhausted) + count(Reason::SnatRefused)));
    families.extend(availability(&super::balancing::backends(shared)));
    let by_reason = |of: fn(&portcullis_common::layout::Count) -> u64| -> Vec<Metric> {
        let pairs = Reason::ALL.iter().zip(&reasons);
        pairs.map(|(reason, n)| counter(&[("reason", reason.label())], of(n) as f64)).collect()
    };
    families.push(family(
        "portcullis_packets_total",
        "Packets by what became of them; the reasons are those of `portcullis drops`.",
        MetricType::COUNTER,
        by_reason(|count| count.packets),
    ));
    families.push(family(
        "portcullis_bytes_total",
        "The same in bytes.",
        MetricType::COUNTER,
        by_reason(|count| count.bytes),
    ));
    let flows = ["ipv4", "ipv6"].iter().zip(used.flows());
    families.push(family(
        "portcullis_flows",
        "Live flows.",
        MetricType::GAUGE,
        flows.map(|(name, n)| gauge(&[("family", name)], n as f64)).collect(),
    ));
    families.extend(by_guest(shared)?);
    families.push(candidates(&tried));
    families.push(health(shared));
    families.retain(|family| !family.get_metric().is_empty());
    let mut text = Vec::new();
    TextEncoder::new().encode(&families, &mut text).context("writing metrics")?;
    Ok(text)
}

/// What each guest holds of the flow table.
fn by_guest(shared: &Shared) -> anyhow::Result<Vec<MetricFamily>> {
    let hops = shared.datapath().next_hops()?;
    let registry = shared.registry().clone();
    let uses = shared.flow_tables()[0].guests();
    let (mut held, mut refused, mut replaced) = (Vec::new(), Vec::new(), Vec::new());
    for (index, _) in hops.iter().filter(|(_, hop)| hop.kind == HOP_GUEST) {
        let used = uses.read(*index);
        let name = registry.next_hop_key(*index).unwrap_or("?");
        let labels = [("guest", name.strip_prefix("guest:").unwrap_or(name))];
        held.push(gauge(&labels, used.held.into()));
        refused.push(counter(&labels, used.refused as f64));
        replaced.push(counter(&labels, used.replaced as f64));
    }
    Ok(vec![
        family(
            "portcullis_guest_flows",
            "Flows that each guest holds, against flowTable.maxFlowsPerGuest.",
            MetricType::GAUGE,
            held,
        ),
        family(
            "portcullis_guest_refused_total",
            "Packets that opened no flow because their guest held as many as it may.",
            MetricType::COUNTER,
            refused,
        ),
        family(
            "portcullis_guest_replaced_total",
            "Half-open flows from outside that were ended to make room for new ones.",
            MetricType::COUNTER,
            replaced,
        ),
    ])
}

fn snat(guests: &[GuestPorts]) -> Vec<MetricFamily> {
    let (mut allocated, mut in_use) = (Vec::new(), Vec::new());
    for guest in guests {
        for on in &guest.ports {
            let protocol = capital(&on.protocol);
            let labels = |awaiting| {
                [
                    ("FrontendIPAddress", on.frontend.as_str()),
                    ("BackendIPAddress", guest.private_address.as_str()),
                    ("ProtocolType", protocol.as_str()),
                    ("IsAwaitingRemoval", awaiting),
                    // Two virtual networks may have the same addresses.
                    ("Guest", guest.guest.as_str()),
                ]
            };
            allocated.push(gauge(&labels("false"), on.allocated.into()));
            allocated.push(gauge(&labels("true"), on.draining.into()));
            in_use.push(gauge(&labels("false"), on.used.into()));
            in_use.push(gauge(&labels("true"), on.draining_used.into()));
        }
    }
    vec![
        family(
            "AllocatedSnatPorts",
            "Allocated SNAT ports; those that drain are awaiting removal.",
            MetricType::GAUGE,
            allocated,
        ),
        family(
            "UsedSnatPorts",
            "SNAT ports with a live flow; of TCP each may serve many destinations.",
            MetricType::GAUGE,
            in_use,
        ),
    ]
}

fn connections(made: u64, refused: u64) -> MetricFamily {
    family(
        "SnatConnectionCount",
        "SNAT connections since the tables were made, of all guests: ports claimed, and packets refused for want of one.",
        MetricType::COUNTER,
        vec![
            counter(&[("ConnectionState", "Successful")], made as f64),
            counter(&[("ConnectionState", "Failed")], refused as f64),
        ],
    )
}

fn availability(backends: &[BackendHealth]) -> Vec<MetricFamily> {
    let percent = |healthy: bool| if healthy { 100.0 } else { 0.0 };
    let mut vips: std::collections::BTreeMap<(IpAddr, u16, &str), bool> = std::collections::BTreeMap::new();
    let mut dips = Vec::new();
    for backend in backends {
        *vips.entry((backend.frontend, backend.frontend_port, backend.protocol)).or_default() |=
            backend.healthy;
        let labels = [
            ("FrontendIPAddress", backend.frontend.to_string()),
            ("FrontendPort", backend.frontend_port.to_string()),
            ("BackendIPAddress", backend.backend.to_string()),
            ("BackendPort", backend.backend_port.to_string()),
            ("ProtocolType", backend.protocol.to_owned()),
            ("Guest", backend.guest.clone()),
        ];
        let labels: Vec<(&str, &str)> = labels.iter().map(|(name, value)| (*name, value.as_str())).collect();
        dips.push(gauge(&labels, percent(backend.healthy)));
    }
    let vips = vips.into_iter().map(|((address, port, protocol), healthy)| {
        let (address, port) = (address.to_string(), port.to_string());
        let labels =
            [("FrontendIPAddress", address.as_str()), ("FrontendPort", &port), ("ProtocolType", protocol)];
        gauge(&labels, percent(healthy))
    });
    vec![
        family(
            "VipAvailability",
            "100 while a backend of the listener takes new flows, else 0.",
            MetricType::GAUGE,
            vips.collect(),
        ),
        family("DipAvailability", "100 while the backend's probe succeeds, else 0.", MetricType::GAUGE, dips),
    ]
}

fn candidates(tried: &[u64]) -> MetricFamily {
    let mut histogram = Histogram::default();
    let (mut so_far, mut sum) = (0, 0.0);
    let mut buckets = Vec::new();
    for (i, &n) in tried.iter().enumerate() {
        so_far += n;
        let bound = 1u64 << i;
        sum += (n * bound) as f64;
        // The last one counts what is beyond.
        if i + 1 < tried.len() {
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(bound as f64);
            bucket.set_cumulative_count(so_far);
            buckets.push(bucket);
        }
    }
    histogram.set_bucket(buckets);
    histogram.set_sample_count(so_far);
    histogram.set_sample_sum(sum);
    let mut metric = Metric::default();
    metric.set_histogram(histogram);
    family(
        "portcullis_snat_candidates_tried",
        "Ports tried until one could be claimed. The sum takes each for the bound of its bucket: it is no less than the truth and less than twice it, but for claims beyond 1024.",
        MetricType::HISTOGRAM,
        vec![metric],
    )
}

fn health(shared: &Shared) -> MetricFamily {
    let events = shared.health_log.events();
    let standing = events.iter().map(|event| {
        let labels = [
            ("event", event.event.as_str()),
            ("severity", &event.severity),
            ("guest", &event.guest),
            ("frontend", &event.frontend),
            ("protocol", &event.protocol),
            ("destination", event.destination.as_deref().unwrap_or_default()),
        ];
        gauge(&labels, 1.0)
    });
    family("portcullis_health_event", "1 while the event lasts.", MetricType::GAUGE, standing.collect())
}

/// `Tcp` of `tcp`.
fn capital(word: &str) -> String {
    let (first, rest) = word.split_at(1.min(word.len()));
    first.to_ascii_uppercase() + rest
}

fn family(name: &str, help: &str, kind: MetricType, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

fn labelled(labels: &[(&str, &str)]) -> Metric {
    let pairs = labels.iter().map(|(name, value)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value((*value).to_owned());
        pair
    });
    Metric::from_label(pairs.collect())
}

fn gauge(labels: &[(&str, &str)], value: f64) -> Metric {
    let (mut metric, mut gauge) = (labelled(labels), Gauge::default());
    gauge.set_value(value);
    metric.set_gauge(gauge);
    metric
}

fn counter(labels: &[(&str, &str)], value: f64) -> Metric {
    let (mut metric, mut counter) = (labelled(labels), Counter::default());
    counter.set_value(value);
    metric.set_counter(counter);
    metric
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flows::snat::PortsOn;

    fn encode(families: &[MetricFamily]) -> String {
        let mut text = Vec::new();
        TextEncoder::new().encode(families, &mut text).unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn ports_have_azures_names_and_dimensions() {
        let on = PortsOn {
            frontend: "203.0.113.10".into(),
            protocol: "tcp".into(),
            allocated: 512,
            used: 3,
            draining: 512,
            draining_used: 1,
            ..PortsOn::default()
        };
        let guest = GuestPorts {
            guest: "vm1/a".into(),
            private_address: "10.0.0.4".into(),
            ports: vec![on],
            ..GuestPorts::default()
        };
        let text = encode(&snat(&[guest]));
        let line = |name: &str, awaiting: &str, value: u32| {
            format!(
                "{name}{{FrontendIPAddress=\"203.0.113.10\",BackendIPAddress=\"10.0.0.4\",ProtocolType=\"Tcp\",\
                 IsAwaitingRemoval=\"{awaiting}\",Guest=\"vm1/a\"}} {value}\n"
            )
        };
        for wanted in [
            line("AllocatedSnatPorts", "false", 512),
            line("AllocatedSnatPorts", "true", 512),
            line("UsedSnatPorts", "false", 3),
            line("UsedSnatPorts", "true", 1),
        ] {
            assert!(text.contains(&wanted), "{wanted} in {text}");
        }
    }

    #[test]
    fn candidates_are_a_histogram_of_powers_of_two() {
        let mut tried = [0; portcullis_common::snat::TRIED_BUCKETS as usize];
        (tried[0], tried[2], tried[11]) = (10, 5, 1);
        let text = encode(&[candidates(&tried)]);
        for wanted in [
            "portcullis_snat_candidates_tried_bucket{le=\"1\"} 10",
            "{le=\"2\"} 10",
            "{le=\"4\"} 15",
            "{le=\"1024\"} 15",
            "{le=\"+Inf\"} 16",
            "_count 16",
        ] {
            assert!(text.contains(wanted), "{wanted} in {text}");
        }
    }

    #[test]
    fn a_listener_is_available_while_one_backend_is() {
        let backend = |last, healthy| BackendHealth {
            frontend: [203, 0, 113, 10].into(),
            frontend_port: 80,
            protocol: "Tcp",
            backend: [10, 0, 0, last].into(),
            backend_port: 8080,
            guest: format!("vm{last}/ipconfig1"),
            healthy,
        };
        let text = encode(&availability(&[backend(4, false), backend(5, true)]));
        assert!(text.contains("VipAvailability{FrontendIPAddress=\"203.0.113.10\",FrontendPort=\"80\",ProtocolType=\"Tcp\"} 100"), "{text}");
        assert!(
            text.contains("BackendIPAddress=\"10.0.0.4\",BackendPort=\"8080\",ProtocolType=\"Tcp\",Guest=\"vm4/ipconfig1\"} 0"),
            "{text}"
        );
    }
}
