//! The exchange between processes keeps the rules of every exchange. Here every rank is a thread with a
//! mesh of its own; `processes.rs` has real processes.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

#[path = "common/counting.rs"]
mod counting;
#[path = "common/meshes.rs"]
mod meshes;
#[path = "common/steps.rs"]
mod steps;

use all2all::conformance::Network;
use all2all::tcp::Options;
use all2all::{AllToAll, ExchangeError, Fault, FaultKind, HostRows, LayerKey, Phase, Reason};
use counting::allocations;
use ids::{Epoch, Rank, StepId};
use meshes::Meshes;
use std::time::{Duration, Instant};
use steps::{ROW_BYTES, step, view};

/// Rows go over connections.
mod connections {
    use super::*;
    all2all::conformance!(Meshes::apart(), allocations);
}

/// Rows go through shared memory.
mod memory {
    use super::*;
    all2all::conformance!(Meshes::together(), allocations);
}

/// Both at once.
mod mixed {
    use super::*;
    all2all::conformance!(Meshes::mixed(), allocations);
}

const LONG: Duration = Duration::from_secs(20);

#[test]
fn frames_may_be_larger_than_connections() {
    large_frames(Meshes::apart(), 32);
}

#[test]
fn frames_may_be_larger_than_shared_memory() {
    large_frames(Meshes::together(), 150);
}

/// Frames several times as large as what lies between two ranks, in steps that are aborted anywhere: ranks
/// never lock each other, and what is left of a frame does not harm the next epoch.
#[track_caller]
fn large_frames(mut network: Meshes, rows: usize) {
    network.options = Options { buffer_bytes: Some(16 << 10), ..Options::default() };
    let network = &network;
    let dropped: u64 = std::thread::scope(|scope| {
        let rank = |me: usize| {
            let mut end = network.join(view(1, me, &[true; 3])).unwrap();
            let aborter = end.aborter();
            for epoch in 2..7 {
                assert_eq!(step(&mut end, 1, rows, LONG), Ok(()), "{me} in {epoch}");
                let control = (me == 1).then(|| {
                    let aborter = aborter.clone();
                    std::thread::spawn(move || {
                        std::thread::sleep(Duration::from_micros(epoch * 700));
                        aborter.abort(Epoch(epoch - 1), Reason::ViewChange);
                    })
                });
                while step(&mut end, 2, rows, LONG).is_ok() {}
                control.into_iter().for_each(|thread| thread.join().unwrap());
                end.reconfigure(view(epoch, me, &[true; 3]), LONG).unwrap();
            }
            assert_eq!(step(&mut end, 1, rows, LONG), Ok(()));
            end.dropped_frames()
        };
        let ranks: Vec<_> = (0..3).map(|me| scope.spawn(move || rank(me))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).sum()
    });
    assert!(0 < dropped, "vacuous: no frame was cut");
}

/// Large frames go to one peer after the other; but not even a rank that takes none keeps others from theirs, or
/// they would suspect the wrong one.
#[test]
fn peer_that_takes_no_rows_keeps_them_from_nobody_else() {
    let mut network = Meshes::apart();
    network.options = Options { buffer_bytes: Some(16 << 10), ..Options::default() };
    let network = &network;
    std::thread::scope(|scope| {
        let rank = |me: usize| {
            let mut end = network.join(view(1, me, &[true; 3])).unwrap();
            // Rank 1 needs nothing of anybody. Rank 0 sends to it before it sends to rank 2, which gives up first.
            let experts = [0, 1, 2].repeat(if me == 1 { 0 } else { 50 });
            let bytes = vec![0; experts.len() * ROW_BYTES];
            let within = if me == 2 { Duration::from_secs(1) } else { LONG };
            let step = StepId(1);
            end.begin_step(Epoch(1), step, Instant::now() + within).unwrap();
            let rows = HostRows { bytes: &bytes, row_bytes: ROW_BYTES };
            let sent = end.dispatch_send(LayerKey { step, layer: 0 }, rows, &experts).unwrap();
            let fault = (me != 1).then(|| end.dispatch_recv(sent).unwrap_err());
            (end, fault)
        };
        let ranks: Vec<_> = (0..3).map(|me| scope.spawn(move || rank(me))).collect();
        let ranks: Vec<_> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
        let (kind, suspects) = (FaultKind::Deadline, vec![Rank(1)]);
        let fault = Fault { kind, suspects, layer: 0, phase: Phase::Dispatch };
        assert_eq!(ranks[2].1, Some(ExchangeError::Faulted(fault)));
    });
}

/// A bit that changes between the sender's checksum and the receiver ends the step on every rank, and the
/// next epoch goes on over the same connections.
#[test]
fn frame_that_changes_on_its_way_fails_the_step() {
    corrupted(9);
    // Rows that are summed piece by piece.
    corrupted(90);
}

#[track_caller]
fn corrupted(rows: usize) {
    let network = &Meshes::apart();
    std::thread::scope(|scope| {
        let rank = |me: usize| {
            let mut end = network.join(view(1, me, &[true; 3])).unwrap();
            assert_eq!(step(&mut end, 1, 9, LONG), Ok(()));
            if me == 1 {
                end.corrupt_next_frame();
                assert!(end.keep_next_frame(), "nothing was sent yet");
                end.corrupt_next_frame();
            }
            let fault = step(&mut end, 2, rows, LONG).unwrap_err();
            assert!(!end.keep_next_frame());
            end.reconfigure(view(2, me, &[true; 3]), LONG).unwrap();
            assert_eq!(step(&mut end, 1, 9, LONG), Ok(()), "{me}");
            format!("{fault:?}")
        };
        let ranks: Vec<_> = (0..3).map(|me| scope.spawn(move || rank(me))).collect();
        let faults: Vec<String> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
        let seen = |fault: &&String| fault.contains("Corrupt") && fault.contains("suspects: [r1]");
        assert_eq!(faults.iter().filter(seen).count(), 1, "{faults:?}");
    });
}

#[test]
fn ranks_that_have_all_of_a_step_move_on_at_once() {
    move_on(Meshes::apart());
    move_on(Meshes::together());
}

/// Whoever has its own results goes on to the next view, while others may not even have noticed that it took all
/// that was for it. That fails nobody's step.
#[track_caller]
fn move_on(network: Meshes) {
    const RANKS: usize = 4;
    const VIEWS: u64 = 30;
    std::thread::scope(|scope| {
        for me in 0..RANKS {
            let network = &network;
            scope.spawn(move || {
                let mut end = network.join(view(1, me, &[true; RANKS])).unwrap();
                for epoch in 1..=VIEWS {
                    assert_eq!(
                        step(&mut end, epoch, 110, LONG),
                        Ok(()),
                        "rank {me}, epoch {epoch}"
                    );
                    end.reconfigure(view(epoch + 1, me, &[true; RANKS]), LONG).unwrap();
                }
            });
        }
    });
}
