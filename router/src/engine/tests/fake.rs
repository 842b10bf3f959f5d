//! A cluster of toy workers and its coordinator, served over loopback.
//!
//! A worker's KV memory holds the tokens themselves; the next token is a hash of what the block
//! table finds there. So a wrong table, a lost token or a skipped step shows in the output.

use futures::{Stream, StreamExt, stream};
use proto::pb::{
    self, coordinator_server as coordinator, coordinator_server::Coordinator,
    worker_server as worker, worker_server::Worker,
};
use std::time::Duration;
use std::{
    collections::{BTreeMap, BTreeSet},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};
use tokio::{net::TcpListener, sync::watch};
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status, Streaming};

pub(crate) const BLOCK_TOKENS: u32 = 4;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The token after `history`. Banned tokens are stepped over.
pub(crate) fn next_token(history: &[u32], seed: u64, banned: &[u32]) -> u32 {
    let mix = |hash: u64, value: u64| (hash ^ value).wrapping_mul(0x0000_0100_0000_01b3);
    let hash = history.iter().fold(seed ^ 0xcbf2_9ce4, |hash, &t| mix(hash, u64::from(t)));
    let mut token = u32::try_from((hash ^ (hash >> 29)) % 50).unwrap();
    while banned.contains(&token) {
        token = (token + 1) % 50;
    }
    token
}

/// Faults to inject and what was seen. Shared by the workers of a cluster.
#[derive(Default)]
pub(crate) struct Script {
    /// Steps that fail on rank 0, once each.
    pub(crate) faults: Mutex<BTreeSet<u64>>,
    /// A step at which the stream of rank 0 breaks; 0: none.
    pub(crate) break_at: AtomicU64,
    /// A step in which rank 0 says that it does not hear rank 1, and takes long; 0: none.
    pub(crate) deaf_at: AtomicU64,
    /// Faults that the router reported.
    pub(crate) reported: Mutex<Vec<pb::Fault>>,
    /// A seed whose sequence is not finite, so many times more.
    pub(crate) poisoned: Mutex<Option<(u64, u32)>>,
    /// The highest router term seen; steps of lower ones are refused.
    pub(crate) term: AtomicU64,
    pub(crate) failed: AtomicU64,
    /// The last step of any rank.
    pub(crate) last: AtomicU64,
    /// Positions computed by all ranks, repeated ones included.
    pub(crate) tokens: AtomicU64,
    /// What a token of a step takes, in milliseconds.
    pub(crate) token_ms: AtomicU64,
    /// Most tokens of a step with several sequences.
    pub(crate) crowd: AtomicU64,
    /// The last step that computed each sequence.
    pub(crate) computed: Mutex<BTreeMap<u64, u64>>,
    /// By rank and sequence: tokens of the copies.
    pub(crate) copies: Mutex<BTreeMap<(u32, u64), Vec<u32>>>,
    /// Copies are lost, and nobody says so.
    pub(crate) forgets: AtomicBool,
    /// Positions that came out of copies.
    pub(crate) restored: AtomicU64,
    /// Steps that failed because a copy was missing.
    pub(crate) missed: AtomicU64,
}

impl Script {
    /// Counts a step, and returns how many milliseconds it takes.
    fn count(&self, step: &pb::Step) -> u64 {
        self.last.fetch_max(step.step, Ordering::SeqCst);
        for slice in &step.slices {
            self.computed.lock().unwrap().insert(slice.sequence, step.step);
        }
        let tokens = step.slices.iter().map(|slice| slice.tokens.len() as u64).sum();
        self.tokens.fetch_add(tokens, Ordering::SeqCst);
        if 1 < step.slices.len() {
            self.crowd.fetch_max(tokens, Ordering::SeqCst);
        }
        tokens * self.token_ms.load(Ordering::SeqCst)
    }
}

