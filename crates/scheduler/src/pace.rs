//! How long steps take, and so how much prefill one may hold while streams wait for it.
//!
//! A step takes as long as its decodes, plus a time per token of prefill on the rank that has the most.
//! Both are measured, since they depend on the machine, the model and what else runs there. Where ranks
//! share a machine the time depends on the others' tokens, too; then the limit follows within a few steps.
//! Integers, so that equal histories give equal plans.

use std::time::Duration;

/// Prefill gets on even where a token takes longer than the limit.
const TOKENS_MIN: u32 = 16;
/// A step may take this many times its own time for prefill, whatever the limit: what prompts lose to the
/// decodes between their pieces is at most half of what they take themselves.
const DECODE_TIMES: u64 = 2;
/// After the first, no time counts as longer than this many times what was expected: a hiccup of the
/// machine is not its pace. A machine that became slower is believed within a few steps.
const SURPRISE: u64 = 4;
/// Steps with decodes and prefill until one has decodes only, to measure them again. Where prompts never
/// end there would be none, and decodes that became slower would be taken for slow prefill.
const MIXED_MAX: u32 = 16;

/// What a step held.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) decodes: u32,
    /// On the rank that has the most of them.
    pub(crate) prefill_tokens: u32,
}

/// The measured times.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Pace {
    /// Of steps that only decode, older ones fading. 0: there was none.
    decode_ns: u64,
    /// Steps that did both since the last that only decoded.
    mixed: u32,
    /// What prefill added to steps, older ones fading.
    prefill_ns: u64,
    /// Tokens for that, 1024 times as many.
    prefill_tokens: u64,
}

