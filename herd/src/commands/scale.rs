//! `herd scale`: how many workers there shall be.

use super::admin::AdminArgs;
use super::parts::say;
use anyhow::{Context, bail};
use proto::pb::ScaleRequest;
use std::time::{Duration, Instant};

/// Between looks at whether the missing workers serve.
const POLL: Duration = Duration::from_millis(100);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Workers that shall serve. Those beyond are drained and end; missing ones are started by the
    /// supervisor of `herd up --processes`, elsewhere by whoever runs the workers.
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: u16,
    /// Longest wait for missing workers to serve, in seconds.
    #[arg(long, default_value_t = 60)]
    wait_s: u64,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let request = ScaleRequest { workers: u32::from(args.workers) };
    let answer = args
        .admin
        .ask(async |mut client| client.scale(request).await)
        .context("the number of workers stays")?
        .into_inner();
    for worker in &answer.drained {
        say(&format!("worker {worker} has left the cluster"));
    }
    if 0 < answer.missing {
        let (missing, wait_s) = (answer.missing, args.wait_s);
        say(&format!("{missing} more must be started; waiting for them up to {wait_s} s"));
    }
    let deadline = Instant::now() + Duration::from_secs(args.wait_s);
    loop {
        let serving = serving(args)?;
        if serving == usize::from(args.workers) {
            say(&format!("{serving} workers serve"));
            return Ok(());
        }
        if deadline <= Instant::now() {
            bail!(
                "{serving} workers serve, not {}; start the others with `herd worker`",
                args.workers
            );
        }
        std::thread::sleep(POLL);
    }
}

fn serving(args: &Args) -> anyhow::Result<usize> {
    let status = args.admin.status()?;
    let members = status["members"].as_array().map_or(&[][..], Vec::as_slice);
    Ok(members.iter().filter(|member| member["state"] == "serving").count())
}
