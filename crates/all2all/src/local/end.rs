//! A rank's end of an exchange within a process, whatever its parcels hold: steps, faults, and the waits for its peers.

use super::Hub;
use super::inbox::{Group, Stop};
use crate::error::{ExchangeError, Fault, FaultKind, Phase, Reason};
use crate::step::{At, Halt, State, Step};
use crate::{Aborter, LayerKey, StepOutcome, View, active_ranks};
use ids::{Epoch, Rank, StepId};
use std::sync::Arc;
use std::time::Instant;

/// Dropping it tells the peers that it is gone.
pub(super) struct End<P> {
    hub: Arc<Hub>,
    group: Arc<Group<P>>,
    /// Shared with the aborters, for life.
    stop: Arc<Stop<P>>,
    pub(super) view: View,
    state: State,
    /// `[destination]`: what is sent next, swapped with the slots.
    pub(super) packed: Vec<P>,
    /// `[source]`: what was received last.
    pub(super) taken: Vec<P>,
}

impl<P: Default + Send + 'static> End<P> {
    pub(super) fn join(hub: &Arc<Hub>, view: View) -> Result<Self, ExchangeError> {
        let group = hub.group(&view)?;
        Ok(Self {
            hub: Arc::clone(hub),
            stop: Arc::new(Stop::new(&group, view.me)),
            group,
            state: State::Idle,
            packed: parcels(&view),
            taken: parcels(&view),
            view,
        })
    }

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

    pub(super) fn faulted(
        &mut self,
        kind: FaultKind,
        suspects: Vec<Rank>,
        place: (u16, Phase),
    ) -> ExchangeError {
        ExchangeError::Faulted(self.fault(kind, suspects, place))
    }

    /// The step that is open and stands where this call belongs; any other call abandons it.
    pub(super) fn running(&mut self, key: LayerKey, at: Option<At>) -> Result<Step, ExchangeError> {
        self.state.running(key, at).map_err(|halt| match halt {
            Halt::Faulted(fault) => ExchangeError::Faulted(fault),
            Halt::Abandoned(place) => {
                self.faulted(FaultKind::Aborted(Reason::Abandoned), vec![], place)
            }
        })
    }

    /// Notes where the open step stands.
    pub(super) fn moved_to(&mut self, step: Step, at: At) {
        self.state = State::Step(Step { at, ..step });
    }

    /// Swaps the packed parcels into the slots of their destinations.
    pub(super) fn send(&mut self, key: LayerKey, phase: Phase) -> Result<(), ExchangeError> {
        let (me, packed, inboxes) = (self.view.me, &mut self.packed, &self.group.inboxes);
        let full = active_ranks(&self.view)
            .find(|to| !inboxes[to.index()].put((key, phase), me, &mut packed[to.index()]));
        match full {
            None => Ok(()),
            Some(to) => Err(self.faulted(FaultKind::Corrupt, vec![to], (key.layer, phase))),
        }
    }

    /// Waits until every active rank's parcel of this layer and phase is here, and takes them.
    pub(super) fn receive(&mut self, key: LayerKey, phase: Phase) -> Result<(), ExchangeError> {
        let step = self.running(key, Some(At::Layer(key.layer, phase)))?;
        let inbox = &self.group.inboxes[self.view.me.index()];
        let wait = (&self.view, &*self.stop, step.deadline);
        inbox
            .take((key, phase), wait, &mut self.taken)
            .map_err(|(kind, suspects)| self.faulted(kind, suspects, (key.layer, phase)))
    }

    /// As [`crate::AllToAll::begin_step`].
    pub(super) fn begin_step(
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

    /// As [`crate::AllToAll::end_step`].
    pub(super) fn end_step(&mut self) -> StepOutcome {
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

    /// As [`crate::AllToAll::aborter`].
    pub(super) fn aborter(&self) -> Aborter {
        let stop = Arc::clone(&self.stop);
        Aborter::new(move |epoch, reason| stop.abort(epoch, reason))
    }

    /// As [`crate::AllToAll::reconfigure`].
    pub(super) fn reconfigure(&mut self, next: View) -> Result<(), ExchangeError> {
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

impl<P> Drop for End<P> {
    fn drop(&mut self) {
        self.group.tell_closed(self.view.me);
    }
}

fn parcels<P: Default>(view: &View) -> Vec<P> {
    (0..view.ranks).map(|_| P::default()).collect()
}
