//! Faults that a worker inflicts on itself, at an exact place of a step.
//!
//! A process that was started with `--allow-chaos` takes them by gRPC ([`Chaos::Allowed`]). They strike
//! through [`Struck`], a wrapper around the exchange, so that neither the engine nor the transports know
//! of them. While nothing is armed, a place costs one relaxed read.

use crate::plantable::Plantable;
use all2all::{
    Aborter, AllToAll, Arrived, ExchangeError, LayerKey, Pending, Routes, Sent, StepOutcome, View,
};
use ids::{Epoch, StepId};
use kernels::Dtype;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Faults that wait at once; a scenario arms a handful.
const ARMED_MAX: usize = 64;

/// Whether a worker lets others inflict faults on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chaos {
    Refused,
    Allowed,
}

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The process ends, there and then.
    Kill,
    /// The worker's thread stands still once; the process answers pings meanwhile.
    Pause(Duration),
    /// The same in every step until then.
    Slow { by: Duration, until: Instant },
    /// A bit of a frame to another rank changes behind its checksum.
    Corrupt,
    /// A value of an expert's result is not a number: once, or in every step until then.
    Nan { until: Option<Instant> },
}

/// A place within a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Before the rows are sent.
    Dispatch,
    /// The rows are here, before the experts run.
    Experts,
    /// Before the results are sent back.
    Combine,
}

/// From which step on; steps are counted from the arming, or are the router's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum From {
    Offset(u64),
    Step(u64),
}

/// A fault and where it strikes. `None`: anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    pub(crate) from: From,
    pub(crate) layer: Option<u16>,
    pub(crate) phase: Option<Phase>,
}

struct Armed {
    fault: Fault,
    /// Steps that have begun since it was armed.
    steps: u64,
}

/// The faults that are armed; shared by the service and the worker's thread.
#[derive(Clone, Default)]
pub(crate) struct Hooks(Arc<Shared>);

#[derive(Default)]
struct Shared {
    armed: AtomicBool,
    faults: Mutex<Vec<Armed>>,
}

/// What a place asks for.
#[derive(Default, Debug, PartialEq, Eq)]
struct Strikes {
    kill: bool,
    sleep: Duration,
    corrupt: Option<Fault>,
    nan: bool,
}

impl Hooks {
    /// Arms a fault; false if too many wait.
    pub(crate) fn arm(&self, fault: Fault) -> bool {
        let mut faults = self.lock();
        if ARMED_MAX <= faults.len() {
            return false;
        }
        faults.push(Armed { fault, steps: 0 });
        self.0.armed.store(true, Ordering::Relaxed);
        true
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Armed>> {
        // Faults are put and taken whole.
        self.0.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_quiet(&self) -> bool {
        !self.0.armed.load(Ordering::Relaxed)
    }

    fn step_begins(&self) {
        if self.is_quiet() {
            return;
        }
        self.lock().iter_mut().for_each(|armed| armed.steps += 1);
    }

    /// What strikes at this place of a step. A fault in rows waits for some.
    fn at(&self, key: LayerKey, phase: Phase, rows: usize) -> Strikes {
        let mut strikes = Strikes::default();
        if self.is_quiet() {
            return strikes;
        }
        let now = Instant::now();
        let mut faults = self.lock();
        faults.retain(|armed| {
            let Fault { kind, from, layer, phase: place } = armed.fault;
            let is_due = match from {
                From::Offset(steps) => steps < armed.steps,
                From::Step(step) => step <= key.step.0,
            };
            let over = match kind {
                Kind::Slow { until, .. } => until <= now,
                Kind::Nan { until } => until.is_some_and(|until| until <= now),
                Kind::Kill | Kind::Pause(_) | Kind::Corrupt => false,
            };
            let here = is_due
                && layer.is_none_or(|layer| layer == key.layer)
                && place.is_none_or(|place| place == phase);
            if over || !here {
                return !over;
            }
            strikes.add(armed.fault, phase, rows)
        });
        self.0.armed.store(!faults.is_empty(), Ordering::Relaxed);
        strikes
    }
}

impl Strikes {
    /// Adds a fault; whether it stays armed.
    fn add(&mut self, fault: Fault, phase: Phase, rows: usize) -> bool {
        match fault.kind {
            Kind::Kill => {
                self.kill = true;
                false
            }
            Kind::Pause(time) => {
                self.sleep += time;
                false
            }
            Kind::Slow { by, .. } => {
                self.sleep += by;
                true
            }
            // Where the rows are lent to the exchange.
            Kind::Corrupt if phase != Phase::Experts && 0 < rows => {
                self.corrupt = Some(fault);
                false
            }
            // The results exist when they are sent back.
            Kind::Nan { until } if phase == Phase::Combine && 0 < rows => {
                self.nan = true;
                until.is_some()
            }
            Kind::Corrupt | Kind::Nan { .. } => true,
        }
    }
}

/// An exchange with the armed faults around it.
pub(crate) struct Struck<'a, A> {
    inner: &'a mut A,
    hooks: &'a Hooks,
    dtype: Dtype,
    key: LayerKey,
    /// Struck, if the place has a frame for another rank.
    corrupting: Option<Fault>,
}

impl<'a, A: Plantable> Struck<'a, A> {
    pub(crate) fn new(inner: &'a mut A, hooks: &'a Hooks, dtype: Dtype) -> Self {
        let key = LayerKey { step: StepId(0), layer: 0 };
        Self { inner, hooks, dtype, key, corrupting: None }
    }

