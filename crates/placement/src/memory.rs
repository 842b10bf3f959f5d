//! How many copies every rank takes, given what its memory holds.

use crate::Shape;

/// Copies per layer that each rank shall be able to hold so that all together can hold
/// `redundancy + 1` copies of every expert: as even as the ranks' `places` allow, and `spare` more
/// where there is memory for them. Fewer copies if there are not enough places; `None` if there is
/// none for every expert.
#[must_use]
pub fn capacities(
    shape: Shape,
    places: &[usize],
    redundancy: u16,
    spare: usize,
) -> Option<Vec<usize>> {
    let places: Vec<usize> = places.iter().map(|&places| places.min(shape.experts)).collect();
    let all: usize = places.iter().sum();
    if all < shape.experts || places.is_empty() {
        return None;
    }
    let copies = (shape.experts * (usize::from(redundancy) + 1)).min(all);
    let held = |most: usize| places.iter().map(|&places| places.min(most)).sum::<usize>();
    let even = copies.div_ceil(places.len());
    let most = (even..=shape.experts).find(|&most| copies <= held(most)).unwrap_or(shape.experts);
    Some(places.iter().map(|&places| places.min(most + spare)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SHAPE: Shape = Shape { moe_layers: 2, experts: 8 };

    #[test]
    fn even_while_memory_allows() {
        let of = |places: &[usize], redundancy, spare| capacities(SHAPE, places, redundancy, spare);
        assert_eq!(of(&[99; 4], 1, 0), Some(vec![4; 4]));
        assert_eq!(of(&[99; 3], 1, 1), Some(vec![7; 3]), "sixteen copies on three, and one more");
        assert_eq!(of(&[2, 99, 99], 1, 0), Some(vec![2, 7, 7]), "others take what one cannot");
        assert_eq!(of(&[3, 3, 3], 1, 0), Some(vec![3; 3]), "nine places: one copy and a bit");
        assert_eq!(of(&[2, 2, 3], 0, 0), None);
        assert_eq!(of(&[99], 1, 0), Some(vec![8]), "nobody needs an expert twice");
        assert_eq!(of(&[], 0, 0), None);
    }

    proptest! {
        #[test]
        fn as_many_copies_as_fit_and_no_more_than_a_rank_holds(
            places in prop::collection::vec(0usize..12, 1..6),
            redundancy in 0u16..3,
            spare in 0usize..3,
        ) {
            let all: usize = places.iter().map(|&places| places.min(8)).sum();
            let Some(capacity) = capacities(SHAPE, &places, redundancy, spare) else {
                prop_assert!(all < 8);
                return Ok(());
            };
            prop_assert!(capacity.iter().zip(&places).all(|(capacity, places)| capacity <= places));
            let wanted = 8 * (usize::from(redundancy) + 1);
            prop_assert!(wanted.min(all) <= capacity.iter().sum());
        }
    }
}
