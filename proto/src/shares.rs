//! Shares: coordinator -> wire -> workers.

use crate::{WireError, pb};
use ids::ExpertId;
use placement::{Shape, Shares};

/// The wire form of the shares of a placement of this shape.
///
/// # Panics
///
/// If the shares are of another shape.
#[must_use]
pub fn shares_to_wire(shares: &Shares, shape: Shape) -> Vec<pb::LayerShares> {
    let experts = || (0..).map(ExpertId).take(shape.experts);
    let expert = |layer, expert| pb::ExpertShares { parts: shares.parts(layer, expert).to_vec() };
    let layer = |layer| pb::LayerShares { experts: experts().map(|e| expert(layer, e)).collect() };
    (0..shape.moe_layers).map(layer).collect()
}

/// The core form of shares.
///
/// # Errors
///
/// [`WireError::Shares`] if they are none.
pub fn shares_from_wire(wire: Vec<pb::LayerShares>) -> Result<Shares, WireError> {
    let layer = |layer: pb::LayerShares| layer.experts.into_iter().map(|e| e.parts).collect();
    Shares::new(wire.into_iter().map(layer).collect())
        .map_err(|error| WireError::Shares(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ids::Rank;
    use placement::{Placement, Window};

    #[test]
    fn shares_survive_the_wire() {
        let layer = vec![vec![Rank(0), Rank(1)], vec![Rank(0)], vec![Rank(2)]];
        let placement = Placement::new(3, vec![layer]).unwrap();
        let window = Window::new(&[vec![10, 3, 4]]).unwrap();
        let shares = Shares::level(&placement, &window).unwrap();
        let wire = shares_to_wire(&shares, placement.shape());
        assert_eq!(shares_from_wire(wire), Ok(shares));
    }

    #[test]
    fn parts_that_cannot_be_are_refused() {
        let wire = |parts: &[f32]| {
            let experts = vec![
                pb::ExpertShares { parts: vec![1.0] },
                pb::ExpertShares { parts: parts.to_vec() },
            ];
            shares_from_wire(vec![pb::LayerShares { experts }]).unwrap_err().to_string()
        };
        assert_eq!(wire(&[]), "shares: layer 0 gives e1 to no copy");
        let text = "shares: layer 0 gives a copy of e1 the part ";
        assert_eq!(wire(&[0.5, f32::NAN]), format!("{text}NaN"));
        assert_eq!(wire(&[1.5, -0.5]), format!("{text}1.5"));
        assert_eq!(
            wire(&[0.5, 0.25]),
            "shares: layer 0 gives the copies of e1 0.75 of it together"
        );
    }
}
