//! The gRPC face of a worker.

use crate::background::Background;
use crate::engine::{Seat, Shard};
use crate::error::EngineError;
use crate::joined::Haste;
use crate::peers;
use crate::runner::{self, Job, Neighbour, Runner};
use crate::weights::Model;
use all2all::tcp::Peer;
use ids::{Epoch, Rank};
use pb::worker_server::WorkerServer;
use placement::View;
use proto::pb;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Answers that wait for a router to read them.
const ANSWERS_MAX: usize = 16;

/// Beats go on for this long after the last step has come: longer than the router waits for any.
const BEATS_LAST: Duration = Duration::from_secs(120);

/// A step that takes longer may wait for a peer that is not heard any more.
const LONG_STEP: Duration = Duration::from_secs(1);

/// Who is not heard for so much longer than it takes to notice is told of: a busy machine is silent for a while, too.
const DEAF: Duration = Duration::from_millis(500);

/// Implements `herd.v1.Worker`.
pub(crate) struct Service {
    model: Arc<Model>,
    runner: Runner,
    /// Moves experts between processes.
    background: Option<Background>,
    incarnation: String,
    profile: String,
    /// The newest epoch it was asked to prepare.
    epoch: Arc<AtomicU64>,
    /// The view of that epoch. A deposed leader and its successor may both come with this number; the
    /// first one's view is the only one that this worker will ever serve under it.
    newest: Mutex<Option<View>>,
    /// Closes when the worker is dropped.
    stopped: watch::Receiver<()>,
    /// Open step streams.
    streams: watch::Sender<usize>,
}

impl Service {
    pub(crate) fn new(
        model: Arc<Model>,
        (runner, background): (&Runner, Option<Background>),
        (incarnation, profile): (String, String),
        stopped: watch::Receiver<()>,
    ) -> Self {
        let (runner, epoch) = (runner.clone(), Arc::default());
        let streams = watch::channel(0).0;
        Self {
            model,
            runner,
            background,
            incarnation,
            profile,
            epoch,
            newest: Mutex::default(),
            stopped,
            streams,
        }
    }

    /// The newest epoch it was asked to prepare.
    pub(crate) fn epoch(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.epoch)
    }

    /// The number of open step streams.
    pub(crate) fn streams(&self) -> watch::Receiver<usize> {
        self.streams.subscribe()
    }

    pub(crate) fn into_server(self) -> WorkerServer<Self> {
        WorkerServer::new(self)
            .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
    }

    /// A seat with all its experts; how many came out of peers' memory and from the checkpoint.
    async fn load(&self, view: &View, rank: Rank) -> Result<(Seat, u32, u32), Status> {
        let (newest, epoch) = (Arc::clone(&self.epoch), view.epoch.0);
        let still_wanted = move || newest.load(Ordering::SeqCst) == epoch;
        let wanted = experts_of(view, rank);
        // What an earlier view needed and no seat holds any more makes room first.
        let (model, kept) = (Arc::clone(&self.model), wanted.clone());
        let forgetting = tokio::task::spawn_blocking(move || model.forget_unused(&kept));
        forgetting.await.map_err(|error| Status::internal(error.to_string()))?;
        let missing = self.model.missing(&wanted).len();
        let background = self.background.as_ref().map(Background::handle);
        let movers = (&self.model, background.as_ref());
        peers::take(movers, (view, rank), &self.model.missing(&wanted), &still_wanted).await;
        let left = self.model.missing(&wanted).len();
        let (model, view) = (Arc::clone(&self.model), view.clone());
        // Loading reads files: not on the runtime's threads.
        let loading =
            tokio::task::spawn_blocking(move || seat(&model, (&view, rank), &still_wanted));
        let loaded = loading.await.map_err(|error| Status::internal(error.to_string()))?;
        let seat = loaded.map_err(|error| Status::internal(error.to_string()))?;
        let count = |experts: usize| u32::try_from(experts).unwrap_or(u32::MAX);
        Ok((seat, count(missing.saturating_sub(left)), count(left)))
    }

    /// Waits for the connections to the members of a view, lest its first step does; the ranks that
    /// stay out of reach.
    async fn unreached(&self, addresses: Vec<Peer>, haste: Haste) -> Result<Vec<u32>, Status> {
        let (runner, peers) = (self.runner.clone(), addresses.clone());
        let waiting = tokio::task::spawn_blocking(move || runner.unreached(&peers, haste));
        let missing = waiting.await.map_err(|error| Status::internal(error.to_string()))?;
        let ranked = (0..).zip(&addresses);
        Ok(ranked.filter(|(_, peer)| missing.contains(peer)).map(|(rank, _)| rank).collect())
    }

    /// Whether the view means this worker.
    fn check(&self, view: &View, rank: usize) -> Result<(), Status> {
        let refuse = |what: &str, theirs: &str, ours: &str| {
            let text = format!("{}: {what} is {theirs}, this worker's {ours}", view.epoch);
            Err(Status::failed_precondition(text))
        };
        let Some(member) = view.members.get(rank) else {
            let text = format!("{} has {} ranks, not {rank}", view.epoch, view.members.len());
            return Err(Status::invalid_argument(text));
        };
        if member.incarnation != self.incarnation {
            return refuse("the incarnation", &member.incarnation, &self.incarnation);
        }
        if view.profile != self.profile {
            return refuse("the numeric profile", &view.profile, &self.profile);
        }
        let fingerprint = self.model.config.fingerprint();
        if view.model != fingerprint {
            return refuse("the model", &view.model, &fingerprint);
        }
        // Views are put whole.
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        match &*newest {
            Some(known) if view.epoch < known.epoch => {
                return refuse("the epoch", "over", &known.epoch.to_string());
            }
            Some(known) if view.epoch == known.epoch && view != known => {
                let text = format!("{} is another view here; plan under a later epoch", view.epoch);
                return Err(Status::failed_precondition(text));
            }
            Some(_) | None => {}
        }
        *newest = Some(view.clone());
        self.epoch.store(view.epoch.0, Ordering::SeqCst);
        Ok(())
    }
}

