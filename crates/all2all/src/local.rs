//! The exchange between ranks that are threads of one process.
//!
//! Every rank has an inbox with one slot per (phase, source). A sender packs the rows of a destination
//! into a buffer of its own and swaps it with the slot's empty one; the receiver swaps it out again.
//! So a row is copied twice (packed by the sender, sorted by the receiver), nothing is allocated
//! once the buffers have grown, and a lock is held for a few swaps only.
//!
//! One slot per phase is enough: a rank sends layer `l + 1` only after it has all results of layer `l`,
//! and its peer sent those only after it had emptied the slot.

use crate::error::{ExchangeError, Fault, FaultKind, Phase, Reason};
use crate::step::{At, Halt, State, Step};
use crate::{
    Aborter, AllToAll, Arrived, HostRows, LayerKey, Pending, Sent, StepOutcome, View, active_ranks,
    lock,
};
use ids::{Epoch, Rank, StepId};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

mod inbox;
mod layer;

use inbox::{Group, Parcel, Stop};
use layer::Layer;

/// Where the ranks of a process find each other.
#[derive(Default)]
pub struct Hub {
    groups: Mutex<Groups>,
}

/// Epochs with members, and the newest that ever had one.
struct Groups {
    by_epoch: BTreeMap<Epoch, Weak<Group>>,
    newest: Epoch,
}

impl Default for Groups {
    fn default() -> Self {
        Self { by_epoch: BTreeMap::new(), newest: Epoch(0) }
    }
}

impl Hub {
    /// A hub without members.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Joins the exchange of a view. Does not wait for the others: the first step does.
    ///
    /// # Errors
    ///
    /// [`ExchangeError::Join`] if the view has a [defect](View::defect), the rank is taken, the sizes
    /// disagree, or the epoch is over because everybody has left it.
    pub fn join(self: &Arc<Self>, view: View) -> Result<Local, ExchangeError> {
        let group = self.group(&view)?;
        let stop = Arc::new(Stop::default());
        stop.moved(&group, view.me);
        Ok(Local {
            hub: Arc::clone(self),
            group,
            stop,
            state: State::Idle,
            packed: parcels(&view),
            taken: parcels(&view),
            layer: Layer::default(),
            view,
        })
    }

    fn group(&self, view: &View) -> Result<Arc<Group>, ExchangeError> {
        let refuse = |reason| ExchangeError::Join { rank: view.me, epoch: view.epoch, reason };
        if let Some(defect) = view.defect() {
            return Err(refuse(defect));
        }
        let mut groups = lock(&self.groups);
        groups.by_epoch.retain(|_, group| 0 < group.strong_count());
        let group = match groups.by_epoch.get(&view.epoch).and_then(Weak::upgrade) {
            Some(group) => group,
            // Whoever has begun the newer epoch never comes back to this one.
            None if view.epoch < groups.newest => return Err(refuse("a newer epoch has begun")),
            None => {
                let group = Arc::new(Group::new(view.ranks));
                groups.by_epoch.insert(view.epoch, Arc::downgrade(&group));
                groups.newest = view.epoch;
                group
            }
        };
        if group.inboxes.len() != usize::from(view.ranks) {
            return Err(refuse("its view has another number of ranks"));
        }
        let mut joined = lock(&group.joined);
        if std::mem::replace(&mut joined[view.me.index()], true) {
            return Err(refuse("the rank is taken"));
        }
        drop(joined);
        Ok(group)
    }
}

fn parcels(view: &View) -> Vec<Parcel> {
    (0..view.ranks).map(|_| Parcel::default()).collect()
}

/// One rank's end of the in-process exchange. Dropping it tells the peers that it is gone.
pub struct Local {
    hub: Arc<Hub>,
    group: Arc<Group>,
    /// Shared with the aborters, for life.
    stop: Arc<Stop>,
    view: View,
    state: State,
    /// `[destination]`: buffers for packing, swapped with the slots.
    packed: Vec<Parcel>,
    /// `[source]`: what was received last.
    taken: Vec<Parcel>,
    layer: Layer,
}

impl Local {
    /// Records the fault of the step and tells the peers, so that none waits for its deadline.
    fn fault(
        &mut self,
        kind: FaultKind,
        suspects: Vec<Rank>,
        (layer, phase): (u16, Phase),
    ) -> Fault {
        self.group.tell_fault(self.view.me);
        let fault = Fault { kind, suspects, layer, phase };
        self.state = State::Faulted(fault.clone());
        fault
    }

    fn faulted(
        &mut self,
        kind: FaultKind,
        suspects: Vec<Rank>,
        place: (u16, Phase),
    ) -> ExchangeError {
        ExchangeError::Faulted(self.fault(kind, suspects, place))
    }

    /// The step that is open and stands where this call belongs; any other call abandons it.
    fn running(&mut self, key: LayerKey, at: Option<At>) -> Result<Step, ExchangeError> {
        self.state.running(key, at).map_err(|halt| match halt {
            Halt::Faulted(fault) => ExchangeError::Faulted(fault),
            Halt::Abandoned(place) => {
                self.faulted(FaultKind::Aborted(Reason::Abandoned), vec![], place)
            }
        })
    }

    /// Swaps the packed parcels into the slots of their destinations.
    fn send(&mut self, key: LayerKey, phase: Phase) -> Result<(), ExchangeError> {
        let (me, packed, inboxes) = (self.view.me, &mut self.packed, &self.group.inboxes);
        let full = active_ranks(&self.view)
            .find(|to| !inboxes[to.index()].put((key, phase), me, &mut packed[to.index()]));
        match full {
            None => Ok(()),
            Some(to) => Err(self.faulted(FaultKind::Corrupt, vec![to], (key.layer, phase))),
        }
    }

