//! `herd logits`.

use super::{BadInput, DeviceArg, DtypeArg, GpuArgs};
use anyhow::Context;
use herd::logits;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Args {
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
    /// What the ranks compute on: cpu, or cuda:N for a GPU, which they share.
    #[arg(long, default_value_t)]
    device: DeviceArg,
    #[command(flatten)]
    gpu: GpuArgs,
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

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let platform = args.device.open(&args.gpu)?;
    let model = worker::Model::open_for(&args.model, args.dtype.into(), platform)?;
    if args.verify {
        model.checkpoint().verify(&|_, _| {})?;
    }
    let bad_input = || BadInput("bad --input".into());
    let prompt = logits::read_input(&args.input).with_context(bad_input)?;
    let options = logits::Options {
        workers: args.workers,
        threads: args.threads,
        chunk: args.chunk,
        greedy: args.greedy,
        redundancy: args.redundancy,
    };
    logits::check_prompt(&model, &prompt).with_context(bad_input)?;
    let outcome = logits::run(&model, &prompt, options)?;
    logits::write_output(&args.output, &outcome)?;
    let rows = prompt.len();
    tracing::info!("wrote [{rows}, {}] logits to {}", outcome.vocab, args.output.display());
    Ok(())
}
