//! What the experts had to do: tokens per expert and layer, window after window.
//!
//! Traffic is a mix of kinds (code, chat, one language), and the mix jumps. A decayed mean of the
//! windows would plan for a mix that never comes; a placement that is level for every pure kind is
//! level for all their mixes, because the load of the fullest rank is convex in the traffic. So
//! [`Load`] keeps a few *regimes*: windows that differ from each other, each with a weight that
//! fades while it does not come again.

use crate::{Placement, PlacementError, Shape};
use ids::ExpertId;

/// Regimes that are remembered: as many as the planner's vectors have lanes.
pub const REGIMES_MAX: usize = 8;
/// What is left of a weight when one more window has passed.
const FADE: f64 = 0.95;
/// Share of the tokens that must go elsewhere to make another regime, beyond chance.
const DISTANCE: f64 = 0.03;
/// How far a regime follows the newest of its windows.
const FOLLOW: f64 = 0.7;
/// Weight of the newest regime beyond what its windows give it.
const NEWEST: f64 = 0.5;

/// Tokens that each expert of each MoE layer received in one span of time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    experts: usize,
    /// `[moe layers][experts]`, flat.
    tokens: Vec<u64>,
}

impl Window {
    /// Checks counts, `[moe layers][experts]`.
    ///
    /// # Errors
    ///
    /// [`PlacementError::Experts`] if a layer has another number of experts than the first.
    pub fn new(layers: &[Vec<u64>]) -> Result<Self, PlacementError> {
        let experts = layers.first().map_or(0, Vec::len);
        for (layer, counts) in layers.iter().enumerate() {
            if counts.len() != experts {
                let found = counts.len();
                return Err(PlacementError::Experts { layer, found, expected: experts });
            }
        }
        Ok(Self { experts, tokens: layers.concat() })
    }

    /// Layers and experts that were counted.
    #[must_use]
    pub fn shape(&self) -> Shape {
        let moe_layers = self.tokens.len().checked_div(self.experts).unwrap_or(0);
        Shape { moe_layers, experts: self.experts }
    }

    fn layers(&self) -> impl Iterator<Item = &[u64]> {
        self.tokens.chunks(self.experts.max(1))
    }

    /// Mean over the layers of (mean load of a rank / load of the fullest), if the copies of an
    /// expert share its tokens equally; 1 is level. A layer without tokens counts as level.
    ///
    /// # Panics
    ///
    /// If the placement is of another shape.
    #[must_use]
    pub fn balance(&self, placement: &Placement) -> f64 {
        let tokens: Vec<f64> = self.tokens.iter().map(|&tokens| float(tokens)).collect();
        balance(&tokens, self.shape(), placement)
    }
}

/// See [`Window::balance`]; `loads` is `[moe layers][experts]`, flat.
fn balance(loads: &[f64], shape: Shape, placement: &Placement) -> f64 {
    let placed = Shape { moe_layers: placement.moe_layers(), experts: placement.experts() };
    assert_eq!(shape, placed, "a placement is judged by the load of its own model");
    let mut sum = 0.0;
    for (layer, loads) in loads.chunks(shape.experts.max(1)).enumerate() {
        let mut ranks = vec![0.0; usize::from(placement.ranks())];
        for (expert, load) in (0..).map(ExpertId).zip(loads) {
            let replicas = placement.replicas(layer, expert);
            for rank in replicas {
                ranks[rank.index()] += load / float(replicas.len() as u64);
            }
        }
        let total: f64 = ranks.iter().sum();
        let fullest = ranks.iter().copied().fold(0.0, f64::max);
        sum += if fullest == 0.0 { 1.0 } else { total / float(ranks.len() as u64) / fullest };
    }
    if shape.moe_layers == 0 { 1.0 } else { sum / float(shape.moe_layers as u64) }
}

/// One kind of traffic.
#[derive(Debug, Clone, PartialEq)]
struct Regime {
    weight: f64,
    /// Share of its layer's tokens per expert, `[moe layers][experts]`, flat.
    shares: Vec<f64>,
}

/// The regimes of the traffic seen so far; empty if none was.
#[derive(Debug, Clone, PartialEq)]
pub struct Load {
    shape: Shape,
    /// The one of the newest window is the last.
    regimes: Vec<Regime>,
}

impl Load {
    /// Nothing is known.
    #[must_use]
    pub fn unknown(shape: Shape) -> Self {
        Self { shape, regimes: Vec::new() }
    }

