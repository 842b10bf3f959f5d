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
        if !targets.all(|(rank, _)| reachable(rank)) {
            return Some("its routes lead to a rank that takes no part");
        }
        None
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

/// For every (MoE layer, expert) the ranks that take turns with the rows of one source, and the expert's
/// slot on each: its index among the ascending experts of that rank.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Routes {
    /// Those of one expert stand together.
    targets: Vec<(Rank, u16)>,
    /// `[moe layers][experts]`: where its targets begin, and how many there are.
    spans: Vec<Vec<(u32, u32)>>,
    /// `[moe layers]`: experts that the source itself holds.
    local: Vec<usize>,
}

/// What [`Routes`] hold: row `i` takes target `first + i % count`.
#[derive(Clone, Copy, Debug)]
pub struct RouteTables<'a> {
    /// Rank and slot.
    pub targets: &'a [(Rank, u16)],
    /// `[moe layers][experts]`: where its targets begin, and how many there are.
    pub spans: &'a [Vec<(u32, u32)>],
}

impl Routes {
    /// The routes of rank `me`.
    ///
    /// * `held`: `[moe layers][ranks]`, ascending experts that a rank holds
    /// * `targets`: which ranks take turns serving (layer, expert) for `me`; at least one
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
            Ok((target, u16::try_from(slot).expect("experts are numbered in 16 bits")))
        };
        let small =
            |n: usize| u32::try_from(n).expect("layers, experts and ranks have 16 bits each");
        let (mut all, mut spans) = (Vec::new(), Vec::new());
        for layer in 0..held.len() {
            let mut of_layer = Vec::with_capacity(experts);
            for expert in (0..).map(ExpertId).take(experts) {
                let (first, ranks) = (small(all.len()), targets(layer, expert));
                assert!(!ranks.is_empty(), "layer {layer} sends {expert} nowhere");
                of_layer.push((first, small(ranks.len())));
                for target in ranks {
                    all.push(slot(layer, expert, target)?);
                }
            }
            spans.push(of_layer);
        }
        let local = held.iter().map(|ranks| ranks[me.index()].len()).collect();
        Ok(Self { targets: all, spans, local })
    }

    /// Rank and slot that serve a row. The rows of a step take turns over the expert's targets, so that
    /// these share its load whatever the sources send.
    ///
    /// # Panics
    ///
    /// If the layer or expert does not exist.
    #[must_use]
    pub fn target(&self, layer: u16, expert: u16, row: usize) -> (Rank, u16) {
        let (first, count) = self.spans[usize::from(layer)][usize::from(expert)];
        self.targets[first as usize + row % count as usize]
    }

    /// The same as tables, for a device that finds the targets itself.
    #[must_use]
    pub fn tables(&self) -> RouteTables<'_> {
        RouteTables { targets: &self.targets, spans: &self.spans }
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