impl Pace {
    /// A step took this long.
    pub(crate) fn observe(&mut self, load: Load, took: Duration) {
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).min(1 << 40);
        match (load.decodes, load.prefill_tokens) {
            (0, 0) => {}
            (_, 0) => {
                self.decode_ns = match (self.decode_ns, took.min(SURPRISE * self.decode_ns)) {
                    (0, _) => took,
                    // The other sequences of long ago say nothing.
                    (_, believed) if self.is_stale() => believed,
                    (before, believed) => (3 * before + believed) / 4,
                };
                self.mixed = 0;
            }
            (decodes, tokens) => {
                let mut own = 0;
                if decodes != 0 {
                    self.mixed += 1;
                    // Without the prefill it would have been no longer.
                    self.decode_ns = self.decode_ns.min(took);
                    own = self.decode_ns;
                }
                let added = (took - own).min(self.expected_ns(tokens).max(own));
                self.prefill_ns = 3 * self.prefill_ns / 4 + added;
                self.prefill_tokens = 3 * self.prefill_tokens / 4 + 1024 * u64::from(tokens);
            }
        }
    }

    /// Whether a step with decodes only is due: where prefill is limited, its share of the times must be known.
    pub(crate) fn is_stale(&self) -> bool {
        self.decode_ns == 0 && self.prefill_ns != 0 || MIXED_MAX <= self.mixed
    }

    /// Tokens per rank that hold up a step's decodes by at most `time`, or a little longer if decoding
    /// itself takes long.
    pub(crate) fn tokens(&self, time: Duration) -> u32 {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let ns = ns.max(DECODE_TIMES * self.decode_ns);
        if self.prefill_ns == 0 {
            return u32::MAX;
        }
        let tokens =
            u128::from(ns) * u128::from(self.prefill_tokens) / u128::from(self.prefill_ns) / 1024;
        u32::try_from(tokens).unwrap_or(u32::MAX).max(TOKENS_MIN)
    }

    /// The longest time that is believed of this many tokens.
    fn expected_ns(&self, tokens: u32) -> u64 {
        if self.prefill_tokens == 0 || self.prefill_ns == 0 {
            return u64::MAX;
        }
        let ns = u128::from(SURPRISE * self.prefill_ns) * u128::from(tokens) * 1024
            / u128::from(self.prefill_tokens);
        u64::try_from(ns).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn pace(steps: &[(u32, u32, u64)]) -> Pace {
        let mut pace = Pace::default();
        for &(decodes, prefill_tokens, took) in steps {
            pace.observe(Load { decodes, prefill_tokens }, ms(took));
        }
        pace
    }

    /// The limit after many steps of which each holds what it may, if decodes and a token take so long.
    fn settled(pace: &mut Pace, decode_ms: u64, token_us: u64) -> u32 {
        for _ in 0..200 {
            let prefill_tokens = if pace.is_stale() { 0 } else { pace.tokens(ms(100)).min(256) };
            let prefill = Duration::from_micros(token_us * u64::from(prefill_tokens));
            pace.observe(Load { decodes: 4, prefill_tokens }, ms(decode_ms) + prefill);
        }
        pace.tokens(ms(100))
    }

    #[test]
    fn nothing_is_held_back_before_anything_was_measured() {
        assert_eq!(Pace::default().tokens(ms(1)), u32::MAX);
        assert_eq!(pace(&[(4, 0, 20)]).tokens(ms(1)), u32::MAX);
        assert_eq!(pace(&[(0, 0, 20)]), Pace::default());
    }

    #[test]
    fn prefill_is_what_a_step_takes_beyond_its_decodes() {
        // A token a millisecond; alone, then beside decodes of 20 ms.
        assert_eq!(pace(&[(0, 200, 200)]).tokens(ms(100)), 100);
        assert_eq!(pace(&[(4, 0, 20), (4, 200, 220)]).tokens(ms(100)), 100);
        // A decode that is not known yet counts as prefill: too little rather than too much.
        assert_eq!(pace(&[(4, 200, 400)]).tokens(ms(100)), 50);
        assert!(pace(&[(4, 200, 400)]).is_stale());
    }

    #[test]
    fn slow_decodes_leave_prefill_twice_their_time() {
        assert_eq!(pace(&[(4, 0, 150), (4, 200, 350)]).tokens(ms(100)), 300);
    }

    #[test]
    fn prefill_never_stands_still() {
        assert_eq!(pace(&[(0, 10, 10_000)]).tokens(ms(100)), TOKENS_MIN);
    }

    #[test]
    fn decodes_that_change_under_endless_prompts_are_measured_again() {
        let mut pace = pace(&[(1, 0, 20), (1, 100, 120)]);
        assert!((99..=100).contains(&settled(&mut pace, 20, 1000)));
        // More streams, and back to few.
        assert!((590..=600).contains(&settled(&mut pace, 300, 1000)));
        assert!((99..=100).contains(&settled(&mut pace, 20, 1000)));
        assert!((33..=35).contains(&settled(&mut pace, 20, 3000)));
    }

    #[test]
    fn steps_of_no_time_do_not_divide_by_it() {
        assert_eq!(pace(&[(0, 10, 0)]).tokens(ms(100)), u32::MAX);
        assert_eq!(pace(&[(4, 0, 20), (4, 10, 5)]).tokens(ms(100)), u32::MAX);
        let mut pace = pace(&[(1, 0, 0)]);
        pace.observe(Load { decodes: 1, prefill_tokens: u32::MAX }, Duration::MAX);
        assert_eq!(pace.tokens(Duration::MAX), u32::MAX);
    }

    #[test]
    fn one_hiccup_is_forgotten_and_a_slower_machine_is_believed() {
        let mut steps = vec![(4, 0, 20), (4, 100, 120), (4, 100, 5000)];
        assert!(30 < pace(&steps).tokens(ms(100)));
        steps.extend([(4, 100, 120); 12]);
        assert!(90 < pace(&steps).tokens(ms(100)));
        steps.extend([(4, 100, 1020); 8]);
        assert_eq!(pace(&steps).tokens(ms(100)), TOKENS_MIN);
        let decodes = pace(&[(4, 0, 20), (4, 0, 3000)]);
        assert_eq!(decodes.decode_ns, 35_000_000);
    }
}
