//! Where a rank sends its rows.

use ids::{Epoch, ExpertId, Rank};
use std::sync::Arc;

/// What one rank needs to know of a view.
#[derive(Clone, Debug)]
pub struct View {
    pub epoch: Epoch,
    pub me: Rank,
    /// Ranks of the view, the masked ones included.
    pub ranks: u16,
    /// `[ranks]`; a masked rank is neither sent to nor waited for.
    pub active: Vec<bool>,
    pub routes: Arc<Routes>,
}

impl View {
    /// Why no exchange can serve this view, if so. Transports refuse it when it is given to them: rows
    /// for a masked rank would wait for nobody.
    #[must_use]
    pub fn defect(&self) -> Option<&'static str> {
        if self.active.len() != usize::from(self.ranks) {
            return Some("its mask has another number of ranks");
        }
        let reachable = |rank: &Rank| self.active.get(rank.index()) == Some(&true);
        let mut targets = self.routes.targets.iter();
        if !targets.all(|target| reachable(&target.rank)) {
            return Some("its routes lead to a rank that takes no part");
        }
        None
    }
}

impl View {
    /// See [`AllToAll::reroute`](crate::AllToAll::reroute).
    pub(crate) fn reroute(&mut self, routes: Arc<Routes>) {
        assert!(routes.targets_match(&self.routes), "other routes to the same ranks");
        self.routes = routes;
    }
}

/// Why a table of routes cannot be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("layer {layer} sends {expert} to {target}, which does not hold it")]
pub struct RoutesError {
    pub layer: usize,
    pub expert: ExpertId,
    pub target: Rank,
}

/// Why the parts of a load cannot be those of a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("layer {layer} shares {expert} among {found} copies, it has {expected}")]
pub struct PartsError {
    pub layer: usize,
    pub expert: ExpertId,
    pub found: usize,
    pub expected: usize,
}

/// For every (MoE layer, expert) the ranks that serve the rows of one source, what part of them each, and the expert's
/// slot there: its index among the ascending experts of that rank.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Routes {
    /// Those of one expert stand together.
    targets: Vec<Target>,
    /// `[moe layers][experts]`: where its targets begin, and how many there are.
    spans: Vec<Vec<(u32, u32)>>,
    /// `[moe layers]`: experts that the source itself holds.
    local: Vec<usize>,
    /// The point of row 0.
    start: u32,
}

/// A rank that serves an expert.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    pub rank: Rank,
    pub slot: u16,
    /// It serves the rows whose point is before this, unless a target before it does. The last one serves the rest.
    pub until: u32,
}

/// What [`Routes`] hold. Row `i` has the point `start + i * STRIDE` modulo 2^32; the expert's first target that ends beyond
/// that point serves it, or else its last.
#[derive(Clone, Copy, Debug)]
pub struct RouteTables<'a> {
    pub targets: &'a [Target],
    /// `[moe layers][experts]`: where its targets begin, and how many there are.
    pub spans: &'a [Vec<(u32, u32)>],
    pub start: u32,
}

/// From the point of one row to that of the next: 2^32 divided by the golden ratio. However many rows there are, they are
/// spread about as evenly over all points as so many can be (Knuth, The Art of Computer Programming 3, section 6.4), so that
/// every target gets its part of few rows, too.
pub const STRIDE: u32 = 0x9e37_79b9;

