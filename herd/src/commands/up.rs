//! `herd up`: a whole cluster on this machine.

use super::BadInput;
use super::etcd::EtcdArgs;
use super::parts::{ComputeArgs, ModelArgs, PlacementArgs, ServeArgs, Signals, block_on, say};
use super::processes;
use super::router::Door;
use anyhow::{Context, ensure};
use herd::cluster::{Cluster, Config};
use std::sync::Arc;
use std::time::Duration;
use worker::{Ended, KvBlocks, MemoryPlan, Model, Share};

/// Between a worker's end and its successor, so that one that cannot live does not fill the log.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

/// Workers of one process register within this time of each other, or something is wrong.
const ASSEMBLE_MAX: Duration = Duration::from_secs(60);

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
    /// Workers that share the experts.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) workers: u16,
    #[command(flatten)]
    pub(crate) placement: PlacementArgs,
    /// Run every role as a process of its own, over a real etcd; what dies is started again.
    #[arg(long)]
    pub(crate) processes: bool,
    /// With --processes: leave dead what dies.
    #[arg(long, requires = "processes")]
    pub(crate) no_restart: bool,
    /// With --processes: let `herd chaos` inflict faults on workers and on the links between them, which then
    /// lead through this process.
    #[arg(long, requires = "processes")]
    pub(crate) allow_chaos: bool,
    /// With --processes: routers; one leads, the others stand by on the next free ports.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub(crate) routers: u16,
    /// With --processes: use an etcd that runs instead of starting one.
    #[command(flatten)]
    pub(crate) etcd: EtcdArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if args.processes {
        return block_on(processes::run(args));
    }
    ensure!(args.etcd.etcd.is_none(), BadInput("--etcd is for --processes".into()));
    ensure!(args.routers == 1, BadInput("--routers is for --processes".into()));
    block_on(serve(args))
}

async fn serve(args: &Args) -> anyhow::Result<()> {
    let dir = args.model.dir()?;
    let door = Door::open(&args.serve, &dir).await?;
    let model = Arc::new(args.compute.model(&dir, args.serve.step_tokens)?);
    let kv = args.compute.kv(&model, args.compute.memory(args.workers)?)?;
    check_memory(args, &model, kv)?;
    let config = Config {
        model: Arc::clone(&model),
        threads: args.compute.threads(args.workers),
        settings: args.placement.settings(args.workers, ASSEMBLE_MAX),
        kv,
        step_tokens: args.serve.step_tokens.max(args.compute.sequences),
        prefill_max: args.serve.prefill_max(),
        sequences_max: args.compute.sequences,
        queue_max: args.serve.queue,
        step_deadline: args.serve.step_deadline(),
        address: door.address.clone(),
    };
    let banner = banner(&config, &door.model.id, &door.address);
    let mut cluster = Cluster::start(config).await?;
    let mut signals = Signals::new()?;
    tokio::select! {
        () = ready(&cluster) => {}
        () = signals.next() => return Ok(()),
    }
    let mut open = door.serve(cluster.engine.clone(), &cluster.coordinator);
    say(&banner);
    loop {
        tokio::select! {
            () = signals.next() => break,
            error = open.ended() => return Err(error),
            (index, end) = ended(&mut cluster) => {
                drop(cluster.workers.remove(index));
                match end {
                    Ended::Drained => say("a worker has left: it was drained"),
                    Ended::Failed(reason) => {
                        // What spoilt the device spoilt it for all workers of this process.
                        ensure!(model.platform.failure().is_none(), "the device has failed: {reason}");
                        tracing::error!(reason, "a worker has ended; another one takes its place");
                        tokio::time::sleep(RESTART_PAUSE).await;
                        cluster.add_worker().await?;
                    }
                }
            }
        }
    }
    open.drain(args.serve.drain_max_s, &mut signals, std::future::ready(())).await;
    Ok(())
}

/// Workers of one process share one copy of all weights, and each has a KV cache.
fn check_memory(args: &Args, model: &Model, kv: KvBlocks) -> anyhow::Result<()> {
    let workers = args.workers;
    let memory = args.compute.memory(workers)?.saturating_mul(workers.into());
    let plan = MemoryPlan::new(model, kv, Share { memory, backups: 0, ranks: workers, workers });
    let plan = plan.with_context(|| BadInput("the model does not fit this machine".into()))?;
    tracing::info!("{plan}");
    ensure!(
        plan.places == plan.experts,
        BadInput(format!(
            "the model does not fit this machine: {plan}; give --memory-mib or less --kv-mib, or \
             share the experts among several machines with `herd worker`"
        ))
    );
    Ok(())
}

/// The first worker that ends, and why.
async fn ended(cluster: &mut Cluster) -> (usize, Ended) {
    let ends = cluster.workers.iter_mut().map(|worker| Box::pin(worker.ended()));
    let (end, index, _) = futures::future::select_all(ends).await;
    (index, end)
}

async fn ready(cluster: &Cluster) {
    while !cluster.engine.is_ready() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn banner(config: &Config, name: &str, address: &str) -> String {
    let model = &config.model.config;
    let mib = config.kv.bytes(model, config.model.dtype).div_ceil(1 << 20);
    format!(
        "herd serves {name}: {} layers, {} experts in each of {} MoE layers, {}\n\
         {} workers x {} threads, KV cache {mib} MiB each\n\n{}",
        model.layers,
        model.experts,
        model.moe_layers().len(),
        config.model.dtype,
        config.settings.workers_expected,
        config.threads,
        how_to_try(name, address),
    )
}

pub(crate) fn how_to_try(name: &str, address: &str) -> String {
    format!(
        "  http://{address}/v1   (OpenAI-compatible; `herd chat --url http://{address}` talks to it)\n\n\
         Try:\n  curl http://{address}/v1/chat/completions -H 'Content-Type: application/json' \\\n    \
         -d '{{\"model\": \"{name}\", \"messages\": [{{\"role\": \"user\", \"content\": \"What is 17 + 25?\"}}]}}'\n\n\
         Ctrl-C stops it."
    )
}
