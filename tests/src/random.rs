//! Reproducible pseudo-random numbers, good enough to pick corners with.

/// xorshift64*. The seed must not be 0.
pub struct Random(pub u64);

impl Random {
    /// 64 bits, of which the upper ones are the better.
    #[expect(clippy::should_implement_trait, reason = "an endless source is no iterator to anybody here")]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n`, which must not be 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }

    pub fn pick<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        of[self.below(of.len())]
    }

    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}
