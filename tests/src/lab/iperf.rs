//! Bulk transfers by the real iperf3.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use super::eventually;
use super::namespace::Namespace;

/// What to transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IperfOptions {
    /// How long, whole seconds.
    pub seconds: u32,
    /// Streams at once.
    pub parallel: u32,
    /// From the server to the client.
    pub reverse: bool,
    /// UDP at this rate (`100M`, `0` for as fast as it goes) instead of TCP.
    pub udp_rate: Option<String>,
    /// More options of the client's.
    pub extra: Vec<String>,
}

impl Default for IperfOptions {
    /// One TCP stream from client to server for two seconds.
    fn default() -> Self {
        IperfOptions { seconds: 2, parallel: 1, reverse: false, udp_rate: None, extra: Vec::new() }
    }
}

/// Runs an iperf3 server on `address` inside `server` and a client inside `client` that connects to
/// `destination` (the same, or what translates to it); returns the client's report, iperf3's JSON.
///
/// # Errors
/// If either fails; the report's own `error` member is one.
pub fn iperf3(
    server: &Namespace,
    address: SocketAddr,
    client: &Namespace,
    destination: SocketAddr,
    options: &IperfOptions,
) -> anyhow::Result<Value> {
    let (bind, port) = (address.ip().to_string(), address.port().to_string());
    let mut serving = server.spawn(&["iperf3", "--server", "--one-off", "--bind", &bind, "--port", &port])?;
    // Asking by connecting would use up the one connection it serves.
    let listens =
        eventually(Duration::from_secs(5), || is_listening(server, address.port()) || !serving.is_running());
    ensure!(listens && serving.is_running(), "iperf3 does not listen on {address} in {}", server.name());

    let (host, port) = (destination.ip().to_string(), destination.port().to_string());
    let (seconds, parallel) = (options.seconds.to_string(), options.parallel.to_string());
    let mut arguments = vec!["iperf3", "--json", "--client", &host, "--port", &port];
    arguments.extend(["--time", &seconds, "--parallel", &parallel, "--connect-timeout", "5000"]);
    if options.reverse {
        arguments.push("--reverse");
    }
    if let Some(rate) = &options.udp_rate {
        arguments.extend(["--udp", "--bitrate", rate]);
    }
    arguments.extend(options.extra.iter().map(String::as_str));
    let limit = Duration::from_secs(u64::from(options.seconds) + 20);
    let finished = client.output(&arguments, limit)?;
    let report: Value = serde_json::from_str(&finished.stdout)
        .with_context(|| format!("output of iperf3: {}{}", finished.stdout, finished.stderr))?;
    if let Some(error) = report.get("error") {
        bail!("iperf3 to {destination} in {}: {error}", client.name());
    }
    Ok(report)
}

/// What the receiver got, in bits per second, from a report of [`iperf3`]; for UDP, what was sent and not
/// lost.
pub fn bits_per_second(report: &Value) -> Option<f64> {
    let end = report.get("end")?;
    if let Some(received) = end.pointer("/sum_received/bits_per_second").and_then(Value::as_f64) {
        return Some(received);
    }
    let sum = end.get("sum")?;
    let lost = sum.get("lost_percent").and_then(Value::as_f64).unwrap_or(0.0);
    Some(sum.get("bits_per_second")?.as_f64()? * (1.0 - lost / 100.0))
}

/// Whether a TCP socket listens on `port`, by the namespace's own table.
fn is_listening(namespace: &Namespace, port: u16) -> bool {
    // `local_address` ends in the port in hexadecimal, and state 0A is LISTEN.
    let port = format!(":{port:04X}");
    namespace.enter(|| {
        ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"].iter().any(|table| {
            std::fs::read_to_string(table).is_ok_and(|table| {
                table.lines().any(|line| {
                    let mut columns = line.split_whitespace().skip(1);
                    let (local, state) = (columns.next().unwrap_or(""), columns.nth(1).unwrap_or(""));
                    local.ends_with(&port) && state == "0A"
                })
            })
        })
    })
}
