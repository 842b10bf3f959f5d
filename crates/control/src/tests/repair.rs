//! What happens to planned views when something goes wrong, and how lost copies are made again.

use super::*;
use ids::ExpertId;

fn fault(epoch: u64) -> Input {
    let silence = Silence::default();
    Input::Fault { epoch: Epoch(epoch), text: "late".into(), suspects: vec![], silence }
}

fn copies(control: &Control) -> usize {
    let placement = &control.committed.as_ref().unwrap().placement;
    let of = |expert| placement.replicas(0, ExpertId(expert)).len();
    (0..4).map(of).sum()
}

/// Goal: nobody loads while streams wait; redundancy is restored beside them. Sequence: one of three is
/// lost, its view counts, a second later the copies are made.
#[test]
fn lost_copies_are_made_again_after_the_streams_go_on() {
    let mut control = serving_with(settings(3));
    assert_eq!(copies(&control), 8);
    check(
        &mut control,
        vec![(5, lost(2)), (5, prepared(2, 0)), (5, prepared(2, 1)), (5, stored(2))],
        &[
            "prepare w0 as r0 of n2[w0 w1]",
            "prepare w1 as r1 of n2[w0 w1]",
            "store n2[w0 w1]",
            "publish n2[w0 w1]",
        ],
    );
    assert!(copies(&control) < 8, "some had their second copy on the lost worker");
    assert_eq!(control.deadline(), Some(Duration::from_secs(6)));
    check(
        &mut control,
        vec![(6, Input::Tick), (9, prepared(3, 0)), (9, prepared(3, 1)), (9, stored(3))],
        &[
            "prepare w0 as r0 of n3[w0 w1]",
            "prepare w1 as r1 of n3[w0 w1]",
            "store n3[w0 w1]",
            "publish n3[w0 w1]",
        ],
    );
    assert_eq!(copies(&control), 8);
    assert_eq!(control.deadline(), None);
    let change = control.status().changes.last().unwrap().clone();
    assert_eq!((change.cause, change.loads > 0), (Cause::Repair, true));
}

/// A worker that is started again in time takes its places: the copies are made once.
#[test]
fn worker_that_comes_back_in_time_takes_the_repair_over() {
    let mut control = serving_with(settings(3));
    control.step(Duration::from_secs(5), lost(2));
    for input in [prepared(2, 0), prepared(2, 1), stored(2), Input::Hello(hello("e"))] {
        control.step(Duration::from_secs(5), input);
    }
    assert_eq!(control.deadline(), None, "the join makes them");
    for input in [prepared(3, 0), prepared(3, 1), prepared(3, 3), stored(3)] {
        control.step(Duration::from_secs(6), input);
    }
    assert_eq!((copies(&control), control.deadline()), (8, None));
}

/// Goal: a step that fails while a newcomer loads is not held up by it. The newcomer is a member of
/// the view that follows at once, with no experts yet.
#[test]
fn failed_step_does_not_wait_for_a_planned_view() {
    let mut control = serving();
    check(
        &mut control,
        vec![(5, Input::Hello(hello("c"))), (6, fault(1))],
        &[
            "welcome c as w2",
            "prepare w0 as r0 of n2[w0 w1 w2]",
            "prepare w1 as r1 of n2[w0 w1 w2]",
            "prepare w2 as r2 of n2[w0 w1 w2]",
            "prepare w0 as r0 of n3[w0 w1 w2]",
            "prepare w1 as r1 of n3[w0 w1 w2]",
            "prepare w2 as r2 of n3[w0 w1 w2]",
        ],
    );
    assert_eq!(control.status().changes.last().unwrap().loads, 0);
    // The view that is on its way is the answer to further failures.
    check(&mut control, vec![(6, fault(1))], &[]);
    for input in [prepared(3, 0), prepared(3, 1), prepared(3, 2), stored(3)] {
        control.step(Duration::from_secs(6), input);
    }
    assert_eq!(control.status().members[2].experts, 0);
    control.step(Duration::from_secs(7), Input::Tick);
    assert_eq!(control.status().changes.last().unwrap().cause, Cause::Repair);
    for input in [prepared(4, 0), prepared(4, 1), prepared(4, 2), stored(4)] {
        control.step(Duration::from_secs(8), input);
    }
    assert_ne!(control.status().members[2].experts, 0);
}

#[test]
fn worker_lost_while_it_drains_is_missed_at_once() {
    let mut control = serving_with(settings(3));
    check(
        &mut control,
        vec![(5, drain(0)), (6, lost(0))],
        &[
            "prepare w1 as r0 of n2[w1 w2]",
            "prepare w2 as r1 of n2[w1 w2]",
            "prepare w1 as r0 of n3[w1 w2]",
            "prepare w2 as r1 of n3[w1 w2]",
        ],
    );
    assert_eq!(control.status().changes.last().unwrap().loads, 0);
}

/// Goal: who is to leave helps out first. Sequence: w0 drains, w1 is lost, w0 is in the view that
/// follows, and leaves by the one after.
#[test]
fn drain_goes_on_after_a_loss() {
    let mut control = serving_with(settings(3));
    check(
        &mut control,
        vec![(5, drain(0)), (6, lost(1)), (6, prepared(3, 0)), (6, prepared(3, 2)), (6, stored(3))],
        &[
            "prepare w1 as r0 of n2[w1 w2]",
            "prepare w2 as r1 of n2[w1 w2]",
            "prepare w0 as r0 of n3[w0 w2]",
            "prepare w2 as r1 of n3[w0 w2]",
            "store n3[w0 w2]",
            "publish n3[w0 w2]",
            "prepare w2 as r0 of n4[w2]",
        ],
    );
}

#[test]
fn newcomer_that_cannot_prepare_leaves_the_serving_view_alone() {
    let mut control = serving();
    check(
        &mut control,
        vec![(5, Input::Hello(hello("c"))), (6, cannot_prepare(2, 2)), (7, prepared(2, 0))],
        &[
            "welcome c as w2",
            "prepare w0 as r0 of n2[w0 w1 w2]",
            "prepare w1 as r1 of n2[w0 w1 w2]",
            "prepare w2 as r2 of n2[w0 w1 w2]",
            "dismiss w2: cannot prepare n2: disk",
            "give n2 up: w2 lost: cannot prepare n2: disk",
        ],
    );
    assert_eq!(control.status().phase, PhaseName::Serving);
    assert_eq!((control.status().epoch, control.deadline()), (Some(Epoch(1)), None));
}

/// A member without memory for more experts serves those that it has.
#[test]
fn member_that_cannot_load_more_serves_on() {
    let mut control = serving();
    check(
        &mut control,
        vec![(5, Input::Hello(hello("c"))), (6, cannot_prepare(2, 1))],
        &[
            "welcome c as w2",
            "prepare w0 as r0 of n2[w0 w1 w2]",
            "prepare w1 as r1 of n2[w0 w1 w2]",
            "prepare w2 as r2 of n2[w0 w1 w2]",
            "give n2 up: w1 cannot prepare it: disk",
        ],
    );
    let change = control.status().changes.last().unwrap().clone();
    assert_eq!(change.given_up.as_deref(), Some("w1 cannot prepare it: disk"));
    let again = control.deadline().expect("the newcomer is not forgotten");
    assert_eq!(again, Duration::from_secs(16));
    control.step(again, Input::Tick);
    assert_eq!(control.status().changes.last().unwrap().cause, Cause::Joined(WorkerId(2)));
}
