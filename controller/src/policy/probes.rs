//! Health probes: how a backend is asked whether it lives (`reference/azure.md` §3).

use super::diagnostics::Problems;
use super::fields::{Complaint, Fields};
use super::names::Names;
use super::network::{self, ProbeProtocol};
use super::register::Register;
use super::shape;
use super::source::{At, Span, Text};
use super::tree::Node;

/// Ports of services that an HTTP request must not be sent to, as in Azure.
pub const NO_HTTP: [u32; 9] = [19, 21, 25, 70, 110, 119, 143, 220, 993];

/// Seconds between probes; Azure's least, and a day.
const INTERVAL: std::ops::RangeInclusive<u32> = 5..=86_400;

const DEFAULT_INTERVAL: u32 = 5;

/// So many results in a row may be asked for before the state changes.
pub const MOST_PROBES: u32 = 100;

/// Azure's default for `probeThreshold`.
const DEFAULT_THRESHOLD: u32 = 1;

/// A request line longer than this no server has to take (RFC 9112 §3 asks for 8,000).
const LONGEST_PATH: usize = 2048;

/// A probe as read.
pub struct Probe {
    name: Option<Text>,
    protocol: Option<ProbeProtocol>,
    port: Option<At<u32>>,
    interval: u32,
    threshold: u32,
}

#[derive(Clone, Copy, PartialEq)]
enum Word {
    Tcp,
    Http,
    Https,
}

/// Reads one of `probes`.
pub fn read(node: &Node<'_>, problems: &mut Problems) -> Option<Probe> {
    let fields = Fields::open(node, &shape::PROBE, problems)?;
    let name = fields.text("name", problems);
    let words = [("Tcp", Word::Tcp), ("Http", Word::Http), ("Https", Word::Https)];
    let word = fields.choice("protocol", &words, problems);
    let port = fields.number("port", 1, u32::from(u16::MAX), problems);
    let path = fields.parsed("requestPath", parse_path, problems);
    let interval = fields.number("intervalInSeconds", *INTERVAL.start(), *INTERVAL.end(), problems);
    let threshold = read_threshold(&fields, problems);
    if let (Some(At { value: Word::Http, .. }), Some(port)) = (&word, &port)
        && NO_HTTP.contains(&port.value)
    {
        problems.error(port.span, format!("{} probes port {} with HTTP", fields.title, port.value)).help(
            "that port is another service's, and Azure refuses it too: probe another port, or use `Tcp`",
        );
    }
    let protocol = match word {
        Some(At { value: Word::Https, span }) => {
            problems
                .error(span, format!("{} is an HTTPS probe, which there is none of", fields.title))
                .help("use `Tcp`, or `Http` on a port that answers without TLS");
            None
        }
        Some(At { value: Word::Tcp, .. }) => {
            if fields.node("requestPath").is_some() {
                problems
                    .error(
                        fields.key("requestPath"),
                        format!("{} is a Tcp probe and has a path", fields.title),
                    )
                    .help("remove `requestPath`, or write `protocol: Http`");
            }
            Some(ProbeProtocol::Tcp)
        }
        Some(At { value: Word::Http, .. }) => {
            if fields.node("requestPath").is_none() {
                problems
                    .error(fields.span, format!("{} lacks `requestPath`", fields.title))
                    .help("write the path that is answered with 200, such as `requestPath: /health`");
            }
            path.map(|path| ProbeProtocol::Http { path: path.value })
        }
        None => None,
    };
    let interval = interval.map_or(DEFAULT_INTERVAL, |interval| interval.value);
    Some(Probe { name, protocol, port, interval, threshold })
}

/// `probeThreshold`, or under its older name `numberOfProbes`.
fn read_threshold(fields: &Fields<'_, '_>, problems: &mut Problems) -> u32 {
    let mut number = |field| fields.number(field, 1, MOST_PROBES, problems);
    let (new, old) = (number("probeThreshold"), number("numberOfProbes"));
    if fields.node("probeThreshold").is_some() && fields.node("numberOfProbes").is_some() {
        problems
            .error(fields.key("numberOfProbes"), "`probeThreshold` and `numberOfProbes` are given together")
            .also(fields.key("probeThreshold"), "the other one")
            .help("they mean the same: remove `numberOfProbes`");
    }
    new.or(old).map_or(DEFAULT_THRESHOLD, |number| number.value)
}

/// What may stand in a request line: nothing that ends it or begins another header.
fn parse_path(text: &str) -> Result<String, Complaint> {
    let help = "write a path of visible ASCII characters that begins with `/`, such as /health";
    let wrong = if !text.starts_with('/') {
        "does not begin with `/`".to_owned()
    } else if let Some(bad) = text.chars().find(|c| !c.is_ascii_graphic()) {
        format!("contains {bad:?}")
    } else if text.len() > LONGEST_PATH {
        format!("is {} characters long, {LONGEST_PATH} are allowed", text.len())
    } else {
        return Ok(text.to_owned());
    };
    Err(Complaint::new(format!("the request path {wrong}")).help(help))
}

/// The probes of a load balancer by name, and which of them rules use.
pub struct Probes {
    names: Names,
    pub built: Vec<network::Probe>,
    spans: Vec<Span>,
    used: Vec<bool>,
}

impl Probes {
    /// Finds the probe a rule means.
    pub fn take(&mut self, reference: &Text, problems: &mut Problems) -> Option<usize> {
        let found = self.names.find(reference, "probes", problems)?;
        self.used[found] = true;
        Some(found)
    }

    /// Probes that no rule uses are hardly meant.
    pub fn warn_unused(&self, problems: &mut Problems) {
        for (at, probe) in self.built.iter().enumerate().filter(|(at, _)| !self.used[*at]) {
            problems
                .warning(self.spans[at], format!("nothing uses probe `{}`", probe.name))
                .help("name it as `probe` of a load balancing rule, or remove it");
        }
    }
}

/// Builds the probes of load balancer `balancer`.
pub fn resolve(read: Vec<Probe>, balancer: &str, register: &mut Register, problems: &mut Problems) -> Probes {
    let names = Names::new("probe of this load balancer");
    let used = vec![false; read.len()];
    let mut probes = Probes { names, built: Vec::new(), spans: Vec::new(), used };
    for (index, probe) in read.into_iter().enumerate() {
        if let Some(name) = &probe.name {
            probes.names.declare(name, index, problems);
            register.add(&["loadBalancers", balancer, "probes", &name.value], name.span);
        }
        probes.spans.push(probe.name.as_ref().map(|name| name.span).unwrap_or_default());
        probes.built.push(network::Probe {
            name: probe.name.map(|name| name.value).unwrap_or_default(),
            // What could not be read has been reported, and no policy comes of it.
            protocol: probe.protocol.unwrap_or(ProbeProtocol::Tcp),
            port: probe.port.map_or(0, |port| port.value as u16),
            interval_seconds: probe.interval,
            threshold: probe.threshold,
        });
    }
    probes
}
