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
use crate::{
    Aborter, AllToAll, Arrived, HostRows, LayerKey, Pending, Sent, StepOutcome, View, active_ranks,
};
use ids::{Epoch, Rank, StepId};
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

mod layer;

use layer::Layer;

/// Where the ranks of a process find each other.
#[derive(Default)]
pub struct Hub {
    groups: Mutex<BTreeMap<Epoch, Weak<Group>>>,
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
    /// [`ExchangeError::Join`] if the rank is taken or the sizes disagree.
    pub fn join(self: &Arc<Self>, view: View) -> Result<Local, ExchangeError> {
        let group = self.group(&view)?;
        Ok(Local {
            hub: Arc::clone(self),
            group,
            state: State::Idle,
            packed: (0..view.ranks).map(|_| Parcel::default()).collect(),
            taken: (0..view.ranks).map(|_| Parcel::default()).collect(),
            layer: Layer::default(),
            view,
        })
    }

    fn group(&self, view: &View) -> Result<Arc<Group>, ExchangeError> {
        let refuse = |reason| ExchangeError::Join { rank: view.me, epoch: view.epoch, reason };
        let mut groups = lock(&self.groups);
        groups.retain(|_, group| 0 < group.strong_count());
        let group = match groups.get(&view.epoch).and_then(Weak::upgrade) {
            Some(group) => group,
            None => {
                let group = Arc::new(Group::new(view.ranks));
                groups.insert(view.epoch, Arc::downgrade(&group));
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

/// The ranks of one epoch.
struct Group {
    inboxes: Vec<Inbox>,
    joined: Mutex<Vec<bool>>,
}

struct Inbox {
    state: Mutex<InboxState>,
    news: Condvar,
}

struct InboxState {
    /// `[phase][source]`
    slots: [Vec<Slot>; 2],
    /// `[source]`: it has left this epoch.
    closed: Vec<bool>,
    /// Somebody ended the step.
    abort: Option<(Reason, Option<Rank>)>,
}

#[derive(Default)]
struct Slot {
    /// What the parcel belongs to; `None` if the slot is empty.
    key: Option<LayerKey>,
    parcel: Parcel,
}

/// Rows from one rank to another.
#[derive(Default)]
struct Parcel {
    rows: Vec<u8>,
    /// Slot of the expert at the receiver, per row; empty in the combine phase.
    slots: Vec<u16>,
}

impl Group {
    fn new(ranks: u16) -> Self {
        let slots = || (0..ranks).map(|_| Slot::default()).collect();
        let inbox = |_| Inbox {
            state: Mutex::new(InboxState {
                slots: [slots(), slots()],
                closed: vec![false; usize::from(ranks)],
                abort: None,
            }),
            news: Condvar::new(),
        };
        Self {
            inboxes: (0..ranks).map(inbox).collect(),
            joined: Mutex::new(vec![false; usize::from(ranks)]),
        }
    }

    /// Tells every rank something and wakes it.
    fn tell_all(&self, tell: impl Fn(&mut InboxState)) {
        for inbox in &self.inboxes {
            tell(&mut lock(&inbox.state));
            inbox.news.notify_all();
        }
    }
}

/// One rank's end of the in-process exchange. Dropping it tells the peers that it is gone.
pub struct Local {
    hub: Arc<Hub>,
    group: Arc<Group>,
    view: View,
    state: State,
    /// `[destination]`: buffers for packing, swapped with the slots.
    packed: Vec<Parcel>,
    /// `[source]`: what was received last.
    taken: Vec<Parcel>,
    layer: Layer,
}

enum State {
    Idle,
    Step {
        step: StepId,
        deadline: Instant,
        open: bool,
    },
    /// A fault stays until the next view.
    Faulted(Fault),
}

impl Local {
    /// Records the first fault of the step and tells the peers, so that none waits for its deadline.
    fn fault(&mut self, fault: Fault) -> ExchangeError {
        let me = self.view.me;
        self.group.tell_all(|inbox| {
            inbox.abort.get_or_insert((Reason::PeerFaulted, Some(me)));
        });
        self.state = State::Faulted(fault.clone());
        ExchangeError::Faulted(fault)
    }

    /// The deadline of the step that `key` belongs to.
    fn running(&mut self, key: LayerKey, phase: Phase) -> Result<Instant, ExchangeError> {
        match &self.state {
            State::Faulted(fault) => Err(ExchangeError::Faulted(fault.clone())),
            State::Step { step, deadline, .. } if *step == key.step => Ok(*deadline),
            State::Step { .. } | State::Idle => {
                let kind = FaultKind::Aborted(Reason::Abandoned);
                Err(self.fault(Fault { kind, suspects: vec![], layer: key.layer, phase }))
            }
        }
    }

    /// Swaps the packed parcels into the slots of their destinations.
    fn send(&mut self, key: LayerKey, phase: Phase) -> Result<(), ExchangeError> {
        self.running(key, phase)?;
        let (me, mut corrupt) = (self.view.me.index(), None);
        for to in active_ranks(&self.view) {
            let inbox = &self.group.inboxes[to.index()];
            let mut state = lock(&inbox.state);
            let slot = &mut state.slots[phase as usize][me];
            if slot.key.is_some() {
                corrupt = Some(to);
                break;
            }
            slot.key = Some(key);
            std::mem::swap(&mut slot.parcel, &mut self.packed[to.index()]);
            drop(state);
            inbox.news.notify_one();
        }
        match corrupt {
            None => Ok(()),
            Some(to) => Err(self.fault(Fault {
                kind: FaultKind::Corrupt,
                suspects: vec![to],
                layer: key.layer,
                phase,
            })),
        }
    }

    /// Waits until every active rank's parcel of this layer and phase is here, and takes them.
    fn receive(&mut self, key: LayerKey, phase: Phase) -> Result<(), ExchangeError> {
        let deadline = self.running(key, phase)?;
        let inbox = &self.group.inboxes[self.view.me.index()];
        let mut state = lock(&inbox.state);
        let fault = loop {
            match look(&state, &self.view, key, phase) {
                Look::Ready => {
                    for from in active_ranks(&self.view) {
                        let slot = &mut state.slots[phase as usize][from.index()];
                        slot.key = None;
                        std::mem::swap(&mut slot.parcel, &mut self.taken[from.index()]);
                    }
                    return Ok(());
                }
                Look::Fault(kind, suspects) => break (kind, suspects),
                Look::Wait(missing) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break (FaultKind::Deadline, missing);
                    }
                    let waited = inbox.news.wait_timeout(state, left);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        };
        drop(state);
        let (kind, suspects) = fault;
        Err(self.fault(Fault { kind, suspects, layer: key.layer, phase }))
    }
}

/// What a rank sees in its inbox.
enum Look {
    Ready,
    Wait(Vec<Rank>),
    Fault(FaultKind, Vec<Rank>),
}

fn look(state: &InboxState, view: &View, key: LayerKey, phase: Phase) -> Look {
    let slots = &state.slots[phase as usize];
    let of = |rank: &Rank| slots[rank.index()].key;
    let all_here = active_ranks(view).all(|rank| of(&rank) == Some(key));
    // An own abort ends even a step whose rows are here: the control plane wants it over.
    match state.abort {
        Some((reason, None)) => return Look::Fault(FaultKind::Aborted(reason), vec![]),
        // What a failing peer sent before it failed is whole: use it, the next wait will end.
        Some((reason, Some(by))) if !all_here => {
            return Look::Fault(FaultKind::Aborted(reason), vec![by]);
        }
        Some(_) | None => {}
    }
    if all_here {
        return Look::Ready;
    }
    let foreign: Vec<Rank> =
        active_ranks(view).filter(|rank| of(rank).is_some_and(|got| got != key)).collect();
    if !foreign.is_empty() {
        return Look::Fault(FaultKind::Corrupt, foreign);
    }
    let missing: Vec<Rank> = active_ranks(view).filter(|rank| of(rank).is_none()).collect();
    let gone: Vec<Rank> =
        missing.iter().copied().filter(|rank| state.closed[rank.index()]).collect();
    if gone.is_empty() { Look::Wait(missing) } else { Look::Fault(FaultKind::PeerClosed, gone) }
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
        if let State::Faulted(_) = self.state {
            return Err(ExchangeError::Poisoned { epoch });
        }
        self.state = State::Step { step, deadline, open: false };
        Ok(())
    }

    fn dispatch_send(
        &mut self,
        key: LayerKey,
        rows: HostRows<'_>,
        experts: &[u16],
    ) -> Result<Sent, ExchangeError> {
        self.running(key, Phase::Dispatch)?;
        if let State::Step { open, .. } = &mut self.state {
            *open = true;
        }
        self.layer.pack(&self.view, key.layer, (rows, experts), &mut self.packed);
        self.send(key, Phase::Dispatch)?;
        Ok(Sent(key))
    }

    fn dispatch_recv(&mut self, sent: Sent) -> Result<Arrived, ExchangeError> {
        self.receive(sent.0, Phase::Dispatch)?;
        let local = self.view.routes.local_experts(sent.0.layer);
        let sorted = self.layer.sort(&self.view, local, &self.taken);
        match sorted {
            Ok(()) => Ok(Arrived(sent.0)),
            Err(from) => Err(self.fault(Fault {
                kind: FaultKind::Corrupt,
                suspects: vec![from],
                layer: sent.0.layer,
                phase: Phase::Dispatch,
            })),
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
        self.running(arrived.0, Phase::Combine)?;
        self.layer.unsort(&self.view, results, &self.taken, &mut self.packed);
        self.send(arrived.0, Phase::Combine)?;
        Ok(Pending(arrived.0))
    }

    fn combine_recv(&mut self, pending: Pending, out: &mut [u8]) -> Result<(), ExchangeError> {
        self.receive(pending.0, Phase::Combine)?;
        if let Err(from) = self.layer.gather(&self.taken, out) {
            return Err(self.fault(Fault {
                kind: FaultKind::Corrupt,
                suspects: vec![from],
                layer: pending.0.layer,
                phase: Phase::Combine,
            }));
        }
        if let State::Step { open, .. } = &mut self.state {
            *open = false;
        }
        Ok(())
    }

    fn end_step(&mut self) -> StepOutcome {
        match &self.state {
            State::Faulted(fault) => StepOutcome::Faulted(fault.clone()),
            State::Step { open: true, .. } => {
                let fault = Fault {
                    kind: FaultKind::Aborted(Reason::Abandoned),
                    suspects: vec![],
                    layer: 0,
                    phase: Phase::Dispatch,
                };
                self.fault(fault.clone());
                StepOutcome::Faulted(fault)
            }
            State::Step { open: false, .. } | State::Idle => {
                self.state = State::Idle;
                StepOutcome::Complete
            }
        }
    }

    fn aborter(&self) -> Aborter {
        let (group, me, current) = (Arc::downgrade(&self.group), self.view.me, self.view.epoch);
        Aborter::new(move |epoch, reason| {
            let Some(group) = group.upgrade().filter(|_| epoch == current) else { return };
            let inbox = &group.inboxes[me.index()];
            lock(&inbox.state).abort = Some((reason, None));
            inbox.news.notify_all();
        })
    }

    fn reconfigure(&mut self, next: View, _budget: Duration) -> Result<(), ExchangeError> {
        if next.epoch <= self.view.epoch {
            return Err(ExchangeError::StaleEpoch { got: next.epoch, current: self.view.epoch });
        }
        // Joining first: on an error this end still serves the old view.
        *self = Arc::clone(&self.hub).join(next)?;
        Ok(())
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        let me = self.view.me.index();
        self.group.tell_all(|inbox| inbox.closed[me] = true);
    }
}

/// A thread that panicked while it held one of these locks left whole values behind: swaps and flags.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
