//! Protocols as a question names them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::flows::{protocol_name, protocol_number};

/// What stands behind `--protocol` of `explain`. In JSON a word, as `flows` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protocol {
    #[default]
    Tcp,
    Udp,
    /// ICMP of the packet's family.
    Icmp,
    /// ICMPv6: as `Icmp`, and the packet is one of IPv6.
    Icmp6,
    /// By its IANA number.
    Other(u8),
}

impl Protocol {
    /// IANA protocol number in a packet of this family.
    pub const fn number(self, v6: bool) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Icmp | Protocol::Icmp6 => {
                if v6 {
                    58
                } else {
                    1
                }
            }
            Protocol::Other(number) => number,
        }
    }

    /// Have its packets ports?
    pub const fn has_ports(self) -> bool {
        matches!(self, Protocol::Tcp | Protocol::Udp)
    }

    /// Is it ICMP, whose echo has an identifier where others have a port?
    pub const fn is_icmp(self) -> bool {
        matches!(self, Protocol::Icmp | Protocol::Icmp6)
    }
}

impl From<u8> for Protocol {
    fn from(number: u8) -> Self {
        match number {
            6 => Protocol::Tcp,
            17 => Protocol::Udp,
            1 => Protocol::Icmp,
            58 => Protocol::Icmp6,
            other => Protocol::Other(other),
        }
    }
}

impl FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        protocol_number(text).map(Self::from).ok_or_else(|| {
            let text: String = text.chars().take(40).collect();
            format!("`{text}` is no protocol: tcp, udp, icmp, icmp6, esp, ah, or a number from 0 to 255")
        })
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&protocol_name(self.number(*self == Protocol::Icmp6)))
    }
}

impl Serialize for Protocol {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Protocol {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_protocol_reads_back_from_its_word_and_icmp_follows_the_family() {
        for number in 0..=u8::MAX {
            let protocol = Protocol::from(number);
            assert_eq!(protocol.to_string().parse(), Ok(protocol));
            let json = serde_json::to_string(&protocol).unwrap();
            assert_eq!(serde_json::from_str::<Protocol>(&json).unwrap(), protocol);
        }
        assert_eq!("ESP".parse(), Ok(Protocol::Other(50)));
        assert_eq!((Protocol::Icmp.number(false), Protocol::Icmp.number(true)), (1, 58));
        for wrong in ["", "sctp", "256", "-1"] {
            assert!(wrong.parse::<Protocol>().unwrap_err().contains("is no protocol"), "{wrong}");
        }
    }
}
