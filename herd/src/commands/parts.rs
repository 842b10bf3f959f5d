//! What several commands share: flags of a role, signals, output.

use super::{BadInput, DEFAULT_LISTEN, DEFAULT_MODEL, DeviceArg, DtypeArg, GpuArgs};
use anyhow::{Context, ensure};
use control::Settings;
use kernels::StepRoom;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{Signal, SignalKind, signal};
use worker::{KvBlocks, Model};

/// Of a worker's memory, the part that the KV cache may take.
const KV_MEMORY_SHARE: u64 = 4;
/// Of a worker's memory, the part that copies of others' KV rows may take.
const BACKUP_MEMORY_SHARE: u64 = 8;
/// Tenths of the free memory that are taken. While experts move a worker holds those of two views.
const MEMORY_TENTHS: u64 = 9;
/// Where the machine does not tell how much is free.
const MEMORY_UNKNOWN: u64 = 4 << 30;

/// Tokens of a step: the same for routers, and for workers that take the memory for it.
pub(crate) const DEFAULT_STEP_TOKENS: u32 = 256;

/// Registration again with a new leader takes a worker a second at most.
const ADOPT_MAX: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub(crate) struct ModelArgs {
    /// Folder of the checkpoint.
    #[arg(long, default_value = DEFAULT_MODEL, env = "HERD_MODEL")]
    pub(crate) model: PathBuf,
}

impl ModelArgs {
    /// The folder, if it looks like a checkpoint.
    pub(crate) fn dir(&self) -> anyhow::Result<PathBuf> {
        let dir = &self.model;
        ensure!(
            dir.join("config.json").is_file(),
            BadInput(format!(
                "there is no config.json in {}; give --model DIR, the folder of a Llama 4 \
                 checkpoint (models/toy-maverick in herd's repository is a small one)",
                dir.display()
            ))
        );
        // The name of `.` or `..` is that of the folder it stands for.
        std::fs::canonicalize(dir).with_context(|| dir.display().to_string())
    }
}

/// How a worker computes.
#[derive(clap::Args)]
pub(crate) struct ComputeArgs {
    /// Threads of a worker; by default the processors are shared evenly by the workers of this
    /// command.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
    /// Arithmetic of the activations; equal on all workers of a cluster.
    #[arg(long, value_enum, default_value = "bf16")]
    pub(crate) dtype: DtypeArg,
    /// What a worker computes on: cpu, or cuda:N for a GPU, which the workers of this command share.
    #[arg(long, default_value_t)]
    pub(crate) device: DeviceArg,
    #[command(flatten)]
    pub(crate) gpu: GpuArgs,
    /// Memory for weights, KV cache and copies of a worker, in MiB; by default the workers of this command share
    /// nine tenths of what is free. How many experts a worker holds depends on it.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) memory_mib: Option<u64>,
    /// Memory for the KV cache of a worker, in MiB; by default a quarter of its memory, and no more than
    /// its sequences can use.
    #[arg(long)]
    pub(crate) kv_mib: Option<u64>,
    /// Memory of the host for copies of other workers' KV rows, in MiB: sequences that lose their worker go on from them,
    /// instead of being computed again. By default as much as the KV cache, and at most an eighth of what the worker may
    /// take, on a GPU a sixteenth of what the host has free; 0: none. Workers of one process keep none: they would die
    /// together.
    #[arg(long)]
    pub(crate) backup_mib: Option<u64>,
    /// Most sequences that run at once on one worker; the others wait.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) sequences: u32,
}

