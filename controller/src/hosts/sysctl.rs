//! Sysctls of the calling thread's network namespace (`/proc/sys/net` follows the thread), and port ranges as
//! they are written there.

use std::fmt;
use std::fs;
use std::str::FromStr;

use anyhow::{Context, Error, Result, bail};

pub(super) const LOCAL_PORT_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
pub(super) const RESERVED_PORTS: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// The ports the host takes for its own outgoing connections, inclusive (`net.ipv4.ip_local_port_range`).
pub fn ephemeral_range() -> Result<(u16, u16)> {
    let text = read(LOCAL_PORT_RANGE)?;
    let mut ports = text.split_whitespace().map(str::parse);
    match (ports.next(), ports.next(), ports.next()) {
        (Some(Ok(first)), Some(Ok(last)), None) => Ok((first, last)),
        _ => bail!("{LOCAL_PORT_RANGE} reads `{text}`, which is not two ports"),
    }
}

/// The ports the host keeps away from (`net.ipv4.ip_local_reserved_ports`), ours among them once prepared.
pub fn reserved_ports() -> Result<Ranges> {
    read(RESERVED_PORTS)?.parse()
}

/// Reads a sysctl by its path under /proc/sys, white space normalised to single blanks.
pub(super) fn read(path: &str) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    Ok(normal(&text))
}

/// Writes a sysctl by its path under /proc/sys.
pub(super) fn write(path: &str, value: &str) -> Result<()> {
    // An empty list is written as a line of its own: writing nothing at all changes nothing.
    fs::write(path, format!("{value}\n")).with_context(|| {
        format!(
            "cannot write `{value}` to {path}: it must be writable here (in a container, mount /proc/sys rw)"
        )
    })
}

/// Whether two values of the sysctl mean the same; the kernel reformats lists of ports.
pub(super) fn same(path: &str, one: &str, other: &str) -> bool {
    if path == RESERVED_PORTS
        && let (Ok(one), Ok(other)) = (one.parse::<Ranges>(), other.parse::<Ranges>())
    {
        return one == other;
    }
    normal(one) == normal(other)
}

fn normal(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A set of ports: sorted, disjoint, not even adjacent, inclusive ranges. Written as the kernel does: `80,100-200`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges(Vec<(u16, u16)>);

impl Ranges {
    /// Sorts and merges; a range whose ends are swapped is turned round.
    pub fn new(ranges: impl IntoIterator<Item = (u16, u16)>) -> Self {
        let mut all: Vec<(u16, u16)> =
            ranges.into_iter().map(|(one, other)| (one.min(other), one.max(other))).collect();
        all.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::with_capacity(all.len());
        for (first, last) in all {
            match merged.last_mut() {
                Some(previous) if u32::from(first) <= u32::from(previous.1) + 1 => {
                    previous.1 = previous.1.max(last);
                }
                _ => merged.push((first, last)),
            }
        }
        Self(merged)
    }

    pub fn union(&self, other: &Self) -> Self {
        Self::new(self.0.iter().chain(&other.0).copied())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn as_slice(&self) -> &[(u16, u16)] {
        &self.0
    }
}

impl fmt::Display for Ranges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, (first, last)) in self.0.iter().enumerate() {
            if position > 0 {
                f.write_str(",")?;
            }
            match first == last {
                true => write!(f, "{first}")?,
                false => write!(f, "{first}-{last}")?,
            }
        }
        Ok(())
    }
}

impl FromStr for Ranges {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut ranges = Vec::new();
        for part in text.trim().split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let port = |port: &str| {
                port.trim()
                    .parse::<u16>()
                    .with_context(|| format!("`{part}` in `{text}` is no range of ports"))
            };
            ranges.push((port(first)?, port(last)?));
        }
        Ok(Self::new(ranges))
    }
}

/// Why the kernel takes no IPv6 address on this device; `None` if it does.
pub fn without_ipv6(device: &str) -> Option<String> {
    // The name is the kernel's: it has no slash and is not `..`.
    match read(&format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6")) {
        Ok(value) if value == "0" => None,
        Ok(_) => Some(format!("net.ipv6.conf.{device}.disable_ipv6 is 1")),
        Err(_) => Some("this kernel has none, or its MTU is below 1280".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosts::testing::{Lab, needs_root};

    #[test]
    fn ranges_merge_what_overlaps_or_touches_and_read_back_as_written() {
        let ranges = Ranges::new([(200, 300), (80, 80), (301, 400), (250, 260), (65535, 65535), (0, 1)]);
        assert_eq!(ranges.to_string(), "0-1,80,200-400,65535");
        assert_eq!(ranges.to_string().parse::<Ranges>().unwrap(), ranges);
        assert!("".parse::<Ranges>().unwrap().is_empty());
        assert!("80-x".parse::<Ranges>().is_err());
        assert!(same(RESERVED_PORTS, "80,81", "80-81"));
        assert!(same("/proc/sys/net/x", "1\t2", "1 2"));
    }

    #[test]
    fn sysctls_are_those_of_the_threads_namespace() {
        if !needs_root() {
            return;
        }
        let lab = Lab::new();
        let here = fs::read_to_string(LOCAL_PORT_RANGE).unwrap();
        lab.run(|| async {
            write(LOCAL_PORT_RANGE, "40000 41000").unwrap();
            write(RESERVED_PORTS, "1000-1002,80,1003").unwrap();
            assert_eq!(ephemeral_range().unwrap(), (40000, 41000));
            assert_eq!(reserved_ports().unwrap().to_string(), "80,1000-1003");
            write(RESERVED_PORTS, "").unwrap();
            assert!(reserved_ports().unwrap().is_empty());
        });
        assert_eq!(fs::read_to_string(LOCAL_PORT_RANGE).unwrap(), here);
    }
}
