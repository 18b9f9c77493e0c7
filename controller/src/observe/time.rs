//! Time for people: UTC dates, durations, ticks.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use portcullis_common::clock::TICK_SHIFT;

/// `2026-11-22T05:33:50Z`
pub fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days as i64);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// The same of Unix seconds.
pub fn unix(seconds: u64) -> String {
    rfc3339(UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or(UNIX_EPOCH))
}

/// Unix seconds of a time.
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Unix seconds of what people write: `2026-11-22T05:33:50Z`, with an offset (`+01:00`) or a fraction, which is cut off; or
/// how long before `now`: `2h ago`, `-90m`, `3d`, `now`. `None`: it is neither.
pub fn parse(text: &str, now: u64) -> Option<u64> {
    let text = text.trim();
    if text.eq_ignore_ascii_case("now") {
        return Some(now);
    }
    parse_ago(text).map(|ago| now.saturating_sub(ago)).or_else(|| parse_rfc3339(text))
}

/// Seconds of `2h ago`, `-2h`, `2h`.
fn parse_ago(text: &str) -> Option<u64> {
    let text = text.strip_suffix("ago").map_or(text, str::trim_end);
    let text = text.strip_prefix('-').unwrap_or(text);
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return None,
    };
    if number.is_empty() || !number.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    number.parse::<u64>().ok()?.checked_mul(seconds)
}

fn parse_rfc3339(text: &str) -> Option<u64> {
    let bytes = text.as_bytes();
    if !text.is_ascii() || bytes.len() < 20 {
        return None;
    }
    let number = |from: usize, to: usize| -> Option<i64> {
        let digits = &text[from..to];
        digits.bytes().all(|digit| digit.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
    };
    let marks = bytes[4] == b'-' && bytes[7] == b'-' && matches!(bytes[10], b'T' | b't' | b' ');
    if !marks || bytes[13] != b':' || bytes[16] != b':' {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let rest = &text[19..];
    let digits = rest
        .strip_prefix('.')
        .map_or(0, |fraction| 1 + fraction.bytes().take_while(u8::is_ascii_digit).count());
    let offset = match &rest[digits..] {
        "Z" | "z" => 0,
        zone => {
            let sign = if zone.starts_with('+') { 1 } else { -1 };
            let zone = zone.strip_prefix(['+', '-'])?;
            let (hours, minutes) = zone.split_once(':')?;
            let two = |part: &str| part.parse::<i64>().ok().filter(|_| part.len() == 2);
            sign * (two(hours)? * 3600 + two(minutes)? * 60)
        }
    };
    let days = day_number(year, month, day);
    // The 31st of February is a day of March.
    if civil(days) != (year, month, day) {
        return None;
    }
    u64::try_from(days * 86_400 + hour * 3600 + minute * 60 + second - offset).ok()
}

/// The day's number from 1970-01-01 on (Howard Hinnant's `days_from_civil`).
fn day_number(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// The date of a day counted from 1970-01-01 (Howard Hinnant's `civil_from_days`).
fn civil(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let of_era = z.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// `3d 4h`, `4h 5m`, `5m 6s`, `6s`
pub fn span(duration: Duration) -> String {
    let s = duration.as_secs();
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m {}s", s / 60, s % 60),
        3600..86_400 => format!("{}h {}m", s / 3600, s / 60 % 60),
        _ => format!("{}d {}h", s / 86_400, s / 3600 % 24),
    }
}

/// Seconds in this many ticks of the datapath's clock.
pub fn seconds(ticks: u32) -> f64 {
    let seconds = ((u64::from(ticks)) << TICK_SHIFT) as f64 / 1e9;
    (seconds * 10.0).round() / 10.0
}

/// `1.5 MiB`
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let at = |s| rfc3339(UNIX_EPOCH + Duration::from_secs(s));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_795_325_630), "2026-11-22T05:33:50Z");
    }

    #[test]
    fn a_time_reads_back_as_it_is_written_and_ago_is_before_now() {
        for seconds in [0, 951_782_400, 1_795_325_630, 4_102_444_799] {
            assert_eq!(parse(&unix(seconds), 7), Some(seconds));
        }
        assert_eq!(parse("2026-11-22T06:33:50.75+01:00", 0), Some(1_795_325_630));
        for (text, ago) in [("2h ago", 7200), ("-2h", 7200), ("90m", 5400), ("3d ago", 259_200), ("now", 0)] {
            assert_eq!(parse(text, 1_000_000), Some(1_000_000 - ago), "{text}");
        }
        for wrong in
            ["", "h", "-h", "2 hours", "2026-02-31T00:00:00Z", "2026-11-22", "2026-11-22T05:33:50", "é"]
        {
            assert_eq!(parse(wrong, 1_000_000), None, "{wrong}");
        }
    }

    #[test]
    fn durations_have_two_units_at_most() {
        assert_eq!(span(Duration::from_secs(59)), "59s");
        assert_eq!(span(Duration::from_secs(3_599)), "59m 59s");
        assert_eq!(span(Duration::from_secs(90_061)), "1d 1h");
    }

    #[test]
    fn sizes_are_binary() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(64 << 20), "64.0 MiB");
    }
}
