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
use all2all::{AllToAll, Reason};
use counting::allocations;
use ids::Epoch;
use meshes::Meshes;
use std::time::Duration;
use steps::{step, view};

all2all::conformance!(Meshes::apart(), allocations);

const LONG: Duration = Duration::from_secs(20);

/// Frames of 320 KiB over connections that hold a tenth of it, in steps that are aborted anywhere: ranks
/// never lock each other, and what is left of a frame does not harm the next epoch.
#[test]
fn frames_may_be_larger_than_connections() {
    let small = Options { buffer_bytes: Some(16 << 10), ..Options::default() };
    let mut network = Meshes::apart();
    network.options = small;
    let dropped: u64 = std::thread::scope(|scope| {
        let rank = |me: usize| {
            let mut end = network.join(view(1, me, &[true; 3])).unwrap();
            let aborter = end.aborter();
            for epoch in 2..12 {
                assert_eq!(step(&mut end, 1, 32, LONG), Ok(()), "{me} in {epoch}");
                let control = (me == 1).then(|| {
                    let aborter = aborter.clone();
                    std::thread::spawn(move || {
                        std::thread::sleep(Duration::from_micros(epoch * 400));
                        aborter.abort(Epoch(epoch - 1), Reason::ViewChange);
                    })
                });
                while step(&mut end, 2, 32, LONG).is_ok() {}
                control.into_iter().for_each(|thread| thread.join().unwrap());
                end.reconfigure(view(epoch, me, &[true; 3]), LONG).unwrap();
            }
            assert_eq!(step(&mut end, 1, 32, LONG), Ok(()));
            end.dropped_frames()
        };
        let ranks: Vec<_> = (0..3).map(|me| scope.spawn(move || rank(me))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).sum()
    });
    assert!(0 < dropped, "vacuous: no frame was cut");
}
