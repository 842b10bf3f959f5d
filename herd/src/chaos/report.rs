//! What happened: as JSON, and as one page to look at.

use super::fault::Kind;
use super::invariants::{self, Verdict};
use super::load::Outcome;
use super::scenario::Scenario;
use serde_json::{Value, json};
use std::fmt::Write;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// A frozen process that will be let go; dropping it waits for that, so that none stays frozen.
pub(super) struct Thaw(Receiver<()>);

impl Thaw {
    pub(super) fn start(after: Duration, thaw: impl FnOnce() + Send + 'static) -> Self {
        let (done, wait) = channel();
        std::thread::spawn(move || {
            std::thread::sleep(after);
            thaw();
            // The run may have been given up.
            let _given_up = done.send(());
        });
        Self(wait)
    }
}

impl Drop for Thaw {
    fn drop(&mut self) {
        // An error means that it is done.
        let _done = self.0.recv();
    }
}

/// A fault that was inflicted.
pub struct Hit {
    /// After the start of the streams.
    pub at_s: f64,
    pub kind: Kind,
    /// `worker 3`, `leader`, `etcd`.
    pub name: String,
    pub pid: u64,
    pub(super) thaw: Option<Thaw>,
}

/// One run of all streams.
pub struct Round {
    pub number: u32,
    pub hits: Vec<Hit>,
    pub outcome: Outcome,
    pub epoch_before: u64,
    pub epoch_after: u64,
    /// The view changes of the round, as `herd status` shows them.
    pub changes: Vec<Value>,
    /// The status after it.
    pub after: Value,
    /// Seconds after it until the cluster was whole and idle; `None` if it did not get there.
    pub recovered_s: Option<f64>,
}

/// A whole run.
pub struct Report {
    pub scenario: Scenario,
    pub workers: usize,
    /// The streams without faults.
    pub peace: Outcome,
    pub rounds: Vec<Round>,
}

impl Round {
    /// One line of the report.
    #[must_use]
    pub fn json(&self) -> Value {
        let hit = |hit: &Hit| json!({ "at_s": round(hit.at_s), "kind": hit.kind, "target": hit.name, "pid": hit.pid });
        let mut line = outcome_json(&self.outcome);
        line["round"] = json!(self.number);
        line["faults"] = json!(self.hits.iter().map(hit).collect::<Vec<_>>());
        line["epochs"] = json!([self.epoch_before, self.epoch_after]);
        line["recovered_s"] = json!(self.recovered_s.map(round));
        line["changes"] = json!(self.changes);
        line
    }
}

impl Report {
    /// Longest stalls of the streams of all rounds, ascending.
    fn stalls_s(&self) -> Outcome {
        let all = self.rounds.iter().flat_map(|round| &round.outcome.stalls_s);
        let mut stalls_s: Vec<f64> = all.copied().collect();
        stalls_s.sort_by(f64::total_cmp);
        Outcome { stalls_s, ..Outcome::default() }
    }

    /// What must hold in every run.
    #[must_use]
    pub fn invariants(&self) -> Vec<Verdict> {
        invariants::judge(self)
    }

    /// What the scenario's promises say of the run; empty if all were kept.
    #[must_use]
    pub fn broken(&self) -> Vec<String> {
        let sum = |of: fn(&Outcome) -> usize| -> usize {
            self.rounds.iter().map(|round| of(&round.outcome)).sum()
        };
        let mut broken = Vec::new();
        let (lost, different) = (sum(|o| o.lost), sum(|o| o.different));
        if lost > 0 {
            broken.push(format!("{lost} streams were lost"));
        }
        if different > 0 {
            broken.push(format!("{different} streams yielded other tokens"));
        }
        // What the first lines have said already.
        let counted = ["I1, I2", "I7"];
        for verdict in self.invariants().iter().filter(|v| !counted.contains(&v.id)) {
            broken.extend(verdict.broken.iter().map(|text| format!("{}: {text}", verdict.id)));
        }
        let stalls = self.stalls_s();
        for (share, name, max) in [
            (0.5, "p50", self.scenario.stall_p50_max_s),
            (0.99, "p99", self.scenario.stall_p99_max_s),
        ] {
            let stall_s = stalls.stall_s(share);
            if max.is_some_and(|max| max < stall_s) {
                let max = max.unwrap_or_default();
                broken.push(format!("{name} of the stalls is {stall_s:.3} s, more than {max} s"));
            }
        }
        broken
    }

