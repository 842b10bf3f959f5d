//! Which ranks hold which experts, and the view that says so.
//!
//! Everything here is immutable and made by a checked constructor: behind it every expert of every
//! layer has a rank.

mod bound;
mod fill;
mod follow;
mod improve;
mod layer;
mod load;
mod memory;
mod plan;
mod pour;
mod replan;
mod shares;
mod unmix;
mod view;

use ids::{ExpertId, Rank};
use std::fmt;

pub use follow::Follower;
pub use load::{Load, REGIMES_MAX, Window, level};
pub use memory::capacities;
pub use plan::{Shape, plan};
pub use replan::{Aim, ExpertLoad, Holdings, Planned, Request, even_capacity, replan};
pub use shares::Shares;
pub use view::{KvPools, Member, View};

/// Why a placement cannot be.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum PlacementError {
    #[error("a placement needs at least one rank")]
    NoRanks,
    #[error("layer {layer} places {found} experts, the first layer {expected}")]
    Experts { layer: usize, found: usize, expected: usize },
    #[error("layer {layer} gives {expert} to no rank")]
    Nowhere { layer: usize, expert: ExpertId },
    #[error("layer {layer} gives {expert} to {rank}, the view has {ranks} ranks")]
    NoSuchRank { layer: usize, expert: ExpertId, rank: Rank, ranks: u16 },
    #[error("layer {layer} gives {expert} to {rank} twice")]
    Twice { layer: usize, expert: ExpertId, rank: Rank },
    #[error("redundancy {redundancy} needs {} ranks, there are {ranks}", u32::from(*redundancy) + 1)]
    Redundancy { redundancy: u16, ranks: u16 },
    #[error("{experts} experts, more than an expert id can number")]
    TooManyExperts { experts: usize },
    #[error("{ranks} ranks, more than a rank can number")]
    TooManyRanks { ranks: usize },
    #[error("{capacity} places per layer for {experts} experts")]
    Capacity { capacity: usize, experts: usize },
    #[error("layer {layer} gives {expert} to no copy")]
    NoPart { layer: usize, expert: ExpertId },
    #[error("layer {layer} gives a copy of {expert} the part {part}")]
    Part { layer: usize, expert: ExpertId, part: f32 },
    #[error("layer {layer} gives the copies of {expert} {sum} of it together")]
    Parts { layer: usize, expert: ExpertId, sum: f32 },
    #[error("{found} given for a model of {expected}")]
    Window { found: Shape, expected: Shape },
}

/// For every MoE layer, which ranks hold a copy of which expert.
#[derive(Clone, PartialEq, Eq)]
pub struct Placement {
    ranks: u16,
    /// `[moe layers][experts]`, replicas in the order of their [`Shares`].
    layers: Vec<Vec<Vec<Rank>>>,
}

impl Placement {
    /// Checks a placement, `[moe layers][experts]` -> replicas in the order of their [`Shares`].
    ///
    /// # Errors
    ///
    /// [`PlacementError`] for the first thing that cannot be.
    pub fn new(ranks: u16, layers: Vec<Vec<Vec<Rank>>>) -> Result<Self, PlacementError> {
        if ranks == 0 {
            return Err(PlacementError::NoRanks);
        }
        let expected = layers.first().map_or(0, Vec::len);
        for (layer, experts) in layers.iter().enumerate() {
            if experts.len() != expected {
                return Err(PlacementError::Experts { layer, found: experts.len(), expected });
            }
            for (expert, replicas) in experts.iter().enumerate() {
                let expert = expert_id(expert, expected)?;
                check_replicas(layer, expert, replicas, ranks)?;
            }
        }
        Ok(Self { ranks, layers })
    }

    /// Ranks of the view.
    #[must_use]
    pub fn ranks(&self) -> u16 {
        self.ranks
    }

    /// MoE layers of the model.
    #[must_use]
    pub fn moe_layers(&self) -> usize {
        self.layers.len()
    }

    /// Experts of every MoE layer.
    #[must_use]
    pub fn experts(&self) -> usize {
        self.layers.first().map_or(0, Vec::len)
    }

    /// Layers and experts that are placed.
    #[must_use]
    pub fn shape(&self) -> Shape {
        Shape { moe_layers: self.moe_layers(), experts: self.experts() }
    }

    /// The ranks that hold `expert`, in the order of their [`Shares`]; never empty.
    ///
    /// # Panics
    ///
    /// If the layer or the expert does not exist.
    #[must_use]
    pub fn replicas(&self, moe_layer: usize, expert: ExpertId) -> &[Rank] {
        &self.layers[moe_layer][expert.index()]
    }

    /// Whether any expert's tokens have a choice of ranks, see [`Placement::targets`].
    pub(crate) fn has_choice(&self) -> bool {
        let copies = self.layers.iter().flatten().map(Vec::len);
        copies.into_iter().any(|copies| 1 < copies && copies < usize::from(self.ranks))
    }

    /// The experts that `rank` holds, ascending.
    ///
    /// # Panics
    ///
    /// If the layer does not exist.
    #[must_use]
    pub fn local_experts(&self, moe_layer: usize, rank: Rank) -> Vec<ExpertId> {
        (0..)
            .map(ExpertId)
            .zip(&self.layers[moe_layer])
            .filter(|(_, replicas)| replicas.contains(&rank))
            .map(|(expert, _)| expert)
            .collect()
    }

    /// The ranks that share the tokens of rank `source`. An expert that every rank holds is served where its tokens are.
    /// Which rank serves a token changes no bit of a result.
    ///
    /// # Panics
    ///
    /// If the layer or the expert does not exist.
    #[must_use]
    pub fn targets(&self, moe_layer: usize, expert: ExpertId, source: Rank) -> Vec<Rank> {
        let replicas = self.replicas(moe_layer, expert);
        if replicas.len() == usize::from(self.ranks) { vec![source] } else { replicas.to_vec() }
    }
}

/// `w0[e0 e2] w1[e1]` per layer, for traces.
impl fmt::Debug for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for layer in 0..self.moe_layers() {
            write!(f, "{}{layer}:", if layer == 0 { "" } else { "; " })?;
            for rank in (0..self.ranks).map(Rank) {
                write!(f, " {rank}{:?}", self.local_experts(layer, rank))?;
            }
        }
        Ok(())
    }
}

fn expert_id(expert: usize, experts: usize) -> Result<ExpertId, PlacementError> {
    u16::try_from(expert).map(ExpertId).map_err(|_| PlacementError::TooManyExperts { experts })
}

fn check_replicas(
    layer: usize,
    expert: ExpertId,
    replicas: &[Rank],
    ranks: u16,
) -> Result<(), PlacementError> {
    if replicas.is_empty() {
        return Err(PlacementError::Nowhere { layer, expert });
    }
    for (i, &rank) in replicas.iter().enumerate() {
        if rank.0 >= ranks {
            return Err(PlacementError::NoSuchRank { layer, expert, rank, ranks });
        }
        if replicas[..i].contains(&rank) {
            return Err(PlacementError::Twice { layer, expert, rank });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
