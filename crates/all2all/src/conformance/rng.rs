//! Chance from a seed (SplitMix64), so that a failure replays.

/// A sequence of numbers that a seed decides.
#[derive(Clone, Debug)]
pub(super) struct Rng(u64);

impl Rng {
    /// The numbers of a seed that is made of several.
    pub(super) fn of(seeds: &[u64]) -> Self {
        let mut rng = Self(0);
        for &seed in seeds {
            rng.0 ^= seed;
            rng.0 = rng.next();
        }
        rng
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `0..limit`. The remainder's bias does not matter here.
    pub(super) fn below(&mut self, limit: u16) -> u16 {
        let limit = u64::from(limit.max(1));
        u16::try_from(self.next() % limit).expect("less than a u16")
    }

    pub(super) fn index(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit.max(1)).expect("a length");
        usize::try_from(self.next() % limit).expect("less than a usize")
    }

    pub(super) fn one_in(&mut self, times: u16) -> bool {
        self.below(times) == 0
    }

    /// Sometimes holds the thread up, for up to some hundred microseconds.
    pub(super) fn dawdle(&mut self) {
        match self.below(8) {
            0 => (0..self.below(20)).for_each(|_| std::thread::yield_now()),
            1 => (0..self.below(20_000)).for_each(|_| std::hint::spin_loop()),
            _ => {}
        }
    }
}
