//! The inboxes of an epoch's ranks, and how a rank waits at its own.
//!
//! A rank that waits first looks a few times without a lock, since its peers are usually about to
//! write, and then sleeps. A writer wakes it only with the last parcel it needs. Nothing here allocates
//! except to describe a fault.

use crate::error::{FaultKind, Phase, Reason};
use crate::{LayerKey, View, active_ranks, lock};
use ids::{Epoch, Rank};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::Instant;

/// Looks before a rank gives its core away: about a microsecond, the time in which a peer that runs
/// writes its parcel. Small MoE layers on 2 cores took 7, 20 and 60 us with 2, 4 and 8 ranks; with 200
/// looks it was 2, 57 and 115 us, since the ranks that look keep the others from writing; without any of
/// this, and a wake per parcel, 17, 64 and 152 us.
const SPINS: u32 = 32;

/// Times a rank then gives its core to another rank before it sleeps. Often more ranks than cores live
/// in a process, so that the peer may need this very core.
const YIELDS: u32 = 4;

/// The ranks of one epoch, and the parcels on their way between them.
pub(super) struct Group<P> {
    pub(super) inboxes: Vec<Inbox<P>>,
    pub(super) joined: Mutex<Vec<bool>>,
}

pub(super) struct Inbox<P> {
    state: Mutex<InboxState<P>>,
    /// Counts what others have written, so that a rank can look without the lock.
    written: AtomicU64,
    news: Condvar,
}

struct InboxState<P> {
    /// `[phase][source]`
    slots: [Vec<Slot<P>>; 2],
    /// `[source]`: it has left this epoch.
    closed: Vec<bool>,
    /// `[source]`: its step has failed, and it is still here.
    faulted: Vec<bool>,
    /// Parcels that the sleeping owner still needs; 0 while it is awake.
    needed: usize,
}

#[derive(Default)]
struct Slot<P> {
    /// What the parcel belongs to; `None` if the slot is empty.
    key: Option<LayerKey>,
    parcel: P,
}

impl<P: Default> Group<P> {
    pub(super) fn new(ranks: u16) -> Self {
        let slots = || (0..ranks).map(|_| Slot::default()).collect();
        let inbox = |_| Inbox {
            state: Mutex::new(InboxState {
                slots: [slots(), slots()],
                closed: vec![false; usize::from(ranks)],
                faulted: vec![false; usize::from(ranks)],
                needed: 0,
            }),
            written: AtomicU64::new(0),
            news: Condvar::new(),
        };
        Self {
            inboxes: (0..ranks).map(inbox).collect(),
            joined: Mutex::new(vec![false; usize::from(ranks)]),
        }
    }
}

impl<P> Group<P> {
    /// Tells every rank that the step of `by` has failed.
    pub(super) fn tell_fault(&self, by: Rank) {
        self.tell_all(|state| state.faulted[by.index()] = true);
    }

    /// Tells every rank that `by` leaves.
    pub(super) fn tell_closed(&self, by: Rank) {
        self.tell_all(|state| state.closed[by.index()] = true);
    }

    fn tell_all(&self, tell: impl Fn(&mut InboxState<P>)) {
        for inbox in &self.inboxes {
            tell(&mut lock(&inbox.state));
            inbox.written.fetch_add(1, Ordering::Release);
            inbox.news.notify_all();
        }
    }
}

impl<P> Inbox<P> {
    /// Swaps a parcel into an empty slot; false if the slot is still full.
    pub(super) fn put(&self, (key, phase): (LayerKey, Phase), from: Rank, parcel: &mut P) -> bool {
        let mut state = lock(&self.state);
        let slot = &mut state.slots[phase as usize][from.index()];
        if slot.key.is_some() {
            return false;
        }
        slot.key = Some(key);
        std::mem::swap(&mut slot.parcel, parcel);
        let wake = state.needed == 1;
        state.needed = state.needed.saturating_sub(1);
        drop(state);
        self.written.fetch_add(1, Ordering::Release);
        if wake {
            self.news.notify_one();
        }
        true
    }

    /// Waits until every active rank's parcel is here, and swaps them out.
    ///
    /// Errors with what ended the wait, and who is to blame for it.
    pub(super) fn take(
        &self,
        (key, phase): (LayerKey, Phase),
        (view, stop, deadline): (&View, &Stop<P>, Instant),
        taken: &mut [P],
    ) -> Result<(), (FaultKind, Vec<Rank>)> {
        let mut looks = 0;
        let mut state = lock(&self.state);
        loop {
            // An own abort ends even a step whose rows are here: the control plane wants it over.
            if let Some(reason) = stop.reason(view.epoch) {
                return Err((FaultKind::Aborted(reason), vec![]));
            }
            let needed = state.needed(view, key, phase);
            if needed == 0 {
                for from in active_ranks(view) {
                    let slot = &mut state.slots[phase as usize][from.index()];
                    slot.key = None;
                    std::mem::swap(&mut slot.parcel, &mut taken[from.index()]);
                }
                return Ok(());
            }
            if let Some(fault) = state.hopeless(view, key, phase) {
                return Err(fault);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err((FaultKind::Deadline, state.missing(view, phase)));
            }
            if looks < SPINS + YIELDS {
                let seen = self.written.load(Ordering::Relaxed);
                drop(state);
                looks = self.look_out(seen, looks);
                state = lock(&self.state);
            } else {
                state.needed = needed;
                let waited = self.news.wait_timeout(state, left);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
                state.needed = 0;
            }
        }
    }

