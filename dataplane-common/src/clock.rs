//! Time in the datapath: ticks of 2^26 ns (67 ms) of `CLOCK_MONOTONIC_COARSE`, finer than the 1/8 s that design §5 asks.
//!
//! A `u32` of ticks wraps after nine years of uptime; comparisons are by wrapping difference, so they survive it.

/// Nanoseconds are shifted right by this to get ticks.
pub const TICK_SHIFT: u32 = 26;

/// A dead record's slot is left alone for this long (at least 130 ms), so that a program still working with a copy
/// of it has ended before the slot is written again. A packet that comes just then for a flow that has just died is
/// refused as `contended`; the shorter this is, the fewer those are.
pub const GRACE: u32 = 3;

/// Ticks in `seconds`, rounded up, at least one: no timer runs out before its time (RFC 4787 REQ-5, RFC 5508 REQ-2).
pub const fn ticks(seconds: u32) -> u32 {
    let t = (seconds as u64 * 1_000_000_000).div_ceil(1 << TICK_SHIFT) as u32;
    if t == 0 { 1 } else { t }
}

/// Is `deadline` behind `now`?
#[inline(always)]
pub const fn passed(deadline: u32, now: u32) -> bool {
    (now.wrapping_sub(deadline) as i32) > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_passes_one_tick_after_it_and_survives_the_wrap() {
        assert!(!passed(100, 100));
        assert!(passed(100, 101));
        assert!(!passed(u32::MAX, u32::MAX));
        assert!(passed(u32::MAX, 0));
        assert!(!passed(3, u32::MAX));
    }

    #[test]
    fn four_minutes_are_within_a_tick_of_four_minutes() {
        let ns = (ticks(240) as u64) << TICK_SHIFT;
        assert!((240_000_000_000..240_100_000_000).contains(&ns));
    }

    #[test]
    fn no_timer_runs_out_before_its_time_however_the_seconds_fall() {
        for seconds in (1..100_000).chain([u32::MAX / 16]) {
            let ns = (ticks(seconds) as u64) << TICK_SHIFT;
            let wanted = seconds as u64 * 1_000_000_000;
            assert!(ns >= wanted && ns - wanted < 1 << TICK_SHIFT, "{seconds} s");
        }
    }
}
