//! The engine: continuous batching over the workers of the current view.
//!
//! One task owns everything that changes: the journal of live sequences, the scheduler and the step
//! streams. It forms a step, waits for all ranks, commits, delivers, and forms the next. When a
//! step fails nothing of it counts; it is planned again, on the same view or on the next one, where
//! the journal's sequences are prefilled again. So a stream pauses but never errs.
//!
//! ```text
//!             view, all step streams open              broken stream, or a newer view
//! waiting ────────────────────────────────▶ serving ────────────────────────────────▶ waiting
//!                                           serving ── failed step ─▶ serving (retry)
//! ```
//!
//! What is planned is decided by `scheduler`, what a token means by the journal. The engine must
//! never deliver a token before every rank of the epoch has answered for its step.

mod describe;
mod journal;
mod link;
mod report;
mod run;
mod suspicion;
#[cfg(test)]
pub(crate) mod tests;
mod watch;

use crate::lead::{Lead, LeadHandle};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::{Notify, mpsc, oneshot};

pub use describe::describe;

/// Submissions between the front door and the engine. They wait there for the end of a step at
/// most; whoever finds it full waits too, so its size only bounds memory.
const SUBMISSIONS_MAX: usize = 256;

/// What clients are told to wait when the queue is full, in seconds. A place frees up with every
/// sequence that ends, so the shortest polite time will do.
const RETRY_AFTER_S: u32 = 1;

/// A sequence to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct Generate {
    pub prompt: Vec<u32>,
    /// New tokens at most.
    pub tokens_max: u32,
    pub sampling: Sampling,
    /// Tokens that end the sequence.
    pub stop_tokens: Vec<u32>,
    /// Sequences of one request share a group: fairness is between requests.
    pub group: u64,
}

/// How tokens are chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// With the position it determines all randomness of the sequence.
    pub seed: u64,
    /// 0: greedy.
    pub temperature: f32,
    /// 1: off.
    pub top_p: f32,
    /// 0: off.
    pub top_k: u32,
    /// 0: off.
    pub min_p: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub bias: Vec<(u32, f32)>,
    /// No stop token is chosen before this many tokens.
    pub tokens_min: u32,
    /// The chosen token's log-probability and this many alternatives.
    pub logprobs: Option<u32>,
}

impl Sampling {
    /// Always the likeliest token.
    #[must_use]
    pub fn greedy() -> Self {
        Self {
            seed: 0,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            bias: Vec::new(),
            tokens_min: 0,
            logprobs: None,
        }
    }
}

/// What a stream yields. Nothing follows `End`, `Failed` or `Deposed`.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Token(SampledToken),
    End(Finish),
    /// The sequence cannot go on, on any view; the text says why.
    Failed(String),
    /// Another router leads; the text says where to try again.
    Deposed(String),
}

/// One token of a stream.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    pub token: u32,
    /// Set if the request asked for log-probabilities.
    pub logprob: Option<f32>,
    /// Alternatives, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// Why a stream is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A stop token was sampled. It is not delivered as a token of its own.
    Stop { token: u32 },
    /// `tokens_max` or the context is reached.
    Length,
}

/// Why a sequence was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Try again later.
    #[error("too many requests wait; retry in {retry_after_s} s")]
    QueueFull { retry_after_s: u32 },
    /// The prompt and one token exceed what the cluster can hold.
    #[error("the prompt has {prompt_tokens} tokens, the context {context_tokens}")]
    TooLong { prompt_tokens: u32, context_tokens: u32 },
    /// The cluster does not serve, and as many requests wait for it as may.
    #[error("the cluster is not ready: {0}")]
    NotReady(String),
    /// The router is about to leave.
    #[error("the router drains")]
    Draining,
    /// Another router leads.
    #[error("this router stands by; {}", serves(leader.as_deref()))]
    StandsBy { leader: Option<String> },
}

fn serves(leader: Option<&str>) -> String {
    leader.map_or_else(|| "no router leads yet".into(), |url| format!("{url} serves"))
}

