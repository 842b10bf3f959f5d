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
        let mut targets = self.routes.targets.iter().flatten();
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

/// For every (MoE layer, expert) the rank that serves the rows of one source, and the expert's slot
/// there: its index among the ascending experts of that rank.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Routes {
    /// `[moe layers][experts]`
    targets: Vec<Vec<(Rank, u16)>>,
    /// `[moe layers]`: experts that the source itself holds.
    local: Vec<usize>,
}

impl Routes {
    /// The routes of rank `me`.
    ///
    /// * `held`: `[moe layers][ranks]`, ascending experts that a rank holds
    /// * `target`: which rank serves (layer, expert) for `me`
    ///
    /// # Errors
    ///
    /// [`RoutesError`] if a target does not hold the expert it is meant to serve.
    ///
    /// # Panics
    ///
    /// If a rank holds more experts than 16 bits can number.
    pub fn new(
        me: Rank,
        experts: usize,
        held: &[Vec<Vec<ExpertId>>],
        target: impl Fn(usize, ExpertId) -> Rank,
    ) -> Result<Self, RoutesError> {
        let route = |layer: usize, expert: ExpertId| {
            let target = target(layer, expert);
            let ranks = &held[layer];
            let slot = ranks.get(target.index()).and_then(|held| held.binary_search(&expert).ok());
            let slot = slot.ok_or(RoutesError { layer, expert, target })?;
            Ok((target, u16::try_from(slot).expect("experts are numbered in 16 bits")))
        };
        let layer = |layer| (0..).map(ExpertId).take(experts).map(|e| route(layer, e)).collect();
        Ok(Self {
            targets: (0..held.len()).map(layer).collect::<Result<_, _>>()?,
            local: held.iter().map(|ranks| ranks[me.index()].len()).collect(),
        })
    }

    /// Rank and slot that serve an expert.
    ///
    /// # Panics
    ///
    /// If the layer or expert does not exist.
    #[must_use]
    pub fn target(&self, layer: u16, expert: u16) -> (Rank, u16) {
        self.targets[usize::from(layer)][usize::from(expert)]
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
