//! Words of a packet, read and written at once. Nothing in a packet is aligned as Rust asks, and LLVM takes a packed field
//! apart into bytes on the bpf target; the machines this runs on (x86-64, aarch64) and their verifiers do not mind. A
//! quarter of the instructions of an established packet were bytes put together.

/// Reads the 16 bits `AT` bytes behind `from`, as they stand.
///
/// # Safety
/// They can be read.
#[inline(always)]
pub unsafe fn load16<const AT: usize, T>(from: *const T) -> u16 {
    #[cfg(target_arch = "bpf")]
    {
        let value: u64;
        // SAFETY: the caller vouches for the place.
        unsafe {
            core::arch::asm!(
                "{value} = *(u16 *)({from} + {at})",
                value = out(reg) value, from = in(reg) from, at = const AT, options(pure, readonly, nostack)
            );
        }
        value as u16
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: the caller vouches for the place.
    unsafe {
        from.byte_add(AT).cast::<u16>().read_unaligned()
    }
}

/// Reads 32 bits likewise.
///
/// # Safety
/// As for [`load16`].
#[inline(always)]
pub unsafe fn load32<const AT: usize, T>(from: *const T) -> u32 {
    #[cfg(target_arch = "bpf")]
    {
        let value: u64;
        // SAFETY: the caller vouches for the place.
        unsafe {
            core::arch::asm!(
                "{value} = *(u32 *)({from} + {at})",
                value = out(reg) value, from = in(reg) from, at = const AT, options(pure, readonly, nostack)
            );
        }
        value as u32
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: the caller vouches for the place.
    unsafe {
        from.byte_add(AT).cast::<u32>().read_unaligned()
    }
}

/// Writes 16 bits `AT` bytes behind `to`.
///
/// # Safety
/// They can be written.
#[inline(always)]
pub unsafe fn store16<const AT: usize, T>(to: *mut T, value: u16) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the caller vouches for the place.
    unsafe {
        core::arch::asm!(
            "*(u16 *)({to} + {at}) = {value}",
            to = in(reg) to, value = in(reg) value as u64, at = const AT, options(nostack)
        );
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: the caller vouches for the place.
    unsafe {
        to.byte_add(AT).cast::<u16>().write_unaligned(value);
    }
}

/// Writes 32 bits likewise.
///
/// # Safety
/// As for [`store16`].
#[inline(always)]
pub unsafe fn store32<const AT: usize, T>(to: *mut T, value: u32) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the caller vouches for the place.
    unsafe {
        core::arch::asm!(
            "*(u32 *)({to} + {at}) = {value}",
            to = in(reg) to, value = in(reg) value as u64, at = const AT, options(nostack)
        );
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: the caller vouches for the place.
    unsafe {
        to.byte_add(AT).cast::<u32>().write_unaligned(value);
    }
}