    /// The whole report.
    #[must_use]
    pub fn json(&self) -> Value {
        let stalls = self.stalls_s();
        let lost: usize = self.rounds.iter().map(|round| round.outcome.lost).sum();
        let different: usize = self.rounds.iter().map(|round| round.outcome.different).sum();
        json!({
            "scenario": self.scenario,
            "workers": self.workers,
            "rounds": self.rounds.len(),
            "streams": self.rounds.iter().map(|round| round.outcome.streams).sum::<usize>(),
            "lost": lost,
            "different": different,
            "stall_p50_s": round(stalls.stall_s(0.5)),
            "stall_p99_s": round(stalls.stall_s(0.99)),
            "stall_max_s": round(stalls.stall_s(1.0)),
            "broken": self.broken(),
            "invariants": self.invariants().iter().map(Verdict::json).collect::<Vec<_>>(),
            "in_peace": outcome_json(&self.peace),
            "by_round": self.rounds.iter().map(Round::json).collect::<Vec<_>>(),
        })
    }
}

fn outcome_json(outcome: &Outcome) -> Value {
    let pieces: u32 = outcome.pieces.iter().sum();
    json!({
        "lost": outcome.lost,
        "first_error": outcome.first_error,
        "different": outcome.different,
        "stall_p50_s": round(outcome.stall_s(0.5)),
        "stall_p99_s": round(outcome.stall_s(0.99)),
        "stall_max_s": round(outcome.stall_s(1.0)),
        "seconds": round(outcome.seconds),
        "pieces_per_s": round(f64::from(pieces) / outcome.seconds.max(1e-9)),
    })
}

fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

/// The report as one page that needs nothing else: a table, and per round the pieces of text per tenth
/// of a second with the faults drawn in.
#[must_use]
pub fn html(report: &Report) -> String {
    let json = report.json();
    let cell = |key: &str| escape(&json[key].to_string());
    let mut page = format!(
        "<!doctype html><meta charset=utf-8><title>herd chaos</title>\
         <style>body{{font:14px sans-serif;margin:2em;max-width:60em}}td,th{{padding:2px 12px;text-align:right}}\
         svg{{background:#f6f6f6;display:block;margin:4px 0 16px}}</style>\
         <h1>herd chaos</h1><p>{} workers, {} streams in {} rounds, seed {}</p>\
         <table><tr><th>lost<th>different<th>stall since the first fault, p50 s<th>p99<th>max\
         <tr><td>{}<td>{}<td>{}<td>{}<td>{}</table>",
        report.workers,
        cell("streams"),
        cell("rounds"),
        report.scenario.seed,
        cell("lost"),
        cell("different"),
        cell("stall_p50_s"),
        cell("stall_p99_s"),
        cell("stall_max_s"),
    );
    for broken in report.broken() {
        push(&mut page, format_args!("<p><b>Broken: {}</b>", escape(&broken)));
    }
    page.push_str("<h2>invariants</h2><table>");
    for Verdict { id, rule, broken } in report.invariants() {
        let held = if broken.is_empty() { "held" } else { "<b>broken</b>" };
        push(
            &mut page,
            format_args!(
                "<tr><td>{id}<td style=text-align:left>{}<td>{held}<td>{}",
                escape(rule),
                escape(&broken.join("; "))
            ),
        );
    }
    page.push_str("</table>");
    push(&mut page, format_args!("<h2>in peace</h2>{}", chart(&report.peace, &[])));
    for round in &report.rounds {
        let (outcome, epochs) = (&round.outcome, (round.epoch_before, round.epoch_after));
        push(
            &mut page,
            format_args!(
                "<h2>round {}</h2><p>epochs {} to {}, lost {}, different {}, longest stall {:.3} s{}",
                round.number,
                epochs.0,
                epochs.1,
                outcome.lost,
                outcome.different,
                outcome.stall_s(1.0),
                chart(outcome, &round.hits),
            ),
        );
    }
    page
}

