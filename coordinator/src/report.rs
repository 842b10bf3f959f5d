//! The machine's status as the JSON of `herd status`. Fields are only ever added.

use crate::meter::Measured;
use control::{Change, Levelling, MemberState, MemberStatus, PhaseName, Status};
use ids::{ExpertId, WorkerId};
use placement::Placement;
use serde_json::{Value, json};
use std::time::Duration;

/// What the workers told.
#[derive(Clone, Copy)]
pub(crate) struct Told<'a> {
    /// What the last window showed.
    pub(crate) load: Option<&'a Measured>,
    /// How a worker's GPU is, if it has one and told lately.
    pub(crate) gpu: &'a dyn Fn(WorkerId) -> Option<Value>,
}

/// * `url`: of this coordinator, which leads
/// * `store`: addresses of the store
pub(crate) fn json(status: &Status, told: Told<'_>, (url, store): (&str, &[String])) -> Value {
    let load = told.load;
    let leader = std::process::id();
    json!({
        "epoch": status.epoch.map(|epoch| epoch.0),
        "phase": phase(status.phase),
        "leader": leader,
        "waiting": status.lack.map(|lack| lack.to_string()),
        "workers_wanted": status.wanted,
        "load": load.map(|load| json!({ "fullest": load.fullest, "rows": load.experts })),
        // By layer and expert: the ranks that hold a copy.
        "placement": status.placement.as_ref().map(placement),
        // By layer and expert: what part of its rows each copy gets, in the same order; null while they share alike, or as a former
        // leader told.
        "shares": { "told": status.shared.0, "parts": parts(status) },
        "members": status.members.iter().map(|of| member(of, told)).collect::<Vec<_>>(),
        "coordinators": [{ "pid": leader, "url": url, "leader": true }],
        "etcd": etcd(store),
        "changes": status.changes.iter().map(change).collect::<Vec<_>>(),
    })
}

/// Of a coordinator that does not lead, as [`json`].
pub(crate) fn standby(url: &str, store: &[String]) -> Value {
    json!({
        "phase": "standby",
        "coordinators": [{ "pid": std::process::id(), "url": url, "leader": false }],
        "etcd": etcd(store),
    })
}

fn etcd(store: &[String]) -> Vec<Value> {
    store.iter().map(|url| json!({ "url": url })).collect()
}

/// The answer to an operator who wanted the load level.
pub(crate) fn levelling(levelling: Levelling) -> Value {
    match levelling {
        Levelling::Begun { epoch, before, after } => {
            json!({ "outcome": "levelled", "epoch": epoch.0, "before": before, "after": after })
        }
        Levelling::Level { before, after } => {
            json!({ "outcome": "level", "before": before, "after": after })
        }
        Levelling::Unknown => json!({ "outcome": "unknown" }),
        Levelling::Busy => json!({ "outcome": "busy" }),
    }
}

fn phase(phase: PhaseName) -> &'static str {
    match phase {
        PhaseName::Adopting => "adopting",
        PhaseName::Assembling => "assembling",
        PhaseName::Preparing => "preparing",
        PhaseName::Committing => "committing",
        PhaseName::Serving => "serving",
    }
}

fn placement(placement: &Placement) -> Value {
    let ranks = |layer, expert| {
        let ranks = placement.replicas(layer, expert).iter();
        ranks.map(|rank| rank.0).collect::<Vec<_>>()
    };
    let layer = |layer| {
        let experts = (0..).map(ExpertId).take(placement.experts());
        experts.map(|expert| ranks(layer, expert)).collect::<Vec<_>>()
    };
    json!((0..placement.moe_layers()).map(layer).collect::<Vec<_>>())
}

fn parts(status: &Status) -> Value {
    let (Some(placement), (_, Some(shares))) = (&status.placement, &status.shared) else {
        return Value::Null;
    };
    let rounded = |part: &f32| (f64::from(*part) * 1e3).round() / 1e3;
    let expert =
        |layer, expert| -> Vec<f64> { shares.parts(layer, expert).iter().map(rounded).collect() };
    let experts = || (0..).map(ExpertId).take(placement.experts());
    let layer = |layer| experts().map(|e| expert(layer, e)).collect::<Vec<_>>();
    json!((0..placement.moe_layers()).map(layer).collect::<Vec<_>>())
}

fn member(member: &MemberStatus, Told { load, gpu }: Told<'_>) -> Value {
    let state = match member.state {
        MemberState::Serving => "serving",
        MemberState::Joining => "joining",
        MemberState::Preparing => "preparing",
        MemberState::Draining => "draining",
    };
    let mut all = json!({
        "worker": member.worker.0,
        "rank": member.rank.map(|rank| rank.0),
        "pid": member.pid,
        "address": member.address,
        "device": member.device,
        "roles": ["attention", "expert"],
        "state": state,
        "experts": member.experts,
        // Rows that its experts computed in the last window.
        "rows": load.map(|load| load.rows.get(&member.worker).copied().unwrap_or(0)),
    });
    if let Some(gpu) = gpu(member.worker) {
        all["gpu"] = gpu;
    }
    all
}

fn change(change: &Change) -> Value {
    let ms = |time: Option<Duration>| time.map(|time| time.as_secs_f64() * 1e3);
    json!({
        "epoch": change.epoch.0,
        "cause": change.cause.to_string(),
        "expert_loads": change.loads,
        "at_ms": ms(Some(change.at)),
        // Null where a broken connection told: how long that went unseen nobody knows.
        "detect_ms": ms(change.detect),
        "plan_ms": ms(change.plan),
        // Why the view before it serves on, if it does.
        "given_up": change.given_up,
        "prepare_ms": ms(change.prepare),
        "commit_ms": ms(change.commit),
        "first_token_ms": ms(change.first_token),
    })
}