    /// Layers and experts that are counted.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Takes in the window that has just ended. Windows of equal length weigh the same.
    ///
    /// # Errors
    ///
    /// [`PlacementError::Window`] if it counts another shape.
    pub fn observe(&mut self, window: &Window) -> Result<(), PlacementError> {
        let found = window.shape();
        if found != self.shape {
            return Err(PlacementError::Window { found, expected: self.shape });
        }
        let totals = window.layers().map(|layer| layer.iter().sum::<u64>());
        let (least, most) = totals.fold((u64::MAX, 0), |(l, m), t| (l.min(t), m.max(t)));
        if most == 0 {
            return Ok(()); // Nobody asked anything; that tells nothing about the experts.
        }
        let shares: Vec<f64> = window.layers().flat_map(shares).collect();
        for regime in &mut self.regimes {
            regime.weight *= FADE;
        }
        // Two samples of one distribution differ by this much in the mean, at most.
        let chance = (float(found.experts as u64) / (3.0 * float(least.max(1)))).sqrt();
        let nearest = (0..self.regimes.len())
            .map(|at| (distance(&self.regimes[at].shares, &shares, found.moe_layers), at))
            .min_by(|left, right| left.0.total_cmp(&right.0));
        let mut newest = match nearest {
            Some((distance, at)) if distance <= DISTANCE + chance => {
                let mut regime = self.regimes.remove(at);
                for (mean, new) in regime.shares.iter_mut().zip(&shares) {
                    *mean += FOLLOW * (new - *mean);
                }
                regime
            }
            Some(_) | None => Regime { weight: 0.0, shares },
        };
        newest.weight += 1.0;
        self.regimes.push(newest);
        if REGIMES_MAX < self.regimes.len() {
            let weights = self.regimes.iter().map(|regime| regime.weight).enumerate();
            let faintest = weights.min_by(|left, right| left.1.total_cmp(&right.1));
            self.regimes.remove(faintest.map_or(0, |(at, _)| at));
        }
        Ok(())
    }

    /// No window was seen.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        self.regimes.is_empty()
    }

    /// [`Window::balance`] as it can be expected: the weighted mean over the regimes, 1 if none is
    /// known.
    ///
    /// # Panics
    ///
    /// If the placement is of another shape.
    #[must_use]
    pub fn balance(&self, placement: &Placement) -> f64 {
        if self.is_unknown() {
            return 1.0;
        }
        let weighted = self.regimes.iter().zip(self.weights()).map(|(regime, weight)| {
            f64::from(weight) * balance(&regime.shares, self.shape, placement)
        });
        weighted.sum()
    }

    /// Weights of the regimes, which add up to 1. The newest one counts as much as all others: the
    /// next window is more often like the last than like any before.
    pub(crate) fn weights(&self) -> Lanes {
        let mut weights = [0.0; REGIMES_MAX];
        let sum: f64 = self.regimes.iter().map(|regime| regime.weight).sum();
        for (lane, regime) in weights.iter_mut().zip(&self.regimes) {
            *lane = single((1.0 - NEWEST) * regime.weight / sum);
        }
        if let Some(last) = self.regimes.len().checked_sub(1) {
            weights[last] += single(NEWEST);
        }
        weights
    }

    /// Share of the layer's tokens per expert, by regime.
    pub(crate) fn demands(&self, moe_layer: usize) -> Vec<Lanes> {
        let first = moe_layer * self.shape.experts;
        let mut demands = vec![[0.0; REGIMES_MAX]; self.shape.experts];
        for (lane, regime) in self.regimes.iter().enumerate() {
            let shares = &regime.shares[first..first + self.shape.experts];
            for (demand, &share) in demands.iter_mut().zip(shares) {
                demand[lane] = single(share);
            }
        }
        demands
    }
}

/// One number per regime.
pub(crate) type Lanes = [f32; REGIMES_MAX];

#[expect(
    clippy::cast_possible_truncation,
    reason = "shares and weights are small; rounding is meant"
)]
fn single(share: f64) -> f32 {
    share as f32
}

/// Exact below 2^53; a share needs fewer digits.
fn float(count: u64) -> f64 {
    count as f64
}

fn shares(layer: &[u64]) -> impl Iterator<Item = f64> {
    let total = float(layer.iter().sum::<u64>().max(1));
    layer.iter().map(move |&tokens| float(tokens) / total)
}

/// Share of the tokens that went elsewhere, mean over the layers: 0 for equal, 1 for disjoint ones.
fn distance(left: &[f64], right: &[f64], moe_layers: usize) -> f64 {
    let differences: f64 = left.iter().zip(right).map(|(l, r)| (l - r).abs()).sum();
    differences / 2.0 / float(moe_layers.max(1) as u64)
}
