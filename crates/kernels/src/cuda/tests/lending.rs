//! Ranks that lend each other rows in device memory keep the rules of every exchange.

use super::super::dispatch::{Arrivals, RouteTable, RouteTableParts, Serving, Sources, dispatch};
use super::super::gate::Route;
use super::super::lent::LentRows;
use super::super::tensor::Tensor;
use super::{driver, noise};
use crate::level::Dtype;
use crate::staged::Loan;
use all2all::conformance::Network;
use all2all::local::{Hub, Lending};
use all2all::{
    Aborter, AllToAll, Arrived, ExchangeError, HostRows, LayerKey, Pending, RouteTables, Routes,
    Sent, StepOutcome, View,
};
use ids::{Epoch, StepId};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An end whose rows come from the host and go back there, to be looked at.
struct OnDevice {
    lending: Lending<LentRows>,
    routes: Arc<RouteTable>,
    rows: Tensor,
    wanted: Route,
    sources: Sources,
    arrivals: Arrivals,
    layer: u16,
    row_bytes: usize,
    /// Of the last layer: rows and offsets as they arrived, and where each row lies.
    arrived: Vec<u8>,
    offsets: Vec<u32>,
    order: Vec<u64>,
}

fn table(routes: &Routes) -> Arc<RouteTable> {
    let RouteTables { targets, spans, start } = routes.tables();
    let of = |target: &all2all::Target| (target.rank.0, target.slot, target.until);
    let targets: Vec<_> = targets.iter().map(of).collect();
    Arc::new(
        RouteTable::new(driver(), RouteTableParts { spans, targets: &targets, start }).unwrap(),
    )
}

impl OnDevice {
    fn new(lending: Lending<LentRows>) -> Self {
        Self {
            routes: table(&lending.view().routes),
            lending,
            rows: Tensor::new(driver(), Dtype::Bf16, (0, 0)).unwrap(),
            wanted: Route::new(driver()).unwrap(),
            sources: Sources::new(driver()).unwrap(),
            arrivals: Arrivals::new(driver()).unwrap(),
            layer: 0,
            row_bytes: 0,
            arrived: vec![],
            offsets: vec![],
            order: vec![],
        }
    }

    /// Of a row on the device, where all have an even number of bytes.
    fn stride(&self) -> usize {
        self.row_bytes.next_multiple_of(2)
    }

    /// Has the device find this rank's rows among those that were lent.
    fn gather(&mut self, arrived: &Arrived) {
        let lent = self.lending.arrived(arrived).0;
        let (layer, stride) = (usize::from(self.layer), self.stride());
        let source = |loan: &Option<LentRows>| {
            let shape = (Dtype::Bf16, stride / 2);
            loan.as_ref().map(|loan| loan.source(layer, shape)).unwrap_or_default()
        };
        self.sources.set(lent.iter().map(source)).unwrap();
        let view = self.lending.view();
        let slots = view.routes.local_experts(self.layer);
        self.arrivals.reserve(slots, self.sources.rows()).unwrap();
        let serving = Serving { layer, me: view.me.0, slots, served: 0, unserved: 0 };
        dispatch(driver(), &self.sources, serving, &mut self.arrivals).unwrap();
        self.offsets = vec![0; slots + 1];
        if 0 < slots {
            self.arrivals.offsets().read(bytemuck::cast_slice_mut(&mut self.offsets)).unwrap();
        }
        let mut order = vec![[0_u32; 2]; self.offsets[slots] as usize];
        self.arrivals.order().read(bytemuck::cast_slice_mut(&mut order)).unwrap();
        self.order.clear();
        self.arrived.clear();
        for [source, row] in order {
            let loan = lent[source as usize].as_ref().unwrap();
            let at =
                loan.source(layer, (Dtype::Bf16, stride / 2)).rows + u64::from(row) * stride as u64;
            self.order.push(at);
            let start = self.arrived.len();
            self.arrived.resize(start + self.row_bytes, 0);
            driver().read(at, &mut self.arrived[start..]).unwrap();
        }
    }
}

