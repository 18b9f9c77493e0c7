//! Which backend a new flow goes to: slots, each given to the healthy member with the highest hash of both (rendezvous
//! hashing). So a member that goes takes only its own slots along, and gets them back when it returns.

/// Slots that each member has at least, on average: its share is then even to about a sixth (one standard deviation).
const EACH: usize = 32;
const FEWEST: usize = 1024;
const MOST: usize = 65_536;

/// How many slots a listener with so many candidates has, down or not: what a probe finds changes no slot but those of its
/// member.
pub(super) fn count(candidates: usize) -> u32 {
    (candidates * EACH).clamp(FEWEST, MOST).next_power_of_two() as u32
}

/// The slots of these members: endpoint + 1 of the one a slot goes to, 0 if there is none.
pub(super) fn fill<'m>(count: u32, healthy: impl Iterator<Item = (&'m str, u32)>) -> Vec<u16> {
    // Below the hash the member's position, so that the highest word names the winner.
    let members: Vec<(u64, u16)> =
        healthy.map(|(name, endpoint)| (of_name(name), endpoint as u16 + 1)).collect();
    if members.is_empty() {
        return vec![0; count as usize];
    }
    let winner = |slot: u32| {
        let slot = mix(u64::from(slot), 0x9e37_79b9_7f4a_7c15);
        // The one step done for every slot and member: both sides are well mixed already.
        let score = |member: u64| (member ^ slot).wrapping_mul(0xd6e8_feb8_6659_fd93) & !0xffff;
        let best = members.iter().zip(0..).fold(0, |best, (&(member, _), i)| best.max(score(member) | i));
        members[(best & 0xffff) as usize].1
    };
    (0..count).map(winner).collect()
}

/// Both halves of a product: every bit of the result depends on every bit of the value. Not cryptographic: who names
/// backends also chooses where flows go.
fn mix(value: u64, factor: u64) -> u64 {
    let product = u128::from(value ^ 0xa076_1d64_78bd_642f) * u128::from(factor);
    (product >> 64) as u64 ^ product as u64
}

/// By name, not by number: an endpoint's number changes with every guest before it.
fn of_name(name: &str) -> u64 {
    name.bytes().fold(name.len() as u64, |hash, byte| mix(hash ^ u64::from(byte), 0xe703_7ed1_a0b4_28db))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn members(count: usize) -> Vec<(String, u32)> {
        (0..count).map(|i| (format!("vm{i}/ipconfig1"), i as u32)).collect()
    }

    fn slots(members: &[(String, u32)], down: impl Fn(u32) -> bool) -> Vec<u16> {
        let healthy = members.iter().filter(|(_, i)| !down(*i)).map(|(name, i)| (name.as_str(), *i));
        fill(count(members.len()), healthy)
    }

    #[test]
    fn a_members_loss_moves_only_its_own_slots_to_all_the_others() {
        for size in [2, 3, 10, 100] {
            let members = members(size);
            let before = slots(&members, |_| false);
            let after = slots(&members, |i| i == 1);
            let mut takers = std::collections::HashSet::new();
            for (then, now) in before.iter().zip(&after) {
                if *then == 2 {
                    assert_ne!(*now, 2);
                    takers.insert(*now);
                } else {
                    assert_eq!(then, now);
                }
            }
            assert!(takers.len() >= (size - 1).min(10), "{size}: {} take over", takers.len());
        }
        assert!(slots(&members(3), |_| true).iter().all(|slot| *slot == 0));
    }

    #[test]
    fn members_get_even_shares() {
        for size in [1, 2, 3, 10, 100, 1000] {
            let members = members(size);
            // Of several runs the quickest: other tests run beside this one.
            let timed = || {
                let began = Instant::now();
                (slots(&members, |_| false), began.elapsed())
            };
            let (slots, took) = (0..5).map(|_| timed()).min_by_key(|(_, took)| *took).unwrap();
            let mut shares = vec![0; size];
            slots.iter().for_each(|slot| shares[usize::from(*slot) - 1] += 1);
            let (most, least) = (*shares.iter().max().unwrap(), *shares.iter().min().unwrap());
            let even = slots.len() as f64 / size as f64;
            println!(
                "{size} members: {} slots, {least}..={most} each, {:.2}..={:.2} of an even share, {took:?}",
                slots.len(),
                f64::from(least) / even,
                f64::from(most) / even
            );
            // Six standard deviations of a binomial.
            assert!((f64::from(most) - even).abs() < 6.0 * even.sqrt(), "{size}");
            assert!((f64::from(least) - even).abs() < 6.0 * even.sqrt(), "{size}");
        }
    }

    #[test]
    fn the_number_of_slots_is_a_power_of_two_and_bounded() {
        assert_eq!([0, 1, 32, 33, 1000, 5000].map(count), [1024, 1024, 1024, 2048, 32_768, 65_536]);
    }
}
