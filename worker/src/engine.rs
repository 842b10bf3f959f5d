//! One rank's steps: device, weights, KV cache and exchange of a view.

use crate::chaos::{Hooks, Struck};
use crate::exchange::{Rows, Served, StepExchange};
use crate::finite::{NonFinite, Place};
use crate::joined::{Joined, Plantable, Transport};
use crate::kv::KvBlocks;
use crate::observe::{Eyes, Observer};
use crate::platform::{Backend, Placed, Platform};
use crate::tally::Tally;
use crate::weights::{Model, ModelError};
use all2all::local::Hub;
use all2all::tcp::Peer;
use all2all::{Aborter, AllToAll, ExchangeError, Fault, Reason, Routes, StepOutcome, View};
use ids::{Epoch, ExpertId, Rank, StepId};
use kernels::cuda::Cuda;
use kernels::{Bad, BadPlace, Cpu, DeviceError, Dtype, Pool, Sampled, StepBatch};
use model::forward::{Forward, ForwardError, Pass};
use model::weights::Dense;
use std::sync::Arc;
use std::time::Instant;

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
    #[error("{0}")]
    NonFinite(NonFinite),
    #[error("a GPU cannot serve this model: {0}")]
    Unsupported(String),
    #[error("the worker has no rank yet")]
    Unseated,
    #[error("the step belongs to {got}, the worker serves {serving:?}")]
    Epoch { got: Epoch, serving: Option<Epoch> },
    #[error("{0}")]
    Io(String),
}

impl EngineError {
    /// What the exchange saw, if it was the exchange.
    #[must_use]
    pub fn fault(&self) -> Option<&Fault> {
        match self {
            Self::Exchange(ExchangeError::Faulted(fault)) | Self::Step(fault) => Some(fault),
            Self::Exchange(
                ExchangeError::StaleEpoch { .. }
                | ExchangeError::NotReady { .. }
                | ExchangeError::Poisoned { .. }
                | ExchangeError::Join { .. },
            )
            | Self::Model(_)
            | Self::Device(_)
            | Self::Routes(_)
            | Self::NonFinite(_)
            | Self::Unsupported(_)
            | Self::Unseated
            | Self::Epoch { .. }
            | Self::Io(_) => None,
        }
    }
}

/// What a rank serves: who holds which expert, `[moe layers][ranks]` ascending, and which rank serves
/// this one's rows of an expert.
pub struct Shard<'a> {
    pub epoch: Epoch,
    pub rank: Rank,
    pub ranks: u16,
    pub held: &'a [Vec<Vec<ExpertId>>],
    pub targets: &'a dyn Fn(usize, ExpertId) -> Vec<Rank>,
}

/// A rank's place in a view, with its experts in memory: ready to be taken at a step boundary.
pub struct Seat {
    experts: Placed,
    /// `[moe layers]`: which these are, ascending.
    local: Vec<Vec<ExpertId>>,
    view: View,
    /// `[ranks]`; empty within one process.
    peers: Vec<Peer>,
}

impl Seat {
    /// Loads the experts of the shard that this process does not have yet, as long as they are wanted.
    ///
    /// # Errors
    ///
    /// [`EngineError`] if weights cannot be loaded, are wanted no more, or the placement is impossible.
    pub fn load(
        model: &Model,
        shard: &Shard<'_>,
        still_wanted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Self, EngineError> {
        let of_rank = |ranks: &Vec<Vec<ExpertId>>| {
            ranks[shard.rank.index()].iter().map(|expert| expert.index()).collect()
        };
        let local: Vec<Vec<usize>> = shard.held.iter().map(of_rank).collect();
        let routes = Routes::new(shard.rank, model.config.experts, shard.held, shard.targets)?;
        let own = shard.held.iter().map(|ranks| ranks[shard.rank.index()].clone());
        Ok(Self {
            experts: model.experts(&local, still_wanted)?,
            local: own.collect(),
            view: View {
                epoch: shard.epoch,
                me: shard.rank,
                ranks: shard.ranks,
                active: vec![true; usize::from(shard.ranks)],
                routes: Arc::new(routes),
            },
            peers: Vec::new(),
        })
    }

    /// Between processes: where the ranks of its view are reached.
    #[must_use]
    pub fn with_peers(self, peers: Vec<Peer>) -> Self {
        Self { peers, ..self }
    }

    /// The epoch of its view.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.view.epoch
    }
}

/// A rank that executes steps. Make it on the thread that steps it.
pub struct Engine(Inner);

