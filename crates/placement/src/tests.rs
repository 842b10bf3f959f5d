//! Plans are valid, even and redundant; impossible placements are refused.

mod follow;
mod replan;
mod shares;
mod unmix;

use super::*;
use proptest::prelude::*;

/// How level the window is with the shares that suit it best.
fn levelled(window: &Window, placement: &Placement) -> f64 {
    window.balance(placement, &Shares::level(placement, window).unwrap())
}

#[test]
fn experts_are_dealt_in_turn() {
    let shape = Shape { moe_layers: 2, experts: 3 };
    let placement = plan(shape, 2, 0).unwrap();
    assert_eq!(format!("{placement:?}"), "0: r0[e0, e2] r1[e1]; 1: r0[e1] r1[e0, e2]");
    let placement = plan(shape, 3, 1).unwrap();
    assert_eq!(
        format!("{placement:?}"),
        "0: r0[e0, e1] r1[e0, e2] r2[e1, e2]; 1: r0[e1, e2] r1[e0, e1] r2[e0, e2]"
    );
}

#[track_caller]
fn check_refused(ranks: u16, replicas: &[Rank], want: &str) {
    let error = Placement::new(ranks, vec![vec![vec![Rank(0)], replicas.to_vec()]]).unwrap_err();
    assert_eq!(error.to_string(), want);
}

#[test]
fn impossible_placements_are_refused() {
    check_refused(2, &[], "layer 0 gives e1 to no rank");
    check_refused(2, &[Rank(2)], "layer 0 gives e1 to r2, the view has 2 ranks");
    check_refused(2, &[Rank(1), Rank(1)], "layer 0 gives e1 to r1 twice");
    let uneven = vec![vec![vec![Rank(0)]], vec![]];
    assert_eq!(
        Placement::new(1, uneven).unwrap_err().to_string(),
        "layer 1 places 0 experts, the first layer 1"
    );
    assert_eq!(
        plan(Shape { moe_layers: 1, experts: 1 }, 2, 2).unwrap_err().to_string(),
        "redundancy 2 needs 3 ranks, there are 2"
    );
    assert_eq!(
        plan(Shape { moe_layers: 1, experts: 1 }, 0, 0).unwrap_err(),
        PlacementError::NoRanks
    );
}

#[test]
fn copies_share_and_what_all_hold_stays_at_home() {
    let layer = vec![vec![Rank(1), Rank(2)], vec![Rank(3), Rank(1), Rank(0), Rank(2)]];
    let placement = Placement::new(4, vec![layer]).unwrap();
    for source in 0..4 {
        let targets = |expert| placement.targets(0, ExpertId(expert), Rank(source));
        assert_eq!(targets(0), [Rank(1), Rank(2)], "its own copy serves as any other");
        assert_eq!(targets(1), [Rank(source)]);
    }
}

proptest! {
    #[test]
    fn plans_are_even_and_redundant(
        moe_layers in 0_usize..5, experts in 1_usize..40, ranks in 1_u16..12, redundancy in 0_u16..3,
    ) {
        prop_assume!(redundancy < ranks);
        let placement = plan(Shape { moe_layers, experts }, ranks, redundancy).unwrap();
        for layer in 0..moe_layers {
            let slots: Vec<usize> =
                (0..ranks).map(|r| placement.local_experts(layer, Rank(r)).len()).collect();
            let copies = usize::from(redundancy) + 1;
            prop_assert_eq!(slots.iter().sum::<usize>(), experts * copies);
            let spread = slots.iter().max().unwrap() - slots.iter().min().unwrap();
            prop_assert!(spread <= 1, "{:?}", slots);
            for expert in 0..experts {
                let expert = ExpertId(u16::try_from(expert).unwrap());
                prop_assert_eq!(placement.replicas(layer, expert).len(), copies);
            }
        }
    }
}
