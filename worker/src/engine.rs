//! One rank's steps: device, weights, KV cache and exchange of a view.

use crate::chaos::{Hooks, Struck};
use crate::error::EngineError;
use crate::exchange::{HostExchange, Rows, Served, StepExchange};
use crate::finite::{NonFinite, located};
use crate::joined::{Joined, Transport};
use crate::kv::KvBlocks;
use crate::loans::StepLoans;
use crate::observe::{Eyes, Observer};
use crate::plantable::Plantable;
use crate::platform::{Backend, Placed, Platform, Ranks};
use crate::tally::Tally;
use crate::weights::Model;
use all2all::local::{Hub, Lending};
use all2all::tcp::Peer;
use all2all::{Aborter, AllToAll, ExchangeError, Reason, Routes, StepOutcome, View};
use ids::{Epoch, ExpertId, Rank, StepId};
use kernels::cuda::Cuda;
use kernels::{Cpu, Dtype, Pool, RowsAt, Sampled, StepBatch};
use model::forward::{Forward, ForwardError, Pass};
use model::weights::Dense;
use placement::Shares;
use std::sync::Arc;
use std::time::Instant;

/// What a rank serves: who holds which expert, `[moe layers][ranks]` ascending, and who serves this one's rows of it.
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
            experts: model.experts(&local, &routes, still_wanted)?,
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

    /// Shares the rows of experts that have copies among these in other parts, between steps. No result depends on it.
    ///
    /// # Errors
    ///
    /// [`EngineError`] if it has no rank, the shares are of another placement, or memory is refused; nothing changes then.
    pub fn share(&mut self, shares: &Shares) -> Result<(), EngineError> {
        on_device!(&mut self.0, rank => rank.share(shares))
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

    /// Appends rows of the KV cache to `out`, between steps.
    ///
    /// # Errors
    ///
    /// [`EngineError`] if they are not there.
    pub(crate) fn read_rows(
        &mut self,
        at: &[RowsAt<'_>],
        out: &mut Vec<u8>,
    ) -> Result<(), EngineError> {
        on_device!(&mut self.0, rank => rank.device.read_kv_rows(&rank.cache, at, out))
    }

    /// Puts rows into blocks of the KV cache, between steps.
    ///
    /// # Errors
    ///
    /// [`EngineError`] if there are no such blocks.
    pub(crate) fn write_rows(&mut self, at: &RowsAt<'_>, rows: &[u8]) -> Result<(), EngineError> {
        on_device!(&mut self.0, rank => rank.device.write_kv_rows(&mut rank.cache, at, rows))
    }

    /// Fails a step that this rank cannot take part in, so that the others do not wait for it.
    pub(crate) fn abandon(&mut self, step: StepId, deadline: Instant) {
        on_device!(&mut self.0, rank => rank.abandon(step, deadline));
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
    #[must_use]
    pub fn aborter(&self) -> Option<Aborter> {
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
    /// Of a MoE layer, wherever they are.
    experts: usize,
    seated: Option<Seated<D>>,
}

struct Seated<D: Backend> {
    experts: Vec<D::Experts>,
    routes: D::Routes,
    served: Served,
    joined: Joined<D>,
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
            experts: config.experts,
            seated: None,
        })
    }

    fn take(&mut self, seat: Seat) -> Result<(), EngineError> {
        let Seat { experts, local, view, peers } = seat;
        let (experts, routes) = D::take(experts);
        let through_host = 1 < view.ranks && !matches!(self.transport, Transport::Local(_));
        let ranks = Ranks { count: view.ranks, through_host };
        self.device.expect_rows(&experts, ranks, &mut self.results)?;
        let served = Served { tally: Arc::clone(&self.tally), experts: self.experts, local };
        let joined = match self.seated.take() {
            Some(mut seated) => match seated.joined.reconfigure(view) {
                Ok(()) => seated.joined,
                Err(error) => {
                    self.seated = Some(seated);
                    return Err(error.into());
                }
            },
            None => self.transport.join(view, &peers)?,
        };
        self.seated = Some(Seated { experts, routes, served, joined });
        Ok(())
    }

    fn share(&mut self, shares: &Shares) -> Result<(), EngineError> {
        let seated = self.seated.as_mut().ok_or(EngineError::Unseated)?;
        let present = &seated.joined.view().routes;
        let routes = present.shared(|layer, expert| shares.parts(layer, expert))?;
        // A device may know steps again by what they name.
        if routes != **present {
            seated.routes = self.device.routes(&routes)?;
            seated.joined.reroute(Arc::new(routes));
        }
        Ok(())
    }

    fn abandon(&mut self, step: StepId, deadline: Instant) {
        match self.seated.as_mut().map(|seated| &mut seated.joined) {
            Some(Joined::Local(local)) => abandon(local, step, deadline),
            Some(Joined::Lending(lending)) => abandon(lending, step, deadline),
            Some(Joined::Tcp(tcp, _)) => abandon(&mut **tcp, step, deadline),
            None => {}
        }
    }

    fn step(
        &mut self,
        step: StepId,
        batch: &StepBatch,
        deadline: Instant,
        eyes: Eyes<'_>,
    ) -> Result<Vec<Sampled>, EngineError> {
        let Seated { experts, routes, served, joined } =
            self.seated.as_mut().ok_or(EngineError::Unseated)?;
        let rank = RankStep {
            step,
            device: &mut self.device,
            forward: &mut self.forward,
            dtype: self.dtype,
            hooks: &self.hooks,
            served,
            deadline,
        };
        let pass = Pass { dense: &self.dense, experts, cache: &mut self.cache, step: batch };
        let results = (self.row_bytes, &mut self.results);
        match joined {
            Joined::Lending(lending) => rank.lend(pass, lending, routes, eyes),
            Joined::Tcp(tcp, Some(lone)) => {
                tcp.begin_step(tcp.view().epoch, step, deadline)?;
                let result = rank.lend(pass, lone, routes, eyes);
                match tcp.end_step() {
                    StepOutcome::Complete => result,
                    StepOutcome::Faulted(fault) => result.and(Err(EngineError::Step(fault))),
                }
            }
            Joined::Local(local) => rank.send(pass, local, results, eyes),
            Joined::Tcp(tcp, None) => rank.send(pass, &mut **tcp, results, eyes),
        }
    }
}

