//! Addresses, prefixes and service tags as a policy writes them.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};

use super::fields::Complaint;
use super::network::AddressMatch;
use super::tags::Tags;

/// Ranges that no virtual network may contain, as in Azure, and why.
pub const FORBIDDEN: &[(&str, &str)] = &[
    ("0.0.0.0/8", "this network"),
    ("127.0.0.0/8", "loopback"),
    ("168.63.129.16/32", "the platform's own address"),
    ("169.254.0.0/16", "link-local"),
    ("224.0.0.0/4", "multicast"),
    ("255.255.255.255/32", "broadcast"),
    // Part of ::/8, but its own name says more.
    ("::ffff:0:0/96", "IPv4 addresses written as IPv6"),
    ("::/8", "unspecified, loopback and reserved"),
    ("fe80::/10", "link-local"),
    ("ff00::/8", "multicast"),
];

/// The forbidden range that shares addresses with a prefix, and why it is forbidden; rather one around the prefix than
/// one inside it.
pub fn forbidden(prefix: &IpNet) -> Option<(IpNet, &'static str)> {
    let ranges =
        || FORBIDDEN.iter().map(|(range, why)| (range.parse::<IpNet>().expect("a constant prefix"), *why));
    let around = ranges().find(|(range, _)| range.contains(prefix));
    around.or_else(|| ranges().find(|(range, _)| prefix.contains(range)))
}

/// An address without a prefix length.
pub fn parse_address(text: &str) -> Result<IpAddr, Complaint> {
    text.parse().map_err(|_| {
        let complaint = Complaint::new(format!("`{text}` is not an IP address"));
        match text.split_once('/') {
            Some((address, _)) if address.parse::<IpAddr>().is_ok() => {
                complaint.help(format!("write the address alone: {address}"))
            }
            _ => complaint.help("write an address such as 10.0.1.4"),
        }
    })
}

/// A prefix with its length; bits behind the length must be zero.
pub fn parse_prefix(text: &str) -> Result<IpNet, Complaint> {
    if let Ok(net) = text.parse::<IpNet>() {
        if net.addr() != net.network() {
            let message = format!("{text} has bits set behind the /{}", net.prefix_len());
            return Err(Complaint::new(message).help(format!(
                "the network is {}; a single address is {}/{}",
                net.trunc(),
                net.addr(),
                net.max_prefix_len()
            )));
        }
        return Ok(net);
    }
    let complaint = Complaint::new(format!("`{text}` is not an address prefix"));
    if let Ok(address) = text.parse::<IpAddr>() {
        let length = if address.is_ipv4() { 32 } else { 128 };
        return Err(Complaint::new(format!("{text} has no prefix length"))
            .help(format!("write it as {text}/{length}, or as the network it is in")));
    }
    // 10.0.0.0/255.255.255.0 is how older tools write it.
    if let Some((address, mask)) = text.split_once('/')
        && let (Ok(address), Ok(mask)) = (address.parse::<Ipv4Addr>(), mask.parse::<Ipv4Addr>())
        && let Ok(net) = Ipv4Net::with_netmask(address, mask)
    {
        return Err(complaint.help(format!("write it as {net}")));
    }
    Err(complaint.help("write a prefix such as 10.0.1.0/24"))
}

/// A prefix, or an address standing for itself alone.
pub fn parse_network(text: &str) -> Result<IpNet, Complaint> {
    match text.parse::<IpAddr>() {
        Ok(address) => Ok(IpNet::from(address)),
        Err(_) => parse_prefix(text),
    }
}

/// One side of a rule: `*`, an address, a prefix or a tag.
pub fn parse_match(text: &str, plural: &str, tags: &Tags) -> Result<AddressMatch, Complaint> {
    if text == "*" {
        return Ok(AddressMatch::Any);
    }
    if let Some(tag) = tags.get(text) {
        return Ok(AddressMatch::Tag(tag));
    }
    if text.eq_ignore_ascii_case("any") {
        return Err(
            Complaint::new(format!("`{text}` is not an address, prefix or tag")).help("write '*' for any")
        );
    }
    if text.contains(',') {
        let list: Vec<_> = text.split(',').map(str::trim).collect();
        return Err(Complaint::new(format!("`{text}` is several addresses in one value"))
            .help(format!("write `{plural}: [{}]`", list.join(", "))));
    }
    let digit = text.starts_with(|c: char| c.is_ascii_digit());
    if text.contains(['/', ':']) || digit {
        return parse_network(text).map(AddressMatch::Prefix);
    }
    tags.missing(text).map(AddressMatch::Tag)
}