#[tonic::async_trait]
impl pb::worker_server::Worker for Service {
    type StepsStream = ReceiverStream<Result<pb::StepResult, Status>>;

    async fn prepare(
        &self,
        request: Request<pb::PrepareRequest>,
    ) -> Result<Response<pb::PrepareResponse>, Status> {
        let pb::PrepareRequest { view, rank, urgent } = request.into_inner();
        let view = view.ok_or_else(|| Status::invalid_argument("the request lacks the view"))?;
        let view = proto::view_from_wire(view)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let rank = u16::try_from(rank)
            .map_err(|_| Status::invalid_argument(format!("rank {rank} is beyond 65535")))?;
        self.check(&view, usize::from(rank))?;
        let epoch = view.epoch;
        let incarnations: Vec<String> =
            view.members.iter().map(|member| member.incarnation.clone()).collect();
        if urgent {
            self.runner.abort_without(&incarnations);
        }
        let addresses = addresses(&view).map_err(|error| Status::internal(error.to_string()))?;
        self.runner.connect(epoch, &addresses);
        let (seat, from_peers, from_disk) = self.load(&view, Rank(rank)).await?;
        let neighbour = |member: &placement::Member| Neighbour {
            incarnation: member.incarnation.clone(),
            address: member.address.clone(),
        };
        let members = view.members.iter().map(neighbour).collect();
        self.runner.offer(seat.with_peers(addresses.clone()), members);
        let haste = if urgent { Haste::Urgent } else { Haste::Planned };
        let unreached = self.unreached(addresses, haste).await?;
        let epoch = epoch.0;
        Ok(Response::new(pb::PrepareResponse { epoch, from_peers, from_disk, unreached }))
    }

    async fn share(
        &self,
        request: Request<pb::ShareRequest>,
    ) -> Result<Response<pb::ShareResponse>, Status> {
        let pb::ShareRequest { epoch, layers } = request.into_inner();
        let shares = proto::shares_from_wire(layers)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        self.runner.share(Epoch(epoch), shares);
        Ok(Response::new(pb::ShareResponse {}))
    }

