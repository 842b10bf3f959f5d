//! What must hold in every run whatever strikes, as far as clients and the status show it.

use super::report::{Report, Round};
use serde_json::{Value, json};

/// A rule and whether it held.
pub struct Verdict {
    /// `I1` to `I8`; text shows the first two together.
    pub id: &'static str,
    pub rule: &'static str,
    /// What broke it, one line each; empty if it held.
    pub broken: Vec<String>,
}

impl Verdict {
    pub(super) fn json(&self) -> Value {
        let Self { id, rule, broken } = self;
        json!({ "id": id, "rule": rule, "held": broken.is_empty(), "broken": broken })
    }
}

type Rule = (&'static str, &'static str, fn(&Report, &Round) -> Option<String>);

const RULES: [Rule; 7] = [
    (
        "I1, I2",
        "every position exactly once and its token that of a run without faults: equal text",
        tokens,
    ),
    ("I3", "epochs only rise", epochs),
    ("I4", "every expert has a living copy: all members serve, and hold experts", members),
    ("I5", "recovery is bounded", recovery),
    ("I6", "nothing leaks: no stream, queue or KV memory is left", leaks),
    ("I7", "every request ends, with its answer", ends),
    ("I8", "one coordinator leads", leaders),
];

/// Judges a run.
pub(super) fn judge(report: &Report) -> Vec<Verdict> {
    let verdict = |(id, rule, of): Rule| {
        let broken =
            |round| of(report, round).map(|text| format!("round {}: {text}", round.number));
        Verdict { id, rule, broken: report.rounds.iter().filter_map(broken).collect() }
    };
    RULES.map(verdict).into()
}

/// How many coordinators say that they lead.
pub(super) fn leading(status: &Value) -> usize {
    let all = status["coordinators"].as_array().into_iter().flatten();
    all.filter(|coordinator| coordinator["leader"] == true).count()
}

/// Whether no request is under way.
pub(super) fn is_idle(status: &Value) -> bool {
    left(status) == (0, 0)
}

/// Streams with queued ones, and sequences that workers hold.
fn left(status: &Value) -> (u64, u64) {
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let router = &status["router"];
    let members = status["members"].as_array().into_iter().flatten();
    let held = members.map(|member| number(&member["sequences"])).sum();
    (number(&router["streams"]) + number(&router["queued"]), held)
}

fn tokens(_: &Report, round: &Round) -> Option<String> {
    let count = round.outcome.different;
    (count > 0).then(|| format!("{count} streams yielded other tokens"))
}

fn epochs(_: &Report, round: &Round) -> Option<String> {
    let epochs: Vec<u64> = round.changes.iter().filter_map(|c| c["epoch"].as_u64()).collect();
    let rise = epochs.windows(2).all(|pair| pair[0] < pair[1])
        && round.epoch_before <= round.epoch_after
        && epochs.last().is_none_or(|last| *last <= round.epoch_after);
    let (before, after) = (round.epoch_before, round.epoch_after);
    (!rise).then(|| format!("from {before} by {epochs:?} to {after}"))
}

fn members(_: &Report, round: &Round) -> Option<String> {
    let members = round.after["members"].as_array().map_or(&[][..], Vec::as_slice);
    let holds = |member: &&Value| {
        member["state"] == "serving" && member["experts"].as_u64().is_some_and(|n| n > 0)
    };
    let bad = members.len() - members.iter().filter(holds).count();
    (bad > 0 || members.is_empty())
        .then(|| format!("{bad} of {} members do not serve experts", members.len()))
}

fn recovery(report: &Report, round: &Round) -> Option<String> {
    let max_s = report.scenario.recovery_max_s;
    let stall_s = round.outcome.stall_s(1.0);
    match round.recovered_s {
        None => Some(format!("the cluster is not whole and idle after {max_s} s")),
        Some(_) => (max_s < stall_s).then(|| format!("a stream stood still for {stall_s:.3} s")),
    }
}

fn leaks(_: &Report, round: &Round) -> Option<String> {
    let (streams, held) = left(&round.after);
    ((streams, held) != (0, 0))
        .then(|| format!("{streams} streams and the memory of {held} sequences are left"))
}

fn ends(_: &Report, round: &Round) -> Option<String> {
    let (count, error) = (round.outcome.lost, &round.outcome.first_error);
    (count > 0).then(|| format!("{count} streams failed: {}", error.as_deref().unwrap_or("?")))
}

fn leaders(_: &Report, round: &Round) -> Option<String> {
    let count = leading(&round.after);
    (count != 1).then(|| format!("{count} lead"))
}
