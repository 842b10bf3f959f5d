//! Adds up what the workers report of their experts' work, window by window. It has no clock.

use ids::WorkerId;
use placement::{Shape, Window};
use std::collections::BTreeMap;

/// Rows of one window, by worker: `[moe layers][experts]`.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    rows: BTreeMap<WorkerId, Vec<Vec<u64>>>,
    /// Of all workers, since the last look.
    moment: Vec<Vec<u64>>,
    last: Option<Measured>,
}

/// What a window showed.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Measured {
    /// Rows that experts computed, all layers together.
    pub(crate) rows: BTreeMap<WorkerId, u64>,
    /// The same by layer and expert, `[moe layers][experts]`.
    pub(crate) experts: Vec<Vec<u64>>,
    /// Load of the fullest worker as a multiple of the mean, averaged over the layers: 1 is level.
    pub(crate) fullest: f64,
}

impl Meter {
    /// Takes a report in.
    ///
    /// # Errors
    ///
    /// If it counts another number of layers or experts than the model has.
    pub(crate) fn add(
        &mut self,
        worker: WorkerId,
        layers: Vec<Vec<u64>>,
        shape: Shape,
    ) -> Result<(), String> {
        let is_known = layers.iter().all(|layer| layer.len() == shape.experts);
        if layers.len() != shape.moe_layers || !is_known {
            return Err(format!("the load of {worker} is not that of {shape}"));
        }
        add(&mut self.moment, &layers);
        add(self.rows.entry(worker).or_default(), &layers);
        Ok(())
    }

    /// What was added since the last call; `None` if that was nothing.
    pub(crate) fn moment(&mut self) -> Option<Window> {
        let moment = std::mem::take(&mut self.moment);
        (!moment.is_empty()).then(|| Window::new(&moment).ok()).flatten()
    }

    /// Ends the window. `None` if nobody had to do anything.
    ///
    /// * `members`: who could have
    pub(crate) fn close(&mut self, members: &[WorkerId]) -> Option<Window> {
        let rows = std::mem::take(&mut self.rows);
        if rows.is_empty() {
            return None;
        }
        let fullest = fullest(&rows, members);
        let total = |rows: &Vec<Vec<u64>>| rows.iter().flatten().sum();
        let by_worker = rows.iter().map(|(&worker, rows)| (worker, total(rows))).collect();
        let mut sum = Vec::new();
        rows.values().for_each(|rows| add(&mut sum, rows));
        let window = Window::new(&sum).ok();
        self.last = Some(Measured { rows: by_worker, experts: sum, fullest });
        window
    }

    /// What the last window with any work showed.
    pub(crate) fn last(&self) -> Option<&Measured> {
        self.last.as_ref()
    }
}

/// Adds counts of one model, `[moe layers][experts]`; the first to come are the sum.
fn add(sum: &mut Vec<Vec<u64>>, layers: &[Vec<u64>]) {
    if sum.is_empty() {
        *sum = layers.to_vec();
        return;
    }
    for (sum, new) in sum.iter_mut().flatten().zip(layers.iter().flatten()) {
        *sum = sum.saturating_add(*new);
    }
}

/// * `members`: who could have had work
fn fullest(rows: &BTreeMap<WorkerId, Vec<Vec<u64>>>, members: &[WorkerId]) -> f64 {
    let count = rows.values().next().map_or(0, Vec::len);
    let idle = members.iter().filter(|member| !rows.contains_key(member)).count();
    let workers = idle + rows.len();
    let mut sum = 0.0;
    for layer in 0..count {
        let loads = rows.values().map(|rows| rows[layer].iter().sum::<u64>());
        let (total, most) = loads.fold((0, 0), |(total, most), l| (total + l, u64::max(most, l)));
        // A layer without rows is level.
        sum += if total == 0 { 1.0 } else { most as f64 * workers as f64 / total as f64 };
    }
    if count == 0 { 1.0 } else { sum / count as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { moe_layers: 2, experts: 2 };

    #[test]
    fn reports_add_up_and_the_fullest_worker_shows() {
        let mut meter = Meter::default();
        let [a, b, c] = [0, 1, 2].map(WorkerId);
        assert_eq!(meter.close(&[a, b]), None);
        for (worker, layers) in [
            (a, vec![vec![3, 1], vec![0, 0]]),
            (b, vec![vec![0, 1], vec![0, 0]]),
            (b, vec![vec![0, 1], vec![0, 2]]),
            (c, vec![vec![0, 0], vec![1, 0]]),
        ] {
            meter.add(worker, layers, SHAPE).unwrap();
        }
        let all = Some(Window::new(&[vec![3, 3], vec![1, 2]]).unwrap());
        assert_eq!(meter.moment(), all);
        assert_eq!(meter.moment(), None, "the next moment starts empty");
        let window = meter.close(&[a, b, c]);
        assert_eq!(window, all);
        let last = meter.last().unwrap();
        assert_eq!(last.rows, BTreeMap::from([(a, 4), (b, 4), (c, 1)]));
        assert_eq!(last.experts, [[3, 3], [1, 2]]);
        // Of three workers one has 4 of 6 rows in one layer, and 2 of 3 in the other.
        assert!((last.fullest - 2.0).abs() < 1e-9, "{}", last.fullest);
        assert_eq!(meter.close(&[a, b]), None, "the next window starts empty");
    }

    #[test]
    fn report_of_another_model_is_refused() {
        let mut meter = Meter::default();
        let error = meter.add(WorkerId(4), vec![vec![1, 2, 3]], SHAPE).unwrap_err();
        assert_eq!(error, "the load of w4 is not that of 2 layers of 2 experts");
        assert_eq!(meter.close(&[]), None);
    }
}
