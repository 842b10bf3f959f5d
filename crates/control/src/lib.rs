//! The coordinator's decisions: who is a member, which view comes next, and when it counts.
//!
//! A pure machine: the shell feeds it [`Input`]s and carries out its [`Output`]s. It never waits, has
//! no clock of its own (`now` counts from the shell's start) and talks to nobody.
//!
//! ```text
//!              all expected workers here,
//!              or assemble_max passed          all prepared              stored
//! Assembling ─────────────────────────▶ Preparing ───────▶ Committing ─────────▶ Serving
//!      ▲                                 │      ▲ ▲            │                    │
//!      └───────── nobody is left ────────┘      │ └─ superseded┘                    │
//!                                               └── lost, joined or faulty step ────┘
//! ```
//!
//! A new leader starts in `Adopting`: the view that stands in the store goes on as it is once its
//! members have registered again. A step that fails for want of some, the smaller part, shows that waiting for
//! those is in vain.
//!
//! A view is tried under a new epoch each time, so what belongs to an abandoned attempt is known by
//! its epoch and changes nothing. Preparing is also how a suspect is confirmed: whoever fails to
//! prepare is no member any more, nor are those whom too few of the others reach.
//!
//! After a loss or a failed step the streams wait, so the next view makes nobody load what somebody
//! else still holds. The copies that it lacks are made by a later view, beside the serving one; whatever
//! goes wrong meanwhile ends that attempt, not the streams.
//!
//! A member that is drained serves on until a view without it counts, and is dismissed then. If all
//! who were to take over are lost meanwhile, it stays.

mod change;
mod follow;
mod leave;
mod machine;
mod plan;
mod reach;
mod repair;
mod silence;
mod status;
#[cfg(test)]
mod tests;

use ids::{Epoch, Rank, WorkerId};
use placement::{Aim, KvPools, Shape, Shares, View, Window};
use std::sync::Arc;
use std::time::Duration;

pub use change::{Cause, Change};
pub use machine::Control;
pub use status::{MemberState, MemberStatus, PhaseName, Status};

/// What an operator decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Workers that the first view waits for.
    pub workers_expected: u16,
    /// Longest wait for them, from the first registration on; then those present must do.
    pub assemble_max: Duration,
    /// How long a new leader waits for the members of the view that stands.
    pub adopt_max: Duration,
    /// Copies of every expert beyond the first, as far as there are ranks for them.
    pub redundancy: u16,
    /// Places per rank and layer for further copies, which level the load of hot experts.
    pub spare: u16,
    /// How long lost copies wait to be made again. A lost worker is often started again at once, and
    /// brings the places back.
    pub repair_after: Duration,
    /// Level the load that often, if it gains enough; `None`: only when an operator asks.
    pub rebalance_every: Option<Duration>,
}

/// How a worker introduces itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Random per process start.
    pub incarnation: String,
    /// `host:port` of its service.
    pub address: String,
    pub pid: u32,
    pub device: String,
    /// Numeric profile.
    pub profile: String,
    /// Fingerprint of the model's configuration.
    pub model: String,
    pub shape: Shape,
    /// Copies of experts per layer that its memory holds.
    pub places: usize,
    pub kv: KvPools,
    pub context_tokens: u32,
    /// `host:port` of its exchange between processes; empty if it exchanges within one only.
    pub exchange: String,
    /// The newest epoch it knows. Epochs do not go back, even if the store has lost its data.
    pub epoch: Epoch,
}

/// Ranks of which a router hears nothing, though it hears others, and for how long.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Silence {
    pub ranks: Vec<Rank>,
    pub lasted: Duration,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A worker wants to be a member.
    Hello(Hello),
    /// A worker is gone; the text says how that is known.
    Lost { worker: WorkerId, evidence: String },
    /// A worker can serve its rank of the view, if it reaches all others.
    Prepared { epoch: Epoch, worker: WorkerId, unreached: Vec<Rank> },
    /// It cannot, or did not answer.
    PrepareFailed { epoch: Epoch, worker: WorkerId, text: String },
    /// The store holds the view.
    Stored { epoch: Epoch },
    /// The store did not answer; the view may or may not stand there.
    StoreFailed { epoch: Epoch, text: String },
    /// The store holds somebody else's view with this epoch.
    Superseded { found: Epoch },
    /// A router saw a step of the epoch fail. Ranks it suspects are no more than a hint; those that are
    /// silent cannot serve it, whatever is wrong with them.
    Fault { epoch: Epoch, text: String, suspects: Vec<Rank>, silence: Silence },
    /// A router committed the first step of the epoch.
    FirstToken { epoch: Epoch },
    /// An operator wants a worker to leave without anybody noticing.
    Drain { worker: WorkerId },
    /// An operator wants this many workers.
    Scale { workers: u16 },
    /// What the experts had to do since the last such input.
    Load { window: Window },
    /// The same of the last moment, to be followed at once; it counts again in the window to come.
    Moment { window: Window },
    /// An operator wants the load level; answered with `Rebalanced`.
    Rebalance,
    /// [`Control::deadline`] has passed.
    Tick,
}

/// What levelling the load would do, or does. Loads are those of the fullest rank as a multiple of the
/// mean, averaged over the layers; 1 is level.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Levelling {
    /// A view change has begun.
    Begun { epoch: Epoch, before: f64, after: f64 },
    /// It would gain too little to make the streams wait.
    Level { before: f64, after: f64 },
    /// No tokens were counted yet.
    Unknown,
    /// Another view change is under way, or none serves.
    Busy,
}

/// Places for experts, per layer, that the members do not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lack {
    pub experts: usize,
    pub places: usize,
    pub workers: usize,
}

impl std::fmt::Display for Lack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { experts, places, workers } = self;
        write!(
            f,
            "the memory of {workers} workers holds {places} experts of each MoE layer, which has "
        )?;
        write!(f, "{experts}; start another worker, or give them more (--memory-mib)")
    }
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// The worker is a member under this id.
    Welcome { incarnation: String, worker: WorkerId },
    /// It cannot be one.
    Refuse { incarnation: String, reason: String },
    /// The worker cannot be drained.
    DrainRefused { worker: WorkerId, reason: String },
    /// These workers leave, and so many must be started by somebody else.
    Scaled { leaving: Vec<WorkerId>, missing: u16 },
    /// The number of workers cannot be changed now.
    ScaleRefused { reason: String },
    /// The answer to `Rebalance`.
    Rebalanced(Levelling),
    /// The members cannot hold the experts; more of them are waited for.
    Lacking(Lack),
    /// Ask a worker to prepare its rank of a view; answer with `Prepared` or `PrepareFailed`. If the aim
    /// is to survive, the view before it cannot go on.
    Prepare { worker: WorkerId, rank: Rank, view: Arc<View>, aim: Aim },
    /// The view of this epoch will never count; the one before it serves on.
    GivenUp { epoch: Epoch, reason: String },
    /// Write the view to the store; answer with `Stored`, `StoreFailed` or `Superseded`.
    Store { view: Arc<View> },
    /// Tell the routers.
    Publish { view: Arc<View> },
    /// Tell the members of the view what part of an expert's rows each of its copies shall have. It may get lost.
    Share { view: Arc<View>, shares: Shares },
    /// End a worker's membership; it may register again.
    Dismiss { worker: WorkerId, reason: String },
}