/// Bars of 6 pixels per tenth of a second.
fn chart(outcome: &Outcome, hits: &[Hit]) -> String {
    let highest = outcome.pieces.iter().copied().max().unwrap_or(1).max(1);
    let width = outcome.pieces.len() * 6 + 120;
    let mut svg = format!("<svg width={width} height=140>");
    for (tenth, &pieces) in outcome.pieces.iter().enumerate() {
        let height = f64::from(pieces) / f64::from(highest) * 100.0;
        let (x, y) = (tenth * 6, 120.0 - height);
        push(
            &mut svg,
            format_args!("<rect x={x} y={y:.1} width=5 height={height:.1} fill=#4a7 />"),
        );
    }
    for hit in hits {
        let x = hit.at_s * 60.0;
        let name = format!("{} {}", hit.kind.name(), hit.name);
        push(
            &mut svg,
            format_args!(
                "<line x1={x:.1} x2={x:.1} y1=14 y2=120 stroke=#c33 /><text x={x:.1} y=12 font-size=11>{}</text>",
                escape(&name)
            ),
        );
    }
    svg.push_str("<text x=0 y=135 font-size=11>pieces of text per 0.1 s</text></svg>");
    svg
}

fn push(to: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _infallible = to.write_fmt(text);
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(lost: usize, stalls_s: &[f64], max: Option<f64>) -> Report {
        let outcome = Outcome { lost, stalls_s: stalls_s.to_vec(), ..Outcome::default() };
        let round = Round {
            number: 0,
            hits: vec![Hit {
                at_s: 1.0,
                kind: Kind::Kill,
                name: "worker <1>".into(),
                pid: 3,
                thaw: None,
            }],
            outcome,
            epoch_before: 1,
            epoch_after: 2,
            changes: vec![],
            after: json!({
                "members": [{ "state": "serving", "experts": 4, "sequences": 0 }],
                "coordinators": [{ "leader": true }, { "leader": false }],
                "router": { "streams": 0, "queued": 0 },
            }),
            recovered_s: Some(0.1),
        };
        let scenario = Scenario { stall_p99_max_s: max, ..Scenario::default() };
        Report { scenario, workers: 2, peace: Outcome::default(), rounds: vec![round] }
    }

    #[test]
    fn broken_promises_are_named() {
        assert!(report(0, &[0.1, 0.2], Some(0.5)).broken().is_empty());
        let broken = report(2, &[0.1, 0.7], Some(0.5)).broken();
        assert_eq!(
            broken,
            ["2 streams were lost", "p99 of the stalls is 0.700 s, more than 0.5 s"]
        );
    }

    #[test]
    fn every_invariant_can_break() {
        let held = |report: &Report| -> Vec<&str> {
            let broken = report.invariants().into_iter().filter(|v| !v.broken.is_empty());
            broken.map(|verdict| verdict.id).collect()
        };
        #[track_caller]
        fn check(
            id: &str,
            held: impl Fn(&Report) -> Vec<&'static str>,
            spoil: impl Fn(&mut Round),
        ) {
            let mut report = report(0, &[0.1], None);
            assert!(held(&report).is_empty());
            spoil(&mut report.rounds[0]);
            assert_eq!(held(&report), [id]);
        }
        let held = |report: &Report| held(report);
        check("I1, I2", held, |round| round.outcome.different = 1);
        check("I3", held, |round| round.epoch_after = 0);
        check("I3", held, |round| {
            round.changes = vec![json!({ "epoch": 2 }), json!({ "epoch": 2 })];
        });
        check("I4", held, |round| round.after["members"][0]["state"] = json!("joining"));
        check("I5", held, |round| round.recovered_s = None);
        check("I5", held, |round| round.outcome.stalls_s = vec![61.0]);
        check("I6", held, |round| round.after["members"][0]["sequences"] = json!(1));
        check("I6", held, |round| round.after["router"]["queued"] = json!(1));
        check("I7", held, |round| round.outcome.lost = 1);
        check("I8", held, |round| round.after["coordinators"][1]["leader"] = json!(true));
    }

    #[test]
    fn page_is_whole_and_escapes_names() {
        let page = html(&report(0, &[0.1], None));
        assert!(page.contains("kill worker &lt;1&gt;") && page.contains("<svg"), "{page}");
    }
}
