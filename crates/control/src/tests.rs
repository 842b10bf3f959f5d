//! Scenarios as traces.

mod follow;
mod memory;
mod planned;
mod random;
mod reach;
mod repair;

use super::*;
use ids::ExpertId;
use std::fmt::Write;

fn settings(workers_expected: u16) -> Settings {
    Settings {
        workers_expected,
        assemble_max: Duration::from_secs(10),
        adopt_max: Duration::from_secs(3),
        redundancy: 1,
        spare: 0,
        repair_after: Duration::from_secs(1),
        rebalance_every: None,
    }
}

fn hello(name: &str) -> Hello {
    Hello {
        incarnation: name.into(),
        address: format!("{name}:1"),
        pid: 1,
        device: "cpu".into(),
        profile: "cpu/f32".into(),
        model: "toy".into(),
        shape: Shape { moe_layers: 2, experts: 4 },
        places: 4,
        kv: KvPools {
            block_tokens: 16,
            full_blocks: 8,
            chunked_blocks: 8,
            chunk_tokens: Some(64),
            backup_tokens: 0,
        },
        context_tokens: 128,
        exchange: String::new(),
        epoch: Epoch(0),
    }
}

fn start(workers_expected: u16) -> Control {
    Control::new(settings(workers_expected), Duration::ZERO, None)
}

/// `w0 r0 of n3[w0 w1]`: short enough to read many of them.
fn text(output: &Output) -> String {
    let members = |view: &View| {
        let workers: Vec<String> = view.members.iter().map(|m| m.worker.to_string()).collect();
        format!("{}[{}]", view.epoch, workers.join(" "))
    };
    match output {
        Output::Welcome { incarnation, worker } => format!("welcome {incarnation} as {worker}"),
        Output::Refuse { incarnation, reason } => format!("refuse {incarnation}: {reason}"),
        Output::DrainRefused { worker, reason } => format!("keep {worker}: {reason}"),
        Output::Scaled { leaving, missing } => format!("leaving {leaving:?}, missing {missing}"),
        Output::ScaleRefused { reason } => format!("not scaled: {reason}"),
        Output::Rebalanced(levelling) => match levelling {
            Levelling::Begun { epoch, before, after } => {
                format!("level {before:.2} to {after:.2} by {epoch}")
            }
            Levelling::Level { before, .. } => format!("is level at {before:.2}"),
            Levelling::Unknown => "no load".into(),
            Levelling::Busy => "busy".into(),
        },
        Output::Lacking(lack) => format!("wait: {lack}"),
        Output::GivenUp { epoch, reason } => format!("give {epoch} up: {reason}"),
        Output::Prepare { worker, rank, view, .. } => {
            format!("prepare {worker} as {rank} of {}", members(view))
        }
        Output::Store { view } => format!("store {}", members(view)),
        Output::Publish { view } => format!("publish {}", members(view)),
        Output::Share { view, shares } => {
            let parts = (0..4).map(|expert| shares.parts(0, ExpertId(expert)));
            let text = parts.map(|parts| {
                parts.iter().map(|part| format!("{part:.1}")).collect::<Vec<_>>().join("+")
            });
            format!("share in {}: {}", view.epoch, text.collect::<Vec<_>>().join(" "))
        }
        Output::Dismiss { worker, reason } => format!("dismiss {worker}: {reason}"),
    }
}

/// Feeds `(seconds, input)` and compares the trace of outputs.
#[track_caller]
fn check(control: &mut Control, inputs: Vec<(u64, Input)>, want: &[&str]) {
    let mut got = Vec::new();
    for (at, input) in inputs {
        got.extend(control.step(Duration::from_secs(at), input).iter().map(text));
    }
    assert_eq!(got, want);
}

fn prepared(epoch: u64, worker: u32) -> Input {
    prepared_without(epoch, worker, &[])
}

/// Prepared, but these ranks are out of its reach.
fn prepared_without(epoch: u64, worker: u32, unreached: &[u16]) -> Input {
    let unreached = unreached.iter().map(|&rank| Rank(rank)).collect();
    Input::Prepared { epoch: Epoch(epoch), worker: WorkerId(worker), unreached }
}

