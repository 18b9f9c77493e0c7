//! The clock that both sides read, and whether it is one.
//!
//! `CLOCK_MONOTONIC_COARSE` here, `bpf_ktime_get_coarse_ns` in the kernel: the same while neither is moved. Both stand still while the
//! machine is suspended, so nothing idles out in its sleep. In a time namespace (time_namespaces(7)) this side's is moved and the
//! kernel's is not.

use anyhow::{Result, ensure};

/// The offsets of this process' time namespace; absent before Linux 5.6.
const OFFSETS: &str = "/proc/self/timens_offsets";

/// Refuses a clock that differs from the programs'.
///
/// # Errors
/// In a time namespace with another monotonic clock: the reaper would free flows that live, or none.
pub fn check_clock() -> Result<()> {
    match std::fs::read_to_string(OFFSETS) {
        Ok(offsets) => check(&offsets),
        // No such namespaces, so no such offset.
        Err(_) => Ok(()),
    }
}

fn check(offsets: &str) -> Result<()> {
    let line = offsets.lines().find_map(|line| line.trim_start().strip_prefix("monotonic"));
    let moved = line.is_some_and(|line| line.split_whitespace().any(|part| part != "0"));
    ensure!(
        !moved,
        "this process is in a time namespace whose clock differs from the kernel's ({OFFSETS}: monotonic {}), and deadlines of \
         flows are by the kernel's: start it outside, without `unshare --time` or a container's clock of its own",
        line.unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_differs_from_the_kernels_is_refused() {
        check_clock().unwrap();
        check("monotonic           0         0\nboottime            5         0\n").unwrap();
        check("").unwrap();
        let error = check("monotonic      100000         0\nboottime            0         0\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("monotonic 100000 0") && error.contains("time namespace"), "{error}");
        assert!(check("monotonic           0       1\n").is_err());
        assert!(check("monotonic          -7       0\n").is_err());
    }
}
