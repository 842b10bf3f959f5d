//! What the experts of this worker had to do: rows per layer and expert, counted as they arrive, or on the device where they
//! never do.
//!
//! Rows of steps that fail afterwards may count too: plans need shares, not sums.

use ids::ExpertId;
use std::sync::atomic::{AtomicU64, Ordering};

/// Rows since the last [`Tally::take`].
#[derive(Debug)]
pub(crate) struct Tally {
    experts: usize,
    /// `[moe layers][experts]`, flat.
    rows: Vec<AtomicU64>,
}

impl Tally {
    pub(crate) fn new(moe_layers: usize, experts: usize) -> Self {
        Self { experts, rows: (0..moe_layers * experts).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Counts the rows of a layer.
    ///
    /// * `local`: the experts of this rank, ascending
    /// * `rows`: of each of them
    pub(crate) fn count(
        &self,
        moe_layer: usize,
        local: &[ExpertId],
        rows: impl IntoIterator<Item = u32>,
    ) {
        for (expert, rows) in local.iter().zip(rows) {
            if 0 < rows {
                let index = moe_layer * self.experts + expert.index();
                self.rows[index].fetch_add(u64::from(rows), Ordering::Relaxed);
            }
        }
    }

    /// What was counted, `[moe layers][experts]`, and starts anew; `None` if nothing was.
    pub(crate) fn take(&self) -> Option<Vec<Vec<u64>>> {
        let rows: Vec<u64> = self.rows.iter().map(|rows| rows.swap(0, Ordering::Relaxed)).collect();
        let any = rows.iter().any(|&rows| 0 < rows);
        any.then(|| rows.chunks(self.experts).map(<[u64]>::to_vec).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_counted_under_their_layer_and_expert_once() {
        let tally = Tally::new(2, 4);
        assert_eq!(tally.take(), None);
        tally.count(0, &[ExpertId(1), ExpertId(3)], [2, 0]);
        tally.count(1, &[ExpertId(0), ExpertId(3)], [1, 3]);
        tally.count(1, &[ExpertId(0), ExpertId(3)], [0, 5]);
        assert_eq!(tally.take(), Some(vec![vec![0, 2, 0, 0], vec![1, 0, 0, 8]]));
        assert_eq!(tally.take(), None);
    }
}
