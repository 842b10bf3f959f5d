//! What the experts had to do: tokens per expert and layer, window after window.
//!
//! Traffic is a mix of kinds (code, chat, one language), and the mix jumps: now and then one kind
//! bursts. A decayed mean of the windows would plan for a mix that never comes, and a plan for the
//! newest window is worst when it is needed most. So [`Load`] names a few *regimes* that the next
//! window may be near: the newest mix; the one before it, while the newest is so young that it may be
//! an excursion; and a burst of each kind that can be told from the mixes seen so far ([`unmix`]).

use crate::unmix::{self, Kinds, Sample};
use crate::{Placement, PlacementError, Shape, Shares, shares};
use ids::ExpertId;

/// Regimes that a plan is for: as many as the planner's vectors have lanes.
pub const REGIMES_MAX: usize = 8;
/// Kinds of traffic that are told apart: the other two lanes are for the newest mix and the one before.
const KINDS_MAX: usize = REGIMES_MAX - 2;
/// Share of the tokens that must go elsewhere to make another mix, beyond chance.
const DISTANCE: f64 = 0.03;
/// Share that makes it a jump.
const JUMP: f64 = 0.1;
/// How far the newest mix follows the newest of its windows.
const FOLLOW: f64 = 0.7;
/// Windows after a jump in which a return to the mix before it is expected.
const EXCURSION_WINDOWS: u32 = 2;
/// Weight of the newest mix; the rest is for bursts of any kind.
const NEWEST: f64 = 0.7;
/// Weights of the newest mix and the one before it, on an excursion.
const AWAY: (f64, f64) = (0.4, 0.5);
/// Least part of a burst that is one kind: if none was stronger yet, that does not mean much.
const BURST_MIN: f64 = 0.3;
/// Mixes that are remembered to tell the kinds from.
const SAMPLES_MAX: usize = 16;

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

    /// Tokens by expert, layer by layer.
    pub fn layers(&self) -> impl Iterator<Item = &[u64]> {
        self.tokens.chunks(self.experts.max(1))
    }

    /// Mean over the layers of (mean load of a rank / load of the fullest) if the copies share an expert's tokens
    /// like this; 1 is level. A layer without tokens counts as level.
    ///
    /// # Panics
    ///
    /// If the placement or the shares are of another shape.
    #[must_use]
    pub fn balance(&self, placement: &Placement, shares: &Shares) -> f64 {
        let layers = self.rank_loads(placement, shares);
        let balances = layers.iter().map(|ranks| level(ranks));
        if layers.is_empty() { 1.0 } else { balances.sum::<f64>() / float(layers.len() as u64) }
    }

    /// Tokens that each rank has to serve, `[moe layers][ranks]`.
    ///
    /// # Panics
    ///
    /// As for [`Window::balance`].
    #[must_use]
    pub fn rank_loads(&self, placement: &Placement, shares: &Shares) -> Vec<Vec<f64>> {
        let shape = self.shape();
        assert_eq!(shape, placement.shape(), "a placement is judged by the load of its own model");
        let of_layer = |(layer, loads): (usize, &[u64])| {
            let mut ranks = vec![0.0; usize::from(placement.ranks())];
            for (expert, &load) in (0..).map(ExpertId).zip(loads) {
                let replicas = placement.replicas(layer, expert);
                let parts = shares.parts(layer, expert);
                assert_eq!(replicas.len(), parts.len(), "shares of this placement");
                for (rank, &part) in replicas.iter().zip(parts) {
                    ranks[rank.index()] += float(load) * f64::from(part);
                }
            }
            ranks
        };
        self.layers().enumerate().map(of_layer).collect()
    }
}

/// Mean load of a rank / load of the fullest; 1 if there is none.
#[must_use]
pub fn level(ranks: &[f64]) -> f64 {
    let total: f64 = ranks.iter().sum();
    let fullest = ranks.iter().copied().fold(0.0, f64::max);
    if fullest == 0.0 { 1.0 } else { total / float(ranks.len() as u64) / fullest }
}

/// Traffic that the next window may bring.
#[derive(Debug, Clone, PartialEq)]
struct Regime {
    weight: f64,
    /// Share of its layer's tokens per expert, `[moe layers][experts]`, flat.
    shares: Vec<f64>,
}

/// The mix before a jump.
#[derive(Debug, Clone, PartialEq)]
struct Before {
    shares: Vec<f64>,
    /// Windows since the jump.
    windows: u32,
}

/// The traffic seen so far, and what is expected next.
#[derive(Debug, Clone, PartialEq)]
pub struct Load {
    shape: Shape,
    /// Shares as in [`Regime`]; empty while no window was seen.
    newest: Vec<f64>,
    before: Option<Before>,
    /// At most [`SAMPLES_MAX`].
    samples: Vec<Sample>,
    /// Empty while no window was seen; their weights add up to 1.
    regimes: Vec<Regime>,
}

impl Load {
    /// Nothing is known.
    #[must_use]
    pub fn unknown(shape: Shape) -> Self {
        let (newest, samples, regimes) = (Vec::new(), Vec::new(), Vec::new());
        Self { shape, newest, before: None, samples, regimes }
    }

