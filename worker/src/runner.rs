//! The worker's thread: it owns the engine and runs one step after the other.
//!
//! A prepared seat waits beside the thread until a step of its epoch comes; so a planned view change
//! costs a running epoch nothing, and the switch happens between two steps.

use crate::backups::{Backups, Keeper, Sender};
use crate::chaos::Hooks;
use crate::engine::{Engine, Seat};
use crate::error::EngineError;
use crate::fence::{Admitted, Fence, Outranked};
use crate::joined::{Haste, Transport};
use crate::tally::Tally;
use crate::weights::Model;
use crate::{Config, step};
use all2all::tcp::Peer;
use all2all::{Aborter, FaultKind, Reason};
use ids::{Epoch, StepId};
use kernels::StepBatch;
use placement::Shares;
use proto::pb;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tonic::Status;

/// Steps that wait for the thread. A router sends the next one after the answer, so more than a few
/// only pile up after it gave up on some.
const STEPS_MAX: usize = 16;

/// Prepared views that no step has come for. They share the experts they have in common.
const SEATS_MAX: usize = 4;

/// A step and where its answer goes.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) step: pb::Step,
    /// It arrived then; its deadline counts from here.
    pub(crate) received: Instant,
    pub(crate) answer: mpsc::Sender<Result<pb::StepResult, Status>>,
}

/// The service's end of the thread.
#[derive(Clone)]
pub(crate) struct Runner {
    jobs: mpsc::Sender<Job>,
    waiting: Waiting,
    fence: Arc<Fence>,
    ended: watch::Receiver<Option<String>>,
    transport: Transport,
    hooks: Hooks,
    tally: Arc<Tally>,
}

/// What the service and the thread share.
#[derive(Clone, Default)]
struct Waiting(Arc<Mutex<Seats>>);

#[derive(Default)]
struct Seats {
    /// Wait for a step of their epoch, each with its view's members. A router may still come to a view while the next
    /// one is prepared.
    next: BTreeMap<Epoch, (Seat, Vec<Neighbour>)>,
    /// The view that is served.
    current: Option<Current>,
    /// How the copies of experts shall share rows from the next step of this epoch on.
    shares: Option<(Epoch, Shares)>,
}

impl Seats {
    /// The newest of the newest epoch that is spoken of counts: a view that is served no more needs none.
    fn share(&mut self, epoch: Epoch, shares: Shares) {
        if self.shares.as_ref().is_none_or(|(known, _)| *known <= epoch) {
            self.shares = Some((epoch, shares));
        }
    }

    /// What a step of this epoch has to begin with, once. Shares of a coming view wait for it.
    fn take_shares(&mut self, epoch: Epoch) -> Option<Shares> {
        let due = self.shares.take_if(|(of, _)| *of <= epoch);
        due.filter(|(of, _)| *of == epoch).map(|(_, shares)| shares)
    }
}

struct Current {
    epoch: Epoch,
    members: Vec<Neighbour>,
    aborter: Aborter,
}

