//! One layer while it is being planned: who holds what, and what every rank has to do.
//!
//! Ranks and experts are indices here. Loads are in units of the mean load of a rank, one number per
//! regime; 1 everywhere is level.

use crate::load::Lanes;
use crate::pour::pour;

/// Holders of one expert that are poured over. Most experts have no more than the smaller number; of those with more than
/// the larger one, all copies share alike.
const POURED_MIN: usize = 4;
const POURED_MAX: usize = 64;
/// Load of the fullest rank at which a layer is level.
const LEVEL: f32 = 1.004;

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
    /// By expert: load of a copy that is put down.
    share: Vec<Lanes>,
    /// By expert and holder: load of that copy.
    parts: Vec<Vec<Lanes>>,
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

/// When the copies share their load well enough.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settling {
    /// Rounds over all experts, at most.
    pub(crate) passes: usize,
    /// Part of a level rank's load: a round that moves less than this from any copy to another was the last.
    pub(crate) moved_min: f32,
}

impl Layer {
    /// `current` is `[experts]` -> ranks.
    pub(crate) fn new(terms: Terms<'_>, demand: Vec<Lanes>, current: &[Vec<usize>]) -> Self {
        let (ranks, experts) = (terms.capacity.len(), demand.len());
        let mut layer = Self {
            capacity: terms.capacity.to_vec(),
            copies_min: terms.copies_min,
            share: demand.clone(),
            parts: current.iter().map(|holders| vec![Lanes::default(); holders.len()]).collect(),
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

    /// What each holder has of the expert's load.
    pub(crate) fn parts(&self, expert: usize) -> &[Lanes] {
        &self.parts[expert]
    }

    /// What one of its holders has of the expert's load.
    pub(crate) fn part(&self, expert: usize, holder: usize) -> Lanes {
        let parts = &self.parts[expert];
        if let [only] = parts[..] {
            return only;
        }
        let at = self.holders[expert].iter().position(|&rank| rank == holder);
        parts[at.expect("asked for a holder")]
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

    /// The load that is expected, over the regimes.
    pub(crate) fn weighted(&self, load: Lanes) -> f32 {
        sum(mul(load, self.weights))
    }

    /// By regime, the load of the fullest rank.
    pub(crate) fn fullest(&self) -> Lanes {
        let mut fullest = Lanes::default();
        for (load, _) in &self.load {
            fullest = std::array::from_fn(|lane| fullest[lane].max(load[lane]));
        }
        fullest
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

    /// Puts a copy down; the expert's other copies keep their parts until they are counted anew.
    pub(crate) fn put(&mut self, rank: usize, expert: usize) {
        self.put_with(rank, expert, self.share[expert]);
    }

    fn put_with(&mut self, rank: usize, expert: usize, part: Lanes) {
        self.held[rank].push(expert);
        self.holders[expert].push(rank);
        self.parts[expert].push(part);
        self.sum(rank);
    }

    /// The reverse of [`Layer::put`].
    pub(crate) fn take(&mut self, rank: usize, expert: usize) {
        self.held[rank].retain(|&other| other != expert);
        if let Some(at) = self.holders[expert].iter().position(|&other| other == rank) {
            self.holders[expert].remove(at);
            self.parts[expert].remove(at);
        }
        self.sum(rank);
    }

    /// A copy goes to another rank, with its part of the load.
    pub(crate) fn transfer(&mut self, expert: usize, from: usize, to: usize) {
        let part = self.part(expert, from);
        self.take(from, expert);
        self.put_with(to, expert, part);
    }

    pub(crate) fn clear(&mut self) {
        self.held.iter_mut().for_each(Vec::clear);
        self.holders.iter_mut().for_each(Vec::clear);
        self.parts.iter_mut().for_each(Vec::clear);
    }

    /// Counts the shares as they will be with this many copies of each expert.
    pub(crate) fn share_among(&mut self, copies: &[usize]) {
        self.share =
            (0..).zip(copies).map(|(expert, &copies)| self.share_of(expert, copies)).collect();
        for (parts, &share) in self.parts.iter_mut().zip(&self.share) {
            parts.fill(share);
        }
        (0..self.ranks()).for_each(|rank| self.sum(rank));
    }

    pub(crate) fn share_among_holders(&mut self) {
        let copies: Vec<usize> = self.holders.iter().map(Vec::len).collect();
        self.share_among(&copies);
    }

    /// The copies of every expert share its load so that the ranks are as level as rounds make them. Each expert
    /// in turn fills up its emptiest holders; that goes towards the least sum of squares, and with these loads no
    /// sharing has a less full fullest rank (Fujishige, Lexicographically optimal base of a polymatroid, 1980).
    pub(crate) fn settle(&mut self, settling: Settling) {
        for _ in 0..settling.passes {
            let mut moved = 0.0_f32;
            for expert in 0..self.experts() {
                if 1 < self.holders[expert].len() {
                    moved = moved.max(self.pour(expert));
                }
            }
            if moved < settling.moved_min {
                break;
            }
        }
        (0..self.ranks()).for_each(|rank| self.sum(rank));
    }

    /// The copies of the expert share its load in these parts of 1, which are as many.
    pub(crate) fn set_parts(&mut self, expert: usize, parts: &[f32]) {
        if parts.len() != self.holders[expert].len() {
            return;
        }
        for (at, part) in parts.iter().enumerate() {
            let load = self.demand[expert].map(|load| load * part);
            let holder = self.holders[expert][at];
            let other = sub(self.load[holder].0, self.parts[expert][at]);
            self.load[holder].0 = add(other, load);
            self.parts[expert][at] = load;
        }
    }

    /// Copies of experts that have several.
    pub(crate) fn shared_copies(&self) -> usize {
        self.holders.iter().map(Vec::len).filter(|&copies| 1 < copies).sum()
    }

    /// The copies of the expert share its load anew. Returns the most that one of them got or gave.
    pub(crate) fn pour(&mut self, expert: usize) -> f32 {
        match self.holders[expert].len() {
            copies if copies <= POURED_MIN => self.pour_over::<POURED_MIN>(expert),
            _ => self.pour_over::<POURED_MAX>(expert),
        }
    }

    fn pour_over<const MAX: usize>(&mut self, expert: usize) -> f32 {
        let mut others = [Lanes::default(); MAX];
        let (holders, parts) = (&self.holders[expert], &mut self.parts[expert]);
        let copies = holders.len();
        for ((other, &holder), &part) in others.iter_mut().zip(holders).zip(parts.iter()) {
            *other = sub(self.load[holder].0, part);
        }
        let before: [Lanes; MAX] =
            std::array::from_fn(|at| parts.get(at).copied().unwrap_or_default());
        // What every rank holds is served where its tokens are; more than some tens of copies are level anyway.
        if copies == self.capacity.len() || MAX < copies {
            let even = 1.0 / single(copies);
            let even = self.demand[expert].map(|load| load * even);
            for (part, &holder) in parts.iter_mut().zip(holders) {
                self.load[holder].0 = add(sub(self.load[holder].0, *part), even);
                *part = even;
            }
            return 0.0;
        }
        pour(self.demand[expert], &others[..copies], parts);
        let mut moved = Lanes::default();
        for (at, (&holder, &part)) in holders.iter().zip(parts.iter()).enumerate() {
            let change = sub(part, before[at]);
            for lane in 0..change.len() {
                moved[lane] = moved[lane].max(change[lane].abs());
            }
            self.load[holder].0 = add(others[at], part);
        }
        moved.into_iter().fold(0.0, f32::max)
    }

    /// Whether every rank is so near a level one that nothing can be gained.
    pub(crate) fn is_level(&self) -> bool {
        self.fullest().iter().zip(self.weights).all(|(&load, weight)| weight == 0.0 || load < LEVEL)
    }

    /// Running differences would drift, so a load is always summed from the start.
    fn sum(&mut self, rank: usize) {
        let held = self.held[rank].iter();
        let load = held.fold(Lanes::default(), |sum, &expert| add(sum, self.part(expert, rank)));
        self.load[rank] = (load, self.cost(load));
    }

    /// What the other holders cost more, summed over all of them, if `holder` gives up its copy.
    pub(crate) fn rise(&self, expert: usize, holder: usize) -> f32 {
        match self.holders[expert].len() {
            copies if copies <= POURED_MIN => self.rise_over::<POURED_MIN>(expert, holder),
            _ => self.rise_over::<POURED_MAX>(expert, holder),
        }
    }

    fn rise_over<const MAX: usize>(&self, expert: usize, holder: usize) -> f32 {
        if MAX < self.holders[expert].len() {
            return 0.0;
        }
        let mut others = [Lanes::default(); MAX];
        let mut parts = others;
        let mut count = 0;
        let mut before = 0.0;
        for (&rank, &part) in self.holders[expert].iter().zip(&self.parts[expert]) {
            if rank != holder {
                others[count] = sub(self.load(rank), part);
                before += self.cost_now(rank);
                count += 1;
            }
        }
        pour(self.demand[expert], &others[..count], &mut parts[..count]);
        let after =
            others[..count].iter().zip(&parts).map(|(&other, &part)| self.cost(add(other, part)));
        after.sum::<f32>() - before
    }

    /// What all holders of an expert and one more cost, which has `below` to do besides.
    pub(crate) fn cost_with(&self, expert: usize, below: Lanes) -> f32 {
        match self.holders[expert].len() {
            copies if copies < POURED_MIN => self.cost_over::<POURED_MIN>(expert, below),
            _ => self.cost_over::<POURED_MAX>(expert, below),
        }
    }

    fn cost_over<const MAX: usize>(&self, expert: usize, below: Lanes) -> f32 {
        let mut others = [Lanes::default(); MAX];
        let mut parts = others;
        let mut count = 0;
        for (&rank, &part) in self.holders[expert].iter().zip(&self.parts[expert]) {
            if count + 1 < MAX {
                others[count] = sub(self.load(rank), part);
                count += 1;
            }
        }
        others[count] = below;
        count += 1;
        if count == self.capacity.len() {
            parts[..count].fill(self.share_of(expert, count));
        } else {
            pour(self.demand[expert], &others[..count], &mut parts[..count]);
        }
        others[..count].iter().zip(&parts).map(|(&other, &part)| self.cost(add(other, part))).sum()
    }

    /// It has as many copies as are weighed one by one.
    pub(crate) fn has_many_copies(&self, expert: usize) -> bool {
        POURED_MAX <= self.holders[expert].len() + 1
    }

    /// What its holders cost now.
    pub(crate) fn cost_of_holders(&self, expert: usize) -> f32 {
        self.holders[expert].iter().map(|&rank| self.cost_now(rank)).sum()
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