fn lost(worker: u32) -> Input {
    Input::Lost { worker: WorkerId(worker), evidence: "stream ended".into() }
}

fn cannot_prepare(epoch: u64, worker: u32) -> Input {
    let worker = WorkerId(worker);
    Input::PrepareFailed { epoch: Epoch(epoch), worker, text: "disk".into() }
}

fn stored(epoch: u64) -> Input {
    Input::Stored { epoch: Epoch(epoch) }
}

fn drain(worker: u32) -> Input {
    Input::Drain { worker: WorkerId(worker) }
}

/// A cluster of two that serves epoch 1.
fn serving() -> Control {
    serving_with(settings(2))
}

/// A cluster of all workers expected, which serves epoch 1.
fn serving_with(settings: Settings) -> Control {
    let workers = u32::from(settings.workers_expected);
    let mut control = Control::new(settings, Duration::ZERO, None);
    let at = Duration::from_secs(1);
    for name in ["a", "b", "c", "d"].into_iter().take(workers as usize) {
        control.step(at, Input::Hello(hello(name)));
    }
    for worker in 0..workers {
        control.step(at, prepared(1, worker));
    }
    control.step(at, stored(1));
    assert_eq!(control.status().phase, PhaseName::Serving);
    control
}

#[test]
fn first_view_waits_for_all_then_counts_once_stored() {
    let mut control = start(2);
    check(
        &mut control,
        vec![
            (0, Input::Hello(hello("a"))),
            (1, Input::Hello(hello("b"))),
            (2, prepared(1, 1)),
            (2, prepared(1, 1)),
            (3, prepared(1, 0)),
            (4, Input::Stored { epoch: Epoch(1) }),
            (9, Input::FirstToken { epoch: Epoch(1) }),
        ],
        &[
            "welcome a as w0",
            "welcome b as w1",
            "prepare w0 as r0 of n1[w0 w1]",
            "prepare w1 as r1 of n1[w0 w1]",
            "store n1[w0 w1]",
            "publish n1[w0 w1]",
        ],
    );
    let status = control.status();
    let mut line = String::new();
    for c in &status.changes {
        let s = |d: Option<Duration>| d.unwrap().as_secs();
        let (prepare, commit, first) = (s(c.prepare), s(c.commit), s(c.first_token));
        write!(line, "{} {} {prepare} {commit} {first}", c.epoch, c.cause).unwrap();
    }
    assert_eq!(line, "n1 start 2 1 8");
    assert_eq!(status.members.iter().map(|m| m.experts).collect::<Vec<_>>(), [8, 8]);
}

#[test]
fn late_workers_are_not_waited_for_for_ever() {
    let mut control = start(3);
    check(
        &mut control,
        vec![(5, Input::Hello(hello("a"))), (14, Input::Tick)],
        &["welcome a as w0"],
    );
    assert_eq!(control.deadline(), Some(Duration::from_secs(15)));
    check(&mut control, vec![(15, Input::Tick)], &["prepare w0 as r0 of n1[w0]"]);
}

#[test]
fn lost_member_is_replaced_by_its_peers_and_ranks_close_up() {
    check(
        &mut serving(),
        vec![
            (5, lost(0)),
            (5, lost(0)),
            (5, prepared(2, 1)),
            (5, Input::Stored { epoch: Epoch(2) }),
        ],
        &["prepare w1 as r0 of n2[w1]", "store n2[w1]", "publish n2[w1]"],
    );
}

#[test]
fn joining_worker_gets_the_last_rank_of_a_new_view() {
    check(
        &mut serving(),
        vec![(5, Input::Hello(hello("c")))],
        &[
            "welcome c as w2",
            "prepare w0 as r0 of n2[w0 w1 w2]",
            "prepare w1 as r1 of n2[w0 w1 w2]",
            "prepare w2 as r2 of n2[w0 w1 w2]",
        ],
    );
}

#[test]
fn loss_during_a_view_change_starts_over_and_old_answers_are_void() {
    check(
        &mut serving(),
        vec![
            (5, Input::Hello(hello("c"))),
            (5, prepared(2, 0)),
            (6, lost(1)),
            (6, prepared(2, 2)),
            (6, prepared(3, 2)),
            (6, prepared(3, 0)),
        ],
        &[
            "welcome c as w2",
            "prepare w0 as r0 of n2[w0 w1 w2]",
            "prepare w1 as r1 of n2[w0 w1 w2]",
            "prepare w2 as r2 of n2[w0 w1 w2]",
            "prepare w0 as r0 of n3[w0 w2]",
            "prepare w2 as r1 of n3[w0 w2]",
            "store n3[w0 w2]",
        ],
    );
}