impl AllToAll for OnDevice {
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
        (self.layer, self.row_bytes) = (key.layer, rows.row_bytes);
        let stride = self.stride();
        let padded = rows
            .bytes
            .chunks_exact(rows.row_bytes)
            .flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(0, stride - row.len())));
        self.rows.become_of(Dtype::Bf16, stride / 2);
        self.rows.put(&padded.collect::<Vec<u8>>());
        self.wanted.put(experts);
        let loan = Some(LentRows::new(&self.rows, &self.wanted, &self.routes));
        self.lending.dispatch_send(key, &[loan], ())
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
        for (at, result) in self.order.iter().zip(results.bytes.chunks_exact(self.row_bytes)) {
            driver().write(*at, result).unwrap();
        }
        self.lending.combine_send(arrived, &[])
    }

    fn combine_recv(&mut self, pending: Pending, out: &mut [u8]) -> Result<(), ExchangeError> {
        self.lending.combine_recv(pending, ())?;
        let mut padded = vec![0; self.rows.rows() * self.stride()];
        self.rows.buffer().read(&mut padded).unwrap();
        let rows = padded.chunks_exact(self.stride());
        for (out, row) in out.chunks_exact_mut(self.row_bytes).zip(rows) {
            out.copy_from_slice(&row[..self.row_bytes]);
        }
        Ok(())
    }

    fn end_step(&mut self) -> StepOutcome {
        self.lending.end_step()
    }

    fn aborter(&self) -> Aborter {
        self.lending.aborter()
    }

    fn reconfigure(&mut self, next: View, budget: Duration) -> Result<(), ExchangeError> {
        let routes = table(&next.routes);
        self.lending.reconfigure(next, budget)?;
        self.routes = routes;
        Ok(())
    }

    fn reroute(&mut self, next: Arc<Routes>) {
        self.routes = table(&next);
        self.lending.reroute(next);
    }
}

struct InProcess(Arc<Hub>);

impl Network for InProcess {
    type End = OnDevice;

    fn grace(&self) -> Duration {
        Duration::from_secs(5)
    }

    fn join(&self, view: View) -> Result<OnDevice, ExchangeError> {
        self.0.lend(view).map(OnDevice::new)
    }
}

all2all::conformance!(InProcess(Hub::new()));

fn lent(rows: &Tensor, wanted: &Route) -> LentRows {
    let parts = RouteTableParts { spans: &[vec![(0, 1)]], targets: &[(0, 0, 0)], start: 0 };
    LentRows::new(rows, wanted, &Arc::new(RouteTable::new(driver(), parts).unwrap()))
}

/// Where rows and choices lie.
fn addresses(loan: &LentRows, columns: usize) -> (u64, u64) {
    let source = loan.source(0, (Dtype::F32, columns));
    (source.rows, source.wanted)
}

#[test]
fn rows_that_are_lent_keep_their_memory_and_their_owner_gets_other() {
    let mut rows = Tensor::of(driver(), Dtype::F32, 8, &noise(16, 1, 1.0));
    let mut wanted = Route::new(driver()).unwrap();
    wanted.put(&[0, 0]);
    let before = rows.to_host().unwrap();
    let loan = lent(&rows, &wanted);
    let first = addresses(&loan, 8);
    let other = noise(16, 2, 1.0);
    rows.put(bytemuck::cast_slice(&other));
    wanted.put(&[7, 7]);
    let second = addresses(&lent(&rows, &wanted), 8);
    assert!(first.0 != second.0 && first.1 != second.1, "{first:?} {second:?}");
    assert_eq!(addresses(&loan, 8), first);
    let mut bytes = vec![0.0_f32; 16];
    driver().read(first.0, bytemuck::cast_slice_mut(&mut bytes)).unwrap();
    assert_eq!(bytes, before);
    // Whoever is late writes where nobody looks any more.
    driver().write(first.0, bytemuck::cast_slice(&[f32::NAN; 16])).unwrap();
    drop(loan);
    assert_eq!(rows.to_host().unwrap(), other);
    // Given back, the memory is used again.
    rows.put(bytemuck::cast_slice(&before));
    wanted.put(&[0, 0]);
    assert_eq!(addresses(&lent(&rows, &wanted), 8), second);
}

#[test]
fn spoilt_rows_are_no_numbers_in_their_first_place() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let rows = Tensor::of(driver(), dtype, 3, &[1.0; 6]);
        let mut wanted = Route::new(driver()).unwrap();
        wanted.put(&[0, 0]);
        let loan = lent(&rows, &wanted);
        assert_eq!(loan.rows(), 2);
        loan.spoil();
        let got = rows.to_host().unwrap();
        assert!(got[0].is_nan() && got[1..] == [1.0; 5], "{got:?}");
    }
    let mut nothing = Route::new(driver()).unwrap();
    nothing.put(&[]);
    lent(&Tensor::of(driver(), Dtype::F32, 3, &[]), &nothing).spoil();
    assert!(driver().failure().is_none());
}
