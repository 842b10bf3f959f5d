//! The subcommands: what each asks of the user, and how it runs.

pub(crate) mod admin;
pub(crate) mod bench;
pub(crate) mod chaos;
pub(crate) mod chat;
pub(crate) mod coordinator;
pub(crate) mod drain;
mod etcd;
mod links;
pub(crate) mod logits;
mod parts;
mod processes;
pub(crate) mod rebalance;
pub(crate) mod router;
pub(crate) mod scale;
pub(crate) mod status;
pub(crate) mod synth;
pub(crate) mod up;
pub(crate) mod worker;

use ::worker::{Gpu, Platform};
use anyhow::Context;
use kernels::cuda::nvml::{self, Nvml};
use kernels::cuda::{Driver, ImageCache, Options};
use kernels::{Dtype, StepRoom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The small trained model of the repository.
pub(crate) const DEFAULT_MODEL: &str = "models/toy-maverick";
/// Where `herd up` listens unless told otherwise.
pub(crate) const DEFAULT_LISTEN: &str = "127.0.0.1:8000";

/// Longest that a GPU may take for what it was given, in seconds: half of what a step may take, and a hundred times
/// what one does.
pub(crate) const DEFAULT_GPU_LIMIT_S: u64 = 30;

/// Arithmetic of the activations.
#[derive(Clone, Copy, clap::ValueEnum)]
pub(crate) enum DtypeArg {
    F32,
    Bf16,
}

impl From<DtypeArg> for Dtype {
    fn from(arg: DtypeArg) -> Self {
        match arg {
            DtypeArg::F32 => Self::F32,
            DtypeArg::Bf16 => Self::Bf16,
        }
    }
}

/// What a worker computes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum DeviceArg {
    #[default]
    Cpu,
    /// The GPU with this number.
    Cuda(u32),
}

impl std::str::FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_prefix("cuda:").and_then(|number| number.parse().ok());
        match (text, number) {
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(number)) => Ok(Self::Cuda(number)),
            (_, None) => Err(format!("{text:?} is no device; give cpu or cuda:N")),
        }
    }
}

impl std::fmt::Display for DeviceArg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

/// How a GPU is opened.
#[derive(clap::Args)]
pub(crate) struct GpuArgs {
    /// Folder for compiled kernels of a GPU, of this user alone; without one they are compiled at every start, which
    /// takes some ten seconds. `herd up --processes` has one that lives as long, if none is given.
    #[arg(long, env = "HERD_KERNEL_CACHE")]
    pub(crate) kernel_cache: Option<PathBuf>,
    /// Longest that a GPU may take for what it was given, in seconds; then it hangs, and the process ends: a worker's to be
    /// started again, if this is less than the router's --step-max-s.
    #[arg(long, default_value_t = DEFAULT_GPU_LIMIT_S, env = "HERD_GPU_LIMIT_S",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) gpu_limit_s: u64,
}

impl GpuArgs {
    fn options(&self) -> Options {
        let cache = self.kernel_cache.as_deref().map(ImageCache::new);
        Options { cache, wait_max: Duration::from_secs(self.gpu_limit_s) }
    }
}

impl DeviceArg {
    /// Opens the device for a tool, which has one step after the other as large as it likes.
    pub(crate) fn open(self, gpu: &GpuArgs) -> anyhow::Result<Platform> {
        self.open_with(gpu, None)
    }

    /// Opens the device; compiles the kernels of a GPU that are not in the cache.
    ///
    /// * `room`: steps that a GPU's workers take the memory for when they start
    pub(crate) fn open_with(
        self,
        gpu: &GpuArgs,
        room: Option<StepRoom>,
    ) -> anyhow::Result<Platform> {
        match self {
            Self::Cpu => Ok(Platform::Cpu),
            Self::Cuda(number) => {
                let start = Instant::now();
                let driver = Driver::open(number, &gpu.options())
                    .with_context(|| BadInput(format!("--device {self} cannot be used")))?;
                let (arch, name) = driver.identity();
                let seconds = start.elapsed().as_secs_f64();
                tracing::info!("{self} is {name} ({arch}); kernels loaded in {seconds:.1} s");
                let driver = Arc::new(driver);
                let gpu = Gpu::new(Arc::clone(&driver));
                let Some(room) = room else { return Ok(Platform::Cuda(gpu)) };
                let gpu = gpu.with_room(room);
                let Some(bus) = driver.bus() else { return Ok(Platform::Cuda(gpu)) };
                Ok(Platform::Cuda(match Nvml::open(Path::new(nvml::LIBRARY), bus) {
                    Ok(nvml) => gpu.watched(nvml),
                    Err(error) => {
                        tracing::info!(%error, "`herd status` will not show how {self} is");
                        gpu
                    }
                }))
            }
        }
    }
}

/// Marks an error as the fault of the input; the text is its context.
#[derive(Debug)]
pub(crate) struct BadInput(pub(crate) String);

impl std::fmt::Display for BadInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadInput {}
