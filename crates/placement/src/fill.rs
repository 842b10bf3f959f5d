//! Makes a layer valid, from whatever survived: no rank holds too much, every expert has its copies.
//!
//! Ranks that held nothing are filled up as a first placement fills all: the most loaded experts get
//! the free places as further copies, then the heaviest copies go to the emptiest ranks first.

use crate::layer::Layer;

/// What becomes of places that no copy needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Free {
    /// They stay free.
    Keep,
    /// Ranks that held nothing, which have to load anyway, get copies of the busiest experts.
    FillNewcomers,
}

/// Gives every expert its copies, within the capacities.
pub(crate) fn fill(layer: &mut Layer, free: Free) {
    trim(layer);
    let mut wanted: Vec<usize> =
        layer.holders.iter().map(|holders| layer.copies_min.max(holders.len())).collect();
    match free {
        Free::Keep => {}
        Free::FillNewcomers => want_more(layer, &mut wanted),
    }
    layer.share_among(&wanted);
    for expert in heaviest_first(layer, &wanted) {
        while layer.holders[expert].len() < wanted[expert] {
            let is_needed = layer.holders[expert].len() < layer.copies_min;
            match emptiest(layer, expert) {
                Some(rank) => layer.put(rank, expert),
                None if is_needed && make_room(layer, expert) => {}
                None if is_needed => return deal_anew(layer),
                None => break,
            }
        }
    }
    layer.share_among_holders();
}

/// Takes copies from ranks that hold more than they can: those first that others have most of.
fn trim(layer: &mut Layer) {
    for rank in 0..layer.ranks() {
        while 0 < layer.excess(rank) {
            let most = layer.held[rank]
                .iter()
                .max_by_key(|&&expert| (layer.holders[expert].len(), std::cmp::Reverse(expert)));
            let expert = *most.expect("it holds more than it can");
            layer.take(rank, expert);
        }
    }
}

/// Further copies of the experts whose copies are busiest, as many as newcomers have places for.
fn want_more(layer: &Layer, wanted: &mut [usize]) {
    let places = |rank: &usize| !layer.is_settled[*rank];
    let newcomers: usize = (0..layer.ranks()).filter(places).map(|rank| layer.room(rank)).sum();
    let missing: usize = wanted.iter().zip(&layer.holders).map(|(w, h)| w - h.len()).sum();
    let hosts = (0..layer.ranks()).filter(|&rank| 0 < layer.capacity(rank)).count();
    let cost = |expert: usize, copies: usize| {
        if copies < hosts { layer.cost(layer.share_of(expert, copies)) } else { -1.0 }
    };
    let mut costs: Vec<f32> =
        (0..).zip(wanted.iter()).map(|(e, &copies)| cost(e, copies)).collect();
    for _ in missing..newcomers {
        let most = (0..costs.len()).max_by(|&l, &r| costs[l].total_cmp(&costs[r]).then(r.cmp(&l)));
        let Some(expert) = most.filter(|&expert| 0.0 < costs[expert]) else { return };
        wanted[expert] += 1;
        costs[expert] = cost(expert, wanted[expert]);
    }
}

/// Experts that lack copies. Those that nobody holds come first: nothing can be served without.
fn heaviest_first(layer: &Layer, wanted: &[usize]) -> Vec<usize> {
    let mut order: Vec<(bool, f32, usize)> = (0..layer.experts())
        .filter(|&expert| layer.holders[expert].len() < wanted[expert])
        .map(|expert| {
            let cost = layer.cost(layer.share_of(expert, wanted[expert]));
            (layer.holders[expert].is_empty(), cost, expert)
        })
        .collect();
    order.sort_by(|left, right| {
        right.0.cmp(&left.0).then(right.1.total_cmp(&left.1)).then(left.2.cmp(&right.2))
    });
    order.into_iter().map(|(_, _, expert)| expert).collect()
}

/// What one more expert that two ranks have in common costs, in units of what a level rank costs.
/// Little: it only spreads a rank's partners, so that its loss burdens all others alike.
const COMMON_COST: f32 = 0.1;

/// The rank with room that can take a copy at the least cost, among equals the one with most room.
fn emptiest(layer: &Layer, expert: usize) -> Option<usize> {
    let share = layer.share(expert);
    let cost = |rank| {
        let common = if layer.copies_min < 2 { 0.0 } else { layer.in_common(rank, expert) };
        layer.cost_of_adding(rank, share) + COMMON_COST * common
    };
    (0..layer.ranks())
        .filter(|&rank| 0 < layer.room(rank) && !layer.holds(rank, expert))
        .map(|rank| (cost(rank), (layer.held[rank].len(), layer.turn(rank)), rank))
        .min_by(|left, right| left.0.total_cmp(&right.0).then(left.1.cmp(&right.1)))
        .map(|(_, _, rank)| rank)
}

/// Finds a place for an expert when all ranks with room hold it already: instead of another's
/// surplus copy, or of one that moves to a rank with room.
fn make_room(layer: &mut Layer, expert: usize) -> bool {
    let hosts = || (0..layer.ranks()).filter(|&rank| !layer.holds(rank, expert));
    let surplus = hosts()
        .flat_map(|rank| layer.held[rank].iter().map(move |&other| (rank, other)))
        .filter(|&(_, other)| layer.has_surplus(other))
        .map(|(rank, other)| (layer.cost(layer.share(other)), rank, other))
        .min_by(|left, right| left.0.total_cmp(&right.0));
    if let Some((_, rank, other)) = surplus {
        layer.take(rank, other);
        layer.put(rank, expert);
        return true;
    }
    let roomy =
        |other: usize| (0..layer.ranks()).find(|&to| 0 < layer.room(to) && !layer.holds(to, other));
    // A copy that has to be loaded anyway can as well be loaded elsewhere.
    let step = hosts()
        .flat_map(|rank| layer.held[rank].iter().map(move |&other| (rank, other)))
        .filter_map(|(rank, other)| Some((rank, other, roomy(other)?)))
        .min_by_key(|&(rank, other, _)| layer.had(rank, other));
    let Some((rank, other, to)) = step else { return false };
    layer.take(rank, other);
    layer.put(to, other);
    layer.put(rank, expert);
    true
}

/// Places the fewest copies that must be, regardless of what was. Always the ranks with most room:
/// this finds a placement whenever there is one (Gale and Ryser; all experts have equally many).
fn deal_anew(layer: &mut Layer) {
    layer.clear();
    for expert in 0..layer.experts() {
        let mut order: Vec<usize> = (0..layer.ranks()).collect();
        order.sort_by_key(|&rank| (std::cmp::Reverse(layer.room(rank)), !layer.had(rank, expert)));
        for &rank in &order[..layer.copies_min] {
            layer.put(rank, expert);
        }
    }
    layer.share_among_holders();
}