/// By device.
enum Inner {
    Cpu(Box<RankEngine<Cpu>>),
    Cuda(Box<RankEngine<Cuda>>),
}

/// What does not depend on the device.
macro_rules! on_device {
    ($engine:expr, $rank:ident => $do:expr) => {
        match $engine {
            Inner::Cpu($rank) => $do,
            Inner::Cuda($rank) => $do,
        }
    };
}

impl Engine {
    /// Loads the dense weights and maps the KV cache; it serves nothing before it takes a seat.
    ///
    /// # Errors
    ///
    /// [`EngineError`] if weights cannot be loaded or memory is refused.
    pub(crate) fn unseated(
        model: &Model,
        transport: Transport,
        threads: usize,
        kv: KvBlocks,
    ) -> Result<Self, EngineError> {
        Ok(Self(match &model.platform {
            Platform::Cpu => {
                Inner::Cpu(Box::new(RankEngine::unseated(model, transport, threads, kv)?))
            }
            Platform::Cuda(_) => {
                Inner::Cuda(Box::new(RankEngine::unseated(model, transport, threads, kv)?))
            }
        }))
    }

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
        let transport = Transport::Local(Arc::clone(hub));
        let mut engine = Self::unseated(model, transport, threads, kv)?;
        engine.take(Seat::load(model, shard, &|| true)?)?;
        Ok(engine)
    }

    /// Faults strike it that are armed there.
    pub(crate) fn hook(&mut self, hooks: Hooks) {
        on_device!(&mut self.0, rank => rank.hooks = hooks);
    }

    /// Takes a seat, between steps. The KV cache keeps its bytes.
    ///
    /// # Errors
    ///
    /// [`EngineError::Exchange`]; the engine then serves what it served before.
    pub fn take(&mut self, seat: Seat) -> Result<(), EngineError> {
        on_device!(&mut self.0, rank => rank.take(seat))
    }

    /// What its experts have to do.
    pub(crate) fn tally(&self) -> Arc<Tally> {
        on_device!(&self.0, rank => Arc::clone(&rank.tally))
    }

    /// Rows that its experts had since the last call, `[moe layers][experts]`; `None` if none had any. Once a worker
    /// serves with it, that worker asks.
    #[must_use]
    pub fn take_load(&self) -> Option<Vec<Vec<u64>>> {
        self.tally().take()
    }

    fn view(&self) -> Option<&View> {
        on_device!(&self.0, rank => rank.seated.as_ref().map(|seated| seated.joined.view()))
    }

    /// Its rank in the view it serves; 0 before the first.
    #[must_use]
    pub fn rank(&self) -> Rank {
        self.view().map_or(Rank(0), |view| view.me)
    }

    /// The epoch it serves.
    #[must_use]
    pub fn epoch(&self) -> Option<Epoch> {
        self.view().map(|view| view.epoch)
    }

    /// Ends the running step of this rank from another thread.
    pub(crate) fn aborter(&self) -> Option<Aborter> {
        on_device!(&self.0, rank => rank.seated.as_ref().map(|seated| seated.joined.aborter()))
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
        observer: Option<&mut dyn Observer>,
    ) -> Result<Vec<Sampled>, EngineError> {
        on_device!(&mut self.0, rank => rank.step(step, batch, deadline, Eyes { observer }))
    }
}

/// A rank on one kind of device.
struct RankEngine<D: Backend> {
    device: D,
    dense: Arc<Dense<D>>,
    cache: D::Cache,
    forward: Forward<D>,
    row_bytes: usize,
    transport: Transport,
    hooks: Hooks,
    dtype: Dtype,
    /// Of its experts, for other ranks.
    results: D::Wire,
    tally: Arc<Tally>,
    seated: Option<Seated<D>>,
}

struct Seated<D: Backend> {
    experts: Vec<D::Experts>,
    served: Served,
    joined: Joined,
}

impl<D: Backend> RankEngine<D> {
    fn unseated(
        model: &Model,
        transport: Transport,
        threads: usize,
        kv: KvBlocks,
    ) -> Result<Self, EngineError> {
        let config = &model.config;
        let mut device = D::open(model, threads, transport.row_memory())?;
        let dense = D::dense(model)?;
        let blocks = |pool| match pool {
            Pool::Full => kv.full,
            Pool::Chunked(_) => kv.chunked,
        };
        let cache = device.new_cache(model, &blocks)?;
        let mut forward = Forward::new(&device, config, 0, (kv.full, kv.chunked));
        device.reserve_for(model, &mut forward)?;
        Ok(Self {
            forward,
            row_bytes: device.row_bytes(config.hidden),
            results: device.wire(),
            device,
            dense,
            cache,
            transport,
            hooks: Hooks::default(),
            dtype: model.dtype,
            tally: Arc::new(Tally::new(config.moe_layers().len(), config.experts)),
            seated: None,
        })
    }

