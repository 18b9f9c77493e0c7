//! Medians and spreads of a handful of rounds.

/// The middle value; `None` of none.
pub(super) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

/// From the smallest to the largest value, as a share of the median.
pub(super) fn spread(values: &[f64]) -> f64 {
    let (min, max) = values.iter().fold((f64::INFINITY, 0.0f64), |(min, max), &v| (min.min(v), max.max(v)));
    match median(values) {
        Some(median) if median > 0.0 => (max - min) / median,
        _ => 0.0,
    }
}

/// The median of the rounds' own ratios: what slows a whole round down does not count.
pub(super) fn paired_ratio(values: &[f64], limits: &[f64]) -> Option<f64> {
    let ratios: Vec<f64> = values
        .iter()
        .zip(limits)
        .filter(|(_, limit)| **limit > 0.0)
        .map(|(value, limit)| value / limit)
        .collect();
    median(&ratios)
}

/// Nanoseconds that a packet takes longer than at the limit, both given in millions a second; the rounds' median. Unlike
/// the ratio it does not depend on how fast the rest of the way is.
pub(super) fn paired_extra_ns(values: &[f64], limits: &[f64]) -> Option<f64> {
    let pairs = values.iter().zip(limits).filter(|(value, limit)| **value > 0.0 && **limit > 0.0);
    median(&pairs.map(|(value, limit)| 1e3 / value - 1e3 / limit).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_disturbed_round_moves_neither_the_median_nor_the_ratio() {
        let limit = [2.0, 2.0, 0.5, 2.0, 2.0];
        let value = [1.0, 1.0, 0.25, 1.0, 1.0];
        assert_eq!(median(&value), Some(1.0));
        assert_eq!(paired_ratio(&value, &limit), Some(0.5));
        assert_eq!(spread(&value), 0.75);
        assert_eq!(paired_extra_ns(&value, &limit), Some(500.0));
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[1.0, 2.0]), Some(1.5));
    }
}
