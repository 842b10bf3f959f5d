//! Why a step did not complete.

use ids::{Epoch, Rank};
use std::fmt;

/// Which half of a layer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Phase {
    Dispatch,
    Combine,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dispatch => "dispatch",
            Self::Combine => "combine",
        })
    }
}

/// Who asked for an abort, and why.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// A peer's step has failed and it says so.
    PeerFaulted,
    /// The step was left in the middle.
    Abandoned,
    /// The control plane moves to another view.
    ViewChange,
}

/// What went wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultKind {
    /// The step's deadline passed.
    Deadline,
    /// A peer is gone.
    PeerClosed,
    /// A peer sent what does not belong to this step.
    Corrupt,
    /// The step was stopped.
    Aborted(Reason),
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Deadline => f.write_str("the step's deadline passed"),
            Self::PeerClosed => f.write_str("a peer is gone"),
            Self::Corrupt => {
                f.write_str("a peer sent rows of another step, or they changed on their way")
            }
            Self::Aborted(reason) => write!(f, "aborted ({reason:?})"),
        }
    }
}

/// A failed step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    pub kind: FaultKind,
    /// Evidence, not a verdict: the ranks that were waited for in vain.
    pub suspects: Vec<Rank>,
    /// MoE layer and half in which it was seen.
    pub layer: u16,
    pub phase: Phase,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, suspects, layer, phase } = self;
        write!(f, "{kind} in {phase} of MoE layer {layer}, suspects {suspects:?}")
    }
}

/// Why a call was refused or a step has failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ExchangeError {
    /// The call belongs to an epoch that is over.
    #[error("{got} is over, the exchange serves {current}")]
    StaleEpoch { got: Epoch, current: Epoch },
    /// The call belongs to an epoch that has not been prepared here.
    #[error("{got} is not prepared, the exchange serves {current}")]
    NotReady { got: Epoch, current: Epoch },
    /// A step of this epoch has failed; only the next view helps.
    #[error("{epoch} has a failed step")]
    Poisoned { epoch: Epoch },
    /// This rank is already taken in this epoch, or the members disagree on its size.
    #[error("{rank} cannot join {epoch}: {reason}")]
    Join { rank: Rank, epoch: Epoch, reason: &'static str },
    /// The step has failed.
    #[error("{0}")]
    Faulted(Fault),
}
