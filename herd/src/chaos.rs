//! `herd chaos`: faults on a running cluster under load, and the proof that no client noticed.
//!
//! A run first lets every stream finish in peace and keeps its tokens; then it starts the same streams
//! again, round after round, kills and freezes processes while they run, and compares. Who is hit and
//! when follows from the scenario's seed alone.

pub mod links;
mod load;
mod report;
mod scenario;

pub use report::{Report, html};
pub use scenario::{Fault, Kind, Scenario, ScenarioError, Target};

use anyhow::{Context, ensure};
use load::Streams;
use report::{Hit, Round};
use scenario::Dice;
use serde_json::Value;
use std::process::Command;
use std::time::{Duration, Instant};

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
    let mut rounds = Vec::new();
    for number in 0..scenario.rounds {
        whole(cluster, workers)?;
        let round = round(scenario, cluster, (&streams, &mut dice), number)?;
        progress(&round);
        rounds.push(round);
    }
    Ok(Report { scenario: scenario.clone(), workers, peace, rounds })
}

fn round(
    scenario: &Scenario,
    cluster: &Cluster,
    (streams, dice): (&Streams, &mut Dice),
    number: u32,
) -> anyhow::Result<Round> {
    let epoch_before = status(cluster)?["epoch"].as_u64().unwrap_or(0);
    let running = streams.start();
    let mut hits = Vec::new();
    let mut planned: Vec<(f64, &Fault)> =
        scenario.faults.iter().map(|fault| (dice.between(fault.after_s), fault)).collect();
    planned.sort_by(|a, b| a.0.total_cmp(&b.0));
    for (at_s, fault) in planned {
        let wait = Duration::from_secs_f64(at_s).saturating_sub(running.started.elapsed());
        std::thread::sleep(wait);
        hits.push(hit(cluster, fault, dice, running.started)?);
    }
    let outcome = running.finish();
    for hit in &mut hits {
        // Waits for the fault's own end, which may come after that of the streams.
        drop(hit.thaw.take());
    }
    let after = status(cluster)?;
    let changes = after["changes"].as_array().cloned().unwrap_or_default();
    let changes =
        changes.into_iter().filter(|c| c["epoch"].as_u64().unwrap_or(0) > epoch_before).collect();
    let epoch_after = after["epoch"].as_u64().unwrap_or(0);
    Ok(Round { number, hits, outcome, epoch_before, epoch_after, changes })
}

/// Strikes one process.
fn hit(cluster: &Cluster, fault: &Fault, dice: &mut Dice, started: Instant) -> anyhow::Result<Hit> {
    let status = status(cluster)?;
    let (pid, name) = match fault.target {
        Target::Worker => {
            let members = status["members"].as_array().map_or(&[][..], Vec::as_slice);
            let serving: Vec<&Value> = members.iter().filter(|m| m["state"] == "serving").collect();
            ensure!(!serving.is_empty(), "no worker serves");
            let victim = serving[dice.below(serving.len())];
            (victim["pid"].as_u64(), format!("worker {}", victim["worker"]))
        }
        Target::Leader => (status["leader"].as_u64(), "leader".to_owned()),
        Target::Etcd => (cluster.etcd_pid.map(u64::from), "etcd".to_owned()),
    };
    let pid = pid.with_context(|| format!("the pid of the {name} is unknown; see --etcd-pid"))?;
    let at_s = started.elapsed().as_secs_f64();
    let thaw = match fault.kind {
        Kind::Kill => {
            signal(pid, "KILL")?;
            None
        }
        Kind::Freeze => {
            signal(pid, "STOP")?;
            Some(report::Thaw::start(Duration::from_secs_f64(fault.for_s), move || {
                // A supervisor may have ended it meanwhile.
                let _ended = signal(pid, "CONT");
            }))
        }
    };
    Ok(Hit { at_s, kind: fault.kind, name, pid, thaw })
}

/// Without unsafe code there is no `kill(2)`; every system has the command.
fn signal(pid: u64, name: &str) -> anyhow::Result<()> {
    let status = Command::new("kill").args([format!("-{name}"), pid.to_string()]).status()?;
    ensure!(status.success(), "cannot send SIG{name} to {pid}; run this on the cluster's host");
    Ok(())
}

fn status(cluster: &Cluster) -> anyhow::Result<Value> {
    let agent: ureq::Agent =
        ureq::Agent::config_builder().timeout_global(Some(STATUS_MAX)).build().into();
    let url = format!("{}/status", cluster.url);
    let mut answer = agent.get(&url).call().with_context(|| format!("no answer from {url}"))?;
    Ok(answer.body_mut().read_json()?)
}

fn serving(cluster: &Cluster) -> anyhow::Result<usize> {
    let status = status(cluster)?;
    let members = status["members"].as_array().map_or(&[][..], Vec::as_slice);
    Ok(members.iter().filter(|member| member["state"] == "serving").count())
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
