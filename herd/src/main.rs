//! The `herd` binary: arguments, and the exit codes 0 (done), 1 (failed), 2 (bad usage or input).

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use herd::logits;
use kernels::Dtype;
use model::checkpoint::CheckpointError;
use model::synth::{SynthExperts, SynthOptions, WeightType};
use std::path::PathBuf;
use std::process::ExitCode;

/// Serves Llama 4 by expert parallelism.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// What to log on stderr, for example `info` or `debug,worker=trace`.
    #[arg(long, global = true, default_value = "info", env = "HERD_LOG")]
    log: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Computes the logits of a token sequence, through engine and exchange.
    Logits(LogitsArgs),
    /// Writes a random checkpoint of any Llama 4 shape, in the published layout.
    Synth(SynthArgs),
}

#[derive(Clone, Copy, ValueEnum)]
enum DtypeArg {
    F32,
    Bf16,
}

#[derive(Args)]
struct LogitsArgs {
    /// Folder of the checkpoint.
    #[arg(long)]
    model: PathBuf,
    /// Safetensors file with `input_ids` [T] i64.
    #[arg(long)]
    input: PathBuf,
    /// Safetensors file to write: `logits` [T, V] f32, `moe.{i}.expert` [T], `greedy_ids`.
    #[arg(long)]
    output: PathBuf,
    /// Ranks that share the experts.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    workers: u16,
    /// Threads of every rank.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Prompt tokens per step.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    chunk: u32,
    /// Arithmetic of the activations.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DtypeArg,
    /// Tokens to generate greedily after the prompt.
    #[arg(long, default_value_t = 0)]
    greedy: u32,
    /// Copies of every expert beyond the first.
    #[arg(long, default_value_t = 0)]
    redundancy: u16,
    /// Read all weights first and refuse a checkpoint with NaN or infinite values.
    #[arg(long)]
    verify: bool,
}

#[derive(Args)]
struct SynthArgs {
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

/// Bytes of a weight file, as in the published checkpoints.
const SHARD_BYTES_MAX: u64 = 5_000_000_000;

fn main() -> ExitCode {
    let cli = Cli::parse();
    telemetry::init_logs(&cli.log);
    let result = match cli.command {
        Command::Logits(args) => run_logits(&args),
        Command::Synth(args) => run_synth(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("herd: {error:#}");
            ExitCode::from(exit_code(&error))
        }
    }
}

/// 2 if the user's input is at fault, 1 otherwise.
fn exit_code(error: &anyhow::Error) -> u8 {
    let marked = error.downcast_ref::<BadInput>().is_some();
    let bad_input = marked
        || error.chain().any(|cause| {
            cause.is::<CheckpointError>()
                || cause.is::<model::config::ConfigError>()
                || cause.is::<worker::ModelError>()
                || cause.is::<model::synth::SynthError>()
                || cause.is::<safetensors::SafeTensorError>()
        });
    if bad_input { 2 } else { 1 }
}

/// Marks an error as the fault of the input.
#[derive(Debug)]
struct BadInput(&'static str);

impl std::fmt::Display for BadInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

fn run_logits(args: &LogitsArgs) -> anyhow::Result<()> {
    let dtype = match args.dtype {
        DtypeArg::F32 => Dtype::F32,
        DtypeArg::Bf16 => Dtype::Bf16,
    };
    let model = worker::Model::open(&args.model, dtype)?;
    if args.verify {
        model.checkpoint().verify(&|_, _| {})?;
    }
    let prompt = logits::read_input(&args.input).context(BadInput("bad --input"))?;
    let options = logits::Options {
        workers: args.workers,
        threads: args.threads,
        chunk: args.chunk,
        greedy: args.greedy,
        redundancy: args.redundancy,
    };
    logits::check_prompt(&model, &prompt).context(BadInput("bad --input"))?;
    let outcome = logits::run(&model, &prompt, options)?;
    logits::write_output(&args.output, &outcome)?;
    let rows = prompt.len();
    tracing::info!("wrote [{rows}, {}] logits to {}", outcome.vocab, args.output.display());
    Ok(())
}

fn run_synth(args: &SynthArgs) -> anyhow::Result<()> {
    let config = std::fs::read_to_string(&args.config)
        .with_context(|| args.config.display().to_string())
        .context(BadInput("bad --config"))?;
    let options = SynthOptions {
        seed: args.seed,
        dtype: match args.dtype {
            DtypeArg::F32 => WeightType::F32,
            DtypeArg::Bf16 => WeightType::Bf16,
        },
        experts: if args.fp8_experts { SynthExperts::Fp8 } else { SynthExperts::Fused },
        shard_bytes_max: SHARD_BYTES_MAX,
        tokenizer_from: args.tokenizer.clone(),
    };
    let summary = model::synth::write(&config, &args.out, &options, &|_, _| {})?;
    tracing::info!("wrote {} tensors to {}", summary.tensors, args.out.display());
    Ok(())
}
