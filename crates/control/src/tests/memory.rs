//! Members whose memory does not hold all copies, or not even one of each expert.

use super::*;
use ids::ExpertId;

fn small(name: &str, places: usize) -> Input {
    Input::Hello(Hello { places, ..hello(name) })
}

/// Three workers with `places` each serve epoch 1.
fn serving_with_places(places: usize) -> Control {
    let mut control = start(3);
    for name in ["a", "b", "c"] {
        control.step(Duration::from_secs(1), small(name, places));
    }
    for worker in 0..3 {
        control.step(Duration::from_secs(1), prepared(1, worker));
    }
    control.step(Duration::from_secs(1), stored(1));
    assert_eq!(control.status().phase, PhaseName::Serving);
    control
}

fn copies(control: &Control) -> usize {
    let placement = &control.committed.as_ref().unwrap().placement;
    (0..4).map(|expert| placement.replicas(0, ExpertId(expert)).len()).sum()
}

/// The redundancy is what memory allows; what it does not allow is not tried again and again.
#[test]
fn second_copies_are_made_while_memory_allows() {
    let control = serving_with_places(3);
    assert_eq!(copies(&control), 8);
    let control = serving_with_places(2);
    assert!((4..=6).contains(&copies(&control)), "six places: not two copies of each");
    assert_eq!(control.deadline(), None);
}

const LACK: &str = "the memory of 1 workers holds 2 experts of each MoE layer, which has 4; \
                    start another worker, or give them more (--memory-mib)";

/// Goal: too few workers for the experts wait for another one instead of overfilling their memory.
#[test]
fn cluster_that_lost_too_many_waits_for_another_worker() {
    let mut control = serving_with_places(2);
    check(
        &mut control,
        vec![(5, lost(2)), (5, lost(1)), (6, Input::Tick), (7, small("d", 1)), (8, small("e", 2))],
        &[
            "prepare w0 as r0 of n2[w0 w1]",
            "prepare w1 as r1 of n2[w0 w1]",
            &format!("wait: {LACK}"),
            "welcome d as w3",
            "wait: the memory of 2 workers holds 3 experts of each MoE layer, which has 4; \
             start another worker, or give them more (--memory-mib)",
            "welcome e as w4",
            "prepare w0 as r0 of n3[w0 w3 w4]",
            "prepare w3 as r1 of n3[w0 w3 w4]",
            "prepare w4 as r2 of n3[w0 w3 w4]",
        ],
    );
    assert_eq!(control.status().lack, None);
}

#[test]
fn who_is_needed_for_the_experts_cannot_leave() {
    let mut control = serving_with_places(2);
    check(
        &mut control,
        vec![
            (5, drain(2)),
            (5, prepared(2, 0)),
            (5, prepared(2, 1)),
            (5, stored(2)),
            (6, drain(1)),
            (6, Input::Scale { workers: 1 }),
        ],
        &[
            "prepare w0 as r0 of n2[w0 w1]",
            "prepare w1 as r1 of n2[w0 w1]",
            "store n2[w0 w1]",
            "publish n2[w0 w1]",
            "dismiss w2: drained",
            &format!("keep w1: {LACK}"),
            &format!("not scaled: {LACK}"),
        ],
    );
    assert_eq!(control.status().phase, PhaseName::Serving);
}

/// A worker that is lost while another one is drained: the drained one is needed now, and stays.
#[test]
fn drain_is_given_up_when_the_others_become_too_few() {
    let mut control = serving_with_places(2);
    control.step(Duration::from_secs(5), drain(2));
    let inputs = vec![(5, lost(1)), (5, prepared(3, 0)), (5, prepared(3, 2)), (5, stored(3))];
    check(
        &mut control,
        inputs,
        &[
            "prepare w0 as r0 of n3[w0 w2]",
            "prepare w2 as r1 of n3[w0 w2]",
            "store n3[w0 w2]",
            "publish n3[w0 w2]",
            &format!("keep w2: {LACK}"),
        ],
    );
    let status = control.status();
    assert_eq!((status.phase, status.lack), (PhaseName::Serving, None));
}
