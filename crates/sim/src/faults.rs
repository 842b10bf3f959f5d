//! What goes wrong, and how often.

use crate::net::{MS, Time};
use crate::rng::Rng;
use crate::store::Mood;

/// One thing that happens to the cluster from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// As many processes at once.
    Kill {
        processes: u64,
    },
    /// A process stands still, and goes on afterwards as if nothing had been.
    Freeze {
        span: Time,
    },
    /// Messages of one direction wait that long.
    Cut {
        link: Link,
        span: Time,
    },
    /// Half of the workers and the others do not hear each other.
    Tear {
        span: Time,
    },
    Join,
    Drain,
    Rebalance,
    Store {
        mood: Mood,
        span: Time,
    },
    /// The coordinator's process ends, and another one leads after that long.
    Crash {
        span: Time,
    },
    /// Another coordinator is elected while the old one believes that it leads. A worker joins, of
    /// which only the new one hears, and another dies after that long: both may plan the same epoch.
    Depose {
        span: Time,
    },
}

/// Between which processes; the workers are drawn when it happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    RouterToWorker,
    WorkerToRouter,
    CoordinatorToWorker,
    WorkerToCoordinator,
    WorkerToWorker,
    CoordinatorToRouter,
    RouterToCoordinator,
}

const LINKS: [Link; 7] = [
    Link::RouterToWorker,
    Link::WorkerToRouter,
    Link::CoordinatorToWorker,
    Link::WorkerToCoordinator,
    Link::WorkerToWorker,
    Link::CoordinatorToRouter,
    Link::RouterToCoordinator,
];

/// Until the next fault: often several during one view change, sometimes none for a while.
pub(crate) fn gap(rng: &mut Rng) -> Time {
    match rng.below(4) {
        0 => rng.between(1, 20) * MS,
        1 => rng.between(20, 200) * MS,
        _ => rng.between(200, 1500) * MS,
    }
}

pub(crate) fn draw(rng: &mut Rng) -> Fault {
    let span = rng.between(10, 200) * MS * if rng.below(3) == 0 { 20 } else { 1 };
    match rng.below(21) {
        0..=2 => Fault::Kill { processes: 1 },
        3 => Fault::Kill { processes: rng.between(2, 4) },
        4..=6 => Fault::Freeze { span },
        7..=9 => {
            let link = rng.pick(&LINKS).unwrap_or(Link::WorkerToWorker);
            Fault::Cut { link, span }
        }
        10..=13 => Fault::Join,
        14 => Fault::Drain,
        15 => Fault::Rebalance,
        16 | 17 => {
            let mood = rng.pick(&[Mood::Slow, Mood::Away, Mood::Mute]).unwrap_or(Mood::Slow);
            Fault::Store { mood, span }
        }
        18 => Fault::Crash { span },
        19 => Fault::Tear { span },
        _ => Fault::Depose { span: rng.between(10, 900) * MS },
    }
}
