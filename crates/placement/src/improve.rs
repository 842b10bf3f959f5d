//! Levels a valid layer, change by change, as long as each is worth the weights it has to load.
//!
//! Only changes that relieve one of the fullest ranks are tried: they are where the layer waits. The
//! best of them is made, until none of the fullest ranks has one left or the budget is spent; the
//! budget counts trials, not time, so that equal requests give equal placements.

use crate::layer::{Layer, Settling, add, sub};

/// What loading an expert on a rank that held others must save, as a part of what a level layer
/// costs. With 64 ranks one of them 10 % above the mean costs 90 of these parts more than a level one.
const LOAD_COST: f32 = 2e-4;
/// Least gain of a change that loads nothing: less is noise of the sums.
const GAIN_MIN: f64 = 1e-5;
/// Trials per layer: enough for a first placement to end level, within 1 ms.
const TRIALS: usize = 1600;
const TRIALS_PER_RANK: usize = 256;
/// Rounds in which the copies of all experts share their load, before the first change and after each.
const FIRST: Settling = Settling { passes: 16, moved_min: 2e-3 };
const AGAIN: Settling = Settling { passes: 2, moved_min: 2e-3 };
/// What it costs, in trials, to weigh a further copy, and to let the load settle per copy that has others.
const COPY_TRIALS: usize = 8;
const SETTLE_TRIALS: usize = 2;
/// Ranks that may get a further copy: the emptiest.
const COPY_TARGETS: usize = 16;
/// Fullest ranks that are tried before the layer counts as level.
const RANKS_TRIED: usize = 8;

#[derive(Debug, Clone, Copy)]
enum Change {
    /// `expert` leaves `rank`, and `other` comes for it from `to`.
    Swap { rank: usize, expert: usize, to: usize, other: usize },
    /// `expert` leaves `rank` for a free place.
    Move { rank: usize, expert: usize, to: usize },
    /// Another copy of `expert` shares the load, in a free place.
    Copy { expert: usize, to: usize },
    /// The same, instead of a copy of `other` that can be spared.
    Replace { expert: usize, to: usize, other: usize },
}

/// Levels the layer.
pub(crate) fn improve(layer: &mut Layer) {
    layer.settle(FIRST);
    let mut cost = layer.cost_of_all();
    let mut trials = TRIALS + TRIALS_PER_RANK * layer.ranks();
    let mut stuck = vec![false; layer.ranks()];
    let mut stuck_count = 0;
    while stuck_count < RANKS_TRIED {
        let open = (0..layer.ranks()).filter(|&rank| !stuck[rank]);
        let fullest =
            open.max_by(|&l, &r| layer.cost_now(l).total_cmp(&layer.cost_now(r)).then(r.cmp(&l)));
        let Some(rank) = fullest else { return };
        if layer.is_level() {
            return;
        }
        let mut search = Search { layer, trials, best: None };
        search.relieve(rank);
        let best = search.best;
        trials = search.trials;
        if trials == 0 {
            return;
        }
        trials = trials.saturating_sub(SETTLE_TRIALS * layer.shared_copies());
        if best.is_some_and(|(_, change)| make(layer, &mut cost, change)) {
            stuck.fill(false);
            stuck_count = 0;
        } else {
            stuck[rank] = true;
            stuck_count += 1;
        }
    }
}

/// The trials of one fullest rank.
struct Search<'a> {
    layer: &'a Layer,
    trials: usize,
    best: Option<(f32, Change)>,
}

