//! All rulesets compiled and put into one image.

use std::collections::HashMap;

use super::error::CompileError;
use super::groups::{Asked, Groups, RulesetOf, place, words};
use super::image::{Image, TooLarge};
use super::numbers::RuleIds;
use super::ruleset::{self, Classes, Scratch, TooManyRows};
use super::workers::in_order;
use crate::policy::network::{Direction, Network};

/// Rulesets that may be compiled before they are put into the image: few enough that what waits does not matter beside
/// the image.
const AHEAD: usize = 16;

/// Compiles all rulesets into an image, and answers for each the bit of its first rule ([`super::image`]). The image
/// keeps no more than `limit` bytes, about; past that it only counts.
pub(super) fn compile(
    network: &Network,
    groups: &Groups,
    ids: &RuleIds,
    limit: usize,
) -> Result<(Image, Vec<u32>), Vec<CompileError>> {
    let mut image = Image::new(groups.asked.len(), limit);
    let mut first_bits = vec![0; groups.asked.len()];
    // Where the words of its rules begin, and how many there are.
    let mut rule_bases: HashMap<(RulesetOf, Direction), (u32, u32)> = HashMap::new();
    let classes =
        Classes { addresses: &groups.addresses, ports: &groups.ports, port_lists: &groups.port_lists };
    let rules_of = |asked: &Asked| &groups.rules[&(asked.of, asked.direction)];
    let mut errors = Vec::new();
    let mut order: Vec<(usize, Asked)> = groups.asked.iter().copied().enumerate().collect();
    order.sort_by_key(|(_, asked)| std::cmp::Reverse(rules_of(asked).len()));
    let one = |(_, asked): &(usize, Asked), scratch: &mut Scratch| {
        ruleset::compile(rules_of(asked), &groups.meanings[asked.context], &classes, scratch)
    };
    in_order(&order, AHEAD, Scratch::default, one, |&(i, asked), compiled| {
        let compiled = match compiled {
            Ok(compiled) => compiled,
            Err(TooManyRows) => {
                let message = "one of its fields tells more than 65,536 kinds of packets apart";
                errors.push(CompileError::new(place(network, asked.of), message));
                return true;
            }
        };
        let (rule_base, count) = *rule_bases.entry((asked.of, asked.direction)).or_insert_with(|| {
            let words = words(network, asked.of, asked.direction, ids);
            (image.rules(words.iter().copied()), words.len() as u32)
        });
        let number = i as u32 + 1;
        let platform = groups.platform.get(&number).copied().unwrap_or_default();
        match image.ruleset(number, &compiled, rule_base, count, platform) {
            Ok(first_bit) => first_bits[i] = first_bit,
            Err(TooLarge) => {
                let message = "the tables of all groups are too large together";
                errors.push(CompileError::new(place(network, asked.of), message));
                return false;
            }
        }
        true
    });
    if errors.is_empty() { Ok((image, first_bits)) } else { Err(errors) }
}