/// A hardware address, `02:00:00:00:00:01` or as Azure writes it `02-00-00-00-00-01`.
pub fn parse_mac(text: &str) -> Result<[u8; 6], Complaint> {
    let help = "write six bytes in hexadecimal, such as 02:00:00:00:00:01";
    let separator = if text.contains('-') { '-' } else { ':' };
    let parts: Vec<_> = text.split(separator).collect();
    let hex = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
    if parts.len() != 6 || !parts.iter().all(hex) {
        return Err(Complaint::new(format!("`{text}` is not a hardware address")).help(help));
    }
    let mut mac = [0; 6];
    for (byte, part) in mac.iter_mut().zip(&parts) {
        *byte = u8::from_str_radix(part, 16).expect("two hexadecimal digits");
    }
    if mac[0] & 1 != 0 || mac == [0; 6] {
        let message = format!("{text} is a group or zero address, no interface can have it");
        return Err(Complaint::new(message)
            .help("give the guest's own hardware address, or leave `macAddress` out to learn it"));
    }
    Ok(mac)
}

/// A Linux device name, by the kernel's `dev_valid_name`.
pub fn parse_device(text: &str) -> Result<String, Complaint> {
    let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    let wrong = if text.is_empty() {
        "is empty".to_owned()
    } else if text.len() > 15 {
        format!("is {} characters long, Linux allows 15", text.len())
    } else if text == "." || text == ".." {
        "is not allowed".to_owned()
    } else if let Some(c) = text.chars().find(|c| bad(*c)) {
        format!("contains {c:?}")
    } else {
        return Ok(text.to_owned());
    };
    Err(Complaint::new(format!("device name `{text}` {wrong}")).help("use the name that `ip link` shows"))
}

#[cfg(test)]
mod tests {
    use super::super::network::ServiceTag;
    use super::*;

    #[test]
    fn a_rule_side_is_any_an_address_a_prefix_or_a_tag_in_any_case() {
        let tags = Tags::default();
        let ok = |text| parse_match(text, "prefixes", &tags).unwrap();
        assert_eq!(ok("*"), AddressMatch::Any);
        assert_eq!(ok("10.0.0.4"), AddressMatch::Prefix("10.0.0.4/32".parse().unwrap()));
        assert_eq!(ok("2001:db8::/32"), AddressMatch::Prefix("2001:db8::/32".parse().unwrap()));
        assert_eq!(ok("INTERNET"), AddressMatch::Tag(ServiceTag::Internet));
        assert_eq!(ok("virtual_network"), AddressMatch::Tag(ServiceTag::VirtualNetwork));
        assert_eq!(ok("AZURE_LOADBALANCER"), AddressMatch::Tag(ServiceTag::AzureLoadBalancer));
        for bad in [
            "",
            "10.0.0.4/24",
            "10.0.0",
            "Storage",
            "any",
            "10.0.0.1,10.0.0.2",
            "10.0.0.1-10.0.0.9",
            "10.0.0.0/33",
        ] {
            assert!(parse_match(bad, "prefixes", &tags).is_err(), "{bad}");
        }
    }

    #[test]
    fn host_bits_are_refused_with_the_network_in_the_help() {
        let complaint = parse_prefix("10.0.1.5/24").unwrap_err();
        assert_eq!(
            complaint.help.as_deref(),
            Some("the network is 10.0.1.0/24; a single address is 10.0.1.5/32")
        );
        assert_eq!(
            parse_prefix("10.1.0.0/255.255.0.0").unwrap_err().help.as_deref(),
            Some("write it as 10.1.0.0/16")
        );
    }

    #[test]
    fn hardware_addresses_of_groups_are_refused() {
        assert_eq!(parse_mac("02:00:00:00:00:0a").unwrap(), [2, 0, 0, 0, 0, 10]);
        assert_eq!(parse_mac("00-0D-3A-F8-80-1A").unwrap(), [0, 0x0d, 0x3a, 0xf8, 0x80, 0x1a]);
        for bad in [
            "",
            "02:00:00:00:00",
            "2:0:0:0:0:1",
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
            "gg:00:00:00:00:01",
        ] {
            assert!(parse_mac(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn device_names_are_what_the_kernel_takes() {
        assert!(parse_device("veth-vm1").is_ok() && parse_device("eth0.100").is_ok());
        for bad in ["", ".", "..", "a/b", "eth0:1", "with space", "sixteen-letters-"] {
            assert!(parse_device(bad).is_err(), "{bad}");
        }
    }
}
