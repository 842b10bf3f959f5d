//! `herd rebalance`: levels the load of the experts over the workers.

use super::admin::AdminArgs;
use super::parts::say;
use anyhow::{Context, bail};
use proto::pb::RebalanceRequest;
use serde_json::Value;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let answer = args
        .admin
        .ask(async |mut client| client.rebalance(RebalanceRequest {}).await)
        .context("the load is not levelled")?;
    let answer: Value = serde_json::from_str(&answer.into_inner().json)?;
    if args.json {
        say(&answer.to_string());
        return Ok(());
    }
    let times = |field: &str| answer[field].as_f64().unwrap_or(f64::NAN);
    let (before, after) = (times("before"), times("after"));
    match answer["outcome"].as_str() {
        Some("levelled") => say(&format!(
            "epoch {}: the fullest worker has {after:.2} times the mean load, before {before:.2}",
            answer["epoch"]
        )),
        Some("level") => say(&format!(
            "nothing changes: the fullest worker has {before:.2} times the mean load, and could have {after:.2}"
        )),
        Some("unknown") => bail!("no tokens were counted yet; send requests first"),
        Some("busy") => bail!("another view change is under way; try again"),
        Some(_) | None => bail!("the coordinator answers {answer}; use its version of herd"),
    }
    Ok(())
}