impl Routes {
    /// The routes of rank `me`; all targets of an expert serve as much.
    ///
    /// * `held`: `[moe layers][ranks]`, ascending experts that a rank holds
    /// * `targets`: which ranks serve (layer, expert) for `me`; at least one
    ///
    /// # Errors
    ///
    /// [`RoutesError`] if a target does not hold the expert it is meant to serve.
    ///
    /// # Panics
    ///
    /// If an expert has no target, or a rank holds more experts than 16 bits can number.
    pub fn new(
        me: Rank,
        experts: usize,
        held: &[Vec<Vec<ExpertId>>],
        targets: impl Fn(usize, ExpertId) -> Vec<Rank>,
    ) -> Result<Self, RoutesError> {
        let slot = |layer: usize, expert: ExpertId, target: Rank| {
            let of_rank = held[layer].get(target.index());
            let slot = of_rank.and_then(|held| held.binary_search(&expert).ok());
            let slot = slot.ok_or(RoutesError { layer, expert, target })?;
            Ok(u16::try_from(slot).expect("experts are numbered in 16 bits"))
        };
        let (mut all, mut spans) = (Vec::new(), Vec::new());
        for layer in 0..held.len() {
            let mut of_layer = Vec::with_capacity(experts);
            for expert in (0..).map(ExpertId).take(experts) {
                let (first, ranks) = (small(all.len()), targets(layer, expert));
                assert!(!ranks.is_empty(), "layer {layer} sends {expert} nowhere");
                of_layer.push((first, small(ranks.len())));
                let ends = ends(&vec![1.0; ranks.len()]);
                for (rank, until) in ranks.into_iter().zip(ends) {
                    all.push(Target { rank, slot: slot(layer, expert, rank)?, until });
                }
            }
            spans.push(of_layer);
        }
        let local = held.iter().map(|ranks| ranks[me.index()].len()).collect();
        // Every source begins elsewhere: their first rows do not meet on the first target.
        let ranks = held.first().map_or(1, Vec::len);
        let start = point(me.index() as f64 / ranks as f64);
        Ok(Self { targets: all, spans, local, start })
    }

    /// The same routes, where the targets of an expert serve other parts of its rows. A part is a target's weight among those
    /// of its expert; if none is above 0, all are alike.
    ///
    /// * `parts`: of (layer, expert), as its targets were given; not asked for where there is only one
    ///
    /// # Errors
    ///
    /// [`PartsError`] if there are more or fewer parts than targets.
    pub fn shared<'p>(
        &self,
        parts: impl Fn(usize, ExpertId) -> &'p [f32],
    ) -> Result<Self, PartsError> {
        let mut shared = self.clone();
        for (layer, spans) in self.spans.iter().enumerate() {
            for (expert, &(first, count)) in (0..).map(ExpertId).zip(spans) {
                if count < 2 {
                    continue;
                }
                let (parts, expected) = (parts(layer, expert), count as usize);
                if parts.len() != expected {
                    return Err(PartsError { layer, expert, found: parts.len(), expected });
                }
                let targets = &mut shared.targets[first as usize..][..expected];
                for (target, until) in targets.iter_mut().zip(ends(parts)) {
                    target.until = until;
                }
            }
        }
        Ok(shared)
    }

    /// Whether both lead to the same ranks and slots, in whatever parts.
    #[must_use]
    pub fn targets_match(&self, other: &Self) -> bool {
        let places = |routes: &Self| {
            routes.targets.iter().map(|target| (target.rank, target.slot)).collect::<Vec<_>>()
        };
        (&self.spans, &self.local, places(self)) == (&other.spans, &other.local, places(other))
    }

    /// Rank and slot that serve a row. The rows of a step are spread over the expert's targets, so that these share its load
    /// whatever the sources send.
    ///
    /// # Panics
    ///
    /// If the layer or expert does not exist.
    #[must_use]
    pub fn target(&self, layer: u16, expert: u16, row: usize) -> (Rank, u16) {
        let (first, count) = self.spans[usize::from(layer)][usize::from(expert)];
        let targets = &self.targets[first as usize..][..count as usize];
        let point = self.start.wrapping_add(small(row).wrapping_mul(STRIDE));
        let serves = targets.iter().position(|target| point < target.until);
        let target = targets[serves.unwrap_or(targets.len() - 1)];
        (target.rank, target.slot)
    }

    /// The same as tables, for a device that finds the targets itself.
    #[must_use]
    pub fn tables(&self) -> RouteTables<'_> {
        RouteTables { targets: &self.targets, spans: &self.spans, start: self.start }
    }

    /// How many experts of a layer this rank holds.
    ///
    /// # Panics
    ///
    /// If the layer does not exist.
    #[must_use]
    pub fn local_experts(&self, layer: u16) -> usize {
        self.local[usize::from(layer)]
    }
}

