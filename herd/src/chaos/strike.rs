//! How a fault reaches its victims: by a signal, by the worker's own hooks, or by its links.

use super::fault::{Between, Fault, Kind, Phase, Target, Way};
use super::links::REST;
use super::report::{Hit, Thaw};
use super::scenario::Dice;
use super::{Cluster, serving_members, status};
use anyhow::{Context, ensure};
use proto::pb;
use serde_json::Value;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Longest wait for a worker or the links to take a fault.
const CALL_MAX: Duration = Duration::from_secs(5);

/// A fault's number and its rules.
type Rules = (u64, Vec<pb::LinkRule>);

/// The rules that are in force, by the fault that made them.
#[derive(Clone)]
pub(super) struct Network {
    url: Option<String>,
    rules: Arc<Mutex<Vec<Rules>>>,
}

impl Network {
    pub(super) fn new(url: Option<String>) -> Self {
        Self { url, rules: Arc::default() }
    }

    /// Puts a fault's rules in force, or takes them away.
    fn change(&self, fault: u64, rules: Vec<pb::LinkRule>) -> anyhow::Result<()> {
        let url = self.url.clone().context(
            "the links are unknown; start the cluster with `herd up --processes --allow-chaos` and give \
             --links the URL that it prints",
        )?;
        // Rules are put whole. The lock is kept, so that the last change is also the last call.
        let mut all = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(other, _)| *other != fault);
        if !rules.is_empty() {
            all.push((fault, rules));
        }
        let rules = all.iter().flat_map(|(_, rules)| rules.clone()).collect();
        call(async move {
            let channel = endpoint(url)?.connect().await?;
            let mut client = pb::links_client::LinksClient::new(channel);
            client.impair(pb::ImpairRequest { rules }).await?;
            Ok(())
        })
        .context("the links do not take the fault")
    }
}

/// Who is struck: processes of workers, or another one.
struct Victim {
    name: String,
    pid: u64,
    /// Of a worker.
    address: String,
}

/// Strikes all victims of one fault at once.
pub(super) fn strike(
    cluster: &Cluster,
    network: &Network,
    (fault, number): (&Fault, u64),
    dice: &mut Dice,
    started: Instant,
) -> anyhow::Result<Vec<Hit>> {
    let status = status(cluster)?;
    let victims = victims(cluster, fault, dice, &status)?;
    let at_s = started.elapsed().as_secs_f64();
    let mut links = if fault.kind.is_of_links() {
        network.change(number, rules(fault, &victims, &status))?;
        let network = network.clone();
        Some(Thaw::start(Duration::from_secs_f64(fault.for_s), move || {
            if let Err(error) = network.change(number, Vec::new()) {
                tracing::error!(%error, "the links stay as they are");
            }
        }))
    } else {
        None
    };
    let hit = |victim: Victim| {
        let thaw = if fault.kind.is_of_links() { links.take() } else { inflict(fault, &victim)? };
        Ok(Hit { at_s, kind: fault.kind, name: victim.name, pid: victim.pid, thaw })
    };
    victims.into_iter().map(hit).collect()
}

fn victims(
    cluster: &Cluster,
    fault: &Fault,
    dice: &mut Dice,
    status: &Value,
) -> anyhow::Result<Vec<Victim>> {
    let one = |name: &str, pid: Option<u64>| {
        let pid =
            pid.with_context(|| format!("the pid of the {name} is unknown; see --etcd-pid"))?;
        Ok(vec![Victim { name: name.to_owned(), pid, address: String::new() }])
    };
    match fault.target {
        Target::Leader => one("leader", status["leader"].as_u64()),
        Target::Etcd => one("etcd", cluster.etcd_pid.map(u64::from)),
        Target::Worker => {
            let mut serving = serving_members(status);
            let count = serving.len();
            ensure!(
                fault.workers <= count,
                "{} workers shall be struck and {count} serve",
                fault.workers
            );
            let draw = |_| {
                let member = serving.remove(dice.below(serving.len()));
                let name = format!("worker {}", member["worker"]);
                let pid = member["pid"].as_u64().with_context(|| format!("{name} has no pid"))?;
                let address = member["address"].as_str().unwrap_or_default().to_owned();
                Ok(Victim { name, pid, address })
            };
            (0..fault.workers).map(draw).collect()
        }
    }
}