/// A member of a view, to the others.
#[derive(Debug, Clone)]
pub(crate) struct Neighbour {
    pub(crate) incarnation: String,
    /// `host:port` of its service.
    pub(crate) address: String,
}

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, Seats> {
        // Seats are put and taken whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Runner {
    pub(crate) fn jobs(&self) -> mpsc::Sender<Job> {
        self.jobs.clone()
    }

    /// Ends the step of the view that is served if a coming view lacks one of its members: nobody
    /// has to wait for the deadline of a step that a lost worker will never finish.
    pub(crate) fn abort_without(&self, incarnations: &[String]) {
        let seats = self.waiting.lock();
        let Some(current) = &seats.current else { return };
        if current.members.iter().any(|member| !incarnations.contains(&member.incarnation)) {
            current.aborter.abort(current.epoch, Reason::ViewChange);
        }
    }

    /// Begins to connect to the members of a coming view.
    pub(crate) fn connect(&self, epoch: Epoch, peers: &[Peer]) {
        self.transport.prepare(epoch, peers);
    }

    /// Which of them are not reached within a while.
    pub(crate) fn unreached(&self, peers: &[Peer], haste: Haste) -> Vec<Peer> {
        self.transport.unreached(peers, haste)
    }

    /// Ranks of the view that is served of which nothing is heard.
    pub(crate) fn unheard(&self) -> Vec<u32> {
        let seats = self.waiting.lock();
        let members = seats.current.iter().flat_map(|current| &current.members);
        let is_unheard =
            |(_, member): &(u32, &Neighbour)| !self.transport.reaches(&member.incarnation);
        (0..).zip(members).filter(is_unheard).map(|(rank, _)| rank).collect()
    }

    /// The copies of experts shall share rows like this in the view of this epoch, whether it serves already or not.
    pub(crate) fn share(&self, epoch: Epoch, shares: Shares) {
        self.waiting.lock().share(epoch, shares);
    }

    /// Offers a seat in the view of these members.
    pub(crate) fn offer(&self, seat: Seat, members: Vec<Neighbour>) {
        let unwanted = self.put_aside(seat, members);
        // A GPU takes its time to free memory: not on the runtime's threads.
        tokio::task::spawn_blocking(move || drop(unwanted));
    }

    /// Returns the seats that nobody will take.
    fn put_aside(&self, seat: Seat, members: Vec<Neighbour>) -> Vec<Seat> {
        let mut seats = self.waiting.lock();
        if seats.current.as_ref().is_some_and(|current| seat.epoch() <= current.epoch) {
            // It is served already: asked for again by a leader that did not hear the answer.
            return vec![seat];
        }
        let mut unwanted = Vec::new();
        let replaced = seats.next.insert(seat.epoch(), (seat, members));
        unwanted.extend(replaced.map(|(seat, _)| seat));
        while SEATS_MAX < seats.next.len() {
            unwanted.extend(seats.next.pop_first().map(|(_, (seat, _))| seat));
        }
        unwanted
    }

    /// Whether a step that has just arrived may go on; who leads if not. What an earlier router left
    /// running is aborted: nobody waits for its answer, and the new router would wait for its deadline.
    pub(crate) fn admit(&self, step: &pb::Step) -> Result<(), Outranked> {
        match self.fence.arrive(step.router_term) {
            Ok(Admitted::Quietly) => Ok(()),
            Ok(Admitted::OverRunning) => {
                let seats = self.waiting.lock();
                if let Some(current) = &seats.current {
                    current.aborter.abort(current.epoch, Reason::ViewChange);
                }
                Ok(())
            }
            Err(outranked) => Err(outranked),
        }
    }

    /// The router has come to this epoch: whatever it asked for under an earlier one is void.
    pub(crate) fn supersede(&self, epoch: Epoch) {
        let seats = self.waiting.lock();
        if let Some(current) = seats.current.as_ref().filter(|current| current.epoch < epoch) {
            current.aborter.abort(current.epoch, Reason::ViewChange);
        }
    }

    /// Where faults for the thread are armed.
    pub(crate) fn hooks(&self) -> &Hooks {
        &self.hooks
    }

    /// Whether a frame that changes on its way is noticed.
    pub(crate) fn sums(&self) -> bool {
        self.transport.sums()
    }

    /// What the experts have to do.
    pub(crate) fn tally(&self) -> Arc<Tally> {
        Arc::clone(&self.tally)
    }

    /// Why the thread has ended, once it has.
    pub(crate) fn ended(&self) -> watch::Receiver<Option<String>> {
        self.ended.clone()
    }
}

/// Waits for the thread's end; why it ended.
pub(crate) async fn end(ended: &mut watch::Receiver<Option<String>>) -> String {
    match ended.wait_for(Option::is_some).await {
        Ok(reason) => reason.clone().unwrap_or_default(),
        Err(_) => "its thread is gone".into(),
    }
}

