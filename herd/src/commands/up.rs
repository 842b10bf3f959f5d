//! `herd up`: a whole cluster on this machine.

use super::{BadInput, DEFAULT_LISTEN, DEFAULT_MODEL, DtypeArg};
use anyhow::{Context, ensure};
use herd::cluster::{Cluster, Config};
use router::http::{Front, ServedModel};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use worker::{KvBlocks, Model};

/// Of the memory that is free before the weights are loaded, the part that the KV cache may take.
const KV_MEMORY_SHARE: u64 = 4;
/// Where the machine does not tell how much is free.
const KV_BYTES_UNKNOWN: u64 = 1 << 30;
/// Between a worker's end and its successor, so that one that cannot live does not fill the log.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of the checkpoint.
    #[arg(long, default_value = DEFAULT_MODEL, env = "HERD_MODEL")]
    model: PathBuf,
    /// What clients call the model; the folder's name if not given.
    #[arg(long)]
    name: Option<String>,
    /// Workers that share the experts.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: u16,
    /// Threads of every worker; by default the processors are shared evenly.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Arithmetic of the activations.
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: DtypeArg,
    /// Where to serve HTTP; port 0 takes a free one.
    #[arg(long, default_value = DEFAULT_LISTEN, env = "HERD_LISTEN")]
    listen: String,
    /// Copies of every expert beyond the first, so that a lost worker needs no loading.
    #[arg(long, default_value_t = 1)]
    redundancy: u16,
    /// Most tokens that a worker computes in one step. More: faster prefill, longer gaps between the
    /// tokens of running streams.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    step_tokens: u32,
    /// Most sequences that run at once on one worker; the others wait.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    sequences: u32,
    /// Most sequences that wait; the next one is told to come back later (429).
    #[arg(long, default_value_t = 256)]
    queue: u32,
    /// Memory for the KV cache of every worker, in MiB; by default a quarter of what is free is
    /// shared by all workers, and no more is taken than the sequences can use.
    #[arg(long)]
    kv_mib: Option<u64>,
    /// Longest that one step may take, in seconds, before it counts as failed.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    step_max_s: u64,
    /// Longest that running requests may go on after Ctrl-C, in seconds.
    #[arg(long, default_value_t = 15)]
    drain_max_s: u64,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
    let result = runtime.block_on(serve(args));
    // Streams that outlast the drain end here, with their connections.
    runtime.shutdown_background();
    result
}

async fn serve(args: &Args) -> anyhow::Result<()> {
    let dir = model_dir(&args.model)?;
    let name = args.name.clone().unwrap_or_else(|| folder_name(&dir));
    let served = ServedModel::load(&dir, name)
        .with_context(|| BadInput(format!("cannot serve {}", dir.display())))?;
    let model = Arc::new(Model::open(&dir, args.dtype.into())?);
    let listener = TcpListener::bind(&args.listen)
        .await
        .with_context(|| format!("cannot listen on {}; give another --listen", args.listen))?;
    let address = listener.local_addr()?.to_string();
    let metrics = telemetry::init_metrics().map_err(anyhow::Error::msg)?;
    router::engine::describe();

    let config = config(args, &model, &address)?;
    let (workers, threads, kv) = (config.workers, config.threads, config.kv);
    let mut cluster = Cluster::start(config).await?;
    ready(&cluster).await;
    let front = Front {
        model: Arc::new(served),
        metrics: Box::new(move || metrics.render()),
        status: router::status::of_coordinators(&cluster.coordinator),
    };
    let name = front.model.id.clone();
    let kv_bytes = kv.bytes(&model.config, model.dtype);
    let summary = format!(
        "{name}: {} layers, {} experts in each of {} MoE layers, {}\n\
         {workers} workers x {threads} threads, KV cache {} MiB each",
        model.config.layers,
        model.config.experts,
        model.config.moe_layers().len(),
        model.dtype,
        kv_bytes.div_ceil(1 << 20),
    );
    let (stop, stopped) = oneshot::channel::<()>();
    let shutdown = async {
        // Also if the sender is dropped: then everything ends.
        let _dropped = stopped.await;
    };
    let server = router::http::serve(listener, front, cluster.engine.clone(), shutdown);
    let server = tokio::spawn(server);
    banner(&summary, &name, &address);
    supervise(&mut cluster, Signals::new()?, args, stop, server).await
}

