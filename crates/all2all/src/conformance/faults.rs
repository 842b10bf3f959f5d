//! Rules 2 to 4: a step is all or nothing, a fault stays until the next view, and nothing outlasts the
//! deadline.

use super::rig::{
    LONG, POINTS, Part, Point, fault, finish, join, on_each, on_every, reconfigure, well,
};
use super::scene::{Place, Scene};
use super::{HostExchange, Network};
use crate::{AllToAll, ExchangeError, FaultKind, HostRows, LayerKey, Reason};
use ids::{Epoch, Rank, StepId};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A rank dies anywhere in a step: no peer completes the step without all of its rows and results.
pub fn check_step_is_all_or_nothing<N: Network>(new: &dyn Fn() -> N) {
    let (mut complete, mut failed) = (0, 0);
    for (until, ranks, seed) in
        POINTS.into_iter().flat_map(|p| (2..5).flat_map(move |r| (0..4).map(move |s| (p, r, s))))
    {
        let network = Arc::new(new());
        let scene = if seed % 2 == 0 { Scene::flat(seed, ranks) } else { Scene::deep(seed, ranks) };
        let scene = Arc::new(scene);
        let dies = Rank(u16::try_from(seed).expect("a small seed") % ranks);
        let told = Arc::clone(&scene);
        let ends = join(&network, &scene, Epoch(1));
        let (_, results) = on_each(ends, move |rank, mut end| {
            let part = Part::new(&told, 1);
            if rank == dies {
                part.run_until(&mut end, until).expect("nobody fails before this rank does");
                drop(end);
                return (None, None);
            }
            let result = part.run(&mut end);
            (Some(end), Some(result))
        });
        for result in results.into_iter().flatten() {
            match result {
                Ok(()) => {
                    assert!(Point::CombineSend < until && scene.layers == 1, "{until:?} {scene:?}");
                    complete += 1;
                }
                Err(error) => {
                    fault(Err(error));
                    failed += 1;
                }
            }
        }
    }
    assert!(0 < complete && 0 < failed, "{complete} complete, {failed} failed");
}

/// A step that is ended in the middle of a layer, begun over, never begun or continued under another
/// number has failed, here and on the peers, which learn it at once.
pub fn check_left_step_has_failed<N: Network>(new: &dyn Fn() -> N) {
    let abandoned = FaultKind::Aborted(Reason::Abandoned);
    for way in [Leave::End, Leave::BeginOver, Leave::OtherStep] {
        for until in [Point::DispatchRecv, Point::CombineSend] {
            let network = Arc::new(new());
            let scene = Arc::new(Scene::new(7, 3));
            let told = Arc::clone(&scene);
            let ends = join(&network, &scene, Epoch(1));
            let (ends, faults) = on_every(ends, move |rank, end| {
                let part = Part::new(&told, 1);
                if rank != Rank(1) {
                    return fault(part.run(end)).kind;
                }
                part.run_until(end, until).expect("nobody fails before this rank does");
                leave(end, way, &told);
                fault(finish(end)).kind
            });
            assert_eq!(faults[1], abandoned, "{way:?} before {until:?}");
            let ends = reconfigure(ends, &scene, Epoch(2));
            well(ends, &scene, 1);
        }
    }
    let network = Arc::new(new());
    let scene = Arc::new(Scene::new(7, 1));
    on_every(join(&network, &scene, Epoch(1)), move |_, end| {
        assert_eq!(fault(finish(end)).kind, abandoned, "a step that was never begun");
        poisoned(end);
    });
}

/// How a step is left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Leave {
    End,
    BeginOver,
    OtherStep,
}

fn leave<E: HostExchange>(end: &mut E, way: Leave, scene: &Scene) {
    match way {
        Leave::End => {}
        Leave::BeginOver => {
            let epoch = end.view().epoch;
            let again = end.begin_step(epoch, StepId(2), Instant::now() + LONG);
            assert_eq!(again, Err(ExchangeError::Poisoned { epoch }));
        }
        Leave::OtherStep => {
            let place = Place { epoch: end.view().epoch, step: StepId(9), layer: 0 };
            let me = end.view().me;
            let (bytes, experts) = (scene.rows(place, me), scene.experts(place, me));
            let rows = HostRows { bytes: &bytes, row_bytes: scene.row_bytes };
            let sent = end.dispatch_send(LayerKey { step: StepId(9), layer: 0 }, rows, &experts);
            fault(sent.map(|_| ()));
        }
    }
}

/// Both refusals of a poisoned exchange.
#[track_caller]
pub(super) fn poisoned<E: HostExchange>(end: &mut E) {
    let epoch = end.view().epoch;
    for step in 0..3 {
        let refused = end.begin_step(epoch, StepId(step), Instant::now() + LONG);
        assert_eq!(refused, Err(ExchangeError::Poisoned { epoch }));
        fault(finish(end));
    }
}