#[test]
fn loss_while_the_store_writes_is_repaired_right_after() {
    check(
        &mut serving(),
        vec![
            (5, Input::Hello(hello("c"))),
            (5, prepared(2, 0)),
            (5, prepared(2, 1)),
            (5, prepared(2, 2)),
            (6, lost(2)),
            (6, Input::Stored { epoch: Epoch(2) }),
        ],
        &[
            "welcome c as w2",
            "prepare w0 as r0 of n2[w0 w1 w2]",
            "prepare w1 as r1 of n2[w0 w1 w2]",
            "prepare w2 as r2 of n2[w0 w1 w2]",
            "store n2[w0 w1 w2]",
            "publish n2[w0 w1 w2]",
            "prepare w0 as r0 of n3[w0 w1]",
            "prepare w1 as r1 of n3[w0 w1]",
        ],
    );
}

#[test]
fn worker_that_cannot_prepare_what_must_be_is_dismissed() {
    let mut control = serving_with(settings(3));
    let failed = || cannot_prepare(2, 1);
    check(
        &mut control,
        vec![(5, lost(0)), (5, failed()), (5, failed())],
        &[
            "prepare w1 as r0 of n2[w1 w2]",
            "prepare w2 as r1 of n2[w1 w2]",
            "dismiss w1: cannot prepare n2: disk",
            "prepare w2 as r0 of n3[w2]",
        ],
    );
}

#[test]
fn faulty_step_of_the_current_epoch_is_answered_by_a_new_epoch() {
    let fault = |epoch| Input::Fault {
        epoch: Epoch(epoch),
        text: "late".into(),
        suspects: vec![],
        silence: Silence::default(),
    };
    check(
        &mut serving(),
        vec![(5, fault(0)), (5, fault(1)), (5, fault(1))],
        &["prepare w0 as r0 of n2[w0 w1]", "prepare w1 as r1 of n2[w0 w1]"],
    );
}

#[test]
fn silent_store_is_asked_again() {
    let mut control = serving();
    let failed = Input::StoreFailed { epoch: Epoch(2), text: "away".into() };
    check(
        &mut control,
        vec![(5, lost(0)), (5, prepared(2, 1)), (5, failed), (5, Input::Tick)],
        &["prepare w1 as r0 of n2[w1]", "store n2[w1]"],
    );
    let retry = control.deadline().unwrap();
    assert_eq!(control.step(retry, Input::Tick).len(), 1);
}

#[test]
fn foreign_view_in_the_store_is_overtaken() {
    check(
        &mut serving(),
        vec![(5, lost(0)), (5, prepared(2, 1)), (5, Input::Superseded { found: Epoch(40) })],
        &["prepare w1 as r0 of n2[w1]", "store n2[w1]", "prepare w1 as r0 of n41[w1]"],
    );
}

#[test]
fn worker_of_another_model_is_refused_with_the_remedy() {
    let mut other = hello("c");
    other.profile = "cpu/bf16".into();
    check(
        &mut serving(),
        vec![(5, Input::Hello(other))],
        &[
            "refuse c: its numeric profile is cpu/bf16, the cluster's cpu/f32; start it with the cluster's",
        ],
    );
}

#[test]
fn registering_again_keeps_the_id() {
    check(&mut serving(), vec![(5, Input::Hello(hello("b")))], &["welcome b as w1"]);
}

/// The view of `serving`, as the store holds it.
fn stands() -> View {
    (**serving().committed.as_ref().unwrap()).clone()
}

