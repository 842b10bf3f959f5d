//! The exchange between ranks that are threads of one process.
//!
//! Every rank has an inbox with one slot per (phase, source). A sender puts what is for a destination
//! into a parcel of its own and swaps it with the slot's empty one; the receiver swaps it out again.
//! Nothing is allocated once the parcels have grown, and a lock is held for a few swaps only.
//!
//! Parcels of [`Local`] hold rows in host memory: each is copied twice (packed by the sender, sorted by
//! the receiver). Those of [`Lending`] say where rows are.
//!
//! One slot per phase is enough: a rank sends layer `l + 1` only after it has all results of layer `l`,
//! and its peer sent those only after it had emptied the slot.

use crate::error::{ExchangeError, FaultKind, Phase};
use crate::step::At;
use crate::{
    Aborter, AllToAll, Arrived, HostRows, LayerKey, Pending, Routes, Sent, StepOutcome, View, lock,
};
use ids::{Epoch, StepId};
use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

mod end;
mod inbox;
mod layer;
mod lending;

use end::End;
use inbox::Group;
use layer::{Layer, Parcel};

pub use lending::Lending;

/// Where the ranks of a process find each other.
#[derive(Default)]
pub struct Hub {
    groups: Mutex<Groups>,
}

/// Epochs with members, and the newest that ever had one.
struct Groups {
    /// Each a [`Group`] of one kind of parcels.
    by_epoch: BTreeMap<Epoch, Weak<dyn Any + Send + Sync>>,
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
    /// [`ExchangeError::Join`] if the view has a [defect](View::defect), the rank is taken, the sizes or
    /// the ways of exchange disagree, or the epoch is over because everybody has left it.
    pub fn join(self: &Arc<Self>, view: View) -> Result<Local, ExchangeError> {
        Ok(Local { end: End::join(self, view)?, layer: Layer::default() })
    }

    /// The same for ranks that lend each other rows.
    ///
    /// # Errors
    ///
    /// As for [`Hub::join`].
    pub fn lend<L: Clone + Send + 'static>(
        self: &Arc<Self>,
        view: View,
    ) -> Result<Lending<L>, ExchangeError> {
        Lending::join(self, view)
    }

    fn group<P: Default + Send + 'static>(
        &self,
        view: &View,
    ) -> Result<Arc<Group<P>>, ExchangeError> {
        let refuse = |reason| ExchangeError::Join { rank: view.me, epoch: view.epoch, reason };
        if let Some(defect) = view.defect() {
            return Err(refuse(defect));
        }
        let mut groups = lock(&self.groups);
        groups.by_epoch.retain(|_, group| 0 < group.strong_count());
        let group = match groups.by_epoch.get(&view.epoch).and_then(Weak::upgrade) {
            Some(group) => group
                .downcast::<Group<P>>()
                .map_err(|_| refuse("its ranks exchange rows in another way"))?,
            // Whoever has begun the newer epoch never comes back to this one.
            None if view.epoch < groups.newest => return Err(refuse("a newer epoch has begun")),
            None => {
                let group = Arc::new(Group::new(view.ranks));
                let known: Weak<Group<P>> = Arc::downgrade(&group);
                groups.by_epoch.insert(view.epoch, known);
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

/// One rank's end of the in-process exchange. Dropping it tells the peers that it is gone.
pub struct Local {
    end: End<Parcel>,
    layer: Layer,
}

impl AllToAll for Local {
    type Rows<'a> = HostRows<'a>;
    type RowsMut<'a> = &'a mut [u8];
    type Experts<'a> = &'a [u16];
    type Offsets = [u32];

    fn view(&self) -> &View {
        &self.end.view
    }

    fn begin_step(
        &mut self,
        epoch: Epoch,
        step: StepId,
        deadline: Instant,
    ) -> Result<(), ExchangeError> {
        self.end.begin_step(epoch, step, deadline)
    }

    fn dispatch_send(
        &mut self,
        key: LayerKey,
        rows: HostRows<'_>,
        experts: &[u16],
    ) -> Result<Sent, ExchangeError> {
        let step = self.end.running(key, None)?;
        self.end.moved_to(step, At::Layer(key.layer, Phase::Dispatch));
        self.layer.pack(&self.end.view, key.layer, (rows, experts), &mut self.end.packed);
        self.end.send(key, Phase::Dispatch)?;
        Ok(Sent(key))
    }

    fn dispatch_recv(&mut self, sent: Sent) -> Result<Arrived, ExchangeError> {
        let key = sent.0;
        self.end.receive(key, Phase::Dispatch)?;
        let local = self.end.view.routes.local_experts(key.layer);
        match self.layer.sort(&self.end.view, local, &self.end.taken) {
            Ok(()) => Ok(Arrived(key)),
            Err(from) => {
                let place = (key.layer, Phase::Dispatch);
                Err(self.end.faulted(FaultKind::Corrupt, vec![from], place))
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
        let step = self.end.running(key, Some(At::Layer(key.layer, Phase::Dispatch)))?;
        self.end.moved_to(step, At::Layer(key.layer, Phase::Combine));
        self.layer.unsort(&self.end.view, results, &self.end.taken, &mut self.end.packed);
        self.end.send(key, Phase::Combine)?;
        Ok(Pending(key))
    }

    fn combine_recv(&mut self, pending: Pending, out: &mut [u8]) -> Result<(), ExchangeError> {
        let key = pending.0;
        let place = (key.layer, Phase::Combine);
        let step = self.end.running(key, Some(At::Layer(key.layer, Phase::Combine)))?;
        self.end.receive(key, Phase::Combine)?;
        if let Err(from) = self.layer.gather(&self.end.taken, out) {
            return Err(self.end.faulted(FaultKind::Corrupt, vec![from], place));
        }
        self.end.moved_to(step, At::Between(key.layer));
        Ok(())
    }

    fn end_step(&mut self) -> StepOutcome {
        self.end.end_step()
    }

    fn aborter(&self) -> Aborter {
        self.end.aborter()
    }

    fn reconfigure(&mut self, next: View, _budget: Duration) -> Result<(), ExchangeError> {
        self.end.reconfigure(next)
    }

    fn reroute(&mut self, routes: Arc<Routes>) {
        self.end.view.reroute(routes);
    }
}