    /// Layers and experts that are counted.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Takes in the window that has just ended.
    ///
    /// # Errors
    ///
    /// [`PlacementError::Window`] if it counts another shape.
    pub fn observe(&mut self, window: &Window) -> Result<(), PlacementError> {
        let found = window.shape();
        if found != self.shape {
            return Err(PlacementError::Window { found, expected: self.shape });
        }
        let totals = || window.layers().map(|layer| layer.iter().sum::<u64>());
        let (least, most) = totals().fold((u64::MAX, 0), |(l, m), t| (l.min(t), m.max(t)));
        if most == 0 {
            return Ok(()); // Nobody asked anything; that tells nothing about the experts.
        }
        let shares: Vec<f64> = window.layers().flat_map(shares).collect();
        // Two samples of one distribution differ by this much in the mean, at most.
        let chance = (float(found.experts as u64) / (3.0 * float(least.max(1)))).sqrt();
        self.follow(&shares, chance);
        let noise = totals().map(|tokens| 1.0 / float(tokens.max(1))).sum();
        self.remember(Sample { shares, noise });
        let kinds = unmix::unmix(&self.samples, found.moe_layers, KINDS_MAX);
        self.expect(kinds.as_ref());
        Ok(())
    }

    /// Moves the newest mix, and remembers the one before if it jumped.
    fn follow(&mut self, shares: &[f64], chance: f64) {
        let far = |mix: &[f64]| distance(mix, shares, self.shape.moe_layers) - chance;
        let moved = if self.newest.is_empty() { 0.0 } else { far(&self.newest) };
        self.before = match self.before.take() {
            Some(before) if far(&before.shares) <= JUMP => None,
            Some(Before { windows, .. }) if moved <= JUMP && EXCURSION_WINDOWS <= windows => None,
            Some(Before { shares, windows }) if moved <= JUMP => {
                Some(Before { shares, windows: windows + 1 })
            }
            // From one excursion to the next: they may all end where the first began.
            Some(Before { shares, .. }) => Some(Before { shares, windows: 1 }),
            None if JUMP < moved => Some(Before { shares: self.newest.clone(), windows: 1 }),
            None => None,
        };
        if self.newest.is_empty() || DISTANCE < moved {
            self.newest = shares.to_vec();
        } else {
            for (mean, new) in self.newest.iter_mut().zip(shares) {
                *mean += FOLLOW * (new - *mean);
            }
        }
    }

    /// Keeps the sample; of too many, the two most alike become one.
    fn remember(&mut self, sample: Sample) {
        self.samples.push(sample);
        if self.samples.len() <= SAMPLES_MAX {
            return;
        }
        let all = 0..self.samples.len();
        let pairs = all.flat_map(|right| (0..right).map(move |left| (left, right)));
        let far = |(left, right): (usize, usize)| {
            let shares = |at: usize| &self.samples[at].shares;
            (distance(shares(left), shares(right), self.shape.moe_layers), left, right)
        };
        let nearest = pairs.map(far).min_by(|left, right| left.0.total_cmp(&right.0));
        let (_, left, right) = nearest.expect("there are several");
        let other = self.samples.remove(right);
        let one = &mut self.samples[left];
        for (mean, new) in one.shares.iter_mut().zip(&other.shares) {
            *mean += (new - *mean) / 2.0;
        }
        one.noise = one.noise.max(other.noise);
    }

    /// Names the regimes.
    fn expect(&mut self, kinds: Option<&Kinds>) {
        let (newest, before) = if self.before.is_some() { AWAY } else { (NEWEST, 0.0) };
        let known = if kinds.is_some() { 1.0 } else { newest + before };
        self.regimes = vec![Regime { weight: newest / known, shares: self.newest.clone() }];
        if let Some(Before { shares, .. }) = &self.before {
            self.regimes.push(Regime { weight: before / known, shares: shares.clone() });
        }
        let Some(Kinds { shares, strongest }) = kinds else { return };
        let weight = (1.0 - newest - before) / float(shares.len() as u64);
        let part = strongest.max(BURST_MIN);
        // A burst comes over what is usual, also when it follows another.
        let usual = self.before.as_ref().map_or(&self.newest, |before| &before.shares);
        for kind in shares {
            let mix = |(usual, kind): (&f64, &f64)| usual + part * (kind - usual);
            let shares = usual.iter().zip(kind).map(mix).collect();
            self.regimes.push(Regime { weight, shares });
        }
    }

    /// Share of a layer's tokens per expert in the newest mix; `None` while no window was seen.
    pub(crate) fn newest(&self, moe_layer: usize) -> Option<&[f64]> {
        self.newest.chunks(self.shape.experts.max(1)).nth(moe_layer)
    }

    /// No window was seen.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        self.regimes.is_empty()
    }

    /// [`Window::balance`] as it can be expected, with shares that follow the load: the weighted mean over the
    /// regimes, 1 if none is known.
    ///
    /// # Panics
    ///
    /// If the placement is of another shape.
    #[must_use]
    pub fn balance(&self, placement: &Placement) -> f64 {
        if self.is_unknown() {
            return 1.0;
        }
        let mut balance = 0.0;
        for moe_layer in 0..self.shape.moe_layers {
            let mut demand = self.demands(moe_layer);
            for share in demand.iter_mut().flatten() {
                *share *= f32::from(placement.ranks());
            }
            let fullest = shares::settled(placement, moe_layer, demand).fullest();
            for (weight, fullest) in self.weights().into_iter().zip(fullest) {
                balance += f64::from(if fullest == 0.0 { weight } else { weight / fullest });
            }
        }
        if self.shape.moe_layers == 0 { 1.0 } else { balance / float(self.shape.moe_layers as u64) }
    }

    /// Weights of the regimes, which add up to 1.
    pub(crate) fn weights(&self) -> Lanes {
        let mut weights = [0.0; REGIMES_MAX];
        for (lane, regime) in weights.iter_mut().zip(&self.regimes) {
            *lane = single(regime.weight);
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
pub(crate) fn float(count: u64) -> f64 {
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