/// Keeps workers alive until a signal comes, then drains.
async fn supervise(
    cluster: &mut Cluster,
    mut signals: Signals,
    args: &Args,
    stop: oneshot::Sender<()>,
    mut server: tokio::task::JoinHandle<std::io::Result<()>>,
) -> anyhow::Result<()> {
    loop {
        tokio::select! {
            () = signals.next() => break,
            result = &mut server => {
                result.context("the HTTP server panicked")?.context("the HTTP server ended")?;
                anyhow::bail!("the HTTP server ended");
            }
            (index, reason) = ended(cluster) => {
                tracing::error!(reason, "a worker has ended; another one takes its place");
                drop(cluster.workers.remove(index));
                tokio::time::sleep(RESTART_PAUSE).await;
                cluster.add_worker().await?;
            }
        }
    }
    let limit = Duration::from_secs(args.drain_max_s);
    say(&format!("stopping: running requests have {} s; Ctrl-C again stops now", args.drain_max_s));
    // The server may have ended by itself.
    let _ended = stop.send(());
    let drained = async {
        cluster.engine.drain().await;
        // Its result is that of a server that was told to stop.
        let _stopped = (&mut server).await;
    };
    tokio::select! {
        () = drained => say("stopped"),
        () = tokio::time::sleep(limit) => say("stopped; some requests were cut off"),
        () = signals.next() => say("stopped at once; some requests were cut off"),
    }
    Ok(())
}

/// The first worker that ends, and why.
async fn ended(cluster: &mut Cluster) -> (usize, String) {
    let ends = cluster.workers.iter_mut().map(|worker| Box::pin(worker.ended()));
    let (reason, index, _) = futures::future::select_all(ends).await;
    (index, reason)
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).context("cannot watch for Ctrl-C")?,
            terminate: signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

fn config(args: &Args, model: &Arc<Model>, address: &str) -> anyhow::Result<Config> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let even = (cores / usize::from(args.workers)).max(1);
    let threads = args.threads.map_or(even, usize::from);
    let kv_bytes = match args.kv_mib {
        Some(mib) => mib.saturating_mul(1 << 20),
        None => {
            memory_available().unwrap_or(KV_BYTES_UNKNOWN)
                / KV_MEMORY_SHARE
                / u64::from(args.workers)
        }
    };
    let kv = KvBlocks::plan(&model.config, model.dtype, kv_bytes, args.sequences)
        .with_context(|| BadInput("--kv-mib is too small for this model".into()))?;
    Ok(Config {
        model: Arc::clone(model),
        workers: args.workers,
        threads,
        redundancy: args.redundancy,
        kv,
        step_tokens: args.step_tokens.max(args.sequences),
        sequences_max: args.sequences,
        queue_max: args.queue,
        step_deadline: Duration::from_secs(args.step_max_s),
        address: address.to_owned(),
    })
}

fn model_dir(dir: &Path) -> anyhow::Result<PathBuf> {
    ensure!(
        dir.join("config.json").is_file(),
        BadInput(format!(
            "there is no config.json in {}; give --model DIR, the folder of a Llama 4 checkpoint \
             (models/toy-maverick in herd's repository is a small one)",
            dir.display()
        ))
    );
    // The name of `.` or `..` is that of the folder it stands for.
    std::fs::canonicalize(dir).with_context(|| dir.display().to_string())
}

fn folder_name(dir: &Path) -> String {
    dir.file_name().map_or_else(|| "llama4".into(), |name| name.to_string_lossy().into_owned())
}

/// Bytes that can be had without swapping, as Linux estimates it.
fn memory_available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

async fn ready(cluster: &Cluster) {
    while !cluster.engine.is_ready() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn banner(summary: &str, name: &str, address: &str) {
    say(&format!(
        "herd serves {summary}\n\n  http://{address}/v1   (OpenAI-compatible; `herd chat --url http://{address}` talks to it)\n\n\
         Try:\n  curl http://{address}/v1/chat/completions -H 'Content-Type: application/json' \\\n    \
         -d '{{\"model\": \"{name}\", \"messages\": [{{\"role\": \"user\", \"content\": \"What is 17 + 25?\"}}]}}'\n\n\
         Ctrl-C stops it."
    ));
}

/// To stdout; nobody may be reading any more.
fn say(text: &str) {
    let mut stdout = std::io::stdout();
    let _closed = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
}