/// What an engine works with.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// `http://host:port` of the coordinator. Several, separated by commas, are tried in turn.
    pub coordinator: String,
    /// The router's own HTTP address, for its status.
    pub address: String,
    /// Token budget per rank and step.
    pub step_tokens: u32,
    /// Longest that prompts hold up a step of streams that wait for their next token; see
    /// [`scheduler::Config::prefill_max`].
    pub prefill_max: Duration,
    /// Running sequences per rank.
    pub sequences_max: u32,
    /// Waiting sequences.
    pub queue_max: u32,
    /// Longest a step may take on a worker.
    pub step_deadline: Duration,
}

/// Starts the engine's tasks on the current runtime. They end when the last handle and the last
/// stream are gone.
#[must_use]
pub fn start(config: EngineConfig) -> EngineHandle {
    start_elected(config, LeadHandle::alone())
}

/// The same for a router that steps only while it leads.
#[must_use]
pub fn start_elected(config: EngineConfig, lead: LeadHandle) -> EngineHandle {
    let (submissions, inbox) = mpsc::channel(SUBMISSIONS_MAX);
    let shared = Arc::new(Shared::new(config.address.clone()));
    let views = watch::spawn(&config.coordinator);
    let engine = run::Engine::new((config, lead.clone()), inbox, views, shared.clone());
    telemetry::spawn("router.engine", engine.run());
    EngineHandle { submissions, shared, lead }
}

/// The front door's end of the engine.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    submissions: mpsc::Sender<Submission>,
    shared: Arc<Shared>,
    lead: LeadHandle,
}

impl EngineHandle {
    /// Queues a sequence; its stream starts at once and its tokens follow.
    ///
    /// # Errors
    ///
    /// [`SubmitError`]; nothing is kept of the sequence then.
    pub async fn submit(&self, generate: Generate) -> Result<TokenStream, SubmitError> {
        if self.shared.draining.load(Ordering::SeqCst) {
            return Err(SubmitError::Draining);
        }
        let (reply, answer) = oneshot::channel();
        let gone = || SubmitError::NotReady("the engine has ended".into());
        self.submissions.send(Submission { generate, reply }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// An error that names the router that leads, if this one stands by.
    ///
    /// # Errors
    ///
    /// [`SubmitError::StandsBy`].
    pub fn check_lead(&self) -> Result<(), SubmitError> {
        match self.lead.now() {
            Lead::Leads { .. } => Ok(()),
            Lead::StandsBy { leader } => Err(SubmitError::StandsBy { leader }),
        }
    }

    /// What it knows of the routers: itself, and the one that leads.
    #[must_use]
    pub fn routers_json(&self) -> serde_json::Value {
        let own = |leads| serde_json::json!({ "address": self.shared.address, "pid": std::process::id(), "leader": leads });
        match self.lead.now() {
            Lead::Leads { .. } => serde_json::json!([own(true)]),
            Lead::StandsBy { leader: None } => serde_json::json!([own(false)]),
            Lead::StandsBy { leader: Some(url) } => {
                let address = url.trim_start_matches("http://");
                serde_json::json!([{ "address": address, "pid": null, "leader": true }, own(false)])
            }
        }
    }

    /// Whether a cluster serves and new sequences are welcome.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.shared.ready.load(Ordering::SeqCst) && !self.shared.draining.load(Ordering::SeqCst)
    }

    /// The router's part of `herd status`.
    #[must_use]
    pub fn status_json(&self) -> serde_json::Value {
        let shared = &self.shared;
        serde_json::json!({
            "address": shared.address,
            "pid": std::process::id(),
            "term": match self.lead.now() {
                Lead::Leads { term, .. } => Some(term),
                Lead::StandsBy { .. } => None,
            },
            "ready": self.is_ready(),
            "draining": shared.draining.load(Ordering::SeqCst),
            "epoch": shared.epoch.load(Ordering::SeqCst),
            "streams": shared.streams.load(Ordering::SeqCst),
            "queued": shared.queued.load(Ordering::SeqCst),
            "steps": shared.steps.load(Ordering::SeqCst),
            "failed_steps": shared.failed_steps.load(Ordering::SeqCst),
            "last_failure": *shared.last_failure(),
        })
    }

    /// Epoch and members of the view that is served, as `herd status` shows them. Empty before the
    /// first one.
    #[must_use]
    pub fn members_json(&self) -> (Option<u64>, serde_json::Value) {
        let served = self.shared.served();
        let peers = served.as_ref().map_or(&[][..], |target| &target.peers);
        let member = |(rank, peer): (usize, &watch::Peer)| {
            serde_json::json!({
                "worker": peer.worker.0,
                "rank": rank,
                "pid": peer.pid,
                "address": peer.address,
                "device": peer.device,
                "roles": ["attention", "expert"],
                "state": "serving",
            })
        };
        let members = peers.iter().enumerate().map(member).collect();
        (served.as_ref().map(|target| target.epoch.0), serde_json::Value::Array(members))
    }

    /// What every rank of the view that is served has.
    #[must_use]
    pub fn load_by_rank(&self) -> Vec<RankLoad> {
        self.shared.load().clone()
    }

    /// The longest sequence, prompt and output. 0 before the first view.
    #[must_use]
    pub fn context_tokens(&self) -> u32 {
        self.shared.context_tokens.load(Ordering::SeqCst)
    }

    /// Refuses new sequences from now on and returns when the last running one has ended.
    pub async fn drain(&self) {
        self.shared.draining.store(true, Ordering::SeqCst);
        loop {
            let ended = self.shared.stream_ended.notified();
            tokio::pin!(ended);
            // Registered before the check, so that an end in between is not missed.
            ended.as_mut().enable();
            if self.shared.streams.load(Ordering::SeqCst) == 0 {
                return;
            }
            ended.await;
        }
    }
}

/// What a rank has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankLoad {
    /// That run on it.
    pub sequences: u32,
    /// Positions of other ranks' sequences of which it keeps copies.
    pub backup_tokens: u64,
}

