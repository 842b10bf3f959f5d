//! View changes that nobody is in a hurry for: drains and rebalances; and what a loss moves.

use super::*;
use ids::ExpertId;

#[test]
fn drained_worker_serves_until_a_view_without_it_counts() {
    let mut control = serving();
    check(&mut control, vec![(5, drain(0))], &["prepare w1 as r0 of n2[w1]"]);
    assert_eq!(control.status().members[0].state, MemberState::Draining);
    assert_eq!(control.status().epoch, Some(Epoch(1)), "the old view serves on");
    check(
        &mut control,
        vec![(6, drain(0)), (6, prepared(2, 1)), (7, stored(2))],
        &["store n2[w1]", "publish n2[w1]", "dismiss w0: drained"],
    );
    assert_eq!(control.status().members.len(), 1);
    assert_eq!(control.status().changes.last().unwrap().cause.to_string(), "w0 drained");
}

#[test]
fn last_member_and_strangers_are_not_drained() {
    check(
        &mut serving(),
        vec![(5, drain(7)), (5, drain(0)), (5, drain(1))],
        &[
            "keep w7: w7 is no member",
            "prepare w1 as r0 of n2[w1]",
            "keep w1: w1 is the last member; start another one first",
        ],
    );
}

/// Goal: who leaves comes back if it is needed. Sequence: w0 drains, its only heir dies while the
/// store writes the view without w0.
#[test]
fn drained_worker_stays_if_those_who_take_over_are_lost() {
    check(
        &mut serving(),
        vec![(5, drain(0)), (5, prepared(2, 1)), (6, lost(1)), (6, stored(2))],
        &[
            "prepare w1 as r0 of n2[w1]",
            "store n2[w1]",
            "publish n2[w1]",
            "prepare w0 as r0 of n3[w0]",
        ],
    );
}

#[test]
fn drain_during_a_view_change_follows_it() {
    check(
        &mut serving(),
        vec![
            (5, Input::Hello(hello("c"))),
            (5, drain(1)),
            (6, prepared(2, 0)),
            (6, prepared(2, 1)),
            (6, prepared(2, 2)),
            (7, stored(2)),
        ],
        &[
            "welcome c as w2",
            "prepare w0 as r0 of n2[w0 w1 w2]",
            "prepare w1 as r1 of n2[w0 w1 w2]",
            "prepare w2 as r2 of n2[w0 w1 w2]",
            "store n2[w0 w1 w2]",
            "publish n2[w0 w1 w2]",
            "prepare w0 as r0 of n3[w0 w2]",
            "prepare w2 as r1 of n3[w0 w2]",
        ],
    );
}

#[test]
fn rebalance_changes_the_view_only_if_it_gains() {
    let mut settings = settings(2);
    settings.redundancy = 0;
    let mut control = serving_with(settings);
    let load = |tokens: [u64; 4]| Input::Load {
        window: Window::new(&[tokens.to_vec(), tokens.to_vec()]).unwrap(),
    };
    // Without load, and under a level one, there is nothing to gain.
    check(
        &mut control,
        vec![(5, Input::Rebalance), (5, load([10, 10, 10, 10])), (5, Input::Rebalance)],
        &["no load", "is level at 1.00"],
    );
    let view = control.committed.clone().unwrap();
    let held = view.placement.local_experts(0, Rank(0));
    let mut skewed = [10; 4];
    for expert in held {
        skewed[expert.index()] = 100;
    }
    check(
        &mut control,
        vec![(6, load(skewed)), (6, Input::Rebalance)],
        &[
            "level 1.29 to 1.00 by n2",
            "prepare w0 as r0 of n2[w0 w1]",
            "prepare w1 as r1 of n2[w0 w1]",
        ],
    );
    assert_eq!(control.status().changes.last().unwrap().cause, Cause::Rebalance);
    check(
        &mut control,
        vec![(7, prepared(2, 0)), (7, prepared(2, 1)), (7, stored(2)), (8, Input::Rebalance)],
        &["store n2[w0 w1]", "publish n2[w0 w1]", "is level at 1.00"],
    );
}

#[test]
fn load_is_levelled_by_itself_at_most_that_often() {
    let every = Some(Duration::from_secs(60));
    let mut control =
        serving_with(Settings { redundancy: 0, rebalance_every: every, ..settings(2) });
    let held = control.committed.as_ref().unwrap().placement.local_experts(0, Rank(0));
    let mut skewed = vec![10; 4];
    for expert in held {
        skewed[expert.index()] = 100;
    }
    let load = || Input::Load { window: Window::new(&[skewed.clone(), skewed.clone()]).unwrap() };
    check(&mut control, vec![(50, load()), (59, load())], &[]);
    check(
        &mut control,
        vec![(60, load())],
        &["prepare w0 as r0 of n2[w0 w1]", "prepare w1 as r1 of n2[w0 w1]"],
    );
    control.step(Duration::from_secs(61), prepared(2, 0));
    control.step(Duration::from_secs(61), prepared(2, 1));
    control.step(Duration::from_secs(61), stored(2));
    check(&mut control, vec![(119, load()), (121, load())], &[]);
    assert_eq!(control.status().changes.len(), 2, "what is level stays");
}