/// Inflicts a fault that strikes a process.
fn inflict(fault: &Fault, victim: &Victim) -> anyhow::Result<Option<Thaw>> {
    let pid = victim.pid;
    match (fault.kind, fault.at) {
        (Kind::Kill, None) => {
            signal(pid, "KILL")?;
            Ok(None)
        }
        (Kind::Freeze, _) => {
            signal(pid, "STOP")?;
            Ok(Some(Thaw::start(Duration::from_secs_f64(fault.for_s), move || {
                // A supervisor may have ended it meanwhile.
                let _ended = signal(pid, "CONT");
            })))
        }
        (
            Kind::Kill
            | Kind::Pause
            | Kind::Slow
            | Kind::Corrupt
            | Kind::Nan
            | Kind::Delay
            | Kind::Drop
            | Kind::Partition,
            _,
        ) => {
            let (request, url) = (inject(fault), format!("http://{}", victim.address));
            call(async move {
                let channel = endpoint(url)?.connect().await?;
                pb::chaos_client::ChaosClient::new(channel).inject(request).await?;
                Ok(())
            })
            .with_context(|| format!("{} does not take the fault", victim.name))?;
            // The worker ends it by itself; the next round must not see it.
            let lasts = (fault.for_s > 0.0).then(|| Duration::from_secs_f64(fault.for_s));
            Ok(lasts.map(|lasts| Thaw::start(lasts, || {})))
        }
    }
}

fn inject(fault: &Fault) -> pb::InjectRequest {
    use pb::inject_request as wire;
    let kind = match fault.kind {
        Kind::Kill => wire::Kind::Kill,
        Kind::Pause => wire::Kind::Pause,
        Kind::Slow => wire::Kind::Slow,
        Kind::Corrupt => wire::Kind::Corrupt,
        Kind::Nan => wire::Kind::Nan,
        Kind::Freeze | Kind::Delay | Kind::Drop | Kind::Partition => wire::Kind::Unspecified,
    };
    let at = fault.at.unwrap_or_default();
    let phase = match at.phase {
        None => wire::Phase::Any,
        Some(Phase::Dispatch) => wire::Phase::Dispatch,
        Some(Phase::Experts) => wire::Phase::Experts,
        Some(Phase::Combine) => wire::Phase::Combine,
    };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked: an hour")]
    let for_ms = (fault.for_s * 1e3) as u32;
    pb::InjectRequest {
        kind: kind.into(),
        ms: fault.ms,
        for_ms,
        from: Some(wire::From::StepOffset(at.step)),
        layer: at.layer.map(u32::from),
        phase: phase.into(),
    }
}

/// The rules between the victims and whom they shall be cut off from.
fn rules(fault: &Fault, victims: &[Victim], status: &Value) -> Vec<pb::LinkRule> {
    let others = status["members"].as_array().into_iter().flatten();
    let others = others.filter_map(|member| member["address"].as_str());
    let others = others.filter(|address| victims.iter().all(|victim| victim.address != *address));
    let sides: Vec<&str> = match fault.between.unwrap_or_default() {
        Between::All => others.chain([REST]).collect(),
        Between::Rest => vec![REST],
        Between::Workers => others.collect(),
    };
    let rule = |from: &str, to: &str| pb::LinkRule {
        from: from.to_owned(),
        to: to.to_owned(),
        delay_ms: fault.ms,
        bytes_per_s: fault.bytes_per_s,
        cut: match fault.kind {
            Kind::Partition => pb::link_rule::Cut::Hold,
            Kind::Drop => pb::link_rule::Cut::Reset,
            Kind::Kill
            | Kind::Freeze
            | Kind::Pause
            | Kind::Slow
            | Kind::Corrupt
            | Kind::Nan
            | Kind::Delay => pb::link_rule::Cut::None,
        }
        .into(),
    };
    let mut rules = Vec::new();
    for victim in victims.iter().map(|victim| &victim.address) {
        for side in &sides {
            let (to, from) = (rule(side, victim), rule(victim, side));
            match fault.way.unwrap_or_default() {
                Way::Both => rules.extend([to, from]),
                Way::To => rules.push(to),
                Way::From => rules.push(from),
            }
        }
    }
    rules
}

/// Without unsafe code there is no `kill(2)`; every system has the command.
fn signal(pid: u64, name: &str) -> anyhow::Result<()> {
    let status = Command::new("kill").args([format!("-{name}"), pid.to_string()]).status()?;
    ensure!(status.success(), "cannot send SIG{name} to {pid}; run this on the cluster's host");
    Ok(())
}

fn endpoint(url: String) -> anyhow::Result<tonic::transport::Endpoint> {
    Ok(proto::standing(url)?.timeout(CALL_MAX))
}

/// Runs one call to its end. What a server says is an error's first line, without its metadata.
fn call(call: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(call).map_err(|error| match error.downcast::<tonic::Status>() {
        Ok(status) => anyhow::anyhow!("{:?}: {}", status.code(), status.message()),
        Err(error) => error,
    })
}
