//! Distribution, filters and ties of the sampler.

use super::*;

fn sampling() -> Sampling {
    Sampling { temperature: 1.0, ..Sampling::default() }
}

/// Tokens chosen at 20 000 positions, as a histogram.
fn histogram(logits: &[f32], sampling: &Sampling) -> Vec<f64> {
    let draws = 20_000_u32;
    let mut counts = vec![0.0; logits.len()];
    for position in 0..draws {
        counts[sample_row(logits, position, sampling).token as usize] += 1.0 / f64::from(draws);
    }
    counts
}

#[track_caller]
fn check(logits: &[f32], sampling: &Sampling, want: &[f64]) {
    for (token, (got, want)) in histogram(logits, sampling).iter().zip(want).enumerate() {
        assert!((got - want).abs() < 0.015, "token {token}: {got} instead of {want}");
    }
}

#[test]
fn frequencies_are_those_of_the_softmax() {
    let logits = [1.0_f32, 2.0, 0.0, -1.0].map(|x| x * 0.7);
    let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
    let want: Vec<f64> = logits.iter().map(|&x| f64::from(x).exp() / sum).collect();
    check(&logits, &Sampling { seed: 9, ..sampling() }, &want);
}

#[test]
fn filters_cut_the_tail() {
    // Probabilities 0.5, 0.3, 0.15, 0.05.
    let logits = [0.5_f32, 0.3, 0.15, 0.05].map(f32::ln);
    check(&logits, &Sampling { top_k: 2, ..sampling() }, &[0.625, 0.375, 0.0, 0.0]);
    // The mass before the third token is 0.8: it stays out at 0.8, in at 0.81.
    check(&logits, &Sampling { top_p: 0.79, ..sampling() }, &[0.625, 0.375, 0.0, 0.0]);
    check(&logits, &Sampling { top_p: 0.81, ..sampling() }, &[0.526, 0.316, 0.158, 0.0]);
    check(&logits, &Sampling { min_p: 0.4, ..sampling() }, &[0.625, 0.375, 0.0, 0.0]);
    check(&logits, &Sampling { top_p: 1e-6, ..sampling() }, &[1.0, 0.0, 0.0, 0.0]);
}

#[test]
fn top_p_needs_more_than_the_first_sorted_head() {
    let logits = vec![0.0_f32; 3000];
    let kept = filtered(&logits, &Sampling { top_p: 0.5, ..sampling() });
    assert_eq!(kept.len(), 1500);
    assert_eq!(kept[..3], [0, 1, 2]);
}

#[test]
fn greedy_ties_go_to_the_lowest_id_and_bans_hold() {
    let logits = [1.0, 3.0, 3.0, 2.0];
    let greedy = Sampling::default();
    assert_eq!(sample_row(&logits, 0, &greedy).token, 1);
    let banned = Sampling { banned: vec![1, 2, 77], ..greedy.clone() };
    assert_eq!(sample_row(&logits, 0, &banned).token, 3);
    let biased = Sampling { bias: vec![(0, 5.0)], ..greedy.clone() };
    assert_eq!(sample_row(&logits, 0, &biased).token, 0);
    let penalised = Sampling {
        output_counts: vec![(1, 2), (2, 1)],
        frequency_penalty: 0.4,
        presence_penalty: 0.3,
        ..greedy
    };
    // 3 - 0.3 - 0.8 = 1.9 and 3 - 0.3 - 0.4 = 2.3 against 2.
    assert_eq!(sample_row(&logits, 0, &penalised).token, 2);
}

#[test]
fn logprobs_are_of_the_models_own_distribution() {
    let logits = [0.5_f32, 0.3, 0.15, 0.05].map(f32::ln);
    let sampling = Sampling { logprobs: Some(2), bias: vec![(3, 100.0)], ..Sampling::default() };
    let got = sample_row(&logits, 0, &sampling);
    assert_eq!(got.token, 3);
    assert!((got.logprob.unwrap() - 0.05_f32.ln()).abs() < 1e-5);
    assert_eq!(got.top.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 1]);
    assert!((got.top[1].1 - 0.3_f32.ln()).abs() < 1e-5);
}

#[test]
fn seed_and_position_decide_alone() {
    let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.61).sin()).collect();
    let draw =
        |seed, position| sample_row(&logits, position, &Sampling { seed, ..sampling() }).token;
    let all: Vec<u32> = (0..40).map(|p| draw(1, p)).collect();
    assert_eq!(all, (0..40).map(|p| draw(1, p)).collect::<Vec<_>>());
    assert_ne!(all, (0..40).map(|p| draw(2, p)).collect::<Vec<_>>());
    // The upper half of the seed counts too.
    assert_ne!(all, (0..40).map(|p| draw(1 | 1 << 40, p)).collect::<Vec<_>>());
}
