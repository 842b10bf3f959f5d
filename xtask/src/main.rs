//! Automation of the repository: `cargo xtask verify` is what a reviewer would otherwise have to remember.
//!
//! It never changes a file of the tree: every command only looks and reports.

mod accesses;
mod gpu_stand_in;
mod kernels_compile;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use gpu_stand_in::Mode;

#[derive(Parser)]
#[command(about = "Automation of the herd repository")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Format, lints and tidy: everything a change must pass besides its tests.
    Verify,
    /// The rules that no compiler checks: dependency directions, files, code map.
    Tidy,
    /// Compiles every CUDA kernel for every supported architecture; needs no GPU. Installs the compiler below
    /// `target` if it is not there.
    KernelsCompile,
    /// Runs a command on a GPU that is none: CUDA's driver is a stand-in that runs herd's kernels on the CPU, slowly, and
    /// checks how it is called. Without a command it says where the stand-in is.
    GpuStandIn {
        /// Watch every load and store of the kernels, and end the process where threads race: ten times as slow.
        #[arg(long)]
        races: bool,
        /// Watch that, too, and print what the kernels ask of memory: sectors, and passes over banks, line by line.
        #[arg(long)]
        accesses: bool,
        /// Such as `target/debug/herd up --device cuda:0`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// A whole cluster under faults, from a seed: checks its laws after every event.
    Sim(SimArgs),
}

#[derive(clap::Args)]
struct SimArgs {
    /// Everything that happens follows from it.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many seeds to run, from `--seed` on.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Workers at the start.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    workers: u16,
    /// Events until the faults stop and service must return.
    #[arg(long, default_value_t = 20_000)]
    steps: u64,
}

fn main() -> anyhow::Result<ExitCode> {
    match Args::parse().task {
        Task::Verify => verify()?,
        Task::Tidy => tidy::run(&root())?,
        Task::KernelsCompile => kernels_compile::run(&root())?,
        Task::GpuStandIn { races, accesses, command } => {
            let mode = match (races, accesses) {
                (_, true) => Mode::Accesses,
                (true, false) => Mode::Races,
                (false, false) => Mode::Plain,
            };
            return gpu_stand_in::run(&root(), mode, &command);
        }
        Task::Sim(args) => sim(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn sim(args: &SimArgs) -> anyhow::Result<()> {
    let SimArgs { workers, steps, .. } = *args;
    for seed in args.seed..args.seed.saturating_add(args.seeds) {
        let report = sim::run(sim::Options { seed, workers, steps })?;
        eprintln!("seed {seed}: {report}");
    }
    Ok(())
}

fn verify() -> anyhow::Result<()> {
    cargo(&["fmt", "--all", "--check"])?;
    cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
    tidy::run(&root())
}

/// The workspace's root folder. The manifest's folder is known at compile time, and xtask is always run from its own tree.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask is a folder of the workspace")
        .to_path_buf()
}

fn cargo(arguments: &[&str]) -> anyhow::Result<()> {
    eprintln!("$ cargo {}", arguments.join(" "));
    let status = Command::new("cargo")
        .args(arguments)
        .current_dir(root())
        .status()
        .context("cargo could not be started")?;
    if !status.success() {
        bail!("cargo {} failed: {status}", arguments.join(" "));
    }
    Ok(())
}
