//! `herd synth`.

use super::{BadInput, DtypeArg};
use anyhow::Context;
use model::synth::{SynthExperts, SynthOptions, WeightType};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How often progress is shown.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// config.json of the shape.
    #[arg(long)]
    config: PathBuf,
    /// Folder to write.
    #[arg(long)]
    out: PathBuf,
    /// The same seed gives the same bytes.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Type of the weights.
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: DtypeArg,
    /// Store routed experts in the FP8 packaging.
    #[arg(long)]
    fp8_experts: bool,
    /// Folder whose tokenizer is copied if its ids fit the vocabulary.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let config = std::fs::read_to_string(&args.config)
        .with_context(|| args.config.display().to_string())
        .context(BadInput("bad --config".into()))?;
    let options = SynthOptions {
        seed: args.seed,
        dtype: match args.dtype {
            DtypeArg::F32 => WeightType::F32,
            DtypeArg::Bf16 => WeightType::Bf16,
        },
        experts: if args.fp8_experts { SynthExperts::Fp8 } else { SynthExperts::Fused },
        tokenizer_from: args.tokenizer.clone(),
        ..SynthOptions::default()
    };
    let shown = Mutex::new(Instant::now());
    let summary = model::synth::write(&config, &args.out, &options, &|done, total| {
        let mut shown = shown.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if PROGRESS_EVERY <= shown.elapsed() {
            *shown = Instant::now();
            let gigabytes = |bytes: u64| bytes as f64 / 1e9;
            tracing::info!("wrote {:.2} of {:.2} GB", gigabytes(done), gigabytes(total));
        }
    })?;
    tracing::info!("wrote {} tensors to {}", summary.tensors, args.out.display());
    Ok(())
}