    /// Lets happen what is armed for this place; whether the results lose a value.
    fn strike(&mut self, phase: Phase, rows: usize) -> bool {
        let Strikes { kill, sleep, corrupt, nan } = self.hooks.at(self.key, phase, rows);
        if kill {
            // Like SIGKILL: nothing is unwound, no connection is said goodbye to.
            std::process::abort();
        }
        if !sleep.is_zero() {
            std::thread::sleep(sleep);
        }
        if corrupt.is_some() {
            self.inner.corrupt_next_frame();
            self.corrupting = corrupt;
        }
        nan
    }

    /// The rows of a place are sent. A frame that should have changed and was not there is waited for: all
    /// rows may have been this rank's own.
    fn sent<T>(&mut self, sent: Result<T, ExchangeError>) -> Result<T, ExchangeError> {
        if let Some(fault) = self.corrupting.take()
            && self.inner.keep_next_frame()
        {
            self.hooks.arm(Fault { from: From::Step(self.key.step.0), ..fault });
        }
        sent
    }
}

impl<A: Plantable> AllToAll for Struck<'_, A> {
    type Rows<'r> = A::Rows<'r>;
    type RowsMut<'r> = A::RowsMut<'r>;
    type Experts<'r> = A::Experts<'r>;
    type Offsets = A::Offsets;

    fn view(&self) -> &View {
        self.inner.view()
    }

    fn begin_step(
        &mut self,
        epoch: Epoch,
        step: StepId,
        deadline: Instant,
    ) -> Result<(), ExchangeError> {
        self.hooks.step_begins();
        self.inner.begin_step(epoch, step, deadline)
    }

    fn dispatch_send(
        &mut self,
        key: LayerKey,
        rows: A::Rows<'_>,
        experts: A::Experts<'_>,
    ) -> Result<Sent, ExchangeError> {
        self.key = key;
        self.strike(Phase::Dispatch, A::count(&rows));
        let sent = self.inner.dispatch_send(key, rows, experts);
        self.sent(sent)
    }

    fn dispatch_recv(&mut self, sent: Sent) -> Result<Arrived, ExchangeError> {
        let arrived = self.inner.dispatch_recv(sent)?;
        let rows = A::count(&self.inner.arrived(&arrived).0);
        self.strike(Phase::Experts, rows);
        Ok(arrived)
    }

    fn arrived(&self, arrived: &Arrived) -> (A::Rows<'_>, &A::Offsets) {
        self.inner.arrived(arrived)
    }