impl Script {
    /// What copies a rank has lost sight of; sequences are restored into its memory otherwise.
    fn restore(&self, rank: u32, step: &pb::Step, memory: &mut Memory) -> Vec<u64> {
        let mut copies = self.copies.lock().unwrap();
        copies.retain(|(of, id), _| *of != rank || !step.released.contains(id));
        let mut missing = Vec::new();
        for slice in step.slices.iter().filter(|slice| slice.restored != 0) {
            let copy = copies.get(&(rank, slice.sequence));
            match copy.filter(|copy| slice.restored as usize <= copy.len()) {
                Some(copy) => {
                    self.restored.fetch_add(slice.restored.into(), Ordering::SeqCst);
                    memory.put(slice, 0, &copy[..slice.restored as usize]);
                }
                None => missing.push(slice.sequence),
            }
        }
        missing
    }

    fn poison(&self, step: &pb::Step, result: &mut pb::StepResult) {
        let Some((seed, times)) = &mut *self.poisoned.lock().unwrap() else { return };
        let is_it = |s: &&pb::Slice| s.sample.as_ref().is_some_and(|s| s.seed == *seed);
        if let Some(slice) = step.slices.iter().find(is_it).filter(|_| 0 < *times) {
            *times -= 1;
            result.fault = "planted".into();
            result.not_finite = Some(slice.sequence);
            result.sampled.clear();
        }
    }

    /// Rows travel at once here.
    fn back_up(&self, slice: &pb::Slice, memory: &Memory) {
        let Some(pb::Backup { rank, start, end }) = slice.backup else { return };
        let mut copies = self.copies.lock().unwrap();
        let copy = copies.entry((rank, slice.sequence)).or_default();
        if start as usize <= copy.len() {
            copy.truncate(start as usize);
            copy.extend(memory.get(slice, start..end));
        }
    }

    /// Every copy, every time.
    fn held(&self, rank: u32) -> Vec<pb::Held> {
        if self.forgets.load(Ordering::SeqCst) {
            return Vec::new();
        }
        let copies = self.copies.lock().unwrap();
        let of_rank = copies.iter().filter(|((of, _), _)| *of == rank);
        let held = |((_, sequence), copy): (&(u32, u64), &Vec<u32>)| pb::Held {
            sequence: *sequence,
            positions: u32::try_from(copy.len()).unwrap(),
            has_gap: false,
        };
        of_rank.map(held).collect()
    }
}

struct FakeWorker {
    rank: u32,
    script: Arc<Script>,
    /// Outlives its streams, as a process does.
    memory: Arc<Mutex<Memory>>,
}

#[derive(Default)]
struct Memory {
    tokens: BTreeMap<(u32, u32), u32>,
}

impl Memory {
    fn put(&mut self, slice: &pb::Slice, start: u32, tokens: &[u32]) {
        for (p, &token) in (start..).zip(tokens) {
            self.tokens.insert(place(slice, p), token);
        }
    }

    fn get(&self, slice: &pb::Slice, positions: std::ops::Range<u32>) -> Vec<u32> {
        positions.map(|p| self.tokens[&place(slice, p)]).collect()
    }

    fn run(&mut self, slice: &pb::Slice) -> Option<pb::Sampled> {
        self.put(slice, slice.start, &slice.tokens);
        let sample = slice.sample.as_ref()?;
        let end = slice.start + u32::try_from(slice.tokens.len()).unwrap();
        let history = self.get(slice, 0..end);
        let token = next_token(&history, sample.seed, &sample.banned);
        let logprob = sample.logprobs.map(|_| -1.0);
        Some(pb::Sampled { sequence: slice.sequence, token, logprob, top: Vec::new() })
    }
}

/// Block of a position, and its place in there.
fn place(slice: &pb::Slice, position: u32) -> (u32, u32) {
    (slice.full_blocks[(position / BLOCK_TOKENS) as usize], position % BLOCK_TOKENS)
}

#[tonic::async_trait]
impl Worker for FakeWorker {
    type StepsStream = Answers<pb::StepResult>;

