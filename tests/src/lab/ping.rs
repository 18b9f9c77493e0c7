//! The real ping tool.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, bail};

use super::namespace::Namespace;

/// What `ping` counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PingOutcome {
    /// Requests.
    pub sent: u32,
    /// Requests that were answered.
    pub received: u32,
    /// Answers beyond the first to the same request; any is a defect of the network.
    pub duplicates: u32,
    /// ICMP errors that came back instead.
    pub errors: u32,
}

/// Pings `destination` from inside `namespace` `count` times, 20 ms apart, and waits up to `timeout` after
/// the last for what is missing. No answer is an outcome, not an error.
///
/// # Errors
/// If ping cannot send, for want of a route for instance.
pub fn ping(
    namespace: &Namespace,
    destination: IpAddr,
    count: u32,
    timeout: Duration,
) -> anyhow::Result<PingOutcome> {
    ping_sized(namespace, destination, count, 56, timeout)
}

/// The same with so many bytes of payload: more than the device's MTU takes, and the packets are fragments.
pub fn ping_sized(
    namespace: &Namespace,
    destination: IpAddr,
    count: u32,
    size: u16,
    timeout: Duration,
) -> anyhow::Result<PingOutcome> {
    let size = size.to_string();
    let (count_text, wait, target) =
        (count.to_string(), format!("{:.3}", timeout.as_secs_f64()), destination.to_string());
    // Not -w, which would make it send more than `count` when some are lost.
    let arguments = ["ping", "-n", "-q", "-i", "0.02", "-c", &count_text, "-W", &wait, "-s", &size, &target];
    let limit = Duration::from_millis(20) * count + timeout + Duration::from_secs(10);
    let finished = namespace.output(&arguments, limit)?;
    // 0: some came back; 1: none did.
    if !matches!(finished.status.code(), Some(0 | 1)) {
        bail!("ping {destination} in {}: {}{}", namespace.name(), finished.stdout, finished.stderr);
    }
    parse(&finished.stdout).with_context(|| format!("output of ping: {}", finished.stdout))
}

/// Reads `5 packets transmitted, 4 received, +1 duplicates, +2 errors, 20% packet loss, time 81ms`.
fn parse(output: &str) -> Option<PingOutcome> {
    let summary = output.lines().find(|line| line.contains(" packets transmitted"))?;
    let number_before = |word: &str| {
        let part = summary.split(", ").find(|part| part.ends_with(word))?;
        part.trim_start_matches('+').split(' ').next()?.parse().ok()
    };
    Some(PingOutcome {
        sent: number_before("packets transmitted")?,
        received: number_before("received")?,
        duplicates: number_before("duplicates").unwrap_or(0),
        errors: number_before("errors").unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_of_ping_is_read() {
        let output = "PING 10.0.0.1 (10.0.0.1) 56(84) bytes of data.\n\n--- 10.0.0.1 ping statistics ---\n\
                      5 packets transmitted, 4 received, +1 duplicates, +2 errors, 20% packet loss\n";
        let expected = PingOutcome { sent: 5, received: 4, duplicates: 1, errors: 2 };
        assert_eq!(parse(output), Some(expected));
        assert_eq!(
            parse("3 packets transmitted, 0 received, 100% packet loss\n").map(|o| o.received),
            Some(0)
        );
    }
}
