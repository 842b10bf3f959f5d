//! `herd drain`: takes a worker out of a running cluster without anybody noticing.

use super::admin::AdminArgs;
use super::parts::say;
use anyhow::Context;
use proto::pb::DrainRequest;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The worker's number in `herd status`.
    worker: u32,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let worker = args.worker;
    args.admin
        .ask(async |mut client| client.drain(DrainRequest { worker }).await)
        .with_context(|| format!("worker {worker} is not drained"))?;
    say(&format!("worker {worker} has left the cluster"));
    Ok(())
}