    fn take(&mut self, seat: Seat) -> Result<(), EngineError> {
        let Seat { experts, local, view, peers } = seat;
        let experts = D::take(experts);
        self.device.expect_rows(&experts, view.ranks, &mut self.results)?;
        let served = Served { tally: Arc::clone(&self.tally), local };
        match &mut self.seated {
            Some(seated) => {
                seated.joined.reconfigure(view)?;
                seated.experts = experts;
                seated.served = served;
            }
            None => {
                let joined = self.transport.join(view, &peers)?;
                self.seated = Some(Seated { experts, served, joined });
            }
        }
        Ok(())
    }

    fn step(
        &mut self,
        step: StepId,
        batch: &StepBatch,
        deadline: Instant,
        eyes: Eyes<'_>,
    ) -> Result<Vec<Sampled>, EngineError> {
        let Seated { experts, served, joined } =
            self.seated.as_mut().ok_or(EngineError::Unseated)?;
        let rank = RankStep {
            device: &mut self.device,
            forward: &mut self.forward,
            row_bytes: self.row_bytes,
            results: &mut self.results,
            dtype: self.dtype,
            hooks: &self.hooks,
            served,
            deadline,
        };
        let pass = Pass { dense: &self.dense, experts, cache: &mut self.cache, step: batch };
        match joined {
            Joined::Local(local) => rank.run(step, pass, local, eyes),
            Joined::Tcp(tcp) => rank.run(step, pass, tcp, eyes),
        }
    }
}

/// What a rank's step needs besides its operands.
struct RankStep<'a, D: Backend> {
    device: &'a mut D,
    forward: &'a mut Forward<D>,
    row_bytes: usize,
    results: &'a mut D::Wire,
    dtype: Dtype,
    hooks: &'a Hooks,
    served: &'a Served,
    deadline: Instant,
}

impl<D: Backend> RankStep<'_, D> {
    fn run<A: Plantable>(
        self,
        step: StepId,
        mut pass: Pass<'_, D>,
        all2all: &mut A,
        mut eyes: Eyes<'_>,
    ) -> Result<Vec<Sampled>, EngineError> {
        let epoch = all2all.view().epoch;
        let mut all2all = Struck::new(all2all, self.hooks, self.dtype);
        all2all.begin_step(epoch, step, self.deadline)?;
        let rows = Rows { bytes: self.row_bytes, dtype: self.dtype };
        let results = (rows, self.results);
        let mut exchange = StepExchange::new(&mut all2all, step, results, self.served);
        let result = self.forward.run(self.device, &mut pass, &mut exchange, &mut eyes);
        let mut found = exchange.found;
        let result = result.and_then(|sampled| {
            if found.is_none() {
                let bad = self.device.bad_value(self.forward.logits())?;
                found = bad.and_then(|bad| located(bad, pass.step));
            }
            Ok(sampled)
        });
        match result {
            Ok(sampled) => match (all2all.end_step(), found) {
                (StepOutcome::Faulted(fault), _) => Err(EngineError::Step(fault)),
                (StepOutcome::Complete, Some(found)) => Err(EngineError::NonFinite(found)),
                (StepOutcome::Complete, None) => Ok(sampled),
            },
            Err(ForwardError::Exchange(error)) => {
                all2all.end_step();
                Err(error.into())
            }
            Err(ForwardError::Device(error)) => {
                // The others wait for this rank's rows: tell them at once.
                all2all.aborter().abort(epoch, Reason::Abandoned);
                all2all.end_step();
                Err(error.into())
            }
        }
    }
}

/// What the device found, in terms of the step.
fn located(bad: Bad, step: &StepBatch) -> Option<NonFinite> {
    let layer = |layer: usize| u16::try_from(layer).expect("layers are numbered in 16 bits");
    Some(match bad.place {
        BadPlace::Hidden { layer: l } => {
            NonFinite { place: Place::Hidden { layer: layer(l) }, row: bad.row }
        }
        BadPlace::Routed { layer: l } => {
            NonFinite { place: Place::Routed { layer: layer(l) }, row: bad.row }
        }
        BadPlace::Logits => {
            NonFinite { place: Place::Logits, row: step.samples.get(bad.row)?.row as usize }
        }
    })
}
