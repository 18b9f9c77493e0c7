//! The classifier: the first matching rule of a group, at a cost that does not depend on how many rules it has.
//!
//! Each field's class selects a row of bits, one bit for each rule in priority order, and one word that summarises
//! which words of the row are not zero. The AND of the summaries selects the words worth ANDing; the first bit set in
//! all five rows is the rule (design §5, ADR 0001).

use crate::engine::Context;
use crate::env::Env;
use crate::opaque::opaque;
use crate::policy::{
    DESTINATION, DESTINATION_PORT, Header, PAGE_BYTES, PROTOCOL, Page, Ruleset, SOURCE, SOURCE_PORT,
};

/// The packet's classes, made once and asked of every group.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct Classes {
    pub of: [u32; 5],
}

/// A record of type `T` from a table of the policy image that begins at `first_page`.
#[inline(always)]
pub fn entry<E: Env, T>(env: &E, generation: u32, first_page: u32, index: u32) -> Option<*const T> {
    let per_page = (PAGE_BYTES / size_of::<T>()) as u32;
    let page = env.page(generation, first_page + index / per_page)?;
    let offset = (index % per_page) as usize & (per_page as usize - 1);
    // SAFETY: the offset is below the number of records in a page (sizes divide 512).
    Some(unsafe { page.cast::<T>().add(offset) })
}

/// The image's header.
#[inline(always)]
pub fn header<E: Env>(env: &E, generation: u32) -> Option<*const Header> {
    Some(env.page(generation, 0)?.cast())
}

/// A `u16` of a table.
#[inline(always)]
pub fn entry16<E: Env>(env: &E, generation: u32, first_page: u32, index: u32) -> Option<u32> {
    let p = entry::<E, u16>(env, generation, first_page, index)?;
    // SAFETY: `entry` points into a page.
    Some(unsafe { *p } as u32)
}

/// The deciding rule of one ruleset: its word in the `rules` table ([`crate::policy::RULE_ALLOW`] and the id), or 0 if
/// none matches (a group ends in DenyAll, so there always is one).
#[inline(never)]
pub fn decide<E: Env>(env: &E, ctx: &mut Context, ruleset: u32) -> u32 {
    decide_inner(env, ctx, ruleset).unwrap_or(0)
}

#[inline(always)]
fn decide_inner<E: Env>(env: &E, ctx: &mut Context, ruleset: u32) -> Option<u32> {
    let generation = ctx.generation;
    let head = header(env, generation)?;
    // SAFETY: page 0 is the header.
    let (rulesets, locals, summaries, rows, rules) =
        unsafe { ((*head).rulesets, (*head).locals, (*head).summaries, (*head).rows, (*head).rules) };
    let set = entry::<E, Ruleset>(env, generation, rulesets, ruleset)?;
    // SAFETY: `entry` points into a page.
    let set = unsafe { &*set };

    let row_source = set.row_base[SOURCE]
        + entry16(env, generation, locals, set.local_base[SOURCE] + ctx.classes.of[SOURCE])?;
    let row_destination = set.row_base[DESTINATION]
        + entry16(env, generation, locals, set.local_base[DESTINATION] + ctx.classes.of[DESTINATION])?;
    let row_sport = set.row_base[SOURCE_PORT]
        + entry16(env, generation, locals, set.local_base[SOURCE_PORT] + ctx.classes.of[SOURCE_PORT])?;
    let row_dport = set.row_base[DESTINATION_PORT]
        + entry16(
            env,
            generation,
            locals,
            set.local_base[DESTINATION_PORT] + ctx.classes.of[DESTINATION_PORT],
        )?;
    let row_protocol = set.row_base[PROTOCOL] + ctx.classes.of[PROTOCOL];

    let summary = |row: u32| -> Option<u64> {
        let p = entry::<E, u64>(env, generation, summaries, row)?;
        // SAFETY: `entry` points into a page.
        Some(unsafe { *p })
    };
    let mut candidates = summary(row_source)?
        & summary(row_destination)?
        & summary(row_sport)?
        & summary(row_dport)?
        & summary(row_protocol)?;

    let a: *const Page = env.page(generation, rows + row_source)?;
    let b: *const Page = env.page(generation, rows + row_destination)?;
    let c: *const Page = env.page(generation, rows + row_sport)?;
    let d: *const Page = env.page(generation, rows + row_dport)?;
    let e: *const Page = env.page(generation, rows + row_protocol)?;
    for _ in 0..64 {
        if candidates == 0 {
            return None;
        }
        let w = opaque(lowest_bit(candidates) as usize) & 63;
        // SAFETY: `w` is below the 64 words of a page.
        let word = unsafe {
            (*a.cast::<u64>().add(w))
                & (*b.cast::<u64>().add(w))
                & (*c.cast::<u64>().add(w))
                & (*d.cast::<u64>().add(w))
                & (*e.cast::<u64>().add(w))
        };
        if word != 0 {
            let rule = (w as u32) << 6 | lowest_bit(word);
            let p = entry::<E, u32>(env, generation, rules, set.rule_base + rule)?;
            // SAFETY: `entry` points into a page.
            return Some(unsafe { *p });
        }
        candidates &= candidates - 1;
    }
    None
}

/// Index of the lowest bit set; 0 for 0.
///
/// BPF has no instruction for it, and branches would multiply what the verifier walks through; so the isolated bit is
/// multiplied with a de Bruijn sequence, whose top six bits are different for each of the 64 shifts.
#[inline(always)]
pub fn lowest_bit(word: u64) -> u32 {
    let i = ((word & word.wrapping_neg()).wrapping_mul(DE_BRUIJN) >> 58) as usize & 63;
    // SAFETY: the index is below the 64 elements.
    unsafe { *BIT_OF.as_ptr().add(i) as u32 }
}

const DE_BRUIJN: u64 = 0x03f7_9d71_b4cb_0a89;

static BIT_OF: [u8; 64] = {
    let mut table = [0; 64];
    let mut bit = 0;
    while bit < 64 {
        table[(DE_BRUIJN.wrapping_mul(1 << bit) >> 58) as usize] = bit;
        bit += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_bit_is_what_the_processor_says() {
        for bit in 0..64 {
            assert_eq!(lowest_bit(1 << bit), bit);
            assert_eq!(lowest_bit(u64::MAX << bit), bit);
        }
    }
}
