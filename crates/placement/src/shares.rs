//! How the copies of an expert share its rows.
//!
//! Copies cannot move as fast as traffic changes, but who serves a row can change with every step: it changes no bit of a
//! result, and nobody has to agree on it. So the shares follow the load from second to second while the placement follows
//! it from minute to minute.

use crate::layer::{Layer, Settling, Terms};
use crate::load::Lanes;
use crate::{Placement, PlacementError, Window, expert_id};
use ids::ExpertId;

/// Afterwards no rank is more than some 0.1 % above what sharing can do.
const SETTLING: Settling = Settling { passes: 100, moved_min: 5e-4 };
/// From shares that were level a moment ago it is not far, and the next moment goes on from there.
const FOLLOWING: Settling = Settling { passes: 8, moved_min: 1e-3 };

/// How far from 1 the parts of an expert may be together.
const ROUNDING: f32 = 1e-3;

/// For every (MoE layer, expert) of one placement, what part of its rows each of its replicas serves.
#[derive(Clone, PartialEq, Debug)]
pub struct Shares {
    /// `[moe layers][experts][replicas]`, as the placement orders them; those of an expert add up to 1.
    parts: Vec<Vec<Vec<f32>>>,
}

impl Shares {
    /// Checks parts, `[moe layers][experts][replicas]`.
    ///
    /// # Errors
    ///
    /// [`PlacementError`] if an expert has no part, or one that is not between 0 and 1, or parts that are not 1 together.
    pub fn new(parts: Vec<Vec<Vec<f32>>>) -> Result<Self, PlacementError> {
        for (layer, experts) in parts.iter().enumerate() {
            for (expert, parts) in experts.iter().enumerate() {
                let expert = expert_id(expert, experts.len())?;
                if parts.is_empty() {
                    return Err(PlacementError::NoPart { layer, expert });
                }
                if let Some(&part) = parts.iter().find(|part| !(0.0..=1.0).contains(*part)) {
                    return Err(PlacementError::Part { layer, expert, part });
                }
                let sum: f32 = parts.iter().sum();
                if ROUNDING < (sum - 1.0).abs() {
                    return Err(PlacementError::Parts { layer, expert, sum });
                }
            }
        }
        Ok(Self { parts })
    }

    /// All copies of an expert serve as much.
    #[must_use]
    pub fn even(placement: &Placement) -> Self {
        let experts = || (0..).map(ExpertId).take(placement.experts());
        let parts = |layer, expert| even(placement.replicas(layer, expert).len());
        let layer = |layer| experts().map(|expert| parts(layer, expert)).collect();
        Self { parts: (0..placement.moe_layers()).map(layer).collect() }
    }

    /// Shares that make this load as level as its placement lets them.
    ///
    /// # Errors
    ///
    /// [`PlacementError::Window`] if the window counts another shape.
    pub fn level(placement: &Placement, window: &Window) -> Result<Self, PlacementError> {
        Self::level_from(placement, window, None)
    }

    /// The same, sooner if the load is like that for which `before` was made.
    pub(crate) fn level_from(
        placement: &Placement,
        window: &Window,
        before: Option<&Self>,
    ) -> Result<Self, PlacementError> {
        let (found, expected) = (window.shape(), placement.shape());
        if found != expected {
            return Err(PlacementError::Window { found, expected });
        }
        let mut parts = Vec::with_capacity(found.moe_layers);
        for (moe_layer, loads) in window.layers().enumerate() {
            let mut layer = layer(placement, moe_layer, demand(loads, placement.ranks()));
            for (expert, id) in (0..).map(ExpertId).take(found.experts).enumerate() {
                layer.set_parts(expert, before.map_or(&[], |before| before.parts(moe_layer, id)));
            }
            layer.settle(if before.is_some() { FOLLOWING } else { SETTLING });
            parts.push((0..found.experts).map(|expert| of_one(layer.parts(expert))).collect());
        }
        Ok(Self { parts })
    }

    /// What part of the expert's rows each replica serves, as the placement orders them; none of one that does not exist.
    #[must_use]
    pub fn parts(&self, moe_layer: usize, expert: ExpertId) -> &[f32] {
        let experts = self.parts.get(moe_layer).map_or(&[][..], Vec::as_slice);
        experts.get(expert.index()).map_or(&[], Vec::as_slice)
    }
}

const ONE: Lanes = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];

/// A layer whose copies share this demand as level as they can, in every regime.
pub(crate) fn settled(placement: &Placement, moe_layer: usize, demand: Vec<Lanes>) -> Layer {
    let mut layer = layer(placement, moe_layer, demand);
    layer.settle(SETTLING);
    layer
}

/// A layer whose copies share this demand alike.
fn layer(placement: &Placement, moe_layer: usize, demand: Vec<Lanes>) -> Layer {
    let capacity = vec![placement.experts(); usize::from(placement.ranks())];
    let terms = Terms { capacity: &capacity, copies_min: 1, weights: ONE, first: 0 };
    let experts = (0..).map(ExpertId).take(placement.experts());
    let holders = |expert| placement.replicas(moe_layer, expert).iter();
    let holders = |expert| holders(expert).map(|rank| rank.index()).collect();
    let holders: Vec<Vec<usize>> = experts.map(holders).collect();
    Layer::new(terms, demand, &holders)
}

/// Loads in units of the mean load of a rank.
fn demand(loads: &[u64], ranks: u16) -> Vec<Lanes> {
    let total: f32 = loads.iter().map(|&load| load as f32).sum();
    let unit = f32::from(ranks) / total.max(1.0);
    loads.iter().map(|&load| ONE.map(|one| one * load as f32 * unit)).collect()
}

/// Parts of a load as parts of 1.
fn of_one(parts: &[Lanes]) -> Vec<f32> {
    let all: f32 = parts.iter().map(|part| part[0]).sum();
    if all <= 0.0 {
        return even(parts.len());
    }
    parts.iter().map(|part| part[0] / all).collect()
}

fn even(copies: usize) -> Vec<f32> {
    vec![1.0 / copies as f32; copies]
}