impl ComputeArgs {
    pub(crate) fn threads(&self, workers: u16) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.threads.map_or((cores / usize::from(workers)).max(1), usize::from)
    }

    /// What a worker may take for weights and KV cache, in bytes.
    pub(crate) fn memory(&self, workers: u16) -> anyhow::Result<u64> {
        if let Some(mib) = self.memory_mib {
            return Ok(mib.saturating_mul(1 << 20));
        }
        let free = match self.device {
            DeviceArg::Cpu => memory_available(),
            DeviceArg::Cuda(number) => {
                let device = self.device;
                let memory = kernels::cuda::memory(number)
                    .with_context(|| BadInput(format!("--device {device} cannot be used")))?;
                Some(memory.free)
            }
        };
        let share = free.map_or(MEMORY_UNKNOWN, |free| free / 10 * MEMORY_TENTHS);
        Ok(share / u64::from(workers))
    }

    /// The model, for workers on the device, with steps of so many tokens.
    pub(crate) fn model(&self, dir: &Path, step_tokens: u32) -> anyhow::Result<Model> {
        // As the router: every sequence that runs has a token in a step, and at most one that samples.
        let rows = usize::try_from(step_tokens.max(self.sequences))?;
        let room = StepRoom { rows, samples: usize::try_from(self.sequences)? };
        let platform = self.device.open_with(&self.gpu, Some(room))?;
        Ok(Model::open_for(dir, self.dtype.into(), platform)?)
    }

    /// The KV cache of a worker with this memory.
    pub(crate) fn kv(&self, model: &Model, memory: u64) -> anyhow::Result<KvBlocks> {
        let bytes = match self.kv_mib {
            Some(mib) => mib.saturating_mul(1 << 20),
            None => memory / KV_MEMORY_SHARE,
        };
        KvBlocks::plan(&model.config, model.dtype, bytes, self.sequences)
            .with_context(|| BadInput("--kv-mib is too small for this model".into()))
    }
}

impl ComputeArgs {
    /// Bytes of the host's memory for copies of others' KV rows, of a worker with so much memory for the rest.
    pub(crate) fn backups(&self, model: &Model, (memory, kv): (u64, KvBlocks)) -> u64 {
        if let Some(mib) = self.backup_mib {
            return mib.saturating_mul(1 << 20);
        }
        let most = match self.device {
            DeviceArg::Cpu => memory / BACKUP_MEMORY_SHARE,
            // There may be eight of them.
            DeviceArg::Cuda(_) => {
                memory_available().unwrap_or(MEMORY_UNKNOWN) / (2 * BACKUP_MEMORY_SHARE)
            }
        };
        kv.bytes(&model.config, model.dtype).min(most)
    }
}

/// How a router serves.
#[derive(clap::Args)]
pub(crate) struct ServeArgs {
    /// What clients call the model; the folder's name if not given.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Where to serve HTTP; port 0 takes a free one.
    #[arg(long, default_value = DEFAULT_LISTEN, env = "HERD_LISTEN")]
    pub(crate) listen: String,
    /// Most tokens that a worker computes in one step. More: faster prefill, longer gaps between the
    /// tokens of running streams.
    #[arg(long, default_value_t = DEFAULT_STEP_TOKENS, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) step_tokens: u32,
    /// Longest that prompts may hold up a step while streams wait for their next token, in milliseconds; as measured.
    /// Twice as long as the step takes without them is always allowed, as are 16 tokens per worker, and four times as much
    /// for streams that go on elsewhere after a fault; the step after a failed one takes none while streams wait. Less:
    /// steadier streams, later first tokens.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) prefill_ms: u64,
    /// Most sequences that wait; the next one is told to come back later (429).
    #[arg(long, default_value_t = 256)]
    pub(crate) queue: u32,
    /// Longest that one step may take, in seconds, before it counts as failed.
    #[arg(long, default_value_t = 60.0, value_parser = seconds)]
    pub(crate) step_max_s: f64,
    /// Longest that running requests may go on after Ctrl-C, in seconds.
    #[arg(long, default_value_t = 15)]
    pub(crate) drain_max_s: u64,
}

fn seconds(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "a number of seconds".to_owned())?;
    if (0.001..=3600.0).contains(&value) { Ok(value) } else { Err("from 0.001 to 3600".into()) }
}

impl ServeArgs {
    pub(crate) fn step_deadline(&self) -> Duration {
        Duration::from_secs_f64(self.step_max_s)
    }

