//! Why and how the view changed: the history that an operator reads.

use ids::{Epoch, Rank, WorkerId};
use std::fmt;
use std::time::Duration;

/// Why a view is replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// The first view.
    Start,
    Joined(WorkerId),
    /// An operator wants it to leave.
    Drained(WorkerId),
    /// An operator wants this many workers.
    Scaled {
        workers: u16,
    },
    /// The load of the experts has shifted.
    Rebalance,
    /// Copies of experts were lost, or a member holds none.
    Repair,
    Lost {
        worker: WorkerId,
        evidence: String,
    },
    /// A step failed and nobody is known to be gone: the same members try again.
    Fault {
        text: String,
        suspects: Vec<Rank>,
    },
    /// Another coordinator's view stood in the store.
    Superseded,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start => f.write_str("start"),
            Self::Joined(worker) => write!(f, "{worker} joined"),
            Self::Drained(worker) => write!(f, "{worker} drained"),
            Self::Scaled { workers } => write!(f, "scaled to {workers}"),
            Self::Rebalance => f.write_str("rebalance"),
            Self::Repair => f.write_str("repair"),
            Self::Lost { worker, evidence } => write!(f, "{worker} lost: {evidence}"),
            Self::Fault { text, suspects } => {
                write!(f, "step failed: {text}; suspects {suspects:?}")
            }
            Self::Superseded => f.write_str("another coordinator wrote a view"),
        }
    }
}

/// One view change, with the time each part took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub epoch: Epoch,
    pub cause: Cause,
    /// When it was decided, since the coordinator's start.
    pub at: Duration,
    /// Copies of experts that workers must load for it.
    pub loads: usize,
    /// How long what is wrong went unseen; unknown if it showed by a broken connection, at once.
    pub detect: Option<Duration>,
    /// Computing the placement.
    pub plan: Option<Duration>,
    /// Until all members were prepared.
    pub prepare: Option<Duration>,
    /// Until the store held the view.
    pub commit: Option<Duration>,
    /// Why it came to nothing, if it did: the view before it serves on.
    pub given_up: Option<String>,
    /// From the decision until a router committed the first step.
    pub first_token: Option<Duration>,
}

impl Change {
    pub(crate) fn new(epoch: Epoch, cause: Cause, at: Duration, loads: usize) -> Self {
        Self {
            epoch,
            cause,
            at,
            loads,
            detect: None,
            plan: None,
            prepare: None,
            commit: None,
            given_up: None,
            first_token: None,
        }
    }
}
