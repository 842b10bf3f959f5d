//! The exchange of MoE rows: every row to the rank of its expert, every result back.
//!
//! One trait, [`AllToAll`], and one set of rules that every transport keeps. A transport serves one view at a time. A step either completes on this rank or it failed:
//! nothing of a failed step is ever used, and after a failure only [`AllToAll::reconfigure`] helps.
//!
//! Moving a row changes no bit of it, and a rank's own rows take the same form as those of others.

#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
pub mod local;
mod routes;
mod step;
pub mod tcp;

pub use error::{ExchangeError, Fault, FaultKind, Phase, Reason};
pub use routes::{PartsError, RouteTables, Routes, RoutesError, STRIDE, Target, View};

use ids::{Epoch, Rank, StepId};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One MoE layer of one step.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct LayerKey {
    pub step: StepId,
    /// Index among the MoE layers.
    pub layer: u16,
}

/// Rows were sent; the rows for this rank can be waited for.
#[must_use = "the peers wait for the rest of the layer"]
#[derive(Debug)]
pub struct Sent(LayerKey);

/// Rows for this rank's experts are here; results can be sent back.
#[must_use = "the peers wait for the results"]
#[derive(Debug)]
pub struct Arrived(LayerKey);

/// Results were sent; those of this rank's own rows can be waited for.
#[must_use = "the results of this rank's rows are still to come"]
#[derive(Debug)]
pub struct Pending(LayerKey);

/// How a step ended on this rank.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StepOutcome {
    /// Every row that this rank got back is of this epoch, step and layer.
    Complete,
    /// All results of the step are void.
    Faulted(Fault),
}

/// Stops a rank from any thread: idempotent, and it waits for no step.
///
/// It serves its exchange for life, across every [`AllToAll::reconfigure`]: only the epoch that an abort
/// names decides what it ends.
#[derive(Clone)]
pub struct Aborter(Arc<dyn Fn(Epoch, Reason) + Send + Sync>);

impl Aborter {
    /// Wraps what a transport does to abort.
    pub fn new(abort: impl Fn(Epoch, Reason) + Send + Sync + 'static) -> Self {
        Self(Arc::new(abort))
    }

    /// Ends `epoch` and all before it: whoever names an epoch knows that the older ones are over.
    ///
    /// The step that is open ends with [`FaultKind::Aborted`], in [`AllToAll::end_step`] at the latest; if
    /// none is open, the next `begin_step` is [`ExchangeError::Poisoned`]. An abort never shows in a later
    /// epoch, so it does nothing once the exchange has moved on, and it may come before the exchange has
    /// reached its epoch: that epoch is then poisoned from the start.
    pub fn abort(&self, epoch: Epoch, reason: Reason) {
        (self.0)(epoch, reason);
    }
}

/// Dispatch and combine of one rank.
///
/// A layer is four calls in the order that the tickets force: send the rows, wait for the rows of the
/// local experts, send their results, wait for the own results. Between the first two the caller runs
/// the shared expert.
///
/// Where ranks share a GPU ([`local::Lending`]) the calls only pass on what is enqueued there: rows are
/// device buffers (hence the associated types), and no call waits for the device. A fault may be
/// reported as soon as it is seen; [`AllToAll::end_step`] repeats it.
///
/// Rules: epochs only rise; a step is all or nothing; a fault
/// poisons until `reconfigure`; nothing outlasts the step's deadline; aborts may race with anything;
/// exactly one result per row, in the order of the rows; rows are moved unchanged; no allocation once
/// the buffers have seen the largest step; what a masked rank writes is never read.
pub trait AllToAll: Send {
    /// Rows, in the memory of host or device.
    type Rows<'a>;
    /// Rows to be overwritten.
    type RowsMut<'a>;
    /// The chosen expert of every row.
    type Experts<'a>;
    /// Where each local expert's rows start among the arrived ones, `[local experts + 1]`.
    type Offsets: ?Sized;

    /// The view this exchange serves.
    fn view(&self) -> &View;

    /// Opens a step; `deadline` bounds all of it.
    ///
    /// # Errors
    ///
    /// [`ExchangeError::StaleEpoch`] and [`ExchangeError::NotReady`], which change nothing; or
    /// [`ExchangeError::Poisoned`], also if the last step is still open: it was left in the middle, and
    /// has failed for that.
    fn begin_step(
        &mut self,
        epoch: Epoch,
        step: StepId,
        deadline: Instant,
    ) -> Result<(), ExchangeError>;

    /// Sends every row to the rank of its expert.
    ///
    /// # Errors
    ///
    /// [`ExchangeError::Faulted`] if the step has failed, here or on a peer.
    fn dispatch_send(
        &mut self,
        key: LayerKey,
        rows: Self::Rows<'_>,
        experts: Self::Experts<'_>,
    ) -> Result<Sent, ExchangeError>;

    /// Waits for the rows of the local experts.
    ///
    /// # Errors
    ///
    /// As for `dispatch_send`.
    fn dispatch_recv(&mut self, sent: Sent) -> Result<Arrived, ExchangeError>;

    /// The rows that arrived, grouped by local expert; within an expert by source rank, then by row.
    fn arrived(&self, arrived: &Arrived) -> (Self::Rows<'_>, &Self::Offsets);

    /// Sends the results, in the order of the arrived rows, to where these came from.
    ///
    /// # Errors
    ///
    /// As for `dispatch_send`.
    fn combine_send(
        &mut self,
        arrived: Arrived,
        results: Self::Rows<'_>,
    ) -> Result<Pending, ExchangeError>;

    /// Waits for the results of the own rows, in their order.
    ///
    /// # Errors
    ///
    /// As for `dispatch_send`.
    fn combine_recv(
        &mut self,
        pending: Pending,
        out: Self::RowsMut<'_>,
    ) -> Result<(), ExchangeError>;

    /// Ends the step; the only place where its outcome stands. A step left in the middle of a layer has
    /// failed, and so has one that was never begun.
    fn end_step(&mut self) -> StepOutcome;

    /// A handle that ends steps of this exchange from any thread.
    fn aborter(&self) -> Aborter;

    /// Moves to the next view, between steps. The members may be the same: a plain new start.
    ///
    /// # Errors
    ///
    /// [`ExchangeError::StaleEpoch`] unless the epoch rises; what the transport needs and lacks. The old
    /// view stays then.
    fn reconfigure(&mut self, next: View, budget: Duration) -> Result<(), ExchangeError>;

    /// Sends the rows of the next steps by other routes to the ranks that hold their experts, between steps. That is this
    /// rank's affair alone: whoever holds an expert serves all that come.
    ///
    /// # Panics
    ///
    /// If the routes have other [targets](Routes::targets_match) than those of the view.
    fn reroute(&mut self, routes: Arc<Routes>);
}

/// Rows in host memory.
#[derive(Clone, Copy, Debug)]
pub struct HostRows<'a> {
    pub bytes: &'a [u8],
    /// Bytes of one row.
    pub row_bytes: usize,
}

impl HostRows<'_> {
    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len().checked_div(self.row_bytes).unwrap_or(0)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Which ranks take part: all of a view but the masked ones.
pub(crate) fn active_ranks(view: &View) -> impl Iterator<Item = Rank> + '_ {
    (0..view.ranks).map(Rank).filter(|rank| view.active[rank.index()])
}

/// A thread that panicked while it held one of the locks here left whole values behind.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
