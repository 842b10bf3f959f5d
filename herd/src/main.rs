//! The `herd` binary: arguments, and the exit codes 0 (done), 1 (failed), 2 (bad usage or input).

mod commands;

use clap::{Args, Command as Parser, CommandFactory, FromArgMatches};
use commands::{
    BadInput, bench, chaos, chat, coordinator, drain, logits, rebalance, router, scale, status,
    synth, up, worker,
};
use model::checkpoint::CheckpointError;

/// Serves Llama 4 by expert parallelism. Without a command: `herd up`.
#[derive(clap::Parser)]
#[command(version, name = "herd")]
struct Cli {
    /// What to log on stderr, for example `info` or `debug,worker=trace`.
    #[arg(long, global = true, default_value = "info", env = "HERD_LOG")]
    log: String,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Serves a checkpoint with a whole cluster on this machine.
    Up(up::Args),
    /// One coordinator of a cluster: who is a member, and where the experts are.
    Coordinator(coordinator::Args),
    /// The router of a cluster: HTTP, and which tokens run next.
    Router(router::Args),
    /// One worker of a cluster.
    Worker(worker::Args),
    /// Talks to a served model in the terminal.
    Chat(chat::Args),
    /// Shows members, epoch, placement and load of a running cluster.
    Status(status::Args),
    /// Inflicts faults on a running cluster under load, and checks that no client noticed.
    Chaos(chaos::Args),
    /// Moves a worker's experts and sequences away, and ends it.
    Drain(drain::Args),
    /// Levels the load of the experts over the workers.
    Rebalance(rebalance::Args),
    /// Sets how many workers there shall be: drains those beyond, waits for the missing.
    Scale(scale::Args),
    /// Computes the logits of a token sequence, through engine and exchange.
    Logits(logits::Args),
    /// Measures; prints one JSON object per line.
    #[command(subcommand)]
    Bench(bench::Command),
    /// Writes a random checkpoint of any Llama 4 shape, in the published layout.
    Synth(synth::Args),
}

fn main() {
    let cli = <Cli as clap::Parser>::parse();
    telemetry::init_logs(&cli.log);
    let command = cli.command.unwrap_or_else(|| Command::Up(up_by_default()));
    let result = match &command {
        Command::Up(args) => up::run(args),
        Command::Coordinator(args) => coordinator::run(args),
        Command::Router(args) => router::run(args),
        Command::Worker(args) => worker::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Status(args) => status::run(args),
        Command::Chaos(args) => chaos::run(args),
        Command::Drain(args) => drain::run(args),
        Command::Rebalance(args) => rebalance::run(args),
        Command::Scale(args) => scale::run(args),
        Command::Logits(args) => logits::run(args),
        Command::Bench(command) => bench::run(command),
        Command::Synth(args) => synth::run(args),
    };
    let code = match result {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("herd: {error:#}");
            exit_code(&error)
        }
    };
    kernels::cuda::exit(code)
}

/// `herd up` as if it had been typed, so that its defaults and environment stand in one place.
fn up_by_default() -> up::Args {
    let parser = up::Args::augment_args(Parser::new("up"));
    let matches = parser.get_matches_from(["up"]);
    up::Args::from_arg_matches(&matches)
        .unwrap_or_else(|error| error.format(&mut Cli::command()).exit())
}

/// 2 if the user's input is at fault, 1 otherwise.
fn exit_code(error: &anyhow::Error) -> i32 {
    let marked = error.downcast_ref::<BadInput>().is_some();
    let bad_input = marked
        || error.chain().any(|cause| {
            cause.is::<CheckpointError>()
                || cause.is::<BadInput>()
                || cause.is::<model::config::ConfigError>()
                || cause.is::<::worker::ModelError>()
                || cause.is::<model::synth::SynthError>()
                || cause.is::<safetensors::SafeTensorError>()
        });
    if bad_input { 2 } else { 1 }
}
