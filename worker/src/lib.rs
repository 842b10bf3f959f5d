//! A worker: its shard of the checkpoint, its device, and its end of the exchange.
//!
//! It executes steps and decides nothing. [`start`] runs it as a gRPC service that registers with a
//! coordinator; [`Engine`] is the rank alone, for tools.

mod background;
mod backups;
mod chaos;
mod engine;
mod error;
mod exchange;
mod fence;
mod finite;
mod gpu;
mod held;
mod inject;
mod joined;
mod kv;
mod loans;
mod memory;
mod observe;
mod peers;
mod plantable;
mod platform;
mod registration;
mod runner;
mod service;
mod site;
mod step;
mod tally;
mod weights;

use background::Background;
use backups::{Backups, RowBytes};
use joined::Transport;
use site::Site;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;

pub use chaos::Chaos;
pub use engine::{Engine, Seat, Shard};
pub use error::EngineError;
pub use finite::{NonFinite, Place};
pub use gpu::Gpu;
pub use joined::{Exchange, Processes, WithinHost};
pub use kv::{KvBlocks, KvTooSmall};
pub use memory::{MemoryError, MemoryPlan, Share};
pub use observe::Observer;
pub use platform::Platform;
pub use weights::{Model, ModelError};

/// What a worker runs with.
pub struct Config {
    /// Shared by the workers of a process.
    pub model: Arc<Model>,
    pub exchange: Exchange,
    /// Threads of its device.
    pub threads: usize,
    pub kv: KvBlocks,
    /// Copies of experts per MoE layer that its memory holds.
    pub places: usize,
    /// Bytes of the host's memory for copies of other workers' KV rows. Workers of one process keep none: they die
    /// together.
    pub backup_bytes: u64,
    /// `http://host:port` of the coordinator. Several, separated by commas, are tried in turn.
    pub coordinator: String,
    /// `host:port` under which the others reach it, if that is not where it listens.
    pub advertise: Option<String>,
    pub chaos: Chaos,
}

impl Config {
    /// Bytes of a position's KV rows.
    fn row_bytes(&self) -> RowBytes {
        kv::row_bytes(&self.model.config, self.model.dtype)
    }

    /// Positions of other workers' sequences of which it keeps copies.
    fn backup_tokens(&self) -> u32 {
        match self.exchange {
            Exchange::Processes(_) => {
                let tokens = self.backup_bytes / (self.row_bytes().sum().max(1) as u64);
                u32::try_from(tokens).unwrap_or(u32::MAX)
            }
            Exchange::Local(_) => 0,
        }
    }
}

/// A running worker. Dropping it ends the worker.
#[derive(Debug)]
pub struct Worker {
    ended: watch::Receiver<Option<Ended>>,
    _stop: watch::Sender<()>,
}

impl Worker {
    /// Waits until the worker has ended by itself.
    pub async fn ended(&mut self) -> Ended {
        match self.ended.wait_for(Option::is_some).await {
            Ok(ended) => ended.clone().unwrap_or(Ended::Drained),
            Err(_) => Ended::Failed("its tasks have ended".into()),
        }
    }
}

/// Why a worker has ended by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// An operator drained it: its work is done.
    Drained,
    /// It can serve no more, which needs a new process.
    Failed(String),
}

/// Waits until the device has failed, for all workers of the process.
async fn failure(platform: Platform) -> String {
    let mut look = tokio::time::interval(LOOK_EVERY);
    let mut refusal = None;
    loop {
        look.tick().await;
        let refused = platform.gpu().and_then(|gpu| gpu.driver().graphs().refused);
        if refused != refusal {
            tracing::warn!(reason = ?refused, "the GPU takes no more graphs: small steps are slower");
            refusal = refused;
        }
        if let Some(failure) = platform.failure() {
            return failure;
        }
    }
}

/// What may be on its way to a worker over one connection: rows of a step at the speed of a fast network.
const WINDOW_BYTES: u32 = 4 << 20;

