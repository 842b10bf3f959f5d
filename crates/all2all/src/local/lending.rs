//! The exchange of ranks that reach each other's rows where these are: on a device that they share.
//!
//! Nothing is copied. A rank lends its rows to all, waits until all have lent theirs, serves those that are its own
//! where they lie, where the results then are, and gives the loans back; a rank that knows that all have done so has its
//! rows again. What a loan is, only the device knows: it keeps the rows' memory for whoever still has it, even if their
//! owner has failed, left, or gone on.
//!
//! The waits are those of threads of the host: a loan is given when what makes the rows is *enqueued*, and given back
//! when what serves them is.

use super::Hub;
use super::end::End;
use crate::error::{ExchangeError, Phase};
use crate::step::At;
use crate::{
    Aborter, AllToAll, Arrived, LayerKey, Pending, Routes, Sent, StepOutcome, View, active_ranks,
};
use ids::{Epoch, StepId};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One rank's end. Dropping it tells the peers that it is gone.
pub struct Lending<L> {
    end: End<Option<L>>,
}

impl<L: Clone + Send + 'static> Lending<L> {
    pub(super) fn join(hub: &Arc<Hub>, view: View) -> Result<Self, ExchangeError> {
        Ok(Self { end: End::join(hub, view)? })
    }

    /// This rank's loans that peers have given back by name in the layer that was combined last.
    pub fn named(&mut self) -> impl Iterator<Item = L> + '_ {
        self.end.taken.iter_mut().filter_map(Option::take)
    }
}

/// Rows that are sent are one loan; those that arrive are one of every rank, `None` of the masked ones. Results are where
/// the rows were, so they need not be named (`&[]`); whoever names a rank's loan, by rank, lets it [know](Lending::named).
impl<L: Clone + Send + 'static> AllToAll for Lending<L> {
    type Rows<'a> = &'a [Option<L>];
    type RowsMut<'a> = ();
    /// A loan says who serves its rows.
    type Experts<'a> = ();
    /// Found on the device.
    type Offsets = ();

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
        rows: &[Option<L>],
        (): (),
    ) -> Result<Sent, ExchangeError> {
        assert_eq!(rows.len(), 1, "a rank lends its own rows");
        let step = self.end.running(key, None)?;
        self.end.moved_to(step, At::Layer(key.layer, Phase::Dispatch));
        for to in active_ranks(&self.end.view) {
            self.end.packed[to.index()].clone_from(&rows[0]);
        }
        self.end.send(key, Phase::Dispatch)?;
        Ok(Sent(key))
    }

    fn dispatch_recv(&mut self, sent: Sent) -> Result<Arrived, ExchangeError> {
        self.end.receive(sent.0, Phase::Dispatch)?;
        Ok(Arrived(sent.0))
    }

    fn arrived(&self, _arrived: &Arrived) -> (&[Option<L>], &()) {
        (&self.end.taken, &())
    }

    fn combine_send(
        &mut self,
        arrived: Arrived,
        named: &[Option<L>],
    ) -> Result<Pending, ExchangeError> {
        let key = arrived.0;
        let step = self.end.running(key, Some(At::Layer(key.layer, Phase::Dispatch)))?;
        self.end.moved_to(step, At::Layer(key.layer, Phase::Combine));
        // Given back before it is said: who hears it has its rows for itself.
        self.end.taken.iter_mut().for_each(|loan| *loan = None);
        for (packed, named) in self.end.packed.iter_mut().zip(named) {
            packed.clone_from(named);
        }
        self.end.send(key, Phase::Combine)?;
        Ok(Pending(key))
    }

    fn combine_recv(&mut self, pending: Pending, (): ()) -> Result<(), ExchangeError> {
        let key = pending.0;
        let step = self.end.running(key, Some(At::Layer(key.layer, Phase::Combine)))?;
        self.end.receive(key, Phase::Combine)?;
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