#[test]
fn spare_places_take_further_copies_of_hot_experts() {
    let mut control = serving_with(Settings { redundancy: 0, spare: 1, ..settings(2) });
    let hot = vec![100, 10, 10, 10];
    let window = Window::new(&[hot.clone(), hot]).unwrap();
    control.step(Duration::from_secs(5), Input::Load { window });
    let outputs = control.step(Duration::from_secs(6), Input::Rebalance);
    let Output::Rebalanced(Levelling::Begun { after, .. }) = outputs[0] else {
        panic!("{outputs:?}")
    };
    assert!(after < 1.10, "{after}");
    let Output::Prepare { view, .. } = &outputs[1] else { panic!("{outputs:?}") };
    assert_eq!(view.placement.replicas(0, ExpertId(0)).len(), 2);
    assert_eq!(control.status().changes.last().unwrap().loads, 4);
}

#[test]
fn youngest_leave_in_one_view_change_when_scaled_down() {
    let mut control = serving_with(settings(4));
    check(
        &mut control,
        vec![(2, Input::Scale { workers: 6 }), (3, Input::Scale { workers: 2 })],
        &[
            "leaving [], missing 2",
            "leaving [w2, w3], missing 0",
            "prepare w0 as r0 of n2[w0 w1]",
            "prepare w1 as r1 of n2[w0 w1]",
        ],
    );
    // Who leaves is not counted, and one always stays.
    check(
        &mut control,
        vec![(3, Input::Scale { workers: 3 }), (4, prepared(2, 0)), (4, prepared(2, 1))],
        &["leaving [], missing 1", "store n2[w0 w1]"],
    );
    check(
        &mut control,
        vec![(4, stored(2)), (5, Input::Scale { workers: 0 })],
        &[
            "publish n2[w0 w1]",
            "dismiss w2: drained",
            "dismiss w3: drained",
            "leaving [w1], missing 0",
            "prepare w0 as r0 of n3[w0]",
        ],
    );
}

#[test]
fn loss_moves_only_what_was_lost() {
    let mut control = serving_with(settings(4));
    let before = control.committed.clone().unwrap();
    let outputs = control.step(Duration::from_secs(2), lost(1));
    let Output::Prepare { view: after, .. } = &outputs[0] else { panic!("{outputs:?}") };
    for layer in 0..2 {
        for (rank, old) in [(0, 0), (1, 2), (2, 3)] {
            let had = before.placement.local_experts(layer, Rank(old));
            let has = after.placement.local_experts(layer, Rank(rank));
            assert_eq!(had, has, "nobody loads anything while the streams wait");
        }
    }
    assert_eq!(control.status().changes.last().unwrap().loads, 0);
}

#[test]
fn standing_members_are_shown_before_they_have_met_the_new_leader() {
    let mut control = Control::new(settings(2), Duration::ZERO, Some(stands()));
    control.step(Duration::ZERO, Input::Hello(hello("b")));
    let status = control.status();
    assert_eq!((status.epoch, status.phase), (Some(Epoch(1)), PhaseName::Adopting));
    let shown: Vec<_> =
        status.members.iter().map(|m| (m.address.as_str(), m.rank, m.state)).collect();
    let want = [
        ("a:1", Some(Rank(0)), MemberState::Serving),
        ("b:1", Some(Rank(1)), MemberState::Serving),
    ];
    assert_eq!(shown, want);
}

fn silent(epoch: u64, ranks: &[u16]) -> Input {
    let ranks = ranks.iter().copied().map(Rank).collect();
    let silence = Silence { ranks, lasted: Duration::from_millis(60) };
    Input::Fault { epoch: Epoch(epoch), text: "silence".into(), suspects: vec![], silence }
}

