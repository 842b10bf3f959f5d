//! What can happen, by who has to deal with it.

use crate::coordinator::Dismissal;
use crate::net::Time;
use crate::router::Answer;
use crate::store::Written;
use crate::worker::{Piece, Seat, StepOrder};
use control::Hello;
use ids::{Epoch, Rank, SeqId, WorkerId};
use placement::View;
use std::sync::Arc;

/// What comes next for somebody.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    Worker(u32, Task),
    Control(Call),
    Router(Message),
    Outside(Outside),
}

/// For a worker's process.
#[derive(Debug, Clone)]
pub(crate) enum Task {
    /// Its registration stream shows that it lives.
    Beat,
    Prepare {
        seat: Seat,
        asked: Asked,
    },
    /// Its experts are there, since then; whether the other members are is another matter.
    Loaded {
        seat: Seat,
        asked: Asked,
        since: Time,
    },
    Dismissed {
        why: Dismissal,
    },
    Step {
        order: StepOrder,
    },
    /// All ranks may be there.
    Meet {
        step: u64,
    },
    Computed {
        session: u64,
        step: u64,
    },
    Late {
        session: u64,
        step: u64,
    },
    /// Rows arrive for a copy that it keeps.
    Keep {
        piece: Piece,
    },
}

/// For a coordinator, or for its store.
#[derive(Debug, Clone)]
pub(crate) enum Call {
    Hello {
        process: u32,
        hello: Box<Hello>,
    },
    /// A process has ended, and its connections with it.
    Gone {
        process: u32,
    },
    /// It looks who is silent.
    Watch {
        leader: u32,
    },
    Wake {
        leader: u32,
    },
    Elect,
    Prepared {
        asked: Asked,
        unreached: Vec<Rank>,
    },
    /// A worker does not obey this leader any more.
    Disobeyed {
        asked: Asked,
    },
    /// Pings are due while a worker prepares.
    Ping {
        asked: Asked,
    },
    Write {
        leader: u32,
        expected: u64,
        view: Arc<View>,
    },
    Written {
        leader: u32,
        epoch: Epoch,
        written: Written,
    },
    Fault {
        epoch: Epoch,
        suspects: Vec<Rank>,
    },
    FirstToken {
        epoch: Epoch,
    },
}

/// For the router.
#[derive(Debug, Clone)]
pub(crate) enum Message {
    /// It asks the coordinator for the view.
    Look,
    News {
        view: Arc<View>,
    },
    Opened {
        session: u64,
    },
    /// A member cannot be reached.
    Refused {
        session: u64,
    },
    Answered {
        answer: Answer,
    },
    Timer {
        tag: u64,
    },
    Submit,
    Cancel {
        sequence: SeqId,
    },
}

/// For the world itself.
#[derive(Debug, Clone)]
pub(crate) enum Outside {
    StoreWell,
    Fault,
    Kill,
    /// A process goes on, unless it was frozen again meanwhile.
    Thaw {
        process: u32,
    },
}

/// A call of `Prepare`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Asked {
    pub(crate) leader: u32,
    pub(crate) epoch: Epoch,
    pub(crate) worker: WorkerId,
    pub(crate) process: u32,
}

/// One line of a failure's trace.
pub(crate) fn text(event: &Event) -> String {
    match event {
        Event::Worker(process, task) => format!("p{process} {}", text_of_task(task)),
        Event::Control(call) => text_of_call(call),
        Event::Router(Message::News { view }) => format!("router hears of {}", members(view)),
        Event::Router(Message::Answered { answer }) => {
            let Answer { rank, step, epoch, result, .. } = answer;
            format!("{rank} answers step {step} of n{epoch}: {}", result.is_ok())
        }
        Event::Router(message) => format!("router: {message:?}"),
        Event::Outside(outside) => format!("{outside:?}"),
    }
}

fn text_of_task(task: &Task) -> String {
    match task {
        Task::Prepare { seat, asked } => {
            format!("prepares {} for leader {}", members(&seat.view), asked.leader)
        }
        Task::Loaded { seat, .. } => format!("loaded {}", seat.view.epoch),
        Task::Step { order } => format!("gets step {} of n{}", order.step, order.epoch),
        Task::Beat
        | Task::Dismissed { .. }
        | Task::Meet { .. }
        | Task::Computed { .. }
        | Task::Keep { .. }
        | Task::Late { .. } => format!("{task:?}"),
    }
}

fn text_of_call(call: &Call) -> String {
    match call {
        Call::Hello { process, .. } => format!("hello of p{process}"),
        Call::Write { leader, view, .. } => format!("leader {leader} writes {}", members(view)),
        Call::Written { leader, epoch, written } => {
            let what = match written {
                Written::Stands(_) => "stands",
                Written::Foreign { .. } => "is overtaken",
                Written::Fenced => "is fenced",
                Written::Unknown => "may stand",
            };
            format!("{epoch} of leader {leader} {what}")
        }
        Call::Gone { .. }
        | Call::Watch { .. }
        | Call::Wake { .. }
        | Call::Elect
        | Call::Prepared { .. }
        | Call::Disobeyed { .. }
        | Call::Ping { .. }
        | Call::Fault { .. }
        | Call::FirstToken { .. } => format!("{call:?}"),
    }
}

fn members(view: &View) -> String {
    let members: Vec<String> = view.members.iter().map(|m| m.pid.to_string()).collect();
    format!("{}[{}]", view.epoch, members.join(" "))
}
