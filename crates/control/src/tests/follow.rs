//! Shares follow the load without a change of view.

use super::*;

fn moment(tokens: [u64; 4]) -> Input {
    Input::Moment { window: Window::new(&[tokens.to_vec(), tokens.to_vec()]).unwrap() }
}

#[test]
fn shares_are_told_when_the_load_moves_and_not_again() {
    let mut control = serving_with(settings(3));
    let placement = control.committed.as_ref().unwrap().placement.clone();
    let first = format!("{placement:?}");
    assert_eq!(first.split(';').next().unwrap(), "0: r0[e0, e1, e3] r1[e0, e2, e3] r2[e1, e2]");
    check(
        &mut control,
        vec![
            (1, moment([90, 0, 0, 0])),
            (2, moment([90, 0, 0, 0])),
            (3, moment([90, 60, 30, 0])),
            (4, moment([90, 60, 30, 0])),
            (5, Input::Rebalance),
        ],
        &[
            "share in n1: 0.5+0.5 0.0+1.0 0.0+1.0 0.5+0.5",
            "share in n1: 0.5+0.5 0.1+0.9 0.1+0.9 0.5+0.5",
            "no load",
        ],
    );
}

/// Nobody answers when he has heard it.
#[test]
fn shares_are_told_again_now_and_then() {
    let mut control = serving_with(settings(3));
    let same = |at| (at, moment([90, 60, 30, 0]));
    let share = "share in n1: 0.4+0.6 0.3+0.7 0.3+0.7 0.5+0.5";
    check(&mut control, (1..9).map(same).collect(), &[share]);
    check(&mut control, (9..17).map(same).collect(), &[share]);
    assert_eq!(control.status().shared.0, 1, "they are the same");
}

#[test]
fn new_view_shares_alike_until_it_is_told_otherwise() {
    let mut control = serving_with(settings(4));
    check(
        &mut control,
        vec![
            (1, moment([90, 60, 30, 0])),
            // Who prepares a planned view serves the one before meanwhile.
            (2, drain(3)),
            (3, moment([10, 0, 300, 0])),
            (4, prepared(2, 0)),
            (4, prepared(2, 1)),
            (4, prepared(2, 2)),
            (5, moment([300, 0, 0, 0])),
            (6, stored(2)),
            (7, moment([0, 0, 0, 9])),
        ],
        &[
            "share in n1: 0.5+0.5 0.3+0.7 0.0+1.0 0.5+0.5",
            "prepare w0 as r0 of n2[w0 w1 w2]",
            "prepare w1 as r1 of n2[w0 w1 w2]",
            "prepare w2 as r2 of n2[w0 w1 w2]",
            "share in n1: 0.0+1.0 0.0+1.0 0.5+0.5 0.5+0.5",
            "store n2[w0 w1 w2]",
            "publish n2[w0 w1 w2]",
            "dismiss w3: drained",
            "share in n2: 0.4+0.6 1.0+0.0 0.2+0.8 0.0+1.0",
        ],
    );
}

/// It does not know what its predecessor told.
#[test]
fn new_leader_tells_shares_even_if_they_are_alike() {
    let view = (**serving_with(settings(3)).committed.as_ref().unwrap()).clone();
    let mut control = Control::new(settings(3), Duration::ZERO, Some(view));
    let names = ["a", "b", "c"].map(|name| (1, Input::Hello(hello(name))));
    let mut inputs = vec![(0, moment([90, 90, 90, 90]))];
    inputs.extend(names);
    inputs.extend([(2, moment([90, 90, 90, 90])), (3, moment([90, 90, 90, 90]))]);
    check(
        &mut control,
        inputs,
        &[
            "welcome a as w0",
            "welcome b as w1",
            "welcome c as w2",
            "publish n1[w0 w1 w2]",
            "share in n1: 0.5+0.5 0.3+0.7 0.4+0.6 0.6+0.4",
        ],
    );
}
