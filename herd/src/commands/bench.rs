//! `herd bench`.

use super::{BadInput, DEFAULT_MODEL, DeviceArg, DtypeArg, GpuArgs};
use anyhow::Context;
use herd::bench::Kernels;
use herd::exchange_bench::{self, Case, Transport};
use herd::{bench, placement_bench};
use model::config::Config;
use model::synth::{SynthExperts, SynthOptions};
use std::io::Write;
use std::path::PathBuf;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Prefill and decode of one checkpoint: tokens per second, time and weight bytes per step, and
    /// the share of the memory bandwidth that the same threads reach by reading alone.
    Engine(EngineArgs),
    /// The expert planner beside DeepSeek's EPLB, on recorded loads: how level, how many experts must
    /// be loaded, how long a plan takes.
    Placement(PlacementArgs),
    /// The exchange of rows between processes of this machine: microseconds and GB/s per number of
    /// processes and bytes per pair.
    Exchange(ExchangeArgs),
    /// One process of `herd bench exchange`.
    #[command(hide = true)]
    ExchangeRank(ExchangeRankArgs),
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
    /// Instead of a checkpoint: random weights of the shape of this config.json, which are made while they are loaded.
    #[arg(long, conflicts_with = "model")]
    random: Option<PathBuf>,
    /// With --random: routed experts in FP8.
    #[arg(long, requires = "random")]
    fp8_experts: bool,
    /// Ranks that share the experts.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    workers: u16,
    /// Threads of every rank.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Arithmetic of the activations.
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: DtypeArg,
    /// What the ranks compute on: cpu, or cuda:N for a GPU, which they share.
    #[arg(long, default_value_t)]
    device: DeviceArg,
    #[command(flatten)]
    gpu: GpuArgs,
    /// Sequences that decode at once, a case each.
    #[arg(long, value_delimiter = ',', default_value = "1,8,32", value_parser = clap::value_parser!(u32).range(1..))]
    streams: Vec<u32>,
    /// Positions that every sequence holds when decoding is measured.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    context: u32,
    /// Also what every kernel of a GPU takes in each case.
    #[arg(long)]
    kernels: bool,
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

#[derive(clap::Args)]
pub(crate) struct ExchangeArgs {
    /// How rows travel.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "tcp,shm")]
    transport: Vec<TransportArg>,
    /// Processes.
    #[arg(long, value_delimiter = ',', default_value = "2,4,8", value_parser = clap::value_parser!(u16).range(2..))]
    ranks: Vec<u16>,
    /// Bytes from every process to every process: tokens of 10 KiB.
    #[arg(long, value_delimiter = ',', default_value = "10240,81920,1310720,10485760")]
    bytes: Vec<u32>,
    /// About how long every case is measured.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Bind the processes to processors in turn. Where they outnumber these, the system may leave more of them on one than
    /// on another, and the figures say more about it than about the exchange.
    #[arg(long)]
    bind: bool,
}

#[derive(clap::Args)]
pub(crate) struct ExchangeRankArgs {
    #[arg(long, value_enum)]
    transport: TransportArg,
    #[arg(long)]
    me: u16,
    #[arg(long)]
    ranks: u16,
    #[arg(long)]
    bytes: u32,
    #[arg(long)]
    rounds: usize,
    #[arg(long)]
    bind: bool,
}

/// The choices of `--transport`.
#[derive(Clone, Copy, clap::ValueEnum)]
enum TransportArg {
    Tcp,
    Shm,
}

impl From<TransportArg> for Transport {
    fn from(transport: TransportArg) -> Self {
        match transport {
            TransportArg::Tcp => Self::Tcp,
            TransportArg::Shm => Self::Shm,
        }
    }
}

pub(crate) fn run(command: &Command) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout();
    let mut print = |line: &serde_json::Value| {
        // A reader that has seen enough closes the pipe.
        let _closed = writeln!(stdout, "{line}");
    };
    match command {
        Command::Engine(args) => engine(args, &mut print),
        Command::Exchange(args) => exchange(args, &mut print),
        Command::ExchangeRank(args) => exchange_rank(args),
        Command::Placement(args) => placement_bench::run(&args.loads, args.repeats, &mut print),
    }
}

fn engine(args: &EngineArgs, print: &mut dyn FnMut(&serde_json::Value)) -> anyhow::Result<()> {
    let (platform, dtype) = (args.device.open(&args.gpu)?, args.dtype.into());
    let model = match &args.random {
        None => worker::Model::open_for(&args.model, dtype, platform)?,
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string());
            let text = text.context(BadInput("bad --random".into()))?;
            let experts = if args.fp8_experts { SynthExperts::Fp8 } else { SynthExperts::Fused };
            let options = SynthOptions { experts, ..SynthOptions::default() };
            worker::Model::random(Config::parse(&text)?, &options, dtype, platform)
        }
    };
    let threads = args.threads * usize::from(args.workers);
    let options = bench::Options {
        bandwidth: bench::measure_bandwidth(&model.platform, threads, print)?,
        workers: args.workers,
        threads: args.threads,
        streams: args.streams.clone(),
        context: args.context,
        kernels: if args.kernels { Kernels::Times } else { Kernels::Nothing },
        prompt: args.prompt,
        decode: args.decode,
        chunk: args.chunk,
    };
    bench::run(&model, &options, print)
}

fn exchange(args: &ExchangeArgs, print: &mut dyn FnMut(&serde_json::Value)) -> anyhow::Result<()> {
    for &ranks in &args.ranks {
        for &bytes in &args.bytes {
            for transport in args.transport.iter().map(|&arg| Transport::from(arg)) {
                let pair_bytes = usize::try_from(bytes)?;
                let case = Case { transport, ranks, pair_bytes, seconds: args.seconds };
                let line = exchange_bench::run(case, |me, rounds| {
                    let flags = format!(
                        "bench exchange-rank --transport {} --me {me} --ranks {ranks} \
                         --bytes {bytes} --rounds {rounds}{}",
                        transport.name(),
                        if args.bind { " --bind" } else { "" }
                    );
                    flags.split(' ').map(str::to_owned).collect()
                })?;
                print(&line);
            }
        }
    }
    Ok(())
}

fn exchange_rank(args: &ExchangeRankArgs) -> anyhow::Result<()> {
    let (transport, ranks) = (args.transport.into(), args.ranks);
    let case = Case { transport, ranks, pair_bytes: usize::try_from(args.bytes)?, seconds: 0.0 };
    let (mut input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
    if args.bind {
        exchange_bench::bind(args.me)?;
    }
    exchange_bench::rank(case, args.me, args.rounds, &mut input, &mut output)
}