    /// Waits until every active rank's parcel of this layer and phase is here, and takes them.
    fn receive(&mut self, key: LayerKey, phase: Phase) -> Result<(), ExchangeError> {
        let step = self.running(key, Some(At::Layer(key.layer, phase)))?;
        let inbox = &self.group.inboxes[self.view.me.index()];
        let wait = (&self.view, &*self.stop, step.deadline);
        inbox
            .take((key, phase), wait, &mut self.taken)
            .map_err(|(kind, suspects)| self.faulted(kind, suspects, (key.layer, phase)))
    }

    /// Notes where the open step stands.
    fn moved_to(&mut self, step: Step, at: At) {
        self.state = State::Step(Step { at, ..step });
    }
}

impl AllToAll for Local {
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
        let start = (0, Phase::Dispatch);
        match &self.state {
            State::Faulted(_) => return Err(ExchangeError::Poisoned { epoch }),
            State::Step(open) => {
                let place = open.place();
                self.fault(FaultKind::Aborted(Reason::Abandoned), vec![], place);
                return Err(ExchangeError::Poisoned { epoch });
            }
            State::Idle => {}
        }
        if let Some(reason) = self.stop.reason(epoch) {
            self.fault(FaultKind::Aborted(reason), vec![], start);
            return Err(ExchangeError::Poisoned { epoch });
        }
        // A peer whose last step failed after this rank's own was complete.
        let inbox = &self.group.inboxes[self.view.me.index()];
        if let Some(by) = inbox.faulted_peer(&self.view) {
            self.fault(FaultKind::Aborted(Reason::PeerFaulted), vec![by], start);
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
        self.moved_to(step, At::Layer(key.layer, Phase::Dispatch));
        self.layer.pack(&self.view, key.layer, (rows, experts), &mut self.packed);
        self.send(key, Phase::Dispatch)?;
        Ok(Sent(key))
    }

    fn dispatch_recv(&mut self, sent: Sent) -> Result<Arrived, ExchangeError> {
        let key = sent.0;
        self.receive(key, Phase::Dispatch)?;
        let local = self.view.routes.local_experts(key.layer);
        match self.layer.sort(&self.view, local, &self.taken) {
            Ok(()) => Ok(Arrived(key)),
            Err(from) => {
                let place = (key.layer, Phase::Dispatch);
                Err(self.faulted(FaultKind::Corrupt, vec![from], place))
            }
        }
    }

    fn arrived(&self, _arrived: &Arrived) -> (HostRows<'_>, &[u32]) {
        self.layer.arrived()
    }

    fn combine_send(
        &mut self,
        arrived: Arrived,
        results: HostRows<'_>,
    ) -> Result<Pending, ExchangeError> {
        let key = arrived.0;
        let step = self.running(key, Some(At::Layer(key.layer, Phase::Dispatch)))?;
        self.moved_to(step, At::Layer(key.layer, Phase::Combine));
        self.layer.unsort(&self.view, results, &self.taken, &mut self.packed);
        self.send(key, Phase::Combine)?;
        Ok(Pending(key))
    }

    fn combine_recv(&mut self, pending: Pending, out: &mut [u8]) -> Result<(), ExchangeError> {
        let key = pending.0;
        let place = (key.layer, Phase::Combine);
        let step = self.running(key, Some(At::Layer(key.layer, Phase::Combine)))?;
        self.receive(key, Phase::Combine)?;
        if let Err(from) = self.layer.gather(&self.taken, out) {
            return Err(self.faulted(FaultKind::Corrupt, vec![from], place));
        }
        self.moved_to(step, At::Between(key.layer));
        Ok(())
    }

    fn end_step(&mut self) -> StepOutcome {
        let fault = match &self.state {
            State::Faulted(fault) => fault.clone(),
            State::Step(step) => {
                let place = step.place();
                let stopped = self.stop.reason(self.view.epoch);
                let left = matches!(step.at, At::Layer(..)).then_some(Reason::Abandoned);
                match stopped.or(left) {
                    Some(reason) => self.fault(FaultKind::Aborted(reason), vec![], place),
                    None => {
                        self.state = State::Idle;
                        return StepOutcome::Complete;
                    }
                }
            }
            State::Idle => {
                let kind = FaultKind::Aborted(Reason::Abandoned);
                self.fault(kind, vec![], (0, Phase::Dispatch))
            }
        };
        StepOutcome::Faulted(fault)
    }

    fn aborter(&self) -> Aborter {
        let stop = Arc::clone(&self.stop);
        Aborter::new(move |epoch, reason| stop.abort(epoch, reason))
    }

    fn reconfigure(&mut self, next: View, _budget: Duration) -> Result<(), ExchangeError> {
        if next.epoch <= self.view.epoch {
            return Err(ExchangeError::StaleEpoch { got: next.epoch, current: self.view.epoch });
        }
        // Joining first: on an error this end still serves the old view.
        let group = self.hub.group(&next)?;
        self.group.tell_closed(self.view.me);
        self.stop.moved(&group, next.me);
        (self.packed, self.taken, self.state) = (parcels(&next), parcels(&next), State::Idle);
        (self.group, self.view) = (group, next);
        Ok(())
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        self.group.tell_closed(self.view.me);
    }
}
