//! Shares follow the traffic, and only if it is worth telling.

use super::*;

/// Expert 0 on two ranks, experts 1 and 2 on one of them each, expert 3 on the third.
fn placement() -> Placement {
    let layer = vec![vec![Rank(0), Rank(1)], vec![Rank(0)], vec![Rank(1)], vec![Rank(2)]];
    Placement::new(3, vec![layer]).unwrap()
}

fn moment(tokens: [u64; 4]) -> Window {
    Window::new(&[tokens.to_vec()]).unwrap()
}

/// The part of rank 0 in expert 0, if shares are told.
#[track_caller]
fn told(follower: &mut Follower) -> Option<f32> {
    let shares = follower.shares(&placement(), None).unwrap();
    shares.map(|shares| shares.parts(0, ExpertId(0))[0])
}

#[test]
fn shares_follow_a_jump_within_a_few_moments_and_are_told_once() {
    let mut follower = Follower::default();
    assert_eq!(told(&mut follower), None, "nothing is known");
    follower.begin();
    follower.observe(&moment([200, 100, 100, 200]));
    assert_eq!(told(&mut follower), None, "even is level");
    // Expert 1 gets more: all of expert 0 belongs on rank 1.
    let mut last = None;
    for moments in 0..20 {
        follower.observe(&moment([200, 300, 100, 200]));
        last = told(&mut follower).or(last);
        assert!(last.is_some_and(|part| part < 0.3), "{last:?} after {moments} moments");
    }
    assert!(last.is_some_and(|part| part < 0.02), "{last:?}");
    follower.observe(&moment([200, 300, 100, 200]));
    assert_eq!(told(&mut follower), None, "that was told");
    follower.begin();
    assert!(told(&mut follower).is_some(), "another placement begins evenly");
    let mut stranger = Follower::default();
    stranger.observe(&moment([200, 100, 100, 200]));
    assert_eq!(told(&mut stranger), Some(0.5), "who knows what was told before");
}

/// Also for a leader that does not know what was told before.
#[test]
fn placement_without_a_choice_needs_no_shares() {
    let all = vec![Rank(0), Rank(1)];
    let layer = vec![all, vec![Rank(0)], vec![Rank(1)], vec![Rank(1)]];
    let placement = Placement::new(2, vec![layer]).unwrap();
    let mut follower = Follower::default();
    follower.observe(&moment([200, 100, 100, 200]));
    assert_eq!(follower.shares(&placement, None), Ok(None));
    assert!(told(&mut follower).is_some(), "with a choice there are some");
}

#[test]
fn few_tokens_are_no_trend() {
    let mut load = Load::unknown(Shape { moe_layers: 1, experts: 4 });
    load.observe(&moment([2000, 1000, 1000, 2000])).unwrap();
    let mut follower = Follower::default();
    follower.observe(&moment([1, 1, 0, 0]));
    let shares = follower.shares(&placement(), Some(&load)).unwrap().expect("something is better");
    let part = shares.parts(0, ExpertId(0))[0];
    assert!((0.2..0.5).contains(&part), "one token more moves a little: {part}");
}

#[test]
fn traffic_of_another_model_is_refused_and_the_next_is_not() {
    let mut follower = Follower::default();
    follower.observe(&Window::new(&[vec![1, 2, 3]]).unwrap());
    let error = follower.shares(&placement(), None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "1 layers of 3 experts given for a model of 1 layers of 4 experts"
    );
    follower.observe(&moment([200, 300, 100, 200]));
    assert!(told(&mut follower).is_some());
}