impl Search<'_> {
    fn relieve(&mut self, rank: usize) {
        let layer = self.layer;
        let regime = layer.worst_regime(layer.load(rank));
        let emptier = |&to: &usize| {
            0 < layer.capacity(to) && layer.load(to)[regime] < layer.load(rank)[regime]
        };
        let mut targets: Vec<usize> = (0..layer.ranks()).filter(emptier).collect();
        targets.sort_by(|&l, &r| layer.load(l)[regime].total_cmp(&layer.load(r)[regime]));
        // Passing pairs over takes time, too.
        let passes = layer.ranks() + layer.held[rank].len() * targets.len();
        self.trials = self.trials.saturating_sub(passes);
        for &expert in &layer.held[rank] {
            self.part(rank, expert, regime, &targets);
            self.copy(expert, &targets[..targets.len().min(COPY_TARGETS)]);
        }
    }

    /// `expert` leaves the rank.
    fn part(&mut self, rank: usize, expert: usize, regime: usize, targets: &[usize]) {
        let layer = self.layer;
        let share = layer.part(expert, rank);
        let without = sub(layer.load(rank), share);
        let unloaded = load_cost(layer, rank, expert);
        let (left, now) = (layer.cost(without), layer.cost_now(rank) + unloaded);
        for &to in targets {
            if layer.holds(to, expert) {
                continue;
            }
            let with = add(layer.load(to), share);
            let before = load_cost(layer, to, expert) - now - layer.cost_now(to);
            if 0 < layer.room(to) {
                self.offer(before + left + layer.cost(with), Change::Move { rank, expert, to });
            }
            for &other in &layer.held[to] {
                let back = layer.part(other, to);
                if share[regime] <= back[regime] || layer.holds(rank, other) {
                    continue;
                }
                let loads = load_cost(layer, rank, other) - load_cost(layer, to, other);
                let cost = layer.cost_of_both(add(without, back), sub(with, back));
                let cost = before + cost + loads;
                self.offer(cost, Change::Swap { rank, expert, to, other });
            }
        }
    }

    /// `expert` gets one more copy elsewhere.
    fn copy(&mut self, expert: usize, targets: &[usize]) {
        let layer = self.layer;
        if layer.has_many_copies(expert) {
            return;
        }
        let now = layer.cost_of_holders(expert);
        for &to in targets {
            if layer.holds(to, expert) {
                continue;
            }
            let before = load_cost(layer, to, expert) - now - layer.cost_now(to);
            if 0 < layer.room(to) {
                let cost = before + layer.cost_with(expert, layer.load(to));
                self.offer(cost, Change::Copy { expert, to });
                self.trials = self.trials.saturating_sub(COPY_TRIALS);
            }
            let surplus = layer.held[to].iter().filter(|&&other| layer.has_surplus(other));
            // The copy that does least.
            let least = surplus.min_by(|&&l, &&r| {
                let part = |other| layer.weighted(layer.part(other, to));
                part(l).total_cmp(&part(r)).then(l.cmp(&r))
            });
            if let Some(&other) = least {
                let below = sub(layer.load(to), layer.part(other, to));
                let cost = before + layer.rise(other, to) + layer.cost_with(expert, below)
                    - load_cost(layer, to, other);
                self.offer(cost, Change::Replace { expert, to, other });
                self.trials = self.trials.saturating_sub(COPY_TRIALS);
            }
        }
    }

    fn offer(&mut self, cost: f32, change: Change) {
        self.trials = self.trials.saturating_sub(1);
        if self.best.is_none_or(|(best, _)| cost < best) {
            self.best = Some((cost, change));
        }
    }
}

/// A copy that is already there, or on a rank that has to be filled anyway, costs nothing.
fn load_cost(layer: &Layer, rank: usize, expert: usize) -> f32 {
    if layer.is_settled[rank] && !layer.had(rank, expert) {
        LOAD_COST * layer.cost_of_level()
    } else {
        0.0
    }
}

/// Makes the change if it is worth it. The trial let only the copies of the changed experts share anew, so what counts
/// is the sum afterwards, beside the `cost` of the layer after the last change: a refused one may leave parts that are
/// a little worse, and to win these back is no gain.
fn make(layer: &mut Layer, cost: &mut f64, change: Change) -> bool {
    let loads = apply(layer, change);
    layer.settle(AGAIN);
    let after = layer.cost_of_all();
    if after + f64::from(loads) < *cost - GAIN_MIN {
        *cost = after;
        return true;
    }
    undo(layer, change);
    layer.settle(AGAIN);
    false
}

/// Returns the cost of what has to be loaded now and had not before.
fn apply(layer: &mut Layer, change: Change) -> f32 {
    match change {
        Change::Swap { rank, expert, to, other } => {
            transfer(layer, expert, rank, to) + transfer(layer, other, to, rank)
        }
        Change::Move { rank, expert, to } => transfer(layer, expert, rank, to),
        Change::Copy { expert, to } => {
            layer.put(to, expert);
            layer.pour(expert);
            load_cost(layer, to, expert)
        }
        Change::Replace { expert, to, other } => {
            layer.take(to, other);
            layer.put(to, expert);
            layer.pour(other);
            layer.pour(expert);
            load_cost(layer, to, expert) - load_cost(layer, to, other)
        }
    }
}

fn undo(layer: &mut Layer, change: Change) {
    match change {
        Change::Swap { rank, expert, to, other } => {
            transfer(layer, expert, to, rank);
            transfer(layer, other, rank, to);
        }
        Change::Move { rank, expert, to } => {
            transfer(layer, expert, to, rank);
        }
        Change::Copy { expert, to } => {
            layer.take(to, expert);
            layer.pour(expert);
        }
        Change::Replace { expert, to, other } => {
            layer.take(to, expert);
            layer.put(to, other);
            layer.pour(expert);
            layer.pour(other);
        }
    }
}

fn transfer(layer: &mut Layer, expert: usize, from: usize, to: usize) -> f32 {
    layer.transfer(expert, from, to);
    load_cost(layer, to, expert) - load_cost(layer, from, expert)
}