/// Starts the thread; returns when the dense weights are loaded.
pub(crate) async fn start(
    config: &Config,
    transport: Transport,
    backups: Option<Backups>,
) -> Result<Runner, EngineError> {
    let (jobs, inbox) = mpsc::channel(STEPS_MAX);
    let (tell_ready, ready) = oneshot::channel();
    let (tell_end, ended) = watch::channel(None);
    let waiting = Waiting::default();
    let seats = waiting.clone();
    let fence = Arc::new(Fence::default());
    let thread_fence = Arc::clone(&fence);
    let model = Arc::clone(&config.model);
    let platform = model.platform.clone();
    let (connecting, hooks) = (transport.clone(), Hooks::default());
    let armed = hooks.clone();
    let (threads, kv) = (config.threads, config.kv);
    let runtime = tokio::runtime::Handle::current();
    let keeper = backups.map(|backups| Keeper::new(backups, Sender::new(runtime)));
    let body = move || match Engine::unseated(&model, transport, threads, kv) {
        Ok(mut engine) => {
            engine.hook(armed);
            // Nobody waits any more if the start was given up.
            let _given_up = tell_ready.send(Ok(engine.tally()));
            run((Rank { engine, keeper }, &model), (&seats, &thread_fence), inbox)
        }
        Err(error) => {
            let _given_up = tell_ready.send(Err(error));
            "it did not start".to_owned()
        }
    };
    let guarded = move || {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        let reason = match result {
            Ok(reason) => reason,
            // What a device leaves behind that has failed may trip the host.
            Err(panic) => platform
                .failure()
                .unwrap_or_else(|| format!("its thread panicked: {}", panic_text(&*panic))),
        };
        tell_end.send_replace(Some(reason));
    };
    std::thread::Builder::new()
        .name("worker".into())
        .spawn(guarded)
        .map_err(|error| EngineError::Io(format!("cannot start the worker's thread: {error}")))?;
    let gone = |_| EngineError::Io("the worker's thread ended while it started".into());
    let tally = ready.await.map_err(gone)??;
    Ok(Runner { jobs, waiting, fence, ended, transport: connecting, hooks, tally })
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text")
}

/// What the thread owns.
struct Rank {
    engine: Engine,
    /// Of copies of other ranks' KV rows, if it keeps any.
    keeper: Option<Keeper>,
}

/// Runs steps until nobody can ask for more, or the device fails; which of them.
fn run(
    (mut rank, model): (Rank, &Model),
    (waiting, fence): (&Waiting, &Fence),
    mut inbox: mpsc::Receiver<Job>,
) -> String {
    let mut batch = StepBatch::default();
    while let Some(job) = inbox.blocking_recv() {
        if job.answer.is_closed() {
            // The router has left; its step would only hold up the next one's.
            continue;
        }
        let result = match fence.begin(job.step.router_term) {
            Ok(()) => execute(&mut rank, waiting, &mut batch, &job),
            Err(outranked) => refusal(&job.step, outranked),
        };
        fence.end();
        let has_ended_well = result.fault.is_empty();
        // A router that left meanwhile plans its steps again.
        let _left = job.answer.blocking_send(Ok(result));
        if let Some(keeper) = rank.keeper.as_mut().filter(|_| has_ended_well) {
            keeper.send(&mut rank.engine, &job.step);
        }
        if let Some(failure) = model.platform.failure() {
            return failure;
        }
    }
    "its service has ended".to_owned()
}

/// The answer to a step of a router that leads no more.
pub(crate) fn refusal(step: &pb::Step, Outranked { term }: Outranked) -> pb::StepResult {
    pb::StepResult {
        epoch: step.epoch,
        step: step.step,
        fault: format!("another router leads since term {term}"),
        router_term: term,
        ..Default::default()
    }
}

/// Runs one step; whatever is wrong is said in the result.
fn execute(rank: &mut Rank, waiting: &Waiting, batch: &mut StepBatch, job: &Job) -> pb::StepResult {
    let wire = &job.step;
    let started = Instant::now();
    let mut result = pb::StepResult { epoch: wire.epoch, step: wire.step, ..Default::default() };
    match attempt(rank, waiting, batch, job) {
        Ok((number, sampled)) => {
            result.rank = number;
            result.sampled = sampled;
            result.held = rank.keeper.as_ref().map_or_else(Vec::new, Keeper::take_news);
        }
        Err(error) => {
            tracing::debug!(epoch = wire.epoch, step = wire.step, %error, "step failed");
            result.suspects = suspects(&error);
            result.echo = is_echo(&error);
            result.not_finite = not_finite(&error, batch, wire);
            result.fault = error.to_string();
            if let EngineError::Missing(sequences) = error {
                result.missing = sequences;
            }
        }
    }
    result.busy_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    result
}

