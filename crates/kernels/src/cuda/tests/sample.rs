//! Choices against the CPU.

use super::super::sample::{Choices, is_plain, sample};
use super::super::tensor::Tensor;
use super::step::{LIMITS, of_tokens, rope, upload};
use super::{driver, noise};
use crate::device::SampleRow;
use crate::level::Dtype;
use crate::sample::{Sampling, sample_row};

/// One row of logits per sampling, at positions 1, 2, ….
#[track_caller]
fn check(logits: &[f32], samplings: &[Sampling], what: &str) {
    let vocab = logits.len() / samplings.len().max(1);
    assert!(samplings.iter().all(is_plain));
    let mut step = of_tokens(&vec![0; samplings.len()]);
    let sample_of = |(row, sampling): (usize, &Sampling)| SampleRow {
        row: u32::try_from(row).unwrap(),
        sampling: sampling.clone(),
    };
    step.samples = samplings.iter().enumerate().map(sample_of).collect();
    let batch = upload(&step, &rope(4), LIMITS);
    let mut choices = Choices::new(driver()).unwrap();
    let on_device = Tensor::of(driver(), Dtype::F32, vocab.max(1), logits);
    sample(driver(), &batch, &on_device, &mut choices).unwrap();
    let rows = step.samples.iter().zip(logits.chunks_exact(vocab.max(1)));
    let want: Vec<u32> =
        rows.map(|(s, row)| sample_row(row, s.row + 1, &s.sampling).token).collect();
    assert_eq!(choices.to_host().unwrap(), want, "{what}");
}

fn at(temperature: f32, seed: u64) -> Sampling {
    Sampling { temperature, seed, ..Sampling::default() }
}

#[test]
fn choices_match_the_cpu() {
    check(&[], &[], "no samples");
    // Around the 4 tokens of a thread and the 4096 of a block.
    for vocab in [1, 2, 3, 4, 5, 127, 1024, 4095, 4096, 4097, 9001] {
        for scale in [0.0, 0.1, 3.0, 40.0] {
            let seed = u32::try_from(vocab).unwrap();
            let logits = noise(6 * vocab, seed, scale);
            let wide = 0xfedc_ba98_7654_3210 ^ u64::from(seed);
            let samplings =
                [at(0.0, 1), at(1.0, 2), at(0.01, 3), at(5.0, wide), at(0.7, wide), at(1.0, 2)];
            check(&logits, &samplings, &format!("{vocab} tokens, {scale}"));
        }
    }
}

#[test]
fn draws_are_spread_over_the_vocabulary() {
    // With equal logits all tokens are likely, so both devices must agree on the noise of each.
    let samplings: Vec<Sampling> = (0..40).map(|seed| at(1.0, seed << 30)).collect();
    check(&vec![0.5; 40 * 301], &samplings, "equal logits");
}

/// The 23 bits that a token's noise at position 1 is made of.
fn bits(seed: u64, token: u32) -> u32 {
    let words = crate::philox4x32([1, token / 4, 0, 0], crate::sample::split(seed));
    words[(token % 4) as usize] >> 9
}

#[test]
fn the_least_likely_token_that_can_win_does() {
    // The largest noise there is lifts a token over one 18.9 above it that has hardly any.
    let tokens = 0..1 << 16;
    let largest = |seed: &u64| tokens.clone().find(|token| bits(*seed, *token) == (1 << 23) - 1);
    let (seed, lifted) =
        (0..2000).find_map(|seed| largest(&seed).map(|token| (seed, token))).unwrap();
    let held = tokens.clone().min_by_key(|token| bits(seed, *token)).unwrap();
    let mut logits = vec![-1e4; tokens.len()];
    (logits[held as usize], logits[lifted as usize]) = (0.0, -18.9);
    let sampling = at(1.0, seed);
    assert_eq!(sample_row(&logits, 1, &sampling).token, lifted);
    check(&logits, &[sampling], "a lifted token");
}

#[test]
fn ties_and_what_is_no_number() {
    let (nan, low, high) = (f32::NAN, f32::NEG_INFINITY, f32::INFINITY);
    for sampling in [at(0.0, 0), at(1.0, 7)] {
        let one = std::slice::from_ref(&sampling);
        check(&[low, nan, 3.0, nan, low], one, "one number");
        check(&[nan; 9], one, "no number");
        check(&[low; 9], one, "nothing likely");
        check(&[1.0, nan, high, 2.0, high], one, "two infinities");
        check(&[-1e38, 1e38, 1e38, -0.0], one, "large ones");
        let mut logits = vec![-3.0; 5000];
        for token in [4097, 4999, 130, 1023] {
            logits[token] = 90.0;
        }
        check(&logits, one, "four equal ones");
    }
    check(&[2.0, 3.0, 3.0], &[at(-1.0, 0)], "a temperature below 0");
    check(&[1.0, 2.0, 3.0], &[at(1e-44, 0)], "a temperature near 0");
    check(&[1.0, 2.0, 3.0], &[at(f32::NAN, 0)], "a temperature that is no number");
}

#[test]
fn rows_that_need_more_than_their_logits_are_not_plain() {
    let warm = at(1.0, 0);
    assert!(is_plain(&warm) && is_plain(&Sampling::default()));
    assert!(is_plain(&Sampling { top_k: 5, top_p: 0.5, min_p: 0.1, ..Sampling::default() }));
    let counts = vec![(1, 1)];
    for sampling in [
        Sampling { top_p: 0.9, ..warm.clone() },
        Sampling { top_k: 1, ..warm.clone() },
        Sampling { min_p: 0.1, ..warm.clone() },
        Sampling { presence_penalty: 1.0, output_counts: counts.clone(), ..warm.clone() },
        Sampling { frequency_penalty: 1.0, output_counts: counts, ..Sampling::default() },
        Sampling { bias: vec![(0, 1.0)], ..warm.clone() },
        Sampling { banned: vec![0], ..Sampling::default() },
        Sampling { logprobs: Some(0), ..Sampling::default() },
    ] {
        assert!(!is_plain(&sampling), "{sampling:?}");
    }
}
