//! Port ranges as rules write them: `80`, `8000-8010`, `*`.

use super::fields::Complaint;

/// Every port.
pub const ANY: (u16, u16) = (0, u16::MAX);

/// Reads one port, range or `*`. `plural` is the field that takes several.
pub fn parse_range(text: &str, plural: &str) -> Result<(u16, u16), Complaint> {
    if text == "*" {
        return Ok(ANY);
    }
    if text.contains(',') {
        let list: Vec<_> = text.split(',').map(|part| format!("'{}'", part.trim())).collect();
        return Err(Complaint::new(format!("`{text}` is several ports in one value"))
            .help(format!("write `{plural}: [{}]`", list.join(", "))));
    }
    let Some((low, high)) = text.split_once('-').filter(|(low, _)| !low.is_empty()) else {
        let port = parse_port(text)?;
        return Ok((port, port));
    };
    let (low, high) = (parse_port(low)?, parse_port(high)?);
    if low > high {
        return Err(Complaint::new(format!("port range {text} ends before it begins"))
            .help(format!("write {high}-{low}")));
    }
    Ok((low, high))
}

fn parse_port(text: &str) -> Result<u16, Complaint> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let help = "write a port from 0 to 65535, a range such as 8000-8010, or '*'";
    match text.parse::<u16>() {
        Ok(port) if digits && (text.len() == 1 || !text.starts_with('0')) => Ok(port),
        _ if digits && !text.starts_with('0') => {
            Err(Complaint::new(format!("port {text} is outside 0..=65535")).help(help))
        }
        _ => Err(Complaint::new(format!("`{text}` is not a port")).help(help)),
    }
}

/// Sorts ranges and joins those that overlap or touch.
pub fn merge(mut ranges: Vec<(u16, u16)>) -> Vec<(u16, u16)> {
    ranges.sort_unstable();
    let mut merged: Vec<(u16, u16)> = Vec::with_capacity(ranges.len());
    for (low, high) in ranges {
        match merged.last_mut() {
            Some(last) if u32::from(low) <= u32::from(last.1) + 1 => last.1 = last.1.max(high),
            _ => merged.push((low, high)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_single_numbers_ranges_or_any() {
        let ok = |text| parse_range(text, "ports").unwrap();
        assert_eq!(ok("*"), ANY);
        assert_eq!(ok("0"), (0, 0));
        assert_eq!(ok("80"), (80, 80));
        assert_eq!(ok("8000-8010"), (8000, 8010));
        assert_eq!(ok("0-65535"), ANY);
        for bad in [
            "", "-", "-5", "80-", "65536", "70000", "010", "http", "80.0", "10-5", "1 - 2", "1-2-3", "80,443",
        ] {
            assert!(parse_range(bad, "ports").is_err(), "{bad}");
        }
    }

    #[test]
    fn a_list_in_one_value_is_answered_with_the_plural_form() {
        let complaint = parse_range("80, 443", "destinationPortRanges").unwrap_err();
        assert_eq!(complaint.help.as_deref(), Some("write `destinationPortRanges: ['80', '443']`"));
    }

    #[test]
    fn overlapping_and_touching_ranges_become_one() {
        assert_eq!(
            merge(vec![(80, 90), (10, 20), (21, 30), (85, 95), (65535, 65535)]),
            [(10, 30), (80, 95), (65535, 65535)]
        );
        assert_eq!(merge(vec![(0, 65535), (5, 6)]), [ANY]);
    }
}
