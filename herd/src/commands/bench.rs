//! `herd bench`.

use super::{DEFAULT_MODEL, DtypeArg};
use herd::{bench, placement_bench};
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Prefill and decode of one checkpoint: tokens per second, time and weight bytes per step, and
    /// the share of the memory bandwidth that the same threads reach by reading alone.
    Engine(EngineArgs),
    /// The expert planner beside DeepSeek's EPLB, on recorded loads: how level, how many experts must
    /// be loaded, how long a plan takes.
    Placement(PlacementArgs),
}

#[derive(clap::Args)]
pub(crate) struct PlacementArgs {
    /// Folder with the loads and EPLB's results.
    #[arg(long, default_value = "bench/eplb")]
    loads: PathBuf,
    /// Plans per case and window; the fastest is reported.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
}

#[derive(clap::Args)]
pub(crate) struct EngineArgs {
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

pub(crate) fn run(command: &Command) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout();
    let mut print = |line: &serde_json::Value| {
        // A reader that has seen enough closes the pipe.
        let _closed = writeln!(stdout, "{line}");
    };
    match command {
        Command::Engine(args) => engine(args, &mut print),
        Command::Placement(args) => placement_bench::run(&args.loads, args.repeats, &mut print),
    }
}

fn engine(args: &EngineArgs, print: &mut dyn FnMut(&serde_json::Value)) -> anyhow::Result<()> {
    let model = Arc::new(worker::Model::open(&args.model, args.dtype.into())?);
    let options = bench::Options {
        workers: args.workers,
        threads: args.threads,
        prompt: args.prompt,
        decode: args.decode,
        chunk: args.chunk,
    };
    bench::run(&model, options, print)
}
