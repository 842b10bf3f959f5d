//! The exchange between ranks that are processes, on one host or several.
//!
//! Every process has one [`Mesh`]: it listens, and keeps a data and a control connection to each peer, through
//! all epochs. A rank drives the data connections itself, inside the calls of the exchange: it never
//! blocks on one of them, so frames that are larger than what the connections hold cannot lock the ranks, and
//! the system's threads cannot get in its way. The control connections carry what must not wait behind
//! rows: that a step has failed, that a rank has left an epoch, and, by their end, that a process is gone.
//!
//! Rows are sent from where the caller has them and received where they belong; see [`lanes`]. Only what a
//! connection does not take at once is copied.
//!
//! Processes of one host share memory if they can ([`ring`]); the connections then only wake and tell. Many rows
//! are copied by their receiver right out of the sender's memory ([`direct`], [`arena`]).
//!
//! Anything that reaches the port and is not ours is closed. This keeps accidents away, not attackers:
//! frames are neither encrypted nor signed, so the port belongs in the cluster's own network.

mod arena;
mod direct;
mod frame;
mod inbound;
mod keeper;
mod lanes;
mod link;
mod mesh;
mod outbound;
mod pacing;
mod pipe;
mod ring;
mod runs;
mod socket;
mod wait;

pub use arena::Buffer;
pub use mesh::Mesh;

use crate::error::{ExchangeError, Fault, FaultKind, Phase, Reason};
use crate::step::{At, Halt, State, Step};
use crate::{
    Aborter, AllToAll, Arrived, HostRows, LayerKey, Pending, Routes, Sent, StepOutcome, View,
    active_ranks,
};
use frame::Head;
use ids::{Epoch, StepId};
use lanes::{Lane, Layer, Wire};
use mesh::Core;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use wait::{Blame, Goal};

/// Who a process is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// Processes of different clusters do not talk.
    pub cluster: String,
    /// This life of the process; a restart gets another one.
    pub incarnation: String,
    /// The machine, as a name that no other one has.
    pub host: String,
}

/// Where a member of a view is reached, and which life of it is meant.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    pub address: SocketAddr,
    pub incarnation: String,
}

/// What can be tuned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// A peer whose kernel does not answer for so long is gone, even between steps.
    pub unanswered: Duration,
    /// A peer of which nothing is heard for so long is cut off or frozen: [`Mesh::reaches`]. Processes give five
    /// signs of life in this time.
    pub silent: Duration,
    /// Share memory with processes of the same host, if that works.
    pub shared_memory: bool,
    /// Bytes that the system holds per connection and direction; `None` takes what has proved itself.
    pub buffer_bytes: Option<usize>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            unanswered: Duration::from_secs(10),
            silent: Duration::from_millis(500),
            shared_memory: true,
            buffer_bytes: None,
        }
    }
}

/// One rank's end of the exchange. Dropping it tells the peers that it is gone.
pub struct Tcp {
    core: Arc<Core>,
    view: View,
    state: State,
    /// `[ranks]`
    lanes: Vec<Lane>,
    layer: Layer,
    waiting: wait::Waiting,
    /// The next frame with rows gets a fault.
    corrupts: bool,
}

impl Tcp {
    fn new(core: Arc<Core>, view: View) -> Self {
        let waiting = wait::Waiting::new(&view);
        let lanes = (0..view.ranks).map(|_| Lane::default()).collect();
        let layer = Layer::new(core.arena.clone());
        let state = State::Idle;
        Self { core, view, state, lanes, layer, waiting, corrupts: false }
    }

    /// Frames of old epochs that came over the present connections and were dropped.
    #[must_use]
    pub fn dropped_frames(&self) -> u64 {
        self.lanes.iter().flat_map(|lane| &lane.wire).map(|wire| wire.inbound.dropped).sum()
    }

    /// As [`Mesh::buffer`].
    #[must_use]
    pub fn buffer(&self, bytes: usize) -> Buffer {
        Buffer::new(self.core.arena.as_ref(), bytes)
    }

    /// Plants a fault: a bit of the next frame that holds rows for another rank changes on its way, behind
    /// the sender's checksum. Frames in shared memory have none and are let alone.
    pub fn corrupt_next_frame(&mut self) {
        self.corrupts = true;
    }

    /// Takes the planted fault back; false if it has struck.
    pub fn keep_next_frame(&mut self) -> bool {
        std::mem::take(&mut self.corrupts)
    }

    /// Records the fault of the step and tells the peers, so that none waits for its deadline.
    fn fault(&mut self, (kind, suspects): Blame, (layer, phase): (u16, Phase)) -> Fault {
        self.core.tell_fault(self.view.epoch);
        let fault = Fault { kind, suspects, layer, phase };
        self.state = State::Faulted(fault.clone());
        fault
    }

