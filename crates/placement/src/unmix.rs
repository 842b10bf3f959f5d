//! Tells the kinds of traffic (code, chat, one language) from the mixes of them that were seen.
//!
//! No kind sends an expert fewer than no tokens. So of each mix as much of the others is subtracted as
//! leaves nothing negative, and what remains is nearly pure. It says what a burst of that kind
//! would be like, though none was seen yet. It must never guess from what is only noise.

/// What one or more windows had in common.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sample {
    /// Share of its layer's tokens per expert, `[moe layers][experts]`, flat.
    pub(crate) shares: Vec<f64>,
    /// Square of how far chance puts it from what it is a sample of, summed over all shares.
    pub(crate) noise: f64,
}

/// The kinds that mixes are made of.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Kinds {
    /// Each as in [`Sample::shares`].
    pub(crate) shares: Vec<Vec<f64>>,
    /// Most that one of them had of a mix, at most 1.
    pub(crate) strongest: f64,
}

/// What a sample must have that no mix of the others has, as a multiple of its noise.
const NOISES: f64 = 3.0;
/// When a kind is subtracted, one in this many of its experts may be left with less than nothing, by
/// chance.
const NEGATIVE_ONE_IN: usize = 33;
/// Most of a mix that is subtracted at once: what is left must not be nothing.
const SUBTRACTED_MAX: f64 = 0.95;
/// A purer kind can be subtracted further from the others; the third time hardly changes a thing.
const SUBTRACTIONS: usize = 3;
/// Times that the kinds are counted anew from all samples, which averages their noise.
const AVERAGES: usize = 2;
/// Steps of an iteration on matrices of a few kinds.
const STEPS: usize = 50;

/// The kinds that `samples` are mixes of, at most `kinds_max`; `None` if they are one mix.
pub(crate) fn unmix(samples: &[Sample], moe_layers: usize, kinds_max: usize) -> Option<Kinds> {
    let mut kinds = corners(samples, kinds_max);
    if kinds.len() < 2 {
        return None;
    }
    purify(&mut kinds, moe_layers);
    for _ in 0..AVERAGES {
        let parts = parts(samples, &kinds);
        average(samples, &parts, &mut kinds);
        purify(&mut kinds, moe_layers);
    }
    let parts = parts(samples, &kinds);
    let strongest = parts.iter().flatten().copied().fold(0.0, f64::max).min(1.0);
    Some(Kinds { shares: kinds, strongest })
}

/// The samples that are least a mix of others: always the one farthest from the plane through those
/// before (successive projection: Gillis and Vavasis 2014).
fn corners(samples: &[Sample], kinds_max: usize) -> Vec<Vec<f64>> {
    let mut rests: Vec<Vec<f64>> = samples.iter().map(|sample| sample.shares.clone()).collect();
    let mut corners = Vec::new();
    while corners.len() < kinds_max {
        let beyond = |(at, rest): (usize, &Vec<f64>)| {
            let square = dot(rest, rest);
            (square - NOISES * samples[at].noise, square, at)
        };
        let farthest = rests.iter().enumerate().map(beyond).max_by(|l, r| l.0.total_cmp(&r.0));
        let Some((_, square, at)) = farthest.filter(|&(beyond, ..)| 0.0 < beyond) else { break };
        corners.push(samples[at].shares.clone());
        let direction = rests[at].clone();
        for rest in &mut rests {
            let part = dot(rest, &direction) / square;
            subtract(rest, part, &direction);
        }
    }
    corners
}

/// Subtracts the kinds from each other as far as nothing becomes negative.
fn purify(kinds: &mut [Vec<f64>], moe_layers: usize) {
    let mean = mean(&kinds[0]);
    let mut ratios = Vec::new();
    for _ in 0..SUBTRACTIONS {
        for at in 0..kinds.len() {
            let mut kind = std::mem::take(&mut kinds[at]);
            for (_, other) in kinds.iter().enumerate().filter(|&(other, _)| other != at) {
                // Experts that the other hardly needs tell little: theirs is mostly noise.
                let telling = kind.iter().zip(other).filter(|&(_, &other)| mean < other);
                ratios.clear();
                ratios.extend(telling.map(|(kind, other)| kind / other));
                if ratios.is_empty() {
                    continue;
                }
                let allowed = ratios.len() / NEGATIVE_ONE_IN;
                let (_, ratio, _) = ratios.select_nth_unstable_by(allowed, f64::total_cmp);
                subtract(&mut kind, ratio.min(SUBTRACTED_MAX), other);
                make_shares(&mut kind, moe_layers);
            }
            kinds[at] = kind;
        }
    }
}

