//! Members that do not reach each other.

use super::*;

fn fault(epoch: u64, suspects: &[u16]) -> Input {
    let suspects = suspects.iter().map(|&rank| Rank(rank)).collect();
    let silence = Silence::default();
    Input::Fault { epoch: Epoch(epoch), text: "silent".into(), suspects, silence }
}

/// Goal: a network torn between workers costs one failed step, whoever is blamed for it. Sequence: four
/// serve, two of them lose the others; they leave together, are kept out for a second, and come back.
#[test]
fn torn_part_leaves_at_once_and_comes_back() {
    let mut control = serving_with(settings(4));
    check(
        &mut control,
        vec![
            (5, fault(1, &[2])),
            (5, prepared_without(2, 0, &[2, 3])),
            (5, prepared_without(2, 1, &[2])),
            (5, prepared_without(2, 2, &[0, 1])),
            (5, prepared_without(2, 3, &[1])),
            (5, prepared(3, 0)),
            (5, prepared(3, 1)),
            (5, stored(3)),
            (5, Input::Hello(hello("c"))),
        ],
        &[
            "prepare w0 as r0 of n2[w0 w1 w2 w3]",
            "prepare w1 as r1 of n2[w0 w1 w2 w3]",
            "prepare w2 as r2 of n2[w0 w1 w2 w3]",
            "prepare w3 as r3 of n2[w0 w1 w2 w3]",
            "dismiss w3: and w0 at , w1 at  do not reach each other",
            "dismiss w2: and w0 at , w1 at  do not reach each other",
            "prepare w0 as r0 of n3[w0 w1]",
            "prepare w1 as r1 of n3[w0 w1]",
            "store n3[w0 w1]",
            "publish n3[w0 w1]",
            "refuse c: it made steps fail; it may come back in 1.0 s",
        ],
    );
    check(
        &mut control,
        vec![(6, Input::Hello(hello("c")))],
        &[
            "welcome c as w4",
            "prepare w0 as r0 of n4[w0 w1 w4]",
            "prepare w1 as r1 of n4[w0 w1 w4]",
            "prepare w4 as r2 of n4[w0 w1 w4]",
        ],
    );
}

/// A newcomer whom a member does not reach does not disturb those who serve.
#[test]
fn newcomer_out_of_reach_is_sent_away() {
    let mut control = serving();
    check(
        &mut control,
        vec![
            (5, Input::Hello(hello("c"))),
            (6, prepared_without(2, 0, &[2])),
            (6, prepared(2, 1)),
            (8, prepared(2, 2)),
        ],
        &[
            "welcome c as w2",
            "prepare w0 as r0 of n2[w0 w1 w2]",
            "prepare w1 as r1 of n2[w0 w1 w2]",
            "prepare w2 as r2 of n2[w0 w1 w2]",
            "dismiss w2: and w0 at  do not reach each other",
            "give n2 up: w2 and w0 at  do not reach each other",
        ],
    );
    assert_eq!(control.status().phase, PhaseName::Serving);
    assert_eq!(control.deadline(), None);
}

/// Members that serve and did not reach each other while a view was planned serve on: had it lasted, a
/// step would have failed.
#[test]
fn planned_view_never_parts_those_who_serve() {
    let mut control = serving();
    check(
        &mut control,
        vec![
            (5, Input::Hello(hello("c"))),
            (6, prepared_without(2, 0, &[1])),
            (6, prepared(2, 1)),
            (6, prepared(2, 2)),
        ],
        &[
            "welcome c as w2",
            "prepare w0 as r0 of n2[w0 w1 w2]",
            "prepare w1 as r1 of n2[w0 w1 w2]",
            "prepare w2 as r2 of n2[w0 w1 w2]",
            "give n2 up: w1 and w0 at  do not reach each other",
        ],
    );
    assert_eq!(control.deadline(), Some(Duration::from_secs(16)), "the newcomer is not forgotten");
}

/// Whoever claims to reach nobody, or ranks that there are not, ends nothing but its own membership.
#[test]
fn who_reaches_nobody_leaves_alone() {
    let mut control = serving_with(settings(3));
    check(
        &mut control,
        vec![
            (5, fault(1, &[])),
            (5, prepared_without(2, 0, &[0, 1, 2, 3, 999])),
            (5, prepared(2, 1)),
            (5, prepared(2, 2)),
        ],
        &[
            "prepare w0 as r0 of n2[w0 w1 w2]",
            "prepare w1 as r1 of n2[w0 w1 w2]",
            "prepare w2 as r2 of n2[w0 w1 w2]",
            "dismiss w0: and w1 at , w2 at  do not reach each other",
            "prepare w1 as r0 of n3[w1 w2]",
            "prepare w2 as r1 of n3[w1 w2]",
        ],
    );
}
