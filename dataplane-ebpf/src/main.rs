//! The kernel side: maps, the environment over them, and the entries of XDP and TC. What is decided, and why, is in
//! `portcullis_common::engine`; nothing here looks at a packet.
//!
//! On the host this crate is an empty program, so that the workspace builds, tests and lints on a stable compiler.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(target_arch = "bpf", allow(clippy::missing_safety_doc))]

#[cfg(target_arch = "bpf")]
mod env;
#[cfg(target_arch = "bpf")]
mod losses;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod tc;
#[cfg(target_arch = "bpf")]
mod xdp;

/// Never reached: the build fails when a panic is linked in (xtask's ELF lint).
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// GPL-compatible, which the helpers for time, redirects and tracing ask for.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(target_arch = "bpf"))]
fn main() {}