    fn combine_send(
        &mut self,
        arrived: Arrived,
        results: A::Rows<'_>,
    ) -> Result<Pending, ExchangeError> {
        // One result per row that has arrived.
        let rows = A::count(&self.inner.arrived(&arrived).0);
        let sent = if self.strike(Phase::Combine, rows) {
            self.inner.combine_send_spoilt(arrived, results, self.dtype)
        } else {
            self.inner.combine_send(arrived, results)
        };
        self.sent(sent)
    }

    fn combine_recv(&mut self, pending: Pending, out: A::RowsMut<'_>) -> Result<(), ExchangeError> {
        self.inner.combine_recv(pending, out)?;
        self.inner.spoil_results();
        Ok(())
    }

    fn end_step(&mut self) -> StepOutcome {
        self.inner.end_step()
    }

    fn aborter(&self) -> Aborter {
        self.inner.aborter()
    }

    fn reconfigure(&mut self, next: View, budget: Duration) -> Result<(), ExchangeError> {
        self.inner.reconfigure(next, budget)
    }

    fn reroute(&mut self, routes: Arc<Routes>) {
        self.inner.reroute(routes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: LayerKey = LayerKey { step: StepId(70), layer: 2 };

    fn armed(kind: Kind, from: From) -> Hooks {
        let hooks = Hooks::default();
        assert!(hooks.arm(Fault { kind, from, layer: Some(2), phase: Some(Phase::Combine) }));
        hooks
    }

    #[test]
    fn fault_strikes_once_in_its_step_layer_and_phase() {
        let hooks = armed(Kind::Kill, From::Offset(1));
        let strikes =
            |hooks: &Hooks, layer, phase| hooks.at(LayerKey { layer, ..KEY }, phase, 1).kill;
        hooks.step_begins();
        assert!(!strikes(&hooks, 2, Phase::Combine), "a step too early");
        hooks.step_begins();
        assert!(!strikes(&hooks, 1, Phase::Combine) && !strikes(&hooks, 2, Phase::Experts));
        assert!(strikes(&hooks, 2, Phase::Combine));
        assert!(!strikes(&hooks, 2, Phase::Combine), "only once");
        assert!(hooks.is_quiet());
    }

    #[test]
    fn step_may_be_the_routers_number() {
        let hooks = armed(Kind::Kill, From::Step(71));
        assert!(!hooks.at(KEY, Phase::Combine, 1).kill);
        assert!(hooks.at(LayerKey { step: StepId(71), ..KEY }, Phase::Combine, 1).kill);
    }

    #[test]
    fn slow_lasts_and_ends_and_row_faults_wait_for_rows() {
        let by = Duration::from_millis(3);
        let slow = |until| armed(Kind::Slow { by, until }, From::Step(0));
        let hooks = slow(Instant::now() + Duration::from_secs(60));
        for _ in 0..3 {
            assert_eq!(hooks.at(KEY, Phase::Combine, 0).sleep, by);
        }
        let hooks = slow(Instant::now());
        assert_eq!(hooks.at(KEY, Phase::Combine, 0), Strikes::default());
        assert!(hooks.is_quiet());

        let hooks = armed(Kind::Nan { until: None }, From::Step(0));
        let nan = |hooks: &Hooks, rows| hooks.at(KEY, Phase::Combine, rows).nan;
        assert!(!nan(&hooks, 0) && nan(&hooks, 1) && !nan(&hooks, 1), "once, and not without rows");
        let lasting = Kind::Nan { until: Some(Instant::now() + Duration::from_secs(60)) };
        let hooks = armed(lasting, From::Step(0));
        assert!(nan(&hooks, 1) && nan(&hooks, 1));
        assert!(!nan(&armed(Kind::Nan { until: Some(Instant::now()) }, From::Step(0)), 1));
    }

    #[test]
    fn armed_faults_have_a_limit() {
        let hooks = Hooks::default();
        let fault = Fault { kind: Kind::Corrupt, from: From::Offset(9), layer: None, phase: None };
        assert!((0..ARMED_MAX).all(|_| hooks.arm(fault)));
        assert!(!hooks.arm(fault));
    }
}
