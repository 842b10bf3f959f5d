//! One layer while it is being planned: who holds what, and what every rank has to do.
//!
//! Ranks and experts are indices here. Loads are in units of the mean load of a rank, one number per
//! regime; 1 everywhere is level.

use crate::load::Lanes;

/// Copies of one layer's experts on ranks.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    /// Copies that each rank can hold.
    capacity: Vec<usize>,
    /// Fewest copies of an expert.
    pub(crate) copies_min: usize,
    /// Load of an expert, over all its copies.
    demand: Vec<Lanes>,
    /// Weights of the regimes.
    weights: Lanes,
    /// By rank: what it holds.
    pub(crate) held: Vec<Vec<usize>>,
    /// By expert: who holds it.
    pub(crate) holders: Vec<Vec<usize>>,
    /// By rank and expert: held before, so that it need not be loaded.
    had: Vec<bool>,
    /// By rank: it held something before, so whatever else it gets is a move.
    pub(crate) is_settled: Vec<bool>,
    /// By expert: load of one copy.
    share: Vec<Lanes>,
    /// By rank, with its cost.
    load: Vec<(Lanes, f32)>,
    ranks: f32,
    /// The rank that ties favour.
    first: usize,
}

/// What a layer is planned for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms<'a> {
    /// Copies that each rank can hold.
    pub(crate) capacity: &'a [usize],
    pub(crate) copies_min: usize,
    pub(crate) weights: Lanes,
    /// The rank that ties favour; another one in each layer, lest one gets all uneven rests.
    pub(crate) first: usize,
}

impl Layer {
    /// `current` is `[experts]` -> ranks.
    pub(crate) fn new(terms: Terms<'_>, demand: Vec<Lanes>, current: &[Vec<usize>]) -> Self {
        let (ranks, experts) = (terms.capacity.len(), demand.len());
        let mut layer = Self {
            capacity: terms.capacity.to_vec(),
            copies_min: terms.copies_min,
            share: demand.clone(),
            demand,
            weights: terms.weights,
            held: vec![Vec::new(); ranks],
            holders: current.to_vec(),
            had: vec![false; ranks * experts],
            is_settled: vec![false; ranks],
            load: vec![(Lanes::default(), 0.0); ranks],
            ranks: single(ranks),
            first: terms.first,
        };
        for (expert, holders) in current.iter().enumerate() {
            for &rank in holders {
                layer.had[rank * experts + expert] = true;
                layer.is_settled[rank] = true;
                layer.held[rank].push(expert);
            }
        }
        layer.share_among_holders();
        layer
    }

    pub(crate) fn ranks(&self) -> usize {
        self.held.len()
    }

    pub(crate) fn experts(&self) -> usize {
        self.holders.len()
    }

    pub(crate) fn capacity(&self, rank: usize) -> usize {
        self.capacity[rank]
    }

    pub(crate) fn had(&self, rank: usize, expert: usize) -> bool {
        self.had[rank * self.experts() + expert]
    }

    pub(crate) fn holds(&self, rank: usize, expert: usize) -> bool {
        self.holders[expert].contains(&rank)
    }

    pub(crate) fn room(&self, rank: usize) -> usize {
        self.capacity[rank].saturating_sub(self.held[rank].len())
    }

    pub(crate) fn excess(&self, rank: usize) -> usize {
        self.held[rank].len().saturating_sub(self.capacity[rank])
    }

    /// It has more copies than it must.
    pub(crate) fn has_surplus(&self, expert: usize) -> bool {
        self.copies_min < self.holders[expert].len()
    }

    /// Load of each of `copies` copies.
    pub(crate) fn share_of(&self, expert: usize, copies: usize) -> Lanes {
        let factor = 1.0 / single(copies).max(1.0);
        self.demand[expert].map(|load| load * factor)
    }

    /// Load of each of its copies as they are counted now.
    pub(crate) fn share(&self, expert: usize) -> Lanes {
        self.share[expert]
    }

    pub(crate) fn load(&self, rank: usize) -> Lanes {
        self.load[rank].0
    }

    /// Place of a rank among equals.
    pub(crate) fn turn(&self, rank: usize) -> usize {
        (rank + self.ranks() - self.first) % self.ranks()
    }

    /// Experts that `rank` and the holders of `expert` both hold.
    pub(crate) fn in_common(&self, rank: usize, expert: usize) -> f32 {
        let holders = &self.holders[expert];
        let shared = |other: &&usize| self.holders[**other].iter().any(|h| holders.contains(h));
        single(self.held[rank].iter().filter(shared).count())
    }

    /// What `rank` costs now.
    pub(crate) fn cost_now(&self, rank: usize) -> f32 {
        self.load[rank].1
    }