/// The events of one sequence. Dropping it cancels the sequence.
#[derive(Debug)]
pub struct TokenStream {
    events: mpsc::Receiver<Event>,
    shared: Arc<Shared>,
}

impl TokenStream {
    /// The next event; `None` after the last one.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }
}

impl Drop for TokenStream {
    /// The engine sees the closed channel before it plans the next step; if it sleeps, it wakes.
    fn drop(&mut self) {
        self.events.close();
        self.shared.wake.notify_one();
    }
}

/// A request to the engine's task.
#[derive(Debug)]
struct Submission {
    generate: Generate,
    reply: oneshot::Sender<Result<TokenStream, SubmitError>>,
}

/// What handles may see of the engine without asking it.
#[derive(Debug)]
struct Shared {
    address: String,
    ready: AtomicBool,
    draining: AtomicBool,
    context_tokens: AtomicU32,
    epoch: AtomicU64,
    streams: AtomicU32,
    queued: AtomicU32,
    steps: AtomicU64,
    failed_steps: AtomicU64,
    last_failure: Mutex<Option<String>>,
    /// By rank.
    load: Mutex<Vec<RankLoad>>,
    /// The view that is served, or was last.
    served: Mutex<Option<watch::Target>>,
    /// A stream was dropped.
    wake: Notify,
    stream_ended: Notify,
}

impl Shared {
    fn new(address: String) -> Self {
        Self {
            address,
            ready: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            context_tokens: AtomicU32::new(0),
            epoch: AtomicU64::new(0),
            streams: AtomicU32::new(0),
            queued: AtomicU32::new(0),
            steps: AtomicU64::new(0),
            failed_steps: AtomicU64::new(0),
            last_failure: Mutex::new(None),
            load: Mutex::new(Vec::new()),
            served: Mutex::new(None),
            wake: Notify::new(),
            stream_ended: Notify::new(),
        }
    }

    fn load(&self) -> std::sync::MutexGuard<'_, Vec<RankLoad>> {
        // Whole numbers are written one by one; a panic between them spoils a display.
        self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn served(&self) -> std::sync::MutexGuard<'_, Option<watch::Target>> {
        // It is put whole.
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn last_failure(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        // A text cannot be half written, so a panic elsewhere does not spoil it.
        self.last_failure.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