    async fn steps(
        &self,
        request: Request<Streaming<pb::Step>>,
    ) -> Result<Response<Self::StepsStream>, Status> {
        let (answer, answers) = mpsc::channel(ANSWERS_MAX);
        let jobs = self.runner.jobs();
        let mut stopped = self.stopped.clone();
        let (runner, streams) = (self.runner.clone(), self.streams.clone());
        streams.send_modify(|open| *open += 1);
        telemetry::spawn("worker.steps", async move {
            tokio::select! {
                () = forward(request.into_inner(), (&runner, jobs), answer) => {}
                // Only ever an error: the worker was dropped.
                _ = stopped.changed() => {}
            }
            streams.send_modify(|open| *open -= 1);
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}

/// `[moe layers]`: what the rank holds in the view.
fn experts_of(view: &View, rank: Rank) -> Vec<Vec<usize>> {
    let of_layer = |layer| -> Vec<usize> {
        view.placement.local_experts(layer, rank).iter().map(|expert| expert.index()).collect()
    };
    (0..view.placement.moe_layers()).map(of_layer).collect()
}

fn seat(
    model: &Model,
    (view, rank): (&View, Rank),
    still_wanted: &(dyn Fn() -> bool + Sync),
) -> Result<Seat, EngineError> {
    let placement = &view.placement;
    let of_layer = |layer| {
        let of_rank = |rank| placement.local_experts(layer, Rank(rank));
        (0..placement.ranks()).map(of_rank).collect()
    };
    let held: Vec<_> = (0..placement.moe_layers()).map(of_layer).collect();
    let targets = |layer, expert| placement.targets(layer, expert, rank);
    let (epoch, ranks) = (view.epoch, placement.ranks());
    let shard = Shard { epoch, rank, ranks, held: &held, targets: &targets };
    Seat::load(model, &shard, still_wanted)
}

/// Where the members exchange rows; none if they are threads of one process.
fn addresses(view: &View) -> Result<Vec<Peer>, EngineError> {
    if view.members.iter().all(|member| member.exchange.is_empty()) {
        return Ok(Vec::new());
    }
    let peer = |member: &placement::Member| {
        let address = member.exchange.parse().map_err(|_| {
            let (worker, address) = (member.worker, &member.exchange);
            EngineError::Io(format!("{worker} exchanges rows at {address:?}, no host:port"))
        })?;
        Ok(Peer { address, incarnation: member.incarnation.clone() })
    };
    view.members.iter().map(peer).collect()
}

/// Hands the steps of one router to the thread until either leaves.
async fn forward(
    mut steps: Streaming<pb::Step>,
    (runner, jobs): (&Runner, mpsc::Sender<Job>),
    answer: mpsc::Sender<Result<pb::StepResult, Status>>,
) {
    // Signs of life, as long as a step may be running.
    let mut beats = tokio::time::interval(proto::BEAT);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut last, mut newest): (Option<Instant>, u64) = (None, 0);
    let mut deaf: Option<Instant> = None;
    loop {
        let message = tokio::select! {
            message = steps.message() => message,
            _ = beats.tick(), if last.is_some_and(|last| last.elapsed() < BEATS_LAST) => {
                // A full channel is sign enough.
                let is_long = last.is_some_and(|last| LONG_STEP <= last.elapsed());
                let mut unheard = if is_long { runner.unheard() } else { Vec::new() };
                deaf = if unheard.is_empty() { None } else { deaf.or_else(|| Some(Instant::now())) };
                if deaf.is_some_and(|since| since.elapsed() < DEAF) {
                    unheard.clear();
                }
                let beat = pb::StepResult { step: newest, unheard, ..Default::default() };
                let _full = answer.try_send(Ok(beat));
                continue;
            }
        };
        last = Some(Instant::now());
        let step = match message {
            Ok(Some(step)) => step,
            Ok(None) => return,
            Err(status) => {
                tracing::debug!(%status, "the router's step stream broke");
                return;
            }
        };
        if let Err(outranked) = runner.admit(&step) {
            tracing::warn!(term = step.router_term, leads = outranked.term, "router refused");
            if answer.send(Ok(runner::refusal(&step, outranked))).await.is_err() {
                return;
            }
            continue;
        }
        runner.supersede(Epoch(step.epoch));
        newest = step.step;
        let job = Job { step, received: Instant::now(), answer: answer.clone() };
        if jobs.send(job).await.is_err() {
            // The router may be gone too.
            let _left = answer.send(Err(Status::unavailable("the worker's thread ended"))).await;
            return;
        }
    }
}
