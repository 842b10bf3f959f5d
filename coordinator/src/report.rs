//! The machine's status as the JSON of `herd status`. Fields are only ever added.

use control::{Change, MemberState, MemberStatus, PhaseName, Status};
use serde_json::{Value, json};
use std::time::Duration;

/// * `url`: of this coordinator, which leads
/// * `store`: addresses of the store
pub(crate) fn json(status: &Status, url: &str, store: &[String]) -> Value {
    let leader = std::process::id();
    json!({
        "epoch": status.epoch.map(|epoch| epoch.0),
        "phase": phase(status.phase),
        "leader": leader,
        "members": status.members.iter().map(member).collect::<Vec<_>>(),
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

fn phase(phase: PhaseName) -> &'static str {
    match phase {
        PhaseName::Adopting => "adopting",
        PhaseName::Assembling => "assembling",
        PhaseName::Preparing => "preparing",
        PhaseName::Committing => "committing",
        PhaseName::Serving => "serving",
    }
}

fn member(member: &MemberStatus) -> Value {
    let state = match member.state {
        MemberState::Serving => "serving",
        MemberState::Joining => "joining",
        MemberState::Preparing => "preparing",
        MemberState::Draining => "draining",
    };
    json!({
        "worker": member.worker.0,
        "rank": member.rank.map(|rank| rank.0),
        "pid": member.pid,
        "address": member.address,
        "device": member.device,
        "roles": ["attention", "expert"],
        "state": state,
        "experts": member.experts,
    })
}

fn change(change: &Change) -> Value {
    let ms = |time: Option<Duration>| time.map(|time| time.as_secs_f64() * 1e3);
    json!({
        "epoch": change.epoch.0,
        "cause": change.cause.to_string(),
        "at_ms": ms(Some(change.at)),
        // How long the loss went unseen: nobody here knows when it really happened.
        "detect_ms": null,
        "plan_ms": ms(change.plan),
        "prepare_ms": ms(change.prepare),
        "commit_ms": ms(change.commit),
        "first_token_ms": ms(change.first_token),
    })
}
