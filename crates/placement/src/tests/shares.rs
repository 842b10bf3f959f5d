//! Shares are as level as the placement allows.

use super::*;

/// The least load of the fullest rank, in tokens: experts that only some ranks hold must be served by these, whatever the
/// shares, and no other constraint binds (Hall). What all ranks hold is spread evenly.
fn fullest_at_best(placement: &Placement, moe_layer: usize, loads: &[u64]) -> f64 {
    let ranks = u32::from(placement.ranks());
    let holders = |expert: usize| -> u32 {
        let expert = ExpertId(u16::try_from(expert).unwrap());
        placement.replicas(moe_layer, expert).iter().map(|rank| 1 << rank.0).sum()
    };
    let all = (1 << ranks) - 1;
    let within = |set: u32| -> u64 {
        let is_bound = |expert: &usize| holders(*expert) & !set == 0 && holders(*expert) != all;
        (0..loads.len()).filter(is_bound).map(|expert| loads[expert]).sum()
    };
    let at_home: u64 =
        (0..loads.len()).filter(|&e| holders(e) == all).map(|expert| loads[expert]).sum();
    let sets = (1_u32..=all).map(|set| within(set) as f64 / f64::from(set.count_ones()));
    sets.fold(0.0, f64::max) + at_home as f64 / f64::from(ranks)
}

proptest! {
    #[test]
    fn shares_are_as_level_as_can_be(
        ranks in 1_u16..7,
        experts in proptest::collection::vec((0_u64..2000, any::<u32>()), 1..30),
    ) {
        let holders = |bits: u32| -> Vec<Rank> {
            let held: Vec<Rank> = (0..ranks).filter(|r| bits >> r & 1 == 1).map(Rank).collect();
            if held.is_empty() { vec![Rank(u16::try_from(bits % u32::from(ranks)).unwrap())] } else { held }
        };
        let layer: Vec<Vec<Rank>> = experts.iter().map(|&(_, bits)| holders(bits)).collect();
        let placement = Placement::new(ranks, vec![layer]).unwrap();
        let loads: Vec<u64> = experts.iter().map(|&(load, _)| load).collect();
        let window = Window::new(std::slice::from_ref(&loads)).unwrap();
        let shares = Shares::level(&placement, &window).unwrap();
        for expert in (0..).map(ExpertId).take(loads.len()) {
            let parts = shares.parts(0, expert);
            prop_assert_eq!(parts.len(), placement.replicas(0, expert).len());
            prop_assert!(parts.iter().all(|part| (0.0..=1.0).contains(part)), "{:?}", parts);
            prop_assert!((parts.iter().sum::<f32>() - 1.0).abs() < 1e-5, "{:?}", parts);
        }
        let fullest = window.rank_loads(&placement, &shares)[0].iter().copied().fold(0.0, f64::max);
        let best = fullest_at_best(&placement, 0, &loads);
        let mean = loads.iter().sum::<u64>() as f64 / f64::from(ranks);
        prop_assert!(fullest <= best + 0.01 * mean + 1e-3, "{} of {} in {:?}", fullest, best, shares);
        prop_assert!(best * 0.999 <= fullest, "the bound is none: {} {}", fullest, best);
    }
}

#[test]
fn load_of_another_model_is_refused() {
    let placement = plan(Shape { moe_layers: 1, experts: 3 }, 2, 0).unwrap();
    let window = Window::new(&[vec![1, 2]]).unwrap();
    assert_eq!(
        Shares::level(&placement, &window).unwrap_err().to_string(),
        "1 layers of 2 experts given for a model of 1 layers of 3 experts"
    );
}