/// What a rank's step needs besides its operands.
struct RankStep<'a, D: Backend> {
    step: StepId,
    device: &'a mut D,
    forward: &'a mut Forward<D>,
    dtype: Dtype,
    hooks: &'a Hooks,
    served: &'a Served,
    deadline: Instant,
}

/// What came of a forward pass.
type Passed<T> = Result<T, ForwardError<ExchangeError>>;

impl<D: Backend> RankStep<'_, D> {
    /// A step whose rows travel through the host's memory.
    fn send<A: HostExchange + Plantable>(
        self,
        mut pass: Pass<'_, D>,
        all2all: &mut A,
        (row_bytes, results): (usize, &mut D::Wire),
        mut eyes: Eyes<'_>,
    ) -> Result<Vec<Sampled>, EngineError> {
        let mut all2all = self.begin(all2all)?;
        let rows = Rows { bytes: row_bytes, dtype: self.dtype };
        let mut exchange = StepExchange::new(&mut all2all, self.step, (rows, results), self.served);
        let passed = self.forward.run(self.device, &mut pass, &mut exchange, &mut eyes);
        let found = exchange.found;
        let passed = passed.and_then(|sampled| {
            let bad = self.device.noted(self.forward.logits())?.bad;
            Ok((sampled, found.or_else(|| located(bad?, pass.step))))
        });
        end(&mut all2all, passed)
    }

    /// A step whose rows stay where they are.
    fn lend(
        self,
        mut pass: Pass<'_, D>,
        all2all: &mut Lending<D::Lent>,
        routes: &D::Routes,
        mut eyes: Eyes<'_>,
    ) -> Result<Vec<Sampled>, EngineError> {
        let mut all2all = self.begin(all2all)?;
        let mut exchange = StepLoans::new(&mut all2all, self.step, routes);
        let passed = self.forward.run(self.device, &mut pass, &mut exchange, &mut eyes);
        let passed = passed.and_then(|sampled| {
            let noted = self.device.noted(self.forward.logits())?;
            self.served.count_noted(noted.served);
            Ok((sampled, noted.bad.and_then(|bad| located(bad, pass.step))))
        });
        end(&mut all2all, passed)
    }

    fn begin<'s, A: Plantable>(&self, all2all: &'s mut A) -> Result<Struck<'s, A>, EngineError>
    where
        Self: 's,
    {
        let epoch = all2all.view().epoch;
        let mut all2all = Struck::new(all2all, self.hooks, self.dtype);
        all2all.begin_step(epoch, self.step, self.deadline)?;
        Ok(all2all)
    }
}

/// Begins a step only to end it for all ranks.
fn abandon<A: AllToAll>(all2all: &mut A, step: StepId, deadline: Instant) {
    let epoch = all2all.view().epoch;
    // If it does not begin, nobody waits in it.
    if all2all.begin_step(epoch, step, deadline).is_ok() {
        all2all.aborter().abort(epoch, Reason::Abandoned);
        all2all.end_step();
    }
}

/// Ends a step. Of what it chose nothing counts if a value was not finite.
fn end<A: Plantable>(
    all2all: &mut Struck<'_, A>,
    passed: Passed<(Vec<Sampled>, Option<NonFinite>)>,
) -> Result<Vec<Sampled>, EngineError> {
    match passed {
        Ok((sampled, found)) => match (all2all.end_step(), found) {
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
            all2all.aborter().abort(all2all.view().epoch, Reason::Abandoned);
            all2all.end_step();
            Err(error.into())
        }
    }
}
