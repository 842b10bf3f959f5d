//! Rule 5: an abort ends the epoch that it names, wherever it falls, and nothing else.

use super::faults::poisoned;
use super::rig::{LONG, POINTS, Part, Point, fault, finish, join, on_every, reconfigure, well};
use super::rng::Rng;
use super::scene::Scene;
use super::{HostExchange, Network};
use crate::{Aborter, AllToAll, FaultKind, Reason};
use ids::{Epoch, Rank, StepId};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// However often and wherever in a step: `end_step` reports it. Between steps `begin_step` does. Peers
/// do not wait for the deadline, and a rank that waits is woken.
pub fn check_abort_ends_its_epoch_wherever_it_falls<N: Network>(new: &dyn Fn() -> N) {
    for (until, ranks) in POINTS.into_iter().flat_map(|p| [(p, 1), (p, 3)]) {
        let network = Arc::new(new());
        let scene = Arc::new(Scene::flat(19, ranks));
        let ends = join(&network, &scene, Epoch(1));
        let ends = abort_at(ends, &scene, until);
        well(reconfigure(ends, &scene, Epoch(2)), &scene, 1);
    }
    abort_wakes(new);
}

/// Rank 0 aborts in its step 1, which has one layer.
#[track_caller]
fn abort_at<E: HostExchange + 'static>(
    ends: Vec<(Rank, E)>,
    scene: &Arc<Scene>,
    until: Point,
) -> Vec<(Rank, E)> {
    let told = Arc::clone(scene);
    on_every(ends, move |rank, end| {
        let part = Part::new(&told, 1);
        if rank == Rank(0) {
            part.run_until(end, until).expect("nobody fails before this rank does");
            let aborter = end.aborter();
            for _ in 0..3 {
                aborter.abort(Epoch(1), Reason::ViewChange);
            }
            if until != Point::Begin {
                let kind = fault(finish(end)).kind;
                assert_eq!(kind, FaultKind::Aborted(Reason::ViewChange), "{until:?}");
            }
        } else {
            // A peer that has every result by then is done, and learns it in the next step.
            let first = part.run(end);
            assert!(Point::CombineSend < until || first.is_err() || told.ranks == 1, "{until:?}");
            if first.is_ok() {
                Part::new(&told, 2).run(end).expect_err("the epoch is over");
            }
        }
        poisoned(end);
    })
    .0
}

/// Rank 0 waits for rank 1, which does nothing, until a thread of the control plane ends it, with a handle
/// from before the view.
fn abort_wakes<N: Network>(new: &dyn Fn() -> N) {
    for seed in 0..20 {
        let network = Arc::new(new());
        let scene = Arc::new(Scene::new(seed, 3));
        let ends = join(&network, &scene, Epoch(1));
        let aborter = ends[0].1.aborter();
        let ends = reconfigure(ends, &scene, Epoch(2));
        let control = std::thread::spawn(move || {
            let mut pace = Rng::of(&[seed]);
            (0..10).for_each(|_| pace.dawdle());
            aborter.abort(Epoch(2), Reason::ViewChange);
        });
        let told = Arc::clone(&scene);
        let (ends, results) = on_every(ends, move |rank, end| match rank {
            Rank(1) => Ok(()),
            _ => Part::new(&told, 1).run(end),
        });
        control.join().expect("only aborts");
        let kind = fault(results[0].clone()).kind;
        assert_eq!(kind, FaultKind::Aborted(Reason::ViewChange));
        results[2].clone().expect_err("rank 1 sends nothing");
        well(reconfigure(ends, &scene, Epoch(3)), &scene, 1);
    }
}

/// Before, in and after a step.
pub fn check_abort_of_an_old_epoch_is_void<N: Network>(new: &dyn Fn() -> N) {
    let network = Arc::new(new());
    let scene = Arc::new(Scene::deep(23, 2));
    let ends = join(&network, &scene, Epoch(3));
    let ends = reconfigure(ends, &scene, Epoch(5));
    let told = Arc::clone(&scene);
    let (ends, _) = on_every(ends, move |_, end| {
        let aborter = end.aborter();
        let old = || (0..5).for_each(|epoch| aborter.abort(Epoch(epoch), Reason::ViewChange));
        old();
        for step in 0..5 {
            assert_eq!(Part::new(&told, step).run(end), Ok(()));
            old();
            end.begin_step(Epoch(5), StepId(99), Instant::now() + LONG).expect("well");
            old();
            assert_eq!(finish(end), Ok(()));
        }
    });
    well(ends, &scene, 8);
}

