//! Ranks that lend each other rows keep the rules of every exchange. The device is host memory here: a loan is a lock
//! around rows, and their owner gets other memory while somebody still has them.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

#[path = "common/counting.rs"]
mod counting;

use all2all::conformance::Network;
use all2all::local::{Hub, Lending};
use all2all::{
    Aborter, AllToAll, Arrived, ExchangeError, HostRows, LayerKey, Pending, Routes, Sent,
    StepOutcome, View,
};
use counting::allocations;
use ids::{Epoch, ExpertId, Rank, StepId};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Rows of a rank, where all reach them.
#[derive(Default)]
struct Shared {
    rows: Vec<u8>,
    wanted: Vec<u16>,
    /// Who serves them.
    routes: Option<Arc<Routes>>,
}

type Loan = Arc<Mutex<Shared>>;

/// An end whose rows are copied into shared memory, and out of it.
struct Lender {
    lending: Lending<Loan>,
    own: Loan,
    layer: u16,
    row_bytes: usize,
    /// Of the last layer: rows and offsets as they arrived, and where each row came from.
    arrived: Vec<u8>,
    offsets: Vec<u32>,
    order: Vec<(usize, usize)>,
}

fn lock(loan: &Loan) -> MutexGuard<'_, Shared> {
    loan.lock().unwrap()
}

impl Lender {
    fn new(lending: Lending<Loan>) -> Self {
        let own = Loan::default();
        let (arrived, offsets, order) = (vec![], vec![], vec![]);
        Self { lending, own, layer: 0, row_bytes: 0, arrived, offsets, order }
    }

    /// Finds this rank's rows among those that were lent.
    fn gather(&mut self, arrived: &Arrived) {
        let (view, lent) = (self.lending.view(), self.lending.arrived(arrived).0);
        self.arrived.clear();
        self.order.clear();
        self.offsets.clear();
        self.offsets.push(0);
        for slot in (0..).take(view.routes.local_experts(self.layer)) {
            for (source, loan) in lent.iter().enumerate() {
                let Some(loan) = loan else { continue };
                let shared = lock(loan);
                let routes = shared.routes.as_ref().unwrap();
                for (row, wanted) in shared.wanted.iter().enumerate() {
                    if routes.target(self.layer, *wanted, row) == (view.me, slot) {
                        let at = row * self.row_bytes;
                        self.arrived.extend_from_slice(&shared.rows[at..at + self.row_bytes]);
                        self.order.push((source, row));
                    }
                }
            }
            self.offsets.push(u32::try_from(self.order.len()).unwrap());
        }
    }
}

impl AllToAll for Lender {
    type Rows<'a> = HostRows<'a>;
    type RowsMut<'a> = &'a mut [u8];
    type Experts<'a> = &'a [u16];
    type Offsets = [u32];

    fn view(&self) -> &View {
        self.lending.view()
    }

    fn begin_step(
        &mut self,
        epoch: Epoch,
        step: StepId,
        deadline: Instant,
    ) -> Result<(), ExchangeError> {
        self.lending.begin_step(epoch, step, deadline)
    }

    fn dispatch_send(
        &mut self,
        key: LayerKey,
        rows: HostRows<'_>,
        experts: &[u16],
    ) -> Result<Sent, ExchangeError> {
        if Arc::get_mut(&mut self.own).is_none() {
            self.own = Loan::default();
        }
        (self.layer, self.row_bytes) = (key.layer, rows.row_bytes);
        let mut shared = lock(&self.own);
        shared.rows.clear();
        shared.rows.extend_from_slice(rows.bytes);
        shared.wanted.clear();
        shared.wanted.extend_from_slice(experts);
        shared.routes = Some(Arc::clone(&self.lending.view().routes));
        drop(shared);
        self.lending.dispatch_send(key, &[Some(Arc::clone(&self.own))], ())
    }

    fn dispatch_recv(&mut self, sent: Sent) -> Result<Arrived, ExchangeError> {
        let arrived = self.lending.dispatch_recv(sent)?;
        self.gather(&arrived);
        Ok(arrived)
    }

    fn arrived(&self, _arrived: &Arrived) -> (HostRows<'_>, &[u32]) {
        (HostRows { bytes: &self.arrived, row_bytes: self.row_bytes }, &self.offsets)
    }

    fn combine_send(
        &mut self,
        arrived: Arrived,
        results: HostRows<'_>,
    ) -> Result<Pending, ExchangeError> {
        let lent = self.lending.arrived(&arrived).0;
        let results = results.bytes.chunks_exact(self.row_bytes);
        for ((source, row), result) in self.order.iter().zip(results) {
            let mut shared = lock(lent[*source].as_ref().unwrap());
            shared.rows[row * self.row_bytes..][..self.row_bytes].copy_from_slice(result);
        }
        self.lending.combine_send(arrived, &[])
    }

    fn combine_recv(&mut self, pending: Pending, out: &mut [u8]) -> Result<(), ExchangeError> {
        self.lending.combine_recv(pending, ())?;
        out.copy_from_slice(&lock(&self.own).rows);
        Ok(())
    }

    fn end_step(&mut self) -> StepOutcome {
        self.lending.end_step()
    }

    fn aborter(&self) -> Aborter {
        self.lending.aborter()
    }

    fn reconfigure(&mut self, next: View, budget: Duration) -> Result<(), ExchangeError> {
        self.lending.reconfigure(next, budget)
    }

    fn reroute(&mut self, routes: Arc<Routes>) {
        self.lending.reroute(routes);
    }
}

struct InProcess(Arc<Hub>);

impl Network for InProcess {
    type End = Lender;

    fn grace(&self) -> Duration {
        Duration::from_secs(5)
    }

    fn join(&self, view: View) -> Result<Lender, ExchangeError> {
        self.0.lend(view).map(Lender::new)
    }
}

all2all::conformance!(InProcess(Hub::new()), allocations);

#[test]
fn ranks_of_an_epoch_exchange_in_one_way() {
    let view = |me| {
        let held = [vec![vec![ExpertId(0)], vec![]]];
        let routes = Routes::new(Rank(me), 1, &held, |_, _| vec![Rank(0)]).unwrap();
        let active = vec![true; 2];
        View { epoch: Epoch(1), me: Rank(me), ranks: 2, active, routes: Arc::new(routes) }
    };
    let hub = Hub::new();
    let _lends = hub.lend::<Loan>(view(0)).unwrap();
    let refused = hub.join(view(1)).err();
    let reason = "its ranks exchange rows in another way";
    assert_eq!(refused, Some(ExchangeError::Join { rank: Rank(1), epoch: Epoch(1), reason }));
    assert!(hub.lend::<Loan>(view(1)).is_ok());
}
