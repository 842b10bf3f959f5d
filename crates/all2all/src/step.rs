//! Where the open step of an end stands, and which call may come next.
//!
//! ```text
//!           begin_step                 dispatch_send ... combine_recv
//!   idle ───────────────▶ step, between layers ◀──────▶ step, in a layer
//!    ▲                          │                             │
//!    └──────── end_step ────────┘                             │  end_step, begin_step
//!   any of them ── fault, abort, call out of order ──▶ faulted ◀┘  (until reconfigure)
//! ```

use crate::LayerKey;
use crate::error::{Fault, Phase};
use ids::StepId;
use std::time::Instant;

pub(crate) enum State {
    Idle,
    Step(Step),
    /// A fault stays until the next view.
    Faulted(Fault),
}

/// The step that is open.
#[derive(Clone, Copy)]
pub(crate) struct Step {
    pub(crate) id: StepId,
    pub(crate) deadline: Instant,
    pub(crate) at: At,
}

/// Where a step stands.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum At {
    /// After so many MoE layers, or rather after this one.
    Between(u16),
    Layer(u16, Phase),
}

/// Why a call cannot go on.
pub(crate) enum Halt {
    /// The step has failed before.
    Faulted(Fault),
    /// The call is out of order, so the step is abandoned in this layer and half.
    Abandoned((u16, Phase)),
}

impl Step {
    pub(crate) fn place(&self) -> (u16, Phase) {
        match self.at {
            At::Between(layer) => (layer, Phase::Combine),
            At::Layer(layer, phase) => (layer, phase),
        }
    }
}

impl State {
    /// The step that is open and stands where a call belongs: at `at`, or between layers.
    pub(crate) fn running(&self, key: LayerKey, at: Option<At>) -> Result<Step, Halt> {
        match self {
            Self::Faulted(fault) => Err(Halt::Faulted(fault.clone())),
            Self::Step(step)
                if step.id == key.step
                    && at.map_or(matches!(step.at, At::Between(_)), |at| at == step.at) =>
            {
                Ok(*step)
            }
            Self::Step(step) => Err(Halt::Abandoned(step.place())),
            Self::Idle => Err(Halt::Abandoned((key.layer, Phase::Dispatch))),
        }
    }
}
