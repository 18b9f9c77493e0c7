//! Which of many prefixes share addresses.

use ipnet::IpNet;

use super::source::At;

/// A prefix and whose it is.
pub type Owned<'a, T> = (&'a At<IpNet>, T);

/// Pairs that overlap, the one that stands later in the file first. Prefixes nest or are apart, so one sweep in order
/// of addresses finds for each the innermost one around it. The families are apart by themselves.
pub fn overlaps<'a, T: Copy>(all: &[Owned<'a, T>]) -> Vec<(Owned<'a, T>, Owned<'a, T>)> {
    let mut sorted = all.to_vec();
    sorted.sort_by_key(|(prefix, _)| (prefix.value.network(), prefix.value.prefix_len()));
    let mut around: Vec<Owned<'a, T>> = Vec::new();
    let mut found = Vec::new();
    for item in sorted {
        while around.last().is_some_and(|outer| !outer.0.value.contains(&item.0.value)) {
            around.pop();
        }
        if let Some(outer) = around.last() {
            let later_first = item.0.span.used >= outer.0.span.used;
            found.push(if later_first { (item, *outer) } else { (*outer, item) });
        }
        around.push(item);
    }
    found
}