    /// Looks until something is written or patience ends; returns the looks so far.
    fn look_out(&self, seen: u64, mut looks: u32) -> u32 {
        while looks < SPINS + YIELDS && self.written.load(Ordering::Acquire) == seen {
            if looks < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
            looks += 1;
        }
        looks
    }

    /// An active peer whose step has failed.
    pub(super) fn faulted_peer(&self, view: &View) -> Option<Rank> {
        let state = lock(&self.state);
        active_ranks(view).find(|rank| state.faulted[rank.index()])
    }
}

impl<P> InboxState<P> {
    /// How many parcels are still to come.
    fn needed(&self, view: &View, key: LayerKey, phase: Phase) -> usize {
        let slots = &self.slots[phase as usize];
        active_ranks(view).filter(|rank| slots[rank.index()].key != Some(key)).count()
    }

    /// Why what is missing will never come. Masked ranks are not looked at, whatever they wrote.
    ///
    /// What a failing peer sent before it failed is whole, so this is asked only while something is
    /// missing. A peer that failed and then moved on is not a suspect.
    fn hopeless(&self, view: &View, key: LayerKey, phase: Phase) -> Option<(FaultKind, Vec<Rank>)> {
        let of = |rank: &Rank| self.slots[phase as usize][rank.index()].key;
        let foreign = |rank: &Rank| of(rank).is_some_and(|got| got != key);
        let faulted = |rank: &Rank| self.faulted[rank.index()];
        let gone = |rank: &Rank| of(rank).is_none() && self.closed[rank.index()] && !faulted(rank);
        let every = |which: &dyn Fn(&Rank) -> bool| active_ranks(view).filter(which).collect();
        if active_ranks(view).any(|rank| foreign(&rank)) {
            Some((FaultKind::Corrupt, every(&foreign)))
        } else if active_ranks(view).any(|rank| gone(&rank)) {
            Some((FaultKind::PeerClosed, every(&gone)))
        } else if active_ranks(view).any(|rank| faulted(&rank)) {
            Some((FaultKind::Aborted(Reason::PeerFaulted), every(&faulted)))
        } else {
            None
        }
    }

    fn missing(&self, view: &View, phase: Phase) -> Vec<Rank> {
        let slots = &self.slots[phase as usize];
        active_ranks(view).filter(|rank| slots[rank.index()].key.is_none()).collect()
    }
}

/// The aborts of one end, across all of its epochs.
pub(super) struct Stop<P>(Mutex<StopState<P>>);

struct StopState<P> {
    /// The newest epoch that is over, and why.
    through: Option<(Epoch, Reason)>,
    /// Where the end may be waiting.
    at: (Weak<Group<P>>, Rank),
}

impl<P> Stop<P> {
    /// Of an end that waits here.
    pub(super) fn new(group: &Arc<Group<P>>, me: Rank) -> Self {
        Self(Mutex::new(StopState { through: None, at: (Arc::downgrade(group), me) }))
    }

    /// The end now waits here.
    pub(super) fn moved(&self, group: &Arc<Group<P>>, me: Rank) {
        lock(&self.0).at = (Arc::downgrade(group), me);
    }

    /// Why `epoch` is over, if it is.
    pub(super) fn reason(&self, epoch: Epoch) -> Option<Reason> {
        lock(&self.0).through.filter(|&(through, _)| epoch <= through).map(|(_, reason)| reason)
    }

    /// Ends `epoch` and wakes the end. The first reason for an epoch stands.
    pub(super) fn abort(&self, epoch: Epoch, reason: Reason) {
        let (group, me) = {
            let mut state = lock(&self.0);
            if state.through.is_none_or(|(through, _)| through < epoch) {
                state.through = Some((epoch, reason));
            }
            state.at.clone()
        };
        let Some(group) = group.upgrade() else { return };
        let inbox = &group.inboxes[me.index()];
        // Under the lock, lest it falls between the owner's look and its sleep.
        let _awake = lock(&inbox.state);
        inbox.written.fetch_add(1, Ordering::Release);
        inbox.news.notify_all();
    }
}
