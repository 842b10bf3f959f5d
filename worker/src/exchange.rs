//! The forward pass's exchange over an all-to-all of host rows.

use crate::tally::Tally;
use all2all::{AllToAll, Arrived, ExchangeError, HostRows, LayerKey, Pending, Sent};
use ids::{ExpertId, StepId};
use kernels::{Cpu, Device, Experts, Route, Wire};
use model::forward::MoeExchange;
use std::sync::Arc;

/// The experts of a rank, and the count of what they have to do.
pub(crate) struct Served {
    pub(crate) tally: Arc<Tally>,
    /// `[moe layers]`, ascending.
    pub(crate) local: Vec<Vec<ExpertId>>,
}

impl Served {
    fn count(&self, moe_layer: usize, offsets: &[u32]) {
        self.tally.count(moe_layer, &self.local[moe_layer], offsets);
    }
}

/// Where a layer stands; the tickets of the exchange, kept between the calls of the forward pass.
enum Layer {
    Idle,
    Sent(Sent),
    Pending(Pending),
}

/// One step's use of an exchange.
pub(crate) struct StepExchange<'a, A> {
    pub(crate) exchange: &'a mut A,
    pub(crate) step: StepId,
    pub(crate) row_bytes: usize,
    served: &'a Served,
    moe_layer: usize,
    rows: usize,
    layer: Layer,
    results: Wire,
}

impl<'a, A> StepExchange<'a, A> {
    pub(crate) fn new(
        exchange: &'a mut A,
        step: StepId,
        row_bytes: usize,
        served: &'a Served,
    ) -> Self {
        let (rows, layer, results) = (0, Layer::Idle, Wire::default());
        Self { exchange, step, row_bytes, served, moe_layer: 0, rows, layer, results }
    }
}

/// An all-to-all of rows in host memory.
pub(crate) trait HostExchange:
    for<'r> AllToAll<
        Rows<'r> = HostRows<'r>,
        RowsMut<'r> = &'r mut [u8],
        Experts<'r> = &'r [u16],
        Offsets = [u32],
    >
{
}

impl<A> HostExchange for A where
    A: for<'r> AllToAll<
            Rows<'r> = HostRows<'r>,
            RowsMut<'r> = &'r mut [u8],
            Experts<'r> = &'r [u16],
            Offsets = [u32],
        >
{
}

impl<A: HostExchange> MoeExchange<Cpu> for StepExchange<'_, A> {
    type Error = ExchangeError;

    fn dispatch(&mut self, layer: usize, rows: &Wire, route: &Route) -> Result<(), ExchangeError> {
        self.moe_layer = layer;
        let layer = u16::try_from(layer).expect("layers are numbered in 16 bits");
        let key = LayerKey { step: self.step, layer };
        self.rows = route.experts().len();
        let rows = HostRows { bytes: rows.bytes(), row_bytes: self.row_bytes };
        self.layer = Layer::Sent(self.exchange.dispatch_send(key, rows, route.experts())?);
        Ok(())
    }

    fn serve(&mut self, device: &mut Cpu, experts: &Experts) -> Result<(), ExchangeError> {
        let Layer::Sent(sent) = std::mem::replace(&mut self.layer, Layer::Idle) else {
            unreachable!("the forward pass dispatches before it serves")
        };
        let arrived: Arrived = self.exchange.dispatch_recv(sent)?;
        let (rows, offsets) = self.exchange.arrived(&arrived);
        self.served.count(self.moe_layer, offsets);
        self.results.room(0);
        device.experts(rows.bytes, offsets, experts, &mut self.results);
        let results = HostRows { bytes: self.results.bytes(), row_bytes: self.row_bytes };
        self.layer = Layer::Pending(self.exchange.combine_send(arrived, results)?);
        Ok(())
    }

    fn combine(&mut self, results: &mut Wire) -> Result<(), ExchangeError> {
        let Layer::Pending(pending) = std::mem::replace(&mut self.layer, Layer::Idle) else {
            unreachable!("the forward pass serves before it combines")
        };
        let bytes = self.rows * self.row_bytes;
        self.exchange.combine_recv(pending, results.room(bytes))
    }
}