    fn faulted(&mut self, blame: Blame, place: (u16, Phase)) -> ExchangeError {
        ExchangeError::Faulted(self.fault(blame, place))
    }

    /// The step that is open and stands where this call belongs; any other call abandons it.
    fn running(&mut self, key: LayerKey, at: Option<At>) -> Result<Step, ExchangeError> {
        self.state.running(key, at).map_err(|halt| match halt {
            Halt::Faulted(fault) => ExchangeError::Faulted(fault),
            Halt::Abandoned(place) => self.faulted(abandoned(), place),
        })
    }

    /// Notes where the open step stands.
    fn moved_to(&mut self, step: Step, at: At) {
        self.state = State::Step(Step { at, ..step });
    }

    /// Begins the frames of a phase to all peers, and awaits theirs.
    fn open_frames(&mut self, key: LayerKey, phase: Phase, sent: &[u8]) {
        let me = self.view.me;
        let row_bytes = u32::try_from(self.layer.row_bytes).expect("a row is short");
        for to in active_ranks(&self.view).filter(|rank| *rank != me) {
            let Lane { wire, own, own_slots, theirs } = &mut self.lanes[to.index()];
            let Some(wire) = wire else { unreachable!("connected before the first frame") };
            let (runs, rows) = match phase {
                Phase::Dispatch => (&*own, own_slots.len()),
                Phase::Combine => (&*theirs, wire.inbound.slots().map_or(0, <[u16]>::len)),
            };
            let rows = u32::try_from(rows).expect("a step has fewer than 2^32 rows");
            let (epoch, sequence) = (self.view.epoch, 0);
            let lent = 0;
            let head = Head { epoch, key, phase, from: me, to, rows, row_bytes, lent, sequence };
            let kept = self.layer.kept && phase == Phase::Combine;
            let sent = if kept { &self.layer.rows } else { sent };
            wire.outbound.begin(&wire.link.data, (head, own_slots), (sent, runs));
            if self.corrupts && 0 < head.rows_bytes() {
                self.corrupts = !wire.outbound.corrupt();
            }
            wire.outbound.reserve(runs);
            wire.inbound.expect(Head { from: to, to: me, ..head });
        }
    }

    /// Uses connections that have come up since; the rest is waited for.
    fn pick_up(&mut self) -> Result<bool, Blame> {
        let me = self.view.me;
        let mut all = true;
        for rank in active_ranks(&self.view).filter(|rank| *rank != me) {
            let lane = &mut self.lanes[rank.index()];
            if lane.wire.is_none() {
                let link = self.core.link(rank);
                let link = link.map_err(|mesh::Refused| (FaultKind::PeerClosed, vec![rank]))?;
                lane.wire = link.and_then(Wire::take);
                all &= lane.wire.is_some();
            }
        }
        Ok(all)
    }

    /// Leaves the connections to whoever uses them next.
    fn put_down(&mut self) {
        for lane in &mut self.lanes {
            if let Some(mut wire) = lane.wire.take() {
                if self.layer.kept {
                    wire.outbound.stage(&wire.link.data, (&self.layer.rows, &lane.theirs));
                }
                wire.give_back();
            }
        }
    }
}

fn abandoned() -> Blame {
    (FaultKind::Aborted(Reason::Abandoned), vec![])
}

impl AllToAll for Tcp {
    type Rows<'a> = HostRows<'a>;
    type RowsMut<'a> = &'a mut [u8];
    type Experts<'a> = &'a [u16];
    type Offsets = [u32];

    fn view(&self) -> &View {
        &self.view
    }

    fn begin_step(
        &mut self,
        epoch: Epoch,
        step: StepId,
        deadline: Instant,
    ) -> Result<(), ExchangeError> {
        let current = self.view.epoch;
        if epoch < current {
            return Err(ExchangeError::StaleEpoch { got: epoch, current });
        }
        if epoch > current {
            return Err(ExchangeError::NotReady { got: epoch, current });
        }
        let blame = match &self.state {
            State::Faulted(_) => return Err(ExchangeError::Poisoned { epoch }),
            State::Step(open) => Some((abandoned(), open.place())),
            // A peer whose last step failed after this rank's own was complete counts, too.
            State::Idle => self.over().map(|blame| (blame, (0, Phase::Dispatch))),
        };
        if let Some((blame, place)) = blame {
            self.fault(blame, place);
            return Err(ExchangeError::Poisoned { epoch });
        }
        self.state = State::Step(Step { id: step, deadline, at: At::Between(0) });
        Ok(())
    }