/// One aborter serves its exchange through all views; an abort may come before its epoch.
pub fn check_aborter_outlives_its_view<N: Network>(new: &dyn Fn() -> N) {
    let network = Arc::new(new());
    let scene = Arc::new(Scene::new(29, 2));
    let mut ends = join(&network, &scene, Epoch(1));
    let aborter = ends[0].1.aborter();
    for epoch in [2, 3] {
        ends = reconfigure(ends, &scene, Epoch(epoch));
        aborter.abort(Epoch(epoch - 1), Reason::ViewChange);
        ends = well(ends, &scene, 1);
        aborter.abort(Epoch(epoch), Reason::ViewChange);
        ends = over(ends, &scene);
    }
    ends = well(reconfigure(ends, &scene, Epoch(4)), &scene, 1);
    aborter.abort(Epoch(6), Reason::ViewChange);
    for epoch in [4, 5, 6] {
        if epoch != 4 {
            ends = reconfigure(ends, &scene, Epoch(epoch));
        }
        ends = over(ends, &scene);
    }
    let ends = well(reconfigure(ends, &scene, Epoch(7)), &scene, 1);
    drop(ends);
    // The exchange is gone; its aborter is harmless.
    aborter.abort(Epoch(7), Reason::ViewChange);
}

/// No step of this epoch completes on any rank; rank 0 does not even begin one.
#[track_caller]
fn over<E: HostExchange + 'static>(ends: Vec<(Rank, E)>, scene: &Arc<Scene>) -> Vec<(Rank, E)> {
    let told = Arc::clone(scene);
    on_every(ends, move |rank, end| {
        if rank != Rank(0) {
            Part::new(&told, 1).run(end).expect_err("rank 0 does not take part");
        }
        poisoned(end);
    })
    .0
}

/// Aborts of old, current and coming epochs hail down on all ranks while these run steps and move on:
/// nothing hangs, what is complete is right, and in the end the cluster is well.
pub fn check_aborts_may_race_with_everything<N: Network>(new: &dyn Fn() -> N) {
    for seed in 0..4 {
        let network = Arc::new(new());
        let scene = Arc::new(Scene::new(seed, 3));
        let ends = join(&network, &scene, Epoch(1));
        let aborters: Vec<Aborter> = ends.iter().map(|(_, end)| end.aborter()).collect();
        let progress = Arc::new(Progress::default());
        let seen = Arc::clone(&progress);
        let control = std::thread::spawn(move || hail(&aborters, &seen, Rng::of(&[seed, 2])));
        let told = Arc::clone(&scene);
        let (ends, _) = on_every(ends, move |rank, end| {
            live(end, &told, &progress, Rng::of(&[seed, u64::from(rank.0)]));
        });
        let bursts = control.join().expect("only aborts");
        assert!(5 < bursts, "vacuous: {bursts} bursts of aborts in {EPOCHS} epochs");
        // The hail may have named an epoch that was still to come.
        well(reconfigure(ends, &scene, Epoch(EPOCHS + 10)), &scene, 0);
    }
}

/// Epochs to live through.
const EPOCHS: u64 = 60;

/// How far the ranks are.
#[derive(Default)]
struct Progress {
    /// The newest epoch that a rank has reached.
    epoch: AtomicU64,
    /// Complete steps of all ranks.
    complete: AtomicU64,
}

/// Bursts of aborts, each after a step was complete, until the last epoch is reached. Returns how many.
fn hail(aborters: &[Aborter], progress: &Progress, mut chance: Rng) -> u64 {
    let (mut bursts, mut before) = (0, 0);
    while progress.epoch.load(Ordering::Acquire) < EPOCHS {
        let complete = progress.complete.load(Ordering::Acquire);
        if complete == before {
            std::thread::yield_now();
            continue;
        }
        for _ in 0..=chance.below(6) {
            let epoch = progress.epoch.load(Ordering::Acquire) + u64::from(chance.below(3));
            let aborter = &aborters[chance.index(aborters.len())];
            aborter.abort(Epoch(epoch.saturating_sub(1)), Reason::ViewChange);
            chance.dawdle();
        }
        (bursts, before) = (bursts + 1, complete);
    }
    bursts
}

/// Runs steps, and moves to the next epoch whenever one fails.
fn live<E: HostExchange>(end: &mut E, scene: &Scene, progress: &Progress, mut pace: Rng) {
    let (mut step, mut next) = (0, 2);
    while end.view().epoch < Epoch(EPOCHS) {
        let part = Part { pace: Some(Rng::of(&[pace.next()])), ..Part::new(scene, step) };
        if part.run(end).is_ok() {
            step += 1;
            progress.complete.fetch_add(1, Ordering::Release);
            continue;
        }
        step = 0;
        // An epoch that every other rank has left already cannot be entered any more.
        while next <= EPOCHS {
            let view = scene.view(Epoch(next), end.view().me);
            next += 1;
            if end.reconfigure(view, LONG).is_ok() {
                break;
            }
        }
        progress.epoch.fetch_max(end.view().epoch.0, Ordering::Release);
    }
}
