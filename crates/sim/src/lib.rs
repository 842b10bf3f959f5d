//! The whole cluster in one thread, from one seed.
//!
//! The machines that decide are the real ones: `control`, `placement`, `scheduler`. Around them stand
//! small models of what acts: the coordinator's shell, the store, the network, the workers with their
//! exchange, and the router with its journal. Time is a number, and every delay, loss and death is
//! drawn from the seed; so a run that fails fails again, step by step.
//!
//! After every event the laws are checked: epochs rise, a view counts only once all its members are
//! prepared and every expert is where the view says, a step commits only if every rank of its epoch
//! took part, and no stream gets another token than it would get alone. When the faults stop, service
//! must return and every stream must end.
//!
//! A worker's KV memory holds the tokens themselves, and the next token is a hash of what the block
//! table finds there. So a wrong table, a lost token or a skipped step shows in the output.

mod coordinator;
mod faults;
mod law;
mod net;
mod rng;
mod router;
mod store;
#[cfg(test)]
mod tests;
mod worker;
mod world;

use std::fmt;
pub use world::Report;

/// A run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Everything that happens follows from it.
    pub seed: u64,
    /// Workers at the start.
    pub workers: u16,
    /// Events until the faults stop.
    pub steps: u64,
}

/// A law was broken, or service did not return.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub options: Options,
    /// The event at which it showed.
    pub step: u64,
    pub text: String,
    /// The last events before it.
    pub trace: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.trace {
            writeln!(f, "  {line}")?;
        }
        let Options { seed, workers, steps } = self.options;
        writeln!(f, "event {}: {}", self.step, self.text)?;
        write!(f, "replay: cargo xtask sim --seed {seed} --workers {workers} --steps {steps}")
    }
}

impl std::error::Error for Failure {}

/// Runs a cluster until its faults have stopped and all streams have ended.
///
/// # Errors
///
/// [`Failure`] if a law was broken on the way.
pub fn run(options: Options) -> Result<Report, Failure> {
    run_with(options, None)
}

/// A machine that panics has broken a law of its own.
fn run_with(options: Options, bug: Option<Bug>) -> Result<Report, Failure> {
    std::panic::catch_unwind(|| world::run(options, bug)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
        let text = format!("a machine panicked: {}", text.unwrap_or_default());
        Err(Failure { options, step: 0, text, trace: Vec::new() })
    })
}

/// Mistakes to plant, to see whether the laws find them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bug {
    /// The router takes any answer for the one it waits for, of whatever epoch and step.
    StaleAnswersCount,
    /// The coordinator takes the first prepared member for all.
    OneAnswerPreparesAll,
    /// The planner drops a replica that redundancy asks for.
    ReplicaDropped,
    /// Workers say that they are prepared without loading what they lack.
    NothingLoaded,
    /// Workers forget experts of the current view as soon as the next one lacks them.
    ForgottenEarly,
    /// Workers prepare views for whoever asks, also for a leader that was deposed.
    DeposedLeaderPrepares,
    /// The store takes every write, whoever writes it over whatever.
    UnguardedStore,
    /// The journal hands a sequence on without its outputs.
    OutputsForgotten,
    /// The scheduler believes that a new process holds what the old one at its rank held.
    MemoryAssumed,
    /// A step counts when most ranks have answered.
    MajorityCommits,
    /// Workers take rows of copies as they come, though some before them got lost.
    GapsIgnored,
}
