//! Kinds are told from mixes, bursts of them are expected, and noise is no kind.

use super::*;
use crate::unmix::{Kinds, Sample, unmix};

const EXPERTS: usize = 32;

/// Kind `at` sends its tokens to its own experts, to fewer the further down, and to those of all.
fn kind(at: usize) -> Vec<f64> {
    let raw: Vec<f64> = (0..EXPERTS)
        .map(|expert| match (expert % 4, expert / 4) {
            (3, _) => 1.0,
            (of, down) if of == at => 8.0 / (down as f64 + 1.0),
            (_, _) => 0.0,
        })
        .collect();
    let sum: f64 = raw.iter().sum();
    raw.iter().map(|share| share / sum).collect()
}

fn mix(parts: [f64; 3]) -> Vec<f64> {
    let share = |expert: usize| (0..3).map(|at| parts[at] * kind(at)[expert]).sum();
    (0..EXPERTS).map(share).collect()
}

fn sample(shares: Vec<f64>) -> Sample {
    Sample { shares, noise: 1e-6 }
}

#[track_caller]
fn check_told(mixes: &[[f64; 3]], want: &[usize]) {
    let samples: Vec<Sample> = mixes.iter().map(|&parts| sample(mix(parts))).collect();
    let Kinds { shares, .. } = unmix(&samples, 1, 6).expect("they are several kinds");
    assert_eq!(shares.len(), want.len());
    for &at in want {
        // What all kinds have in common is nobody's own, so the own experts are what counts.
        let own = |shares: &[f64]| {
            let of = |kind: usize| shares.iter().skip(kind).step_by(4).sum::<f64>();
            of(at) / (of(0) + of(1) + of(2))
        };
        let purest = shares.iter().map(|shares| own(shares)).fold(0.0, f64::max);
        assert!(0.95 < purest, "kind {at} is told to {purest}");
    }
}

#[test]
fn kinds_are_told_from_mixes() {
    check_told(&[[0.7, 0.3, 0.0], [0.4, 0.6, 0.0], [0.5, 0.5, 0.0]], &[0, 1]);
    check_told(&[[0.6, 0.3, 0.1], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4], [0.4, 0.4, 0.2]], &[0, 1, 2]);
}

#[test]
fn one_mix_is_no_kind() {
    let same = mix([0.5, 0.3, 0.2]);
    assert_eq!(unmix(&[sample(same.clone()), sample(same.clone())], 1, 6), None);
    let noisy = |at: usize| {
        let shares = same.iter().enumerate().map(|(e, x)| if e % 8 == at { x + 1e-4 } else { *x });
        sample(shares.collect())
    };
    assert_eq!(unmix(&[noisy(0), noisy(1), noisy(2)], 1, 6), None);
}

#[test]
fn first_burst_of_a_kind_finds_its_experts_spread() {
    let shape = Shape { moe_layers: 1, experts: EXPERTS };
    let window = |parts: [f64; 3]| {
        let tokens = |share: f64| format!("{:.0}", share * 1e6).parse::<u64>().unwrap();
        Window::new(&[mix(parts).into_iter().map(tokens).collect::<Vec<u64>>()]).unwrap()
    };
    let seen = [[0.8, 0.2, 0.0], [0.7, 0.3, 0.0], [0.8, 0.2, 0.0]];
    let mut load = Load::unknown(shape);
    let mut balances = Vec::new();
    for parts in seen {
        load.observe(&window(parts)).unwrap();
        let request = Request {
            aim: Aim::Level,
            capacity: &[5; 8],
            redundancy: 0,
            current: &Holdings::none(shape),
            load: &load,
        };
        let placement = replan(&request).unwrap().placement;
        balances.push(levelled(&window([0.2, 0.8, 0.0]), &placement));
    }
    // After the first window nothing says that there are two kinds.
    assert!(balances[0] < 0.9, "{balances:?}");
    assert!(0.97 < balances[2], "{balances:?}");
}
