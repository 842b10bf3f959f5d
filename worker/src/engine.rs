//! One rank's steps: device, weights, KV cache and exchange of a view.

use crate::exchange::StepExchange;
use crate::weights::{Model, ModelError};
use all2all::local::{Hub, Local};
use all2all::{AllToAll, ExchangeError, Fault, Reason, Routes, StepOutcome, View};
use ids::{Epoch, ExpertId, Rank, StepId};
use kernels::{Cache, Cpu, DeviceError, Experts, Level, Pool, Sampled, StepBatch};
use model::forward::{Forward, ForwardError, Observer, Pass, pools, shape};
use model::weights::Dense;
use std::sync::Arc;
use std::time::Instant;

/// Capacity of the KV cache of a rank.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvBlocks {
    pub full: u32,
    pub chunked: u32,
}

/// Why a rank cannot start, or a step failed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("exchange: {0}")]
    Exchange(#[from] ExchangeError),
    #[error("placement: {0}")]
    Routes(#[from] all2all::RoutesError),
    #[error("step failed: {0}")]
    Step(Fault),
}

/// A rank that executes steps. Make it on the thread that steps it.
pub struct Engine {
    device: Cpu,
    dense: Arc<Dense<Cpu>>,
    experts: Vec<Experts>,
    cache: Cache,
    forward: Forward<Cpu>,
    exchange: Local,
    row_bytes: usize,
}

/// What a rank serves: who holds which expert, `[moe layers][ranks]` ascending, and which rank serves
/// this one's rows of an expert.
pub struct Shard<'a> {
    pub epoch: Epoch,
    pub rank: Rank,
    pub ranks: u16,
    pub held: &'a [Vec<Vec<ExpertId>>],
    pub target: &'a dyn Fn(usize, ExpertId) -> Rank,
}

impl Engine {
    /// Loads the shard of `shard.rank` and joins the exchange of its view.
    ///
    /// # Errors
    ///
    /// [`EngineError`] if weights cannot be loaded or memory is refused.
    pub fn new(
        model: &Model,
        shard: &Shard<'_>,
        hub: &Arc<Hub>,
        threads: usize,
        kv: KvBlocks,
    ) -> Result<Self, EngineError> {
        let config = &model.config;
        let local: Vec<Vec<usize>> = shard
            .held
            .iter()
            .map(|ranks| ranks[shard.rank.index()].iter().map(|e| e.index()).collect())
            .collect();
        let (dense, experts) = (model.dense()?, model.experts(&local)?);
        let device = Cpu::new(Level::detect(), model.dtype, threads)?;
        let blocks = |pool| match pool {
            Pool::Full => kv.full,
            Pool::Chunked(_) => kv.chunked,
        };
        let heads = shape(config);
        let layers = pools(config);
        let cache = Cache::new(model.dtype, heads.kv_heads, heads.head_dim, &layers, blocks)?;
        let routes = Routes::new(shard.rank, config.experts, shard.held, shard.target)?;
        let exchange = hub.join(View {
            epoch: shard.epoch,
            me: shard.rank,
            ranks: shard.ranks,
            active: vec![true; usize::from(shard.ranks)],
            routes: Arc::new(routes),
        })?;
        Ok(Self {
            forward: Forward::new(&device, config, 0, (kv.full, kv.chunked)),
            row_bytes: device.row_bytes(config.hidden),
            device,
            dense,
            experts,
            cache,
            exchange,
        })
    }

    /// Executes one step; `deadline` bounds every wait for the other ranks.
    ///
    /// # Errors
    ///
    /// [`EngineError`]: nothing of the step counts, on any rank.
    pub fn step(
        &mut self,
        step: StepId,
        batch: &StepBatch,
        deadline: Instant,
        observer: &mut impl Observer<Cpu>,
    ) -> Result<Vec<Sampled>, EngineError> {
        let epoch = self.exchange.view().epoch;
        self.exchange.begin_step(epoch, step, deadline)?;
        let mut exchange = StepExchange::new(&mut self.exchange, step, self.row_bytes);
        let mut pass = Pass {
            dense: &self.dense,
            experts: &self.experts,
            cache: &mut self.cache,
            step: batch,
        };
        let result = self.forward.run(&mut self.device, &mut pass, &mut exchange, observer);
        let sampled = match result {
            Ok(sampled) => sampled,
            Err(ForwardError::Exchange(error)) => {
                self.exchange.end_step();
                return Err(error.into());
            }
            Err(ForwardError::Device(error)) => {
                // The others wait for this rank's rows: tell them at once.
                self.exchange.aborter().abort(epoch, Reason::Abandoned);
                self.exchange.end_step();
                return Err(error.into());
            }
        };
        match self.exchange.end_step() {
            StepOutcome::Complete => Ok(sampled),
            StepOutcome::Faulted(fault) => Err(EngineError::Step(fault)),
        }
    }
}
