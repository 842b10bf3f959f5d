//! The `herd` binary: arguments, and the exit codes 0 (done), 1 (failed), 2 (bad usage or input).

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use herd::{bench, logits};
use kernels::Dtype;
use model::checkpoint::CheckpointError;
use model::synth::{SynthExperts, SynthOptions, WeightType};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

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
    /// Measures; prints one JSON object per line.
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Writes a random checkpoint of any Llama 4 shape, in the published layout.
    Synth(SynthArgs),
}

#[derive(Clone, Copy, ValueEnum)]
enum DtypeArg {
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

#[derive(Subcommand)]
enum BenchCommand {
    /// Prefill and decode of one checkpoint: tokens per second, time and weight bytes per step, and
    /// the share of the memory bandwidth that the same threads reach by reading alone.
    Engine(BenchEngineArgs),
}

#[derive(Args)]
struct BenchEngineArgs {
    /// Folder of the checkpoint.
    #[arg(long, default_value = DEFAULT_MODEL)]
    model: PathBuf,
    /// Ranks that share the experts.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    workers: u16,
    /// Threads of every rank.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Arithmetic of the activations.
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: DtypeArg,
    /// Tokens of the prefill case.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    prompt: u32,
    /// Steps of the decode case.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    decode: u32,
    /// Token budget per rank and step.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    chunk: u32,
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

/// The small trained model of the repository.
const DEFAULT_MODEL: &str = "models/toy-maverick";

/// Bytes of a weight file, as in the published checkpoints.
const SHARD_BYTES_MAX: u64 = 5_000_000_000;

fn main() -> ExitCode {
    let cli = Cli::parse();
    telemetry::init_logs(&cli.log);
    let result = match cli.command {
        Command::Logits(args) => run_logits(&args),
        Command::Bench(BenchCommand::Engine(args)) => run_bench_engine(&args),
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
    let model = worker::Model::open(&args.model, args.dtype.into())?;
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

fn run_bench_engine(args: &BenchEngineArgs) -> anyhow::Result<()> {
    let model = Arc::new(worker::Model::open(&args.model, args.dtype.into())?);
    let options = bench::Options {
        workers: args.workers,
        threads: args.threads,
        prompt: args.prompt,
        decode: args.decode,
        chunk: args.chunk,
    };
    let mut stdout = std::io::stdout();
    bench::run(&model, options, &mut |line| {
        // A reader that has seen enough closes the pipe.
        let _closed = writeln!(stdout, "{line}");
    })
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
