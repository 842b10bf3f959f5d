//! `herd chaos`: faults on a running cluster under load, and the proof that no client noticed.
//!
//! A run first lets every stream finish in peace and keeps its tokens; then it starts the same streams
//! again, round after round, kills and freezes processes while they run, and compares. Who is hit and
//! when follows from the scenario's seed alone.

mod fault;
mod invariants;
pub mod links;
mod load;
mod report;
mod scenario;
mod strike;

pub use fault::{At, Between, Fault, Kind, Phase, Target, Way};
pub use report::{Report, html};
pub use scenario::{Scenario, ScenarioError};

use anyhow::{Context, ensure};
use load::Streams;
use report::Round;
use scenario::Dice;
use serde_json::Value;
use std::time::{Duration, Instant};
use strike::Network;

/// Longest wait for the cluster to be whole again between two rounds.
const WHOLE_MAX: Duration = Duration::from_secs(60);
/// Longest wait for an answer of the router's status.
const STATUS_MAX: Duration = Duration::from_secs(5);

/// Where to find the cluster.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// The router, `http://host:port`.
    pub url: String,
    /// The status does not know it.
    pub etcd_pid: Option<u32>,
    /// Where the links take rules, `http://host:port`.
    pub links: Option<String>,
}

/// Runs a scenario; `progress` is called after every round.
///
/// # Errors
///
/// If the cluster cannot be reached, a target does not exist, or the streams cannot run in peace.
pub fn run(
    scenario: &Scenario,
    cluster: &Cluster,
    progress: &mut dyn FnMut(&Round),
) -> anyhow::Result<Report> {
    let workers = serving(cluster)?;
    ensure!(workers > 0, "no worker serves; start a cluster first");
    let mut streams = Streams::new(&cluster.url, scenario.streams, scenario.tokens)?;
    let peace = streams.in_peace()?;
    let mut dice = Dice::new(scenario.seed);
    let network = Network::new(cluster.links.clone());
    let mut rounds = Vec::new();
    for number in 0..scenario.rounds {
        whole(cluster, workers)?;
        let round = round((scenario, number, workers), cluster, &network, (&streams, &mut dice))?;
        progress(&round);
        rounds.push(round);
    }
    Ok(Report { scenario: scenario.clone(), workers, peace, rounds })
}

fn round(
    (scenario, number, workers): (&Scenario, u32, usize),
    cluster: &Cluster,
    network: &Network,
    (streams, dice): (&Streams, &mut Dice),
) -> anyhow::Result<Round> {
    let epoch_before = status(cluster)?["epoch"].as_u64().unwrap_or(0);
    let running = streams.start();
    let mut hits = Vec::new();
    let when = |fault: &Fault| fault.after_s.unwrap_or_default();
    let mut planned: Vec<(f64, (&Fault, u64))> =
        scenario.faults.iter().zip(0..).map(|f| (dice.between(when(f.0)), f)).collect();
    planned.sort_by(|a, b| a.0.total_cmp(&b.0));
    for (at_s, fault) in planned {
        let wait = Duration::from_secs_f64(at_s).saturating_sub(running.started.elapsed());
        std::thread::sleep(wait);
        hits.extend(strike::strike(cluster, network, fault, dice, running.started)?);
    }
    let first_s = hits.iter().map(|hit| hit.at_s).reduce(f64::min);
    let outcome = running.finish(first_s.unwrap_or_default());
    for hit in &mut hits {
        // Waits for the fault's own end, which may come after that of the streams.
        drop(hit.thaw.take());
    }
    let (after, recovered_s) = settled(cluster, workers, scenario.recovery_max_s)?;
    let changes = after["changes"].as_array().cloned().unwrap_or_default();
    let changes =
        changes.into_iter().filter(|c| c["epoch"].as_u64().unwrap_or(0) > epoch_before).collect();
    let epoch_after = after["epoch"].as_u64().unwrap_or(0);
    Ok(Round { number, hits, outcome, epoch_before, epoch_after, changes, after, recovered_s })
}

/// The status once the cluster is whole and idle, and the seconds until then; or the last one, if that
/// takes too long.
fn settled(
    cluster: &Cluster,
    workers: usize,
    limit_s: f64,
) -> anyhow::Result<(Value, Option<f64>)> {
    let start = Instant::now();
    loop {
        let status = status(cluster);
        let elapsed_s = start.elapsed().as_secs_f64();
        match status {
            // Nobody leads for a while after a leader's death, though all workers serve.
            Ok(status)
                if workers <= serving_members(&status).len()
                    && 0 < invariants::leading(&status)
                    && invariants::is_idle(&status) =>
            {
                return Ok((status, Some(elapsed_s)));
            }
            status if limit_s < elapsed_s => return Ok((status?, None)),
            // An error is a coordinator that is being replaced.
            Ok(_) | Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn status(cluster: &Cluster) -> anyhow::Result<Value> {
    let agent: ureq::Agent =
        ureq::Agent::config_builder().timeout_global(Some(STATUS_MAX)).build().into();
    let url = format!("{}/status", cluster.url);
    let mut answer = agent.get(&url).call().with_context(|| format!("no answer from {url}"))?;
    Ok(answer.body_mut().read_json()?)
}

/// The members that serve.
fn serving_members(status: &Value) -> Vec<&Value> {
    let members = status["members"].as_array().into_iter().flatten();
    members.filter(|member| member["state"] == "serving").collect()
}

fn serving(cluster: &Cluster) -> anyhow::Result<usize> {
    Ok(serving_members(&status(cluster)?).len())
}

/// Waits until as many workers serve as at the start.
fn whole(cluster: &Cluster, workers: usize) -> anyhow::Result<()> {
    let start = Instant::now();
    // An error is a coordinator that is being replaced.
    while !serving(cluster).is_ok_and(|serving| workers <= serving) {
        ensure!(start.elapsed() < WHOLE_MAX, "the cluster is not whole again after {WHOLE_MAX:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
