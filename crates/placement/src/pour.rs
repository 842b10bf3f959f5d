//! How the copies of one expert share its load so that the fullest of them is as empty as can be: poured like
//! water over vessels that stand unevenly full.

use crate::load::{Lanes, REGIMES_MAX};

/// What each holder gets of `demand`, by regime; it fills the emptiest first, up to a common level.
///
/// * `others`: what each holder has to do besides
/// * `parts`: one per holder; the result
pub(crate) fn pour(demand: Lanes, others: &[Lanes], parts: &mut [Lanes]) {
    debug_assert_eq!(others.len(), parts.len());
    match (others, parts) {
        ([_], [all]) => *all = demand,
        ([one, other], [first, second]) => {
            for lane in 0..demand.len() {
                let even = (demand[lane] + other[lane] - one[lane]) * 0.5;
                first[lane] = even.max(0.0).min(demand[lane]);
                second[lane] = demand[lane] - first[lane];
            }
        }
        (others, parts) => {
            let level = level(demand, others);
            for (part, below) in parts.iter_mut().zip(others) {
                for lane in 0..demand.len() {
                    part[lane] = (level[lane] - below[lane]).max(0.0);
                }
            }
        }
    }
}

/// The common level of those holders that get anything.
fn level(demand: Lanes, others: &[Lanes]) -> Lanes {
    let mut level = [f32::MAX; REGIMES_MAX];
    // Holders above the mean of those below the last level get nothing. Without them the mean is lower, which may
    // leave further ones above it; each round leaves out one at least, or is the last.
    for _ in 0..others.len() {
        let (mut sum, mut count) = (demand, Lanes::default());
        for below in others {
            for lane in 0..demand.len() {
                let is_below = below[lane] <= level[lane];
                sum[lane] += if is_below { below[lane] } else { 0.0 };
                count[lane] += if is_below { 1.0 } else { 0.0 };
            }
        }
        let mut is_last = true;
        for lane in 0..demand.len() {
            let mean = sum[lane] / count[lane].max(1.0);
            is_last &= level[lane] <= mean;
            level[lane] = level[lane].min(mean);
        }
        if is_last {
            break;
        }
    }
    level
}
