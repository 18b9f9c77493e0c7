//! The words of a question: who is meant by `vm1:443`, `host`, `[fd00::4]:443`.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::api::Failure;

/// One end, as it was named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word<'t> {
    Host,
    Address(IpAddr),
    /// A guest.
    Name(&'t str),
}

/// `10.0.1.4`, `10.0.1.4:443`, `fd00::4`, `[fd00::4]`, `[fd00::4]:443`, `vm1`, `vm1/primary:443`, `host:53`
pub fn read(text: &str) -> Result<(Word<'_>, Option<u16>), Failure> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    if let Some(address) = bare.and_then(|bare| bare.parse::<Ipv6Addr>().ok()) {
        return Ok((Word::Address(address.into()), None));
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok((Word::Address(address), None));
    }
    if let Ok(both) = text.parse::<SocketAddr>() {
        return Ok((Word::Address(both.ip()), Some(both.port())));
    }
    let (name, port) = match text.rsplit_once(':') {
        None => (text, None),
        // Digits only: `parse` alone would take `+443`.
        Some((name, port)) => match port.parse() {
            Ok(number) if port.bytes().all(|byte| byte.is_ascii_digit()) => (name, Some(number)),
            _ => {
                return Err(Failure::input(format!(
                    "`{}` is no port (0 to 65535) in {}; an IPv6 address with a port is written [fd00::4]:443",
                    short(port),
                    short(text)
                )));
            }
        },
    };
    Ok((if name == "host" { Word::Host } else { Word::Name(name) }, port))
}

/// As much of a hostile text as an error needs.
pub fn short(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_what_stands_behind_the_colon_and_ipv6_stands_in_brackets() {
        let four = Word::Address([1, 1, 1, 1].into());
        let six = Word::Address("fd00::4".parse().unwrap());
        for (text, read_as) in [
            ("1.1.1.1", (four, None)),
            ("1.1.1.1:443", (four, Some(443))),
            ("fd00::4", (six, None)),
            ("[fd00::4]", (six, None)),
            ("[fd00::4]:443", (six, Some(443))),
            ("vm1", (Word::Name("vm1"), None)),
            ("vm1/v6:0", (Word::Name("vm1/v6"), Some(0))),
            ("host:53", (Word::Host, Some(53))),
        ] {
            assert_eq!(read(text).unwrap(), read_as, "{text}");
        }
    }

    #[test]
    fn what_is_no_port_is_refused_and_long_nonsense_is_not_repeated() {
        for text in ["vm1:http", "1.1.1.1:70000", "[fd00::4]:", "vm1:+443", "vm1:-1", ":"] {
            assert!(read(text).unwrap_err().message.contains("is no port"), "{text}");
        }
        // A colon more than an address has: the last part is taken for the port of a name that nobody has.
        assert!(read(&format!("vm:{}", "9".repeat(60_000))).unwrap_err().message.len() < 400);
    }
}