    pub(crate) fn prefill_max(&self) -> Duration {
        Duration::from_millis(self.prefill_ms)
    }

    pub(crate) fn model_name(&self, dir: &Path) -> String {
        let folder = || dir.file_name().map(|name| name.to_string_lossy().into_owned());
        self.name.clone().or_else(folder).unwrap_or_else(|| "llama4".into())
    }
}

/// Where copies of experts go.
#[derive(clap::Args)]
pub(crate) struct PlacementArgs {
    /// Copies of every expert beyond the first, so that a lost worker needs no loading.
    #[arg(long, default_value_t = 1)]
    redundancy: u16,
    /// Places per worker and layer for further copies of hot experts, which level the load.
    #[arg(long, default_value_t = 0)]
    spare_experts: u16,
    /// Make lost copies of experts again after so long, in seconds, unless the lost worker is back.
    #[arg(long, default_value_t = 1)]
    repair_s: u64,
    /// Level the load of the experts that often, in seconds, if it gains enough; 0: only by
    /// `herd rebalance`.
    #[arg(long, default_value_t = 60)]
    rebalance_s: u64,
}

impl PlacementArgs {
    /// The settings of a coordinator.
    pub(crate) fn settings(&self, workers_expected: u16, assemble_max: Duration) -> Settings {
        let rebalance = Duration::from_secs(self.rebalance_s);
        Settings {
            workers_expected,
            assemble_max,
            adopt_max: ADOPT_MAX,
            redundancy: self.redundancy,
            spare: self.spare_experts,
            repair_after: Duration::from_secs(self.repair_s),
            rebalance_every: (!rebalance.is_zero()).then_some(rebalance),
        }
    }

    /// The flags that make another process of this program settle on the same.
    pub(crate) fn flags(&self) -> [String; 8] {
        let Self { redundancy, spare_experts, repair_s, rebalance_s } = self;
        [
            "--redundancy".into(),
            redundancy.to_string(),
            "--spare-experts".into(),
            spare_experts.to_string(),
            "--repair-s".into(),
            repair_s.to_string(),
            "--rebalance-s".into(),
            rebalance_s.to_string(),
        ]
    }
}

/// For roles that another process of this program started.
#[derive(clap::Args)]
pub(crate) struct ChildArgs {
    /// End when standard input ends, that is with the process that holds its other side.
    #[arg(long, hide = true)]
    pub(crate) exit_with_parent: bool,
}

impl ChildArgs {
    /// Waits for the parent's end, or for ever.
    pub(crate) async fn parent_gone(&self) {
        if !self.exit_with_parent {
            return std::future::pending().await;
        }
        let (mut stdin, mut buffer) = (tokio::io::stdin(), [0; 64]);
        // An error says as much as the end does.
        while matches!(stdin.read(&mut buffer).await, Ok(n) if 0 < n) {}
    }
}

/// Ctrl-C and SIGTERM.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// Ctrl-C in a terminal reaches a supervisor's children too; it is the supervisor who stops them,
    /// in order.
    heeds_interrupt: bool,
}

impl Signals {
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).context("cannot watch for Ctrl-C")?,
            terminate: signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?,
            heeds_interrupt: true,
        })
    }

    /// Those that a role obeys: without Ctrl-C if it has a supervisor.
    pub(crate) fn of_role(child: &ChildArgs) -> anyhow::Result<Self> {
        Ok(Self { heeds_interrupt: !child.exit_with_parent, ..Self::new()? })
    }

    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv(), if self.heeds_interrupt => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Runs a command's future; what it left running ends with it.
pub(crate) fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
    let result = runtime.block_on(future);
    runtime.shutdown_background();
    result
}

/// To stdout; nobody may be reading any more.
pub(crate) fn say(text: &str) {
    let mut stdout = std::io::stdout();
    let _closed = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
}

/// Bytes that can be had without swapping, as Linux estimates it.
fn memory_available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
