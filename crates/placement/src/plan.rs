//! The first placement of a view: even numbers of experts, replicas on distinct ranks.

use crate::{Placement, PlacementError};
use ids::Rank;

/// What is to be placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub moe_layers: usize,
    pub experts: usize,
}

/// Places `redundancy + 1` copies of every expert on distinct ranks.
///
/// Copies are dealt out in turn: copy `c` of expert `e` is deal number `c * experts + e`, shifted so
/// that no rank gets the same expert twice; the ranks' slots differ by at most one per copy. Layers
/// start at different ranks, so that an uneven rest does not always burden the same one.
///
/// # Errors
///
/// [`PlacementError`] if there are fewer ranks than copies, or too many experts to number.
pub fn plan(shape: Shape, ranks: u16, redundancy: u16) -> Result<Placement, PlacementError> {
    if redundancy >= ranks && ranks > 0 {
        return Err(PlacementError::Redundancy { redundancy, ranks });
    }
    let width = usize::from(ranks.max(1));
    let rank = |slot: usize| Rank(u16::try_from(slot % width).expect("below the ranks"));
    let replicas = |layer: usize, expert: usize| {
        // Neighbours of the first copy: distinct because there are at most `ranks` of them.
        (0..=usize::from(redundancy)).map(|copy| rank(layer + expert + copy)).collect()
    };
    let layer = |layer| (0..shape.experts).map(|expert| replicas(layer, expert)).collect();
    Placement::new(ranks, (0..shape.moe_layers).map(layer).collect())
}
