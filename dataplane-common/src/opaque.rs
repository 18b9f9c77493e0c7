//! A value the optimiser knows nothing about.

/// Returns `value`, hiding from the optimiser where it came from.
///
/// The verifier believes only checks it sees. LLVM drops those that others imply (two bounds checks of one packet, a
/// mask on a value it knows to be small), by reasoning the verifier does not follow (aya.md A2b #2). One register
/// move: an empty statement would leave two line-info records at one instruction, which the kernel refuses.
#[inline(always)]
pub fn opaque(value: usize) -> usize {
    #[cfg(target_arch = "bpf")]
    {
        let mut value = value;
        // SAFETY: moves a register to itself.
        unsafe {
            core::arch::asm!("{0} = {0}", inout(reg) value, options(pure, nomem, nostack, preserves_flags));
        }
        value
    }
    #[cfg(not(target_arch = "bpf"))]
    value
}

/// Bytes between two addresses in one packet. By hand, because to the verifier these are pointers, which are subtracted in 64
/// bits or not at all, and LLVM sees that 32 are enough.
#[inline(always)]
pub fn between(start: usize, end: usize) -> u32 {
    #[cfg(target_arch = "bpf")]
    {
        let mut bytes = end;
        // SAFETY: a subtraction of two registers.
        unsafe {
            core::arch::asm!(
                "{0} -= {1}", inout(reg) bytes, in(reg) start, options(pure, nomem, nostack, preserves_flags)
            );
        }
        bytes as u32
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        (end - start) as u32
    }
}