fn small(count: usize) -> u32 {
    u32::try_from(count)
        .expect("layers, experts, ranks and rows of a step have far fewer than 2^32")
}

/// Where each target's points end.
fn ends(parts: &[f32]) -> Vec<u32> {
    let weight = |part: &f32| if 0.0 < *part && part.is_finite() { f64::from(*part) } else { 0.0 };
    let mut weights: Vec<f64> = parts.iter().map(weight).collect();
    let all: f64 = weights.iter().sum();
    if all <= 0.0 {
        weights.fill(1.0);
    }
    let all: f64 = weights.iter().sum();
    let mut sum = 0.0;
    let ends = weights.iter().map(|weight| {
        sum += weight;
        point(sum / all)
    });
    let mut ends: Vec<u32> = ends.collect();
    // Whatever rounding makes of it: who serves nothing stands behind the end.
    if let Some(last) = weights.iter().rposition(|&weight| 0.0 < weight) {
        ends[last..].fill(u32::MAX);
    }
    ends
}

/// How far a part of all points reaches.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "within 0 to 2^32 - 1")]
fn point(part: f64) -> u32 {
    (part * 4_294_967_296.0).clamp(0.0, 4_294_967_295.0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One expert on all of `ranks` ranks, whose copies have these parts of the rows of rank `me`.
    fn routes(me: u16, parts: &[f32]) -> Routes {
        let ranks: Vec<Rank> = (0..).map(Rank).take(parts.len()).collect();
        let held = vec![vec![vec![ExpertId(0)]; parts.len()]];
        let routes = Routes::new(Rank(me), 1, &held, |_, _| ranks.clone()).unwrap();
        routes.shared(|_, _| parts).unwrap()
    }

    fn served(routes: &Routes, copies: usize, rows: usize) -> Vec<usize> {
        let mut served = vec![0; copies];
        for row in 0..rows {
            served[routes.target(0, 0, row).0.index()] += 1;
        }
        served
    }

    #[test]
    fn every_copy_has_its_part_of_few_rows_and_of_many() {
        for parts in [&[0.5, 0.5][..], &[0.7, 0.3], &[0.1, 0.0, 0.65, 0.25], &[0.02, 0.98]] {
            for me in 0..u16::try_from(parts.len()).unwrap() {
                let routes = routes(me, parts);
                for rows in 0..2000 {
                    for (count, part) in served(&routes, parts.len(), rows).iter().zip(parts) {
                        let off = *count as f64 - rows as f64 * f64::from(*part);
                        assert!(off.abs() < 4.0, "{count} of {rows} rows for {part} of {parts:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn sources_of_one_row_each_do_not_meet() {
        let mut served = [0; 4];
        for me in 0..4 {
            served[routes(me, &[0.25; 4]).target(0, 0, 0).0.index()] += 1;
        }
        assert_eq!(served, [1; 4]);
    }

    #[test]
    fn copy_without_a_part_serves_nothing_and_no_parts_are_equal_ones() {
        for (parts, want) in [
            ([0.0, 1.0, 0.0], [0, 300, 0]),
            ([1.0, 0.0, 0.0], [300, 0, 0]),
            ([0.0, 0.0, 7.5], [0, 0, 300]),
            ([f32::NAN, -1.0, 1e-30], [0, 0, 300]),
        ] {
            assert_eq!(served(&routes(0, &parts), 3, 300), want, "{parts:?}");
        }
        let alike = served(&routes(0, &[0.0; 3]), 3, 300);
        assert!(alike.iter().all(|count| (98..=102).contains(count)), "{alike:?}");
    }

    #[test]
    fn parts_of_other_copies_are_refused() {
        let error = routes(0, &[0.5, 0.5]).shared(|_, _| &[1.0]).unwrap_err();
        assert_eq!(error.to_string(), "layer 0 shares e0 among 1 copies, it has 2");
    }
}