fn attempt(
    Rank { engine, keeper }: &mut Rank,
    waiting: &Waiting,
    batch: &mut StepBatch,
    job: &Job,
) -> Result<(u32, Vec<pb::Sampled>), EngineError> {
    let wire = &job.step;
    let epoch = Epoch(wire.epoch);
    let (next, unwanted) = {
        let mut seats = waiting.lock();
        // Seats of earlier epochs will never be taken.
        let later = seats.next.split_off(&epoch);
        let unwanted = std::mem::replace(&mut seats.next, later);
        (seats.next.remove(&epoch), unwanted)
    };
    drop(unwanted);
    if let Some((seat, members)) = next {
        tracing::info!(%epoch, "takes its seat");
        engine.take(seat)?;
        let aborter = engine.aborter();
        if let Some(keeper) = keeper {
            keeper.sit_among(members.iter().map(|member| member.address.clone()).collect());
        }
        let current = aborter.map(|aborter| Current { epoch, members, aborter });
        waiting.lock().current = current;
    }
    if engine.epoch() != Some(epoch) {
        return Err(EngineError::Epoch { got: epoch, serving: engine.epoch() });
    }
    let shares = waiting.lock().take_shares(epoch);
    if let Some(shares) = shares
        && let Err(error) = engine.share(&shares)
    {
        // The step does not need them.
        tracing::warn!(%epoch, %error, "shares are not taken");
    }
    step::fill(batch, wire);
    let deadline = job.received + Duration::from_millis(u64::from(wire.deadline_ms));
    let restored = match keeper {
        Some(keeper) => keeper.restore(engine, wire),
        None => no_copies(wire),
    };
    if let Err(error) = restored {
        engine.abandon(StepId(wire.step), deadline);
        return Err(error);
    }
    let sampled = engine.step(StepId(wire.step), batch, deadline, None)?;
    Ok((u32::from(engine.rank().0), step::sampled(wire, sampled)))
}

/// Whether a step does without copies, where there are none.
fn no_copies(step: &pb::Step) -> Result<(), EngineError> {
    let restored = step.slices.iter().filter(|slice| slice.restored != 0);
    let missing: Vec<u64> = restored.map(|slice| slice.sequence).collect();
    if missing.is_empty() { Ok(()) } else { Err(EngineError::Missing(missing)) }
}

/// Whether another rank knows better what went wrong.
fn is_echo(error: &EngineError) -> bool {
    error.fault().is_some_and(|fault| fault.kind == FaultKind::Aborted(Reason::PeerFaulted))
}

/// The sequence in whose rows a value is not finite.
fn not_finite(error: &EngineError, batch: &StepBatch, step: &pb::Step) -> Option<u64> {
    let EngineError::NonFinite(found) = error else { return None };
    let row = batch.rows.get(found.row)?;
    step.slices.get(usize::try_from(row.table).ok()?).map(|slice| slice.sequence)
}

/// The ranks that the exchange waited for in vain. A value that is not finite may be the doing of the
/// request, and accuses nobody.
fn suspects(error: &EngineError) -> Vec<u32> {
    error.fault().map_or_else(Vec::new, |fault| {
        fault.suspects.iter().map(|rank| u32::from(rank.0)).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(part: f32) -> Shares {
        Shares::new(vec![vec![vec![part, 1.0 - part]]]).unwrap()
    }

    #[test]
    fn copies_where_there_are_none_are_missing() {
        let slice = |sequence, restored| pb::Slice { sequence, restored, ..Default::default() };
        let step = |slices| pb::Step { slices, ..Default::default() };
        assert!(no_copies(&step(vec![slice(1, 0)])).is_ok());
        let error = no_copies(&step(vec![slice(1, 0), slice(2, 9), slice(3, 1)])).unwrap_err();
        assert!(matches!(error, EngineError::Missing(missing) if missing == [2, 3]));
    }

    #[test]
    fn shares_are_taken_once_in_their_epoch_and_the_newest_count() {
        let mut seats = Seats::default();
        assert_eq!(seats.take_shares(Epoch(3)), None);
        seats.share(Epoch(3), shares(0.5));
        seats.share(Epoch(3), shares(0.25));
        seats.share(Epoch(2), shares(0.75));
        assert_eq!(seats.take_shares(Epoch(2)), None, "they wait for their view");
        assert_eq!(seats.take_shares(Epoch(3)), Some(shares(0.25)));
        assert_eq!(seats.take_shares(Epoch(3)), None);
        seats.share(Epoch(3), shares(0.5));
        assert_eq!(seats.take_shares(Epoch(4)), None, "their view is over");
        seats.share(Epoch(4), shares(0.125));
        assert_eq!(seats.take_shares(Epoch(4)), Some(shares(0.125)));
    }
}