    /// What a rank with this load costs. The eighth power sees little else than the fullest ranks,
    /// and yet it tells two placements apart whose fullest rank is the same.
    pub(crate) fn cost(&self, load: Lanes) -> f32 {
        sum(mul(eighth_powers(load), self.weights))
    }

    /// What two ranks cost, in less time than one after the other: most of all trials end here.
    pub(crate) fn cost_of_both(&self, one: Lanes, other: Lanes) -> f32 {
        sum(mul(add(eighth_powers(one), eighth_powers(other)), self.weights))
    }

    pub(crate) fn cost_of_adding(&self, rank: usize, share: Lanes) -> f32 {
        self.cost(add(self.load(rank), share)) - self.cost_now(rank)
    }

    /// Puts a copy down; the expert's other copies keep their share until it is counted anew.
    pub(crate) fn put(&mut self, rank: usize, expert: usize) {
        self.held[rank].push(expert);
        self.holders[expert].push(rank);
        self.sum(rank);
    }

    /// The reverse of [`Layer::put`].
    pub(crate) fn take(&mut self, rank: usize, expert: usize) {
        self.held[rank].retain(|&other| other != expert);
        self.holders[expert].retain(|&other| other != rank);
        self.sum(rank);
    }

    pub(crate) fn clear(&mut self) {
        self.held.iter_mut().for_each(Vec::clear);
        self.holders.iter_mut().for_each(Vec::clear);
    }

    /// Counts the shares as they will be with this many copies of each expert.
    pub(crate) fn share_among(&mut self, copies: &[usize]) {
        self.share =
            (0..).zip(copies).map(|(expert, &copies)| self.share_of(expert, copies)).collect();
        (0..self.ranks()).for_each(|rank| self.sum(rank));
    }

    pub(crate) fn share_among_holders(&mut self) {
        let copies: Vec<usize> = self.holders.iter().map(Vec::len).collect();
        self.share_among(&copies);
    }

    /// Counts the share of one expert and the loads of its holders.
    pub(crate) fn share_anew(&mut self, expert: usize) {
        self.share[expert] = self.share_of(expert, self.holders[expert].len());
        for at in 0..self.holders[expert].len() {
            self.sum(self.holders[expert][at]);
        }
    }

    /// Running differences would drift, so a load is always summed from the start.
    fn sum(&mut self, rank: usize) {
        let held = self.held[rank].iter();
        let load = held.fold(Lanes::default(), |sum, &expert| add(sum, self.share[expert]));
        self.load[rank] = (load, self.cost(load));
    }

    /// What the other holders cost more, summed over all holders, if one of them gives up its copy.
    pub(crate) fn rise(&self, expert: usize) -> f32 {
        self.holders[expert].iter().map(|&holder| self.rise_at(expert, holder)).sum()
    }

    /// The part of one holder in it.
    pub(crate) fn rise_at(&self, expert: usize, holder: usize) -> f32 {
        let fewer = self.share_of(expert, self.holders[expert].len() - 1);
        self.cost_of_adding(holder, sub(fewer, self.share(expert)))
    }

    /// What the layer costs if it is level.
    pub(crate) fn cost_of_level(&self) -> f32 {
        self.ranks
    }

    /// In double precision: a rank that cannot be relieved must not hide what others gain.
    pub(crate) fn cost_of_all(&self) -> f64 {
        self.load.iter().map(|(_, cost)| f64::from(*cost)).sum()
    }

    /// The regime that costs most under this load.
    pub(crate) fn worst_regime(&self, load: Lanes) -> usize {
        let mut worst = (0, 0.0);
        for (regime, cost) in mul(eighth_powers(load), self.weights).into_iter().enumerate() {
            if worst.1 < cost {
                worst = (regime, cost);
            }
        }
        worst.0
    }
}

/// Counts of ranks and copies fit 16 bits.
fn single(count: usize) -> f32 {
    f32::from(u16::try_from(count).unwrap_or(u16::MAX))
}

/// Without `powi`, whose digits depend on the platform.
fn eighth_powers(loads: Lanes) -> Lanes {
    let squares = mul(loads, loads);
    let fourths = mul(squares, squares);
    mul(fourths, fourths)
}

/// Halves are added to halves: one sum after the other would wait for each.
fn sum([a, b, c, d, e, f, g, h]: Lanes) -> f32 {
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

// Loops in place: what `array::from_fn` makes of these is often done lane by lane.

pub(crate) fn add(mut left: Lanes, right: Lanes) -> Lanes {
    for (left, right) in left.iter_mut().zip(right) {
        *left += right;
    }
    left
}

pub(crate) fn sub(mut left: Lanes, right: Lanes) -> Lanes {
    for (left, right) in left.iter_mut().zip(right) {
        *left -= right;
    }
    left
}

fn mul(mut left: Lanes, right: Lanes) -> Lanes {
    for (left, right) in left.iter_mut().zip(right) {
        *left *= right;
    }
    left
}
