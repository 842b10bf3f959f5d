//! The forward pass's exchange over an all-to-all of host rows, and the watch over what travels.

use crate::finite::{NonFinite, Place, first_bad_row};
use crate::tally::Tally;
use all2all::{AllToAll, Arrived, ExchangeError, HostRows, LayerKey, Pending, Sent};
use ids::{ExpertId, StepId};
use kernels::{Dtype, RouteOnHost, Staged, WireOnHost};
use model::forward::{ForwardError, MoeExchange};
use std::sync::Arc;

/// The experts of a rank, and the count of what they have to do.
pub(crate) struct Served {
    pub(crate) tally: Arc<Tally>,
    /// Of a MoE layer, wherever they are.
    pub(crate) experts: usize,
    /// `[moe layers]`, ascending.
    pub(crate) local: Vec<Vec<ExpertId>>,
}

impl Served {
    /// Of rows that arrived here.
    fn count(&self, moe_layer: usize, offsets: &[u32]) {
        let rows = offsets.windows(2).map(|ends| ends[1] - ends[0]);
        self.tally.count(moe_layer, &self.local[moe_layer], rows);
    }

    /// Of rows that were served where they are, `[moe layers][experts]`.
    pub(crate) fn count_noted(&self, rows: &[u32]) {
        let layers = rows.chunks_exact(self.experts.max(1));
        for ((moe_layer, local), rows) in self.local.iter().enumerate().zip(layers) {
            self.tally.count(moe_layer, local, rows.iter().copied());
        }
    }
}

/// The form of a row.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) bytes: usize,
    pub(crate) dtype: Dtype,
}

/// Where a layer stands; the tickets of the exchange, kept between the calls of the forward pass.
enum Layer {
    Idle,
    Sent(Sent),
    Pending(Pending),
}

/// What came of a part of a layer's exchange.
type Passed = Result<(), ForwardError<ExchangeError>>;

/// One step's use of an exchange.
pub(crate) struct StepExchange<'a, A, D: Staged> {
    pub(crate) exchange: &'a mut A,
    pub(crate) step: StepId,
    pub(crate) row_bytes: usize,
    dtype: Dtype,
    served: &'a Served,
    /// The chosen experts of the layer, `[rows]`, and its index.
    experts: Vec<u16>,
    index: u16,
    pub(crate) found: Option<NonFinite>,
    layer: Layer,
    results: &'a mut D::Wire,
}

impl<'a, A, D: Staged> StepExchange<'a, A, D> {
    pub(crate) fn new(
        exchange: &'a mut A,
        step: StepId,
        (rows, results): (Rows, &'a mut D::Wire),
        served: &'a Served,
    ) -> Self {
        Self {
            exchange,
            step,
            row_bytes: rows.bytes,
            dtype: rows.dtype,
            served,
            experts: Vec::new(),
            index: 0,
            found: None,
            layer: Layer::Idle,
            results,
        }
    }

    /// Remembers the first value that is not finite. The step goes on, since no row depends on another
    /// one and the other ranks need theirs; it fails when it is over.
    fn watch(&mut self, bytes: &[u8], place: impl Fn(&Self, usize) -> Place) {
        if self.found.is_none()
            && let Some(row) = first_bad_row(bytes, self.row_bytes, self.dtype)
        {
            self.found = Some(NonFinite { place: place(self, row), row });
        }
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

impl<A: HostExchange, D: Staged> MoeExchange<D> for StepExchange<'_, A, D> {
    type Error = ExchangeError;

    fn dispatch(
        &mut self,
        device: &mut D,
        layer: usize,
        (rows, route): (&D::Wire, &D::Route),
    ) -> Passed {
        let layer = u16::try_from(layer).expect("layers are numbered in 16 bits");
        let key = LayerKey { step: self.step, layer };
        self.experts.clear();
        self.experts.extend_from_slice(route.experts());
        let bytes = rows.bytes();
        device.failed()?;
        self.index = layer;
        self.watch(bytes, |_, _| Place::Hidden { layer });
        let rows = HostRows { bytes, row_bytes: self.row_bytes };
        let sent = self.exchange.dispatch_send(key, rows, route.experts());
        self.layer = Layer::Sent(sent.map_err(ForwardError::Exchange)?);
        Ok(())
    }

    fn serve(&mut self, device: &mut D, experts: &D::Experts) -> Passed {
        let sent = match std::mem::replace(&mut self.layer, Layer::Idle) {
            Layer::Sent(sent) => sent,
            Layer::Idle | Layer::Pending(_) => {
                unreachable!("the forward pass dispatches before it serves")
            }
        };
        let arrived: Arrived = self.exchange.dispatch_recv(sent).map_err(ForwardError::Exchange)?;
        let (rows, offsets) = self.exchange.arrived(&arrived);
        self.served.count(usize::from(self.index), offsets);
        self.results.room(0);
        device.experts(rows.bytes, offsets, experts, self.results);
        let results = HostRows { bytes: self.results.bytes(), row_bytes: self.row_bytes };
        device.failed()?;
        let pending = self.exchange.combine_send(arrived, results);
        self.layer = Layer::Pending(pending.map_err(ForwardError::Exchange)?);
        Ok(())
    }

    fn combine(&mut self, _: &mut D, results: &mut D::Wire) -> Passed {
        let pending = match std::mem::replace(&mut self.layer, Layer::Idle) {
            Layer::Pending(pending) => pending,
            Layer::Idle | Layer::Sent(_) => {
                unreachable!("the forward pass serves before it combines")
            }
        };
        let bytes = results.room(self.experts.len() * self.row_bytes);
        self.exchange.combine_recv(pending, bytes).map_err(ForwardError::Exchange)?;
        self.watch(bytes, |this, row| {
            let (layer, expert) = (this.index, this.experts[row]);
            let rank = this.exchange.view().routes.target(layer, expert, row).0.0;
            Place::Expert { layer, expert, rank }
        });
        Ok(())
    }
}