#[test]
fn silent_rank_leaves_at_once_and_comes_back_later_each_time() {
    let mut control = serving();
    check(
        &mut control,
        vec![(5, silent(1, &[1])), (5, silent(1, &[1])), (5, Input::Hello(hello("b")))],
        &[
            "dismiss w1: the router heard nothing from it for 60ms",
            "prepare w0 as r0 of n2[w0]",
            "refuse b: it made steps fail; it may come back in 1.0 s",
        ],
    );
    let detect = control.status().changes.last().unwrap().detect;
    assert_eq!(detect, Some(Duration::from_millis(60)));
    check(
        &mut control,
        vec![
            (6, prepared(2, 0)),
            (6, stored(2)),
            (6, Input::Hello(hello("b"))),
            (6, prepared(3, 0)),
            (6, prepared(3, 2)),
            (6, stored(3)),
        ],
        &[
            "store n2[w0]",
            "publish n2[w0]",
            "welcome b as w2",
            "prepare w0 as r0 of n3[w0 w2]",
            "prepare w2 as r1 of n3[w0 w2]",
            "store n3[w0 w2]",
            "publish n3[w0 w2]",
        ],
    );
    check(
        &mut control,
        vec![(7, silent(3, &[1])), (8, Input::Hello(hello("b")))],
        &[
            "dismiss w2: the router heard nothing from it for 60ms",
            "prepare w0 as r0 of n4[w0]",
            "refuse b: it made steps fail; it may come back in 1.0 s",
        ],
    );
    check(&mut control, vec![(9, Input::Hello(hello("b")))], &["welcome b as w3"]);
}

#[test]
fn router_that_hears_nobody_ends_no_membership() {
    let mut control = serving();
    check(
        &mut control,
        vec![(5, silent(1, &[0, 1]))],
        &["prepare w0 as r0 of n2[w0 w1]", "prepare w1 as r1 of n2[w0 w1]"],
    );
    assert_eq!(control.status().members.len(), 2);
}

#[test]
fn rank_that_others_do_not_reach_leaves_when_steps_keep_failing() {
    let mut control = start(3);
    for name in ["a", "b", "c"] {
        control.step(Duration::from_secs(1), Input::Hello(hello(name)));
    }
    let serve = |control: &mut Control, epoch: u64| {
        for worker in 0..3 {
            control.step(Duration::from_secs(1), prepared(epoch, worker));
        }
        control.step(Duration::from_secs(1), stored(epoch));
    };
    serve(&mut control, 1);
    let fault = |epoch, suspects: &[u16]| Input::Fault {
        epoch: Epoch(epoch),
        text: "late".into(),
        suspects: suspects.iter().copied().map(Rank).collect(),
        silence: Silence::default(),
    };
    // A step that counts between two failures ends the row.
    control.step(Duration::from_secs(2), fault(1, &[2]));
    serve(&mut control, 2);
    control.step(Duration::from_secs(2), Input::FirstToken { epoch: Epoch(2) });
    // Worker 1 and the others do not reach each other.
    control.step(Duration::from_secs(2), fault(2, &[0, 2]));
    serve(&mut control, 3);
    control.step(Duration::from_secs(3), fault(3, &[1]));
    serve(&mut control, 4);
    check(
        &mut control,
        vec![(4, fault(4, &[0, 2]))],
        &[
            "dismiss w1: 3 steps failed, and it is blamed most",
            "prepare w0 as r0 of n5[w0 w2]",
            "prepare w2 as r1 of n5[w0 w2]",
        ],
    );
}

/// Whoever is drained is not replaced by those who start workers until there are as many as wanted.
#[test]
fn drain_lowers_the_number_that_was_wanted() {
    let mut control = serving_with(settings(3));
    control.step(Duration::from_secs(5), Input::Scale { workers: 3 });
    control.step(Duration::from_secs(6), drain(1));
    assert_eq!(control.wanted(), Some(2));
    let mut control = serving_with(settings(3));
    control.step(Duration::from_secs(6), drain(1));
    assert_eq!(control.wanted(), None, "nobody has said");
    control.want(5);
    control.step(Duration::from_secs(7), drain(2));
    assert_eq!(control.wanted(), Some(1));
}

/// Who loads experts for a planned view is late with its beats, and is not given up for a few of them.
#[test]
fn short_silence_while_experts_are_loaded_is_let_pass() {
    let mut control = serving();
    let silent = |ms| Input::Fault {
        epoch: Epoch(1),
        text: "silent".into(),
        suspects: vec![Rank(1)],
        silence: Silence { ranks: vec![Rank(1)], lasted: Duration::from_millis(ms) },
    };
    control.step(Duration::from_secs(5), Input::Hello(hello("c")));
    check(&mut control, vec![(5, silent(60)), (5, silent(290))], &[]);
    check(
        &mut control,
        vec![(5, silent(310))],
        &[
            "dismiss w1: the router heard nothing from it for 310ms",
            "prepare w0 as r0 of n3[w0 w2]",
            "prepare w2 as r1 of n3[w0 w2]",
        ],
    );
}