#[test]
fn new_leader_goes_on_with_the_view_that_stands() {
    let mut control = Control::new(settings(2), Duration::from_secs(5), Some(stands()));
    assert_eq!(control.deadline(), Some(Duration::from_secs(8)));
    check(
        &mut control,
        vec![
            (6, Input::Hello(hello("b"))),
            (6, Input::Hello(hello("c"))),
            (7, Input::Hello(hello("a"))),
        ],
        &[
            "welcome b as w1",
            "welcome c as w2",
            "welcome a as w0",
            "publish n1[w0 w1]",
            "prepare w0 as r0 of n2[w0 w1 w2]",
            "prepare w1 as r1 of n2[w0 w1 w2]",
            "prepare w2 as r2 of n2[w0 w1 w2]",
        ],
    );
}

#[test]
fn stranger_that_comes_first_does_not_keep_the_members_out() {
    let mut control = Control::new(settings(2), Duration::from_secs(5), Some(stands()));
    let stranger = Hello { model: "other".into(), ..hello("x") };
    check(
        &mut control,
        vec![
            (6, Input::Hello(stranger)),
            (6, Input::Hello(hello("a"))),
            (6, Input::Hello(hello("b"))),
        ],
        &[
            "refuse x: its model is other, the cluster's toy; start it with the cluster's",
            "welcome a as w0",
            "welcome b as w1",
            "publish n1[w0 w1]",
        ],
    );
}

#[test]
fn new_leader_replaces_members_that_do_not_come() {
    let mut control = Control::new(settings(2), Duration::from_secs(5), Some(stands()));
    check(
        &mut control,
        vec![(6, Input::Hello(hello("b"))), (7, Input::Tick), (8, Input::Tick)],
        &["welcome b as w1", "prepare w1 as r0 of n2[w1]"],
    );
    let mut alone = Control::new(settings(2), Duration::from_secs(5), Some(stands()));
    check(&mut alone, vec![(8, Input::Tick), (9, Input::Hello(hello("d")))], &["welcome d as w2"]);
    assert_eq!(alone.status().phase, PhaseName::Assembling);
}

#[test]
fn new_leader_does_not_wait_for_members_whom_a_step_misses() {
    let missed = |epoch: u64, ranks: &[u16]| Input::Fault {
        epoch: Epoch(epoch),
        text: "a stream broke".into(),
        suspects: ranks.iter().map(|&rank| Rank(rank)).collect(),
        silence: Silence::default(),
    };
    let adopts = || Control::new(settings(2), Duration::from_secs(5), Some(stands()));
    let goes_on = ["welcome b as w1", "prepare w1 as r0 of n2[w1]"];
    let inputs = vec![(5, missed(1, &[0])), (6, Input::Hello(hello("b")))];
    check(&mut adopts(), inputs, &goes_on);
    let inputs = vec![(5, Input::Hello(hello("b"))), (6, missed(1, &[0]))];
    check(&mut adopts(), inputs, &goes_on);
    // Whoever comes all the same is a member.
    let inputs = vec![(5, missed(1, &[0])), (5, Input::Hello(hello("a")))];
    let both = ["welcome a as w0", "welcome b as w1", "publish n1[w0 w1]"];
    check(&mut adopts(), [inputs, vec![(6, Input::Hello(hello("b")))]].concat(), &both);
    // Old news, and a step that misses everybody, shorten nothing.
    let inputs = vec![(5, missed(0, &[0])), (6, Input::Hello(hello("b"))), (7, Input::Tick)];
    check(&mut adopts(), inputs, &["welcome b as w1"]);
    check(&mut adopts(), vec![(5, missed(1, &[0, 1])), (7, Input::Tick)], &[]);
}

#[test]
fn epochs_do_not_go_back_with_a_store_that_lost_its_data() {
    let mut control = start(2);
    let veteran = Hello { epoch: Epoch(40), ..hello("a") };
    check(
        &mut control,
        vec![(0, Input::Hello(veteran)), (0, Input::Hello(hello("b")))],
        &[
            "welcome a as w0",
            "welcome b as w1",
            "prepare w0 as r0 of n41[w0 w1]",
            "prepare w1 as r1 of n41[w0 w1]",
        ],
    );
}

#[test]
fn last_worker_lost_waits_for_workers() {
    let mut control = serving();
    check(&mut control, vec![(5, lost(0)), (5, lost(1))], &["prepare w1 as r0 of n2[w1]"]);
    assert_eq!(control.status().phase, PhaseName::Assembling);
    assert_eq!(control.deadline(), None);
}