    async fn prepare(
        &self,
        _request: Request<pb::PrepareRequest>,
    ) -> Result<Response<pb::PrepareResponse>, Status> {
        Err(Status::unimplemented("the router never prepares"))
    }

    async fn share(
        &self,
        _request: Request<pb::ShareRequest>,
    ) -> Result<Response<pb::ShareResponse>, Status> {
        Err(Status::unimplemented("the router never shares"))
    }

    async fn steps(
        &self,
        request: Request<Streaming<pb::Step>>,
    ) -> Result<Response<Self::StepsStream>, Status> {
        let (rank, script) = (self.rank, self.script.clone());
        let memory = self.memory.clone();
        let pause_ms = Arc::new(AtomicU64::new(0));
        let work_ms = Arc::clone(&pause_ms);
        let answers = request.into_inner().map(move |step| {
            let step = step?;
            let term = script.term.fetch_max(step.router_term, Ordering::SeqCst);
            if step.router_term < term {
                return Ok(pb::StepResult {
                    epoch: step.epoch,
                    step: step.step,
                    fault: "refused".into(),
                    router_term: term,
                    ..Default::default()
                });
            }
            pause_ms.store(script.count(&step), Ordering::SeqCst);
            let breaks = script.break_at.load(Ordering::SeqCst);
            if rank == 0 && breaks != 0 && breaks <= step.step {
                script.break_at.store(0, Ordering::SeqCst);
                return Err(Status::aborted("the stream breaks"));
            }
            let mut memory = memory.lock().unwrap();
            let missing = script.restore(rank, &step, &mut memory);
            let mut result = pb::StepResult {
                epoch: step.epoch,
                step: step.step,
                rank,
                held: script.held(rank),
                ..Default::default()
            };
            if !missing.is_empty() {
                script.missed.fetch_add(1, Ordering::SeqCst);
                (result.fault, result.missing) = ("a copy is missing".into(), missing);
                return Ok(result);
            }
            result.sampled = step.slices.iter().filter_map(|slice| memory.run(slice)).collect();
            step.slices.iter().for_each(|slice| script.back_up(slice, &memory));
            drop(memory);
            if rank == 0 && script.faults.lock().unwrap().remove(&step.step) {
                script.failed.fetch_add(1, Ordering::SeqCst);
                result.fault = "planted".into();
                result.sampled.clear();
            }
            script.poison(&step, &mut result);
            Ok(result)
        });
        let script = self.script.clone();
        let answers = answers.flat_map(move |answer| {
            let is_deaf = answer.as_ref().is_ok_and(|result: &pb::StepResult| {
                rank == 0 && result.step == script.deaf_at.load(Ordering::SeqCst)
            });
            let step = answer.as_ref().map_or(0, |result| result.step);
            let beat = pb::StepResult { step, unheard: vec![1], ..Default::default() };
            let beats = stream::iter(is_deaf.then_some(Ok(beat)));
            let work = Duration::from_millis(work_ms.load(Ordering::SeqCst));
            let pause = if is_deaf { LONG_STEP } else { work };
            beats.chain(stream::once(async move {
                tokio::time::sleep(pause).await;
                answer
            }))
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

/// What a step takes that waits for a rank.
const LONG_STEP: Duration = Duration::from_millis(100);

struct FakeCoordinator(watch::Receiver<Option<pb::View>>, Arc<Script>);

#[tonic::async_trait]
impl Coordinator for FakeCoordinator {
    type RegisterStream = Answers<pb::RegisterEvent>;
    type WatchViewStream = Answers<pb::View>;

    async fn register(
        &self,
        _request: Request<pb::RegisterRequest>,
    ) -> Result<Response<Self::RegisterStream>, Status> {
        Err(Status::unimplemented("no worker registers here"))
    }

    async fn watch_view(
        &self,
        _request: Request<pb::WatchViewRequest>,
    ) -> Result<Response<Self::WatchViewStream>, Status> {
        let views = WatchStream::new(self.0.clone());
        Ok(Response::new(Box::pin(views.filter_map(|view| async { view.map(Ok) }))))
    }

    async fn report(
        &self,
        request: Request<pb::ReportRequest>,
    ) -> Result<Response<pb::ReportResponse>, Status> {
        if let Some(pb::report_request::News::Fault(fault)) = request.into_inner().news {
            self.1.reported.lock().unwrap().push(fault);
        }
        Ok(Response::new(pb::ReportResponse {}))
    }

    async fn drain(
        &self,
        _: Request<pb::DrainRequest>,
    ) -> Result<Response<pb::DrainResponse>, Status> {
        Err(Status::unimplemented("nobody drains here"))
    }

    async fn rebalance(
        &self,
        _request: Request<pb::RebalanceRequest>,
    ) -> Result<Response<pb::RebalanceResponse>, Status> {
        Err(Status::unimplemented("nobody asks a fake"))
    }

    async fn scale(
        &self,
        _request: Request<pb::ScaleRequest>,
    ) -> Result<Response<pb::ScaleResponse>, Status> {
        Err(Status::unimplemented("nobody asks a fake"))
    }

    async fn status(
        &self,
        _request: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusResponse>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }
}

/// Workers and a coordinator that has no view yet.
pub(crate) struct Cluster {
    pub(crate) coordinator: String,
    pub(crate) script: Arc<Script>,
    workers: Vec<String>,
    /// Positions of others' sequences that each rank keeps.
    pub(crate) backup_tokens: AtomicU32,
    views: watch::Sender<Option<pb::View>>,
}

impl Cluster {
    pub(crate) async fn start(ranks: u32) -> Self {
        let script = Arc::new(Script::default());
        let mut workers = Vec::new();
        for rank in 0..ranks {
            let fake = FakeWorker { rank, script: script.clone(), memory: Arc::default() };
            let server = tonic::transport::Server::builder();
            workers.push(serve(server, worker::WorkerServer::new(fake)).await);
        }
        let (views, receiver) = watch::channel(None);
        let server = tonic::transport::Server::builder();
        let fake = coordinator::CoordinatorServer::new(FakeCoordinator(receiver, script.clone()));
        let coordinator = format!("http://{}", serve(server, fake).await);
        let backup_tokens = AtomicU32::new(0);
        Self { coordinator, script, workers, backup_tokens, views }
    }

    /// Publishes a view of the first `ranks` workers.
    pub(crate) fn publish(&self, epoch: u64, ranks: u32, full_blocks: u32) {
        let member = |rank: u32| pb::Member {
            worker: rank,
            rank,
            address: self.workers[rank as usize].clone(),
            incarnation: "fake".into(),
            pid: 1,
            device: "fake".into(),
            kv: Some(pb::KvPools {
                block_tokens: BLOCK_TOKENS,
                full_blocks,
                chunked_blocks: 64,
                chunk_tokens: 8,
                backup_tokens: self.backup_tokens.load(Ordering::SeqCst),
            }),
            context_tokens: 200,
            exchange: String::new(),
        };
        let replicas = pb::Replicas { ranks: vec![0] };
        self.views.send_replace(Some(pb::View {
            epoch,
            members: (0..ranks).map(member).collect(),
            placement: vec![pb::LayerPlacement { experts: vec![replicas] }],
            profile: "fake".into(),
            model: "fake".into(),
        }));
    }
}

async fn serve<S>(mut server: tonic::transport::Server, service: S) -> String
where
    S: tonic::codegen::Service<
            tonic::codegen::http::Request<tonic::body::Body>,
            Response = tonic::codegen::http::Response<tonic::body::Body>,
            Error = std::convert::Infallible,
        > + tonic::server::NamedService
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = server.add_service(service);
    telemetry::spawn("fake", async move {
        server.serve_with_incoming(proto::incoming(listener)).await.unwrap();
    });
    address
}