/// How often a worker without steps looks whether its device is well.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Longest that a drained worker waits for its router to leave it.
const LEAVE_MAX: Duration = Duration::from_secs(30);

fn no_experts(error: std::io::Error) -> EngineError {
    EngineError::Io(format!("cannot exchange experts with other workers: {error}"))
}

/// Loads the dense weights, starts the worker's thread and its service on `listener`, and registers.
///
/// # Errors
///
/// [`EngineError`] if weights cannot be loaded or memory is refused.
pub async fn start(config: Config, listener: TcpListener) -> Result<Worker, EngineError> {
    let address = listener.local_addr().map_err(|error| EngineError::Io(error.to_string()))?;
    let incarnation = uuid::Uuid::new_v4().to_string();
    let cluster = config.model.config.fingerprint();
    let transport = Transport::open(&config.exchange, &cluster, &incarnation)
        .map_err(|error| EngineError::Io(format!("cannot start the exchange: {error}")))?;
    let reached = config.advertise.clone().unwrap_or_else(|| address.to_string());
    let mut card = registration::card(&config, &reached, &incarnation);
    card.exchange = transport.address();
    let (platform, dtype) = (config.model.platform.clone(), config.model.dtype);
    let (profile, nvml) = (platform.profile(dtype), platform.nvml());
    // A port that is refused is refused before weights are loaded.
    let sender = match &config.exchange {
        Exchange::Local(_) => None,
        Exchange::Processes(Processes { experts_port, .. }) => {
            let site = Site { address: address.ip(), reached: &reached, port: *experts_port };
            let listener = site.listen().map_err(no_experts)?;
            Some((Background::start().map_err(no_experts)?, listener))
        }
    };
    // Who keeps no copies still sends rows to others that do.
    let takes_part = matches!(config.exchange, Exchange::Processes(_));
    let backups = takes_part.then(|| Backups::new(config.row_bytes(), config.backup_bytes));
    let runner = runner::start(&config, transport, backups.clone()).await?;
    let (stop, mut stopped) = watch::channel(());
    let model = Arc::clone(&config.model);
    let packed = (Arc::clone(&model), profile.clone());
    let (background, experts) = match sender {
        None => (None, None),
        Some((background, listener)) => {
            let experts = peers::serve(&background, listener, packed, stopped.clone());
            (Some(background), Some(experts.map_err(no_experts)?))
        }
    };
    let identity = (incarnation, profile);
    let service = service::Service::new(model, (&runner, background), identity, stopped.clone());
    let (tell_end, ended) = watch::channel(None);
    let reports = registration::Reports::new(runner.tally(), nvml);
    let register = registration::keep(config.coordinator, (card, service.epoch()), reports);
    let mut streams = service.streams();
    let keeping = backups.map(|backups| backups::server(backups, stopped.clone()));
    let server = tonic::transport::Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .add_service(service.into_server())
        .add_optional_service(experts)
        .add_optional_service(keeping)
        .add_service(inject::server(config.chaos, runner.clone()))
        .serve_with_incoming(proto::incoming(listener));
    telemetry::spawn("worker", async move {
        let mut thread = runner.ended();
        let drained = async {
            register.await;
            // An error means that the service is gone, and its streams with it.
            let _left = tokio::time::timeout(LEAVE_MAX, streams.wait_for(|open| *open == 0)).await;
        };
        let end = tokio::select! {
            result = server => Ended::Failed(match result {
                Ok(()) => "its service ended".into(),
                Err(error) => format!("its service ended: {error}"),
            }),
            () = drained => Ended::Drained,
            // Whoever cannot step must not stay a member.
            reason = runner::end(&mut thread) => Ended::Failed(reason),
            // Without a step the thread does not notice.
            reason = failure(platform) => Ended::Failed(reason),
            // Only ever an error: the worker was dropped.
            _ = stopped.changed() => return,
        };
        tell_end.send_replace(Some(end));
    });
    Ok(Worker { ended, _stop: stop })
}
