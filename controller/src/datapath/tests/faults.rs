//! Makes the n-th bpf(2) call of this thread fail.

use std::cell::Cell;
use std::io;

thread_local! {
    static COUNTDOWN: Cell<Option<u32>> = const { Cell::new(None) };
}

/// The `n`th call from now (counting from 1) fails with EIO, once.
pub fn fail_nth(n: u32) {
    COUNTDOWN.set(Some(n));
}

/// Ends the plan; whether the failure has struck.
pub fn struck() -> bool {
    COUNTDOWN.replace(None).is_none()
}

/// Called before every system call.
pub fn strike() -> io::Result<()> {
    match COUNTDOWN.get() {
        None => Ok(()),
        Some(1) => {
            COUNTDOWN.set(None);
            Err(io::Error::from_raw_os_error(libc::EIO))
        }
        Some(n) => {
            COUNTDOWN.set(Some(n - 1));
            Ok(())
        }
    }
}
