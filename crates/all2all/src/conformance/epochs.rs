//! Rule 1, epochs only rise; and what that means for rows and for ranks that move at different times.

use super::rig::{LONG, POINTS, Part, fault, finish, join, on_every, reconfigure, well};
use super::rng::Rng;
use super::scene::Scene;
use super::{HostExchange, Network};
use crate::{AllToAll, ExchangeError, Reason};
use ids::{Epoch, Rank, StepId};
use std::sync::Arc;
use std::time::Instant;

/// A step of an older or a newer epoch is refused at once and changes nothing, between steps and in one;
/// so is a view whose epoch does not rise.
pub fn check_epochs_only_rise<N: Network>(new: &dyn Fn() -> N) {
    let network = Arc::new(new());
    let grace = network.grace();
    let scene = Arc::new(Scene::new(1, 2));
    let mut ends = join(&network, &scene, Epoch(5));
    for (current, next) in [(5, 6), (6, 9)] {
        let told = Arc::clone(&scene);
        ends = on_every(ends, move |rank, end| {
            let current = Epoch(current);
            refuses_other_epochs(end, current);
            for epoch in [Epoch(0), Epoch(current.0 - 1), current] {
                let refused = end.reconfigure(told.view(epoch, rank), LONG);
                assert_eq!(refused, Err(ExchangeError::StaleEpoch { got: epoch, current }));
            }
            let start = Instant::now();
            end.begin_step(current, StepId(7), start + LONG).expect("nothing has changed");
            refuses_other_epochs(end, current);
            assert!(start.elapsed() < grace, "a refusal took {:?}", start.elapsed());
            assert_eq!(finish(end), Ok(()), "a refused step does not disturb the open one");
        })
        .0;
        ends = well(ends, &scene, 8);
        ends = reconfigure(ends, &scene, Epoch(next));
        ends = well(ends, &scene, 9);
    }
}

fn refuses_other_epochs<E: HostExchange>(end: &mut E, current: Epoch) {
    for got in [Epoch(0), Epoch(current.0 - 1)] {
        let refused = end.begin_step(got, StepId(7), Instant::now() + LONG);
        assert_eq!(refused, Err(ExchangeError::StaleEpoch { got, current }));
    }
    for got in [Epoch(current.0 + 1), Epoch(u64::MAX)] {
        let refused = end.begin_step(got, StepId(7), Instant::now() + LONG);
        assert_eq!(refused, Err(ExchangeError::NotReady { got, current }));
    }
    assert_eq!(end.view().epoch, current);
}

/// A step that was left anywhere is replayed under the same number in the next epoch, and sees nothing
/// of the first attempt. (Rows depend on the epoch.)
pub fn check_rows_of_an_old_epoch_never_show<N: Network>(new: &dyn Fn() -> N) {
    for (seed, until) in (0..).zip(POINTS).flat_map(|(i, p)| [(2 * i, p), (2 * i + 1, p)]) {
        let network = Arc::new(new());
        let scene = Arc::new(Scene::new(seed, 3));
        let mut ends = join(&network, &scene, Epoch(1));
        for epoch in 1..4 {
            let told = Arc::clone(&scene);
            ends = on_every(ends, move |rank, end| {
                let part = Part::new(&told, 5);
                if u64::from(rank.0) == epoch % 3 {
                    part.run_until(end, until).expect("nobody fails before this rank does");
                    end.aborter().abort(Epoch(epoch), Reason::Abandoned);
                    fault(finish(end));
                } else {
                    let _fails_unless_it_has_all = part.run(end);
                }
            })
            .0;
            ends = reconfigure(ends, &scene, Epoch(epoch + 1));
            ends = well(ends, &scene, 5);
        }
    }
}

/// Ranks move to the next view at different times; those that are there wait in their step.
pub fn check_slow_rank_joins_a_step_that_waits_for_it<N: Network>(new: &dyn Fn() -> N) {
    let network = Arc::new(new());
    let scene = Arc::new(Scene::new(3, 3));
    let ends = join(&network, &scene, Epoch(1));
    let told = Arc::clone(&scene);
    let (ends, _) = on_every(ends, move |rank: Rank, end| {
        for epoch in (2..40).map(Epoch) {
            let mut pace = Rng::of(&[epoch.0, u64::from(rank.0)]);
            pace.dawdle();
            end.reconfigure(told.view(epoch, rank), LONG).expect("moves to the next view");
            for step in 0..2 {
                let part = Part { pace: Some(pace.clone()), ..Part::new(&told, step) };
                assert_eq!(part.run(end), Ok(()), "{rank} in {epoch}");
            }
        }
    });
    well(ends, &scene, 0);
}