/// How much of each kind is in each sample, by least squares, none negative. What chance does to a
/// share grows with it, so each difference counts by the mean share.
fn parts(samples: &[Sample], kinds: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let shares = kinds[0].len();
    let mut weights = vec![0.0; shares];
    for sample in samples {
        for (weight, share) in weights.iter_mut().zip(&sample.shares) {
            *weight += share;
        }
    }
    let floor = 1e-3 * mean(&weights);
    let weigh = |kind: &Vec<f64>| -> Vec<f64> {
        kind.iter().zip(&weights).map(|(share, weight)| share / (weight + floor)).collect()
    };
    let weighed: Vec<Vec<f64>> = kinds.iter().map(weigh).collect();
    let matrix: Vec<Vec<f64>> = weighed.iter().map(|left| dots(left, kinds)).collect();
    let mut parts: Vec<Vec<f64>> =
        samples.iter().map(|sample| dots(&sample.shares, &weighed)).collect();
    let goals = parts.clone();
    solve(&matrix, &mut parts);
    for (part, goal) in parts.iter_mut().zip(&goals) {
        part.iter_mut().for_each(|part| *part = part.max(1e-6));
        for _ in 0..STEPS {
            // Lee and Seung's step: it stays positive and never leads away.
            let now = dots(part, &matrix);
            for ((part, now), goal) in part.iter_mut().zip(now).zip(goal) {
                *part *= goal / now.max(f64::MIN_POSITIVE);
            }
        }
    }
    parts
}

/// The kinds that make the samples in these parts, by least squares.
fn average(samples: &[Sample], parts: &[Vec<f64>], kinds: &mut [Vec<f64>]) {
    let column = |kind: usize| -> Vec<f64> { parts.iter().map(|parts| parts[kind]).collect() };
    let columns: Vec<Vec<f64>> = (0..kinds.len()).map(column).collect();
    let matrix: Vec<Vec<f64>> = columns.iter().map(|left| dots(left, &columns)).collect();
    let shares = kinds[0].len();
    let goal = |share: usize| -> Vec<f64> {
        let of = |column: &Vec<f64>| -> f64 {
            column.iter().zip(samples).map(|(part, sample)| part * sample.shares[share]).sum()
        };
        columns.iter().map(of).collect()
    };
    let mut goals: Vec<Vec<f64>> = (0..shares).map(goal).collect();
    solve(&matrix, &mut goals);
    for (share, found) in goals.iter().enumerate() {
        for (kind, found) in kinds.iter_mut().zip(found) {
            kind[share] = found.max(0.0);
        }
    }
}

/// Replaces each vector `goal` by the one that `matrix`, symmetric and positive, makes `goal` of:
/// Gauss's elimination, which needs no exchange of rows for such a matrix.
fn solve(matrix: &[Vec<f64>], goals: &mut [Vec<f64>]) {
    let size = matrix.len();
    let mut rows = matrix.to_vec();
    let trace: f64 = (0..size).map(|at| rows[at][at]).sum();
    for (at, row) in rows.iter_mut().enumerate() {
        // Kinds that are nearly alike must not blow up each other's noise.
        row[at] += 1e-9 * trace;
    }
    let mut factors = vec![vec![0.0; size]; size];
    for at in 0..size {
        for below in at + 1..size {
            let factor = rows[below][at] / rows[at][at];
            let (upper, lower) = rows.split_at_mut(below);
            subtract(&mut lower[0], factor, &upper[at]);
            factors[below][at] = factor;
        }
    }
    for goal in goals {
        for at in 0..size {
            for below in at + 1..size {
                goal[below] -= factors[below][at] * goal[at];
            }
        }
        for at in (0..size).rev() {
            let known: f64 = (at + 1..size).map(|other| rows[at][other] * goal[other]).sum();
            goal[at] = (goal[at] - known) / rows[at][at];
        }
    }
}

/// Nothing is negative and every layer adds up to 1, if anything is left of it.
fn make_shares(kind: &mut [f64], moe_layers: usize) {
    for layer in kind.chunks_mut((kind.len() / moe_layers.max(1)).max(1)) {
        layer.iter_mut().for_each(|share| *share = share.max(0.0));
        let sum: f64 = layer.iter().sum();
        if 0.0 < sum {
            layer.iter_mut().for_each(|share| *share /= sum);
        }
    }
}

fn dot(left: &[f64], right: &[f64]) -> f64 {
    // Four sums at once, always the same ones: one after the other would wait for each.
    let (lefts, rights) = (left.as_chunks::<4>(), right.as_chunks::<4>());
    let mut sums = [0.0; 4];
    for (left, right) in lefts.0.iter().zip(rights.0) {
        for at in 0..4 {
            sums[at] += left[at] * right[at];
        }
    }
    let rest: f64 = lefts.1.iter().zip(rights.1).map(|(left, right)| left * right).sum();
    (sums[0] + sums[2]) + (sums[1] + sums[3]) + rest
}

fn dots(vector: &[f64], rows: &[Vec<f64>]) -> Vec<f64> {
    rows.iter().map(|row| dot(vector, row)).collect()
}

fn subtract(from: &mut [f64], part: f64, what: &[f64]) {
    for (from, what) in from.iter_mut().zip(what) {
        *from -= part * what;
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / (values.len().max(1) as f64)
}