    fn dispatch_send(
        &mut self,
        key: LayerKey,
        rows: HostRows<'_>,
        experts: &[u16],
    ) -> Result<Sent, ExchangeError> {
        let step = self.running(key, None)?;
        let place = (key.layer, Phase::Dispatch);
        self.moved_to(step, At::Layer(key.layer, Phase::Dispatch));
        self.connect(step.deadline).map_err(|blame| self.faulted(blame, place))?;
        self.layer.plan((&self.view, key.layer), (rows, experts), &mut self.lanes);
        self.open_frames(key, Phase::Dispatch, rows.bytes);
        self.lend(Goal::Arrived(key.layer), rows.bytes, step.deadline)
            .map_err(|blame| self.faulted(blame, place))?;
        Ok(Sent(key))
    }

    fn dispatch_recv(&mut self, sent: Sent) -> Result<Arrived, ExchangeError> {
        let key = sent.0;
        let phase = Phase::Dispatch;
        let step = self.running(key, Some(At::Layer(key.layer, phase)))?;
        self.finish(Goal::Arrived(key.layer), &mut [], step.deadline)
            .map_err(|blame| self.faulted(blame, (key.layer, phase)))?;
        Ok(Arrived(key))
    }

    fn arrived(&self, _arrived: &Arrived) -> (HostRows<'_>, &[u32]) {
        let Layer { row_bytes, rows, offsets, .. } = &self.layer;
        let bytes = &rows[..self.layer.arrived_bytes()];
        (HostRows { bytes, row_bytes: *row_bytes }, offsets)
    }

    fn combine_send(
        &mut self,
        arrived: Arrived,
        results: HostRows<'_>,
    ) -> Result<Pending, ExchangeError> {
        let key = arrived.0;
        let step = self.running(key, Some(At::Layer(key.layer, Phase::Dispatch)))?;
        self.moved_to(step, At::Layer(key.layer, Phase::Combine));
        self.layer.stage_results(results.bytes, &self.lanes[self.view.me.index()]);
        self.open_frames(key, Phase::Combine, results.bytes);
        let lent = if self.layer.kept { &[] } else { results.bytes };
        self.lend(Goal::Returned, lent, step.deadline)
            .map_err(|blame| self.faulted(blame, (key.layer, Phase::Combine)))?;
        Ok(Pending(key))
    }

    fn combine_recv(&mut self, pending: Pending, out: &mut [u8]) -> Result<(), ExchangeError> {
        let key = pending.0;
        let phase = Phase::Combine;
        let step = self.running(key, Some(At::Layer(key.layer, phase)))?;
        let own: usize = self.lanes.iter().map(|lane| lane.own.bytes()).sum();
        assert_eq!(out.len(), own, "one result per own row");
        self.finish(Goal::Returned, out, step.deadline)
            .map_err(|blame| self.faulted(blame, (key.layer, phase)))?;
        self.layer.keep_results(out, &self.lanes[self.view.me.index()]);
        self.moved_to(step, At::Between(key.layer));
        Ok(())
    }

    fn end_step(&mut self) -> StepOutcome {
        let (blame, place) = match &self.state {
            State::Faulted(fault) => return StepOutcome::Faulted(fault.clone()),
            State::Step(step) => {
                let stopped = self.core.stop.reason(self.view.epoch);
                let left = matches!(step.at, At::Layer(..)).then_some(Reason::Abandoned);
                let Some(reason) = stopped.or(left) else {
                    self.state = State::Idle;
                    return StepOutcome::Complete;
                };
                ((FaultKind::Aborted(reason), vec![]), step.place())
            }
            State::Idle => (abandoned(), (0, Phase::Dispatch)),
        };
        StepOutcome::Faulted(self.fault(blame, place))
    }

    fn aborter(&self) -> Aborter {
        let core = Arc::clone(&self.core);
        Aborter::new(move |epoch, reason| {
            core.stop.abort(epoch, reason);
            core.announce();
        })
    }

    fn reconfigure(&mut self, next: View, _budget: Duration) -> Result<(), ExchangeError> {
        if next.epoch <= self.view.epoch {
            return Err(ExchangeError::StaleEpoch { got: next.epoch, current: self.view.epoch });
        }
        // On an error this end still serves the old view. Connections come up in the background: the
        // first step waits for them, so the budget is not needed.
        let members = self.core.members(&next)?;
        self.put_down();
        self.core.enter(&next, members);
        self.lanes.clear();
        self.lanes.resize_with(usize::from(next.ranks), Lane::default);
        self.waiting = wait::Waiting::new(&next);
        (self.state, self.view) = (State::Idle, next);
        Ok(())
    }

    fn reroute(&mut self, routes: Arc<Routes>) {
        self.view.reroute(routes);
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        self.put_down();
        self.core.finish(self.view.epoch);
    }
}
