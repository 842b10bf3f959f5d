//! The first placement of a view: even numbers of experts, replicas on distinct ranks.

use crate::{Placement, PlacementError};
use ids::Rank;
use std::fmt;

/// What is to be placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub moe_layers: usize,
    pub experts: usize,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} layers of {} experts", self.moe_layers, self.experts)
    }
}

/// Places `redundancy + 1` copies of every expert on distinct ranks.
///
/// Expert by expert, the copies go to the emptiest ranks, so the slots of two ranks differ by at most
/// one. Layers break ties from different ranks on, so that an uneven rest does not always burden the
/// same one.
///
/// # Errors
///
/// [`PlacementError`] if there are fewer ranks than copies, or too many experts to number.
///
/// # Panics
///
/// Never: ranks are numbered in 16 bits because `ranks` is.
pub fn plan(shape: Shape, ranks: u16, redundancy: u16) -> Result<Placement, PlacementError> {
    if ranks == 0 {
        return Err(PlacementError::NoRanks);
    }
    if redundancy >= ranks {
        return Err(PlacementError::Redundancy { redundancy, ranks });
    }
    let layer = |layer| deal(layer, shape.experts, usize::from(ranks), usize::from(redundancy) + 1);
    Placement::new(ranks, (0..shape.moe_layers).map(layer).collect())
}

/// Deals the copies of one layer's experts, `[experts]` -> ranks.
fn deal(layer: usize, experts: usize, ranks: usize, copies: usize) -> Vec<Vec<Rank>> {
    let mut held = vec![Vec::with_capacity(copies); experts];
    let mut load = vec![0_usize; ranks];
    for replicas in &mut held {
        // All copies of an expert at once: the emptiest ranks, so loads differ by at most one.
        let mut order: Vec<usize> = (0..ranks).collect();
        order.sort_by_key(|&rank| (load[rank], (rank + ranks - layer % ranks) % ranks));
        for &rank in &order[..copies] {
            load[rank] += 1;
            replicas.push(Rank(u16::try_from(rank).expect("ranks are numbered in 16 bits")));
        }
    }
    held
}
