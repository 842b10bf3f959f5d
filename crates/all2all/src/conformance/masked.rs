//! Rule 9: what a masked rank writes is never read, whatever view it believes in.

use super::rig::{Part, Point, finish, in_time, join, on_every, reconfigure, well};
use super::scene::Scene;
use super::{HostExchange, Network};
use crate::{AllToAll, ExchangeError, Reason};
use ids::{Epoch, Rank};
use std::sync::Arc;
use std::time::Duration;

const ZOMBIE: Rank = Rank(1);

/// What a rank that is masked, and does not know it, does to the others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mischief {
    /// Sends rows of the very step.
    Send(Point),
    /// Fails and says so.
    Fault,
    Abort,
    /// Joins and goes.
    Close,
}

/// A masked rank sends rows under the right epoch and step, fails, aborts, leaves: the others do not
/// notice. Nor do they notice what it does in the epoch in which it was a member.
pub fn check_masked_rank_is_never_read<N: Network>(new: &dyn Fn() -> N) {
    let network = Arc::new(new());
    let active = [true, false, true];
    let whole = Arc::new(Scene::new(37, 3));
    let masked = Arc::new(Scene::masked(41, &active));
    let mut ends = join(&network, &whole, Epoch(1));
    // Everybody has sent its rows when the view changes.
    let told = Arc::clone(&whole);
    ends = on_every(ends, move |_, end| {
        Part::new(&told, 1).run_until(end, Point::DispatchRecv).expect("only sends");
    })
    .0;
    let (_, mut old) = ends.remove(ZOMBIE.index());
    let mut ends = reconfigure(ends, &masked, Epoch(2));
    ends = well(ends, &masked, 1);
    old.aborter().abort(Epoch(1), Reason::ViewChange);
    let _over = finish(&mut old);
    ends = well(ends, &masked, 2);
    drop(old);
    ends = well(ends, &masked, 3);

    let all = [
        Mischief::Send(Point::DispatchRecv),
        Mischief::Send(Point::Next),
        Mischief::Fault,
        Mischief::Abort,
        Mischief::Close,
    ];
    for (epoch, mischief) in (3..).map(Epoch).zip(all.into_iter().cycle().take(15)) {
        ends = reconfigure(ends, &masked, epoch);
        // A transport may refuse a rank that it knows to be masked.
        let zombie = network.join(whole.view(epoch, ZOMBIE)).ok();
        let told = Arc::clone(&whole);
        let zombie = std::thread::spawn(move || zombie.map(|end| haunt(&told, end, mischief)));
        // Before the others begin, or at the same time.
        let zombie = match epoch.0 % 2 {
            0 => Err(in_time(zombie)),
            _ => Ok(zombie),
        };
        for step in 1..6 {
            ends = well(ends, &masked, step);
        }
        drop(zombie.map_or_else(|end| end, in_time));
        ends = well(ends, &masked, 6);
    }
}

/// Returns the end if it does not leave.
fn haunt<E: HostExchange>(scene: &Scene, mut end: E, mischief: Mischief) -> Option<E> {
    let within = Duration::from_millis(5);
    let part = Part { within, ..Part::new(scene, 1) };
    match mischief {
        Mischief::Send(until) => {
            // Nobody sends it anything, so it never gets far.
            let _fails = part.run_until(&mut end, until);
        }
        Mischief::Fault => {
            let _fails = part.run(&mut end);
        }
        Mischief::Abort => {
            end.aborter().abort(end.view().epoch, Reason::ViewChange);
            let _fails = part.run(&mut end);
        }
        Mischief::Close => return None,
    }
    Some(end)
}

/// Rows for a masked rank would wait for nobody, or read what it wrote.
pub fn check_routes_to_a_masked_rank_are_refused<N: Network>(new: &dyn Fn() -> N) {
    let network = Arc::new(new());
    let scene = Arc::new(Scene::deep(43, 2));
    let astray = |epoch, me| {
        let mut view = scene.view(epoch, me);
        view.active[1 - me.index()] = false;
        view
    };
    let refused = network.join(astray(Epoch(1), Rank(0))).err();
    assert!(matches!(refused, Some(ExchangeError::Join { .. })), "{refused:?}");
    let mut ends = join(&network, &scene, Epoch(2));
    for (rank, end) in &mut ends {
        let refused = end.reconfigure(astray(Epoch(3), *rank), Duration::from_secs(1));
        assert!(matches!(refused, Err(ExchangeError::Join { .. })), "{refused:?}");
        assert_eq!(end.view().epoch, Epoch(2), "the old view stays");
    }
    well(ends, &scene, 1);
}