/// After a fault only the next view helps; it may have the same members, again and again.
pub fn check_poison_lasts_until_the_next_view<N: Network>(new: &dyn Fn() -> N) {
    let network = Arc::new(new());
    let scene = Arc::new(Scene::new(11, 3));
    let mut ends = join(&network, &scene, Epoch(1));
    for epoch in 1..10 {
        ends = well(ends, &scene, 1);
        let told = Arc::clone(&scene);
        ends = on_every(ends, move |rank, end| {
            let part = Part::new(&told, 2);
            if u64::from(rank.0) == epoch % 3 {
                part.run_until(end, Point::DispatchRecv).expect("nobody fails before");
                fault(finish(end));
            } else {
                fault(part.run(end));
            }
            poisoned(end);
            let current = Epoch(epoch);
            let got = Epoch(epoch - 1);
            let refused = end.begin_step(got, StepId(3), Instant::now() + LONG);
            assert_eq!(refused, Err(ExchangeError::StaleEpoch { got, current }));
        })
        .0;
        ends = reconfigure(ends, &scene, Epoch(epoch + 1));
    }
    well(ends, &scene, 2);
}

/// A rank falls silent anywhere in a step, but keeps its end: the peers are back by the deadline and
/// suspect it.
pub fn check_silent_peer_ends_the_step_at_the_deadline<N: Network>(new: &dyn Fn() -> N) {
    for (until, ranks) in POINTS.into_iter().flat_map(|p| [(p, 2), (p, 4)]) {
        // A busy machine may need longer than that to bring the rank to where it falls silent.
        let mut within = Duration::from_millis(60);
        while fall_silent(&Arc::new(new()), until, ranks, within).is_err() {
            within *= 2;
            assert!(within < LONG / 8, "{until:?} is not reached in half of {within:?}");
        }
    }
}

/// The deadline was over before the rank fell silent.
struct TooEarly;

fn fall_silent<N: Network>(
    network: &Arc<N>,
    until: Point,
    ranks: u16,
    within: Duration,
) -> Result<(), TooEarly> {
    let grace = network.grace();
    let scene = Arc::new(Scene::deep(13, ranks));
    let told = Arc::clone(&scene);
    let ends = join(network, &scene, Epoch(1));
    let ended = [FaultKind::Deadline, FaultKind::Aborted(Reason::PeerFaulted)];
    let (ends, faults) = on_every(ends, move |rank, end| {
        let part = Part { within, ..Part::new(&told, 1) };
        if rank == Rank(1) {
            return part.run_until(end, until).err().map(|_| fault(finish(end)));
        }
        let start = Instant::now();
        let fault = fault(part.run(end));
        let took = start.elapsed();
        assert!(took < within + grace, "{rank} took {took:?} for a deadline of {within:?}");
        assert!(fault.kind != FaultKind::Deadline || within <= took, "early: {took:?}");
        Some(fault)
    });
    for fault in faults.iter().flatten() {
        assert!(ended.contains(&fault.kind), "{until:?}: {fault:?}");
    }
    if faults[1].is_some() {
        return Err(TooEarly);
    }
    let first = faults.iter().flatten().find(|fault| fault.kind == FaultKind::Deadline);
    let first = first.unwrap_or_else(|| panic!("nobody saw the deadline: {faults:?}"));
    assert!(first.suspects.contains(&Rank(1)), "{until:?}: {first:?}");
    well(reconfigure(ends, &scene, Epoch(2)), &scene, 1);
    Ok(())
}

/// A rank dies anywhere in a step: the peers are back long before the deadline, and one names it.
pub fn check_gone_peer_ends_the_step_at_once<N: Network>(new: &dyn Fn() -> N) {
    for (until, ranks) in POINTS.into_iter().flat_map(|p| [(p, 2), (p, 4)]) {
        let network = Arc::new(new());
        let grace = network.grace();
        let scene = Arc::new(Scene::deep(17, ranks));
        let told = Arc::clone(&scene);
        let ends = join(&network, &scene, Epoch(1));
        let (_, faults) = on_each(ends, move |rank, mut end| {
            let part = Part::new(&told, 1);
            if rank == Rank(1) {
                part.run_until(&mut end, until).expect("nobody fails before this rank does");
                return (None, None);
            }
            let start = Instant::now();
            let fault = fault(part.run(&mut end));
            let took = start.elapsed();
            assert!(took < grace, "{rank} took {took:?} to see that a peer is gone");
            (Some(end), Some(fault))
        });
        let faults: Vec<_> = faults.into_iter().flatten().collect();
        let named = |fault: &&crate::Fault| {
            fault.kind == FaultKind::PeerClosed && fault.suspects == [Rank(1)]
        };
        assert!(faults.iter().any(|fault| named(&fault)), "{until:?}: {faults:?}");
    }
}
