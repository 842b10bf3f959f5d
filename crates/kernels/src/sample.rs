//! Choosing the next token from a row of logits.
//!
//! Order of the steps, as in vLLM: penalties and bias on the logits, then temperature, then `min_p`,
//! `top_k` and `top_p` on the distribution, then the draw. The draw is Gumbel-max: the token with the
//! largest `logit / temperature + g`, where `g` comes from Philox keyed by the request's seed and
//! counted by (position, token). No state survives the call.

use crate::philox::philox4x32;
use std::cmp::Ordering;

/// How one sequence wants its next token. Neutral values switch a part off.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    pub seed: u64,
    /// 0: the largest logit, no randomness.
    pub temperature: f32,
    /// Keep the smallest set of likeliest tokens whose mass reaches this; 1: off.
    pub top_p: f32,
    /// Keep this many likeliest tokens; 0: off.
    pub top_k: u32,
    /// Keep tokens at least this fraction as likely as the likeliest; 0: off.
    pub min_p: f32,
    /// Taken off the logit of every token generated so far.
    pub presence_penalty: f32,
    /// Taken off once per time the token was generated.
    pub frequency_penalty: f32,
    /// Times each token was generated so far; only read by the penalties.
    pub output_counts: Vec<(u32, u32)>,
    /// Added to logits.
    pub bias: Vec<(u32, f32)>,
    /// Never chosen.
    pub banned: Vec<u32>,
    /// Report the log-probability of the chosen token and of this many likeliest ones.
    pub logprobs: Option<u32>,
}

impl Default for Sampling {
    /// Greedy.
    fn default() -> Self {
        Self {
            seed: 0,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            output_counts: Vec::new(),
            bias: Vec::new(),
            banned: Vec::new(),
            logprobs: None,
        }
    }
}

/// A chosen token. Log-probabilities are natural, of the model's own distribution: before penalties,
/// bias and temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    pub token: u32,
    pub logprob: Option<f32>,
    /// The likeliest tokens, likeliest first, ties by id.
    pub top: Vec<(u32, f32)>,
}

/// Chooses the token at absolute `position` (of the token being chosen). `logits`: `[vocab]`.
///
/// Tokens outside the vocabulary in `bias`, `banned` and `output_counts` are passed over.
///
/// # Panics
///
/// If `logits` is empty.
#[must_use]
pub fn sample_row(logits: &[f32], position: u32, sampling: &Sampling) -> Sampled {
    assert!(!logits.is_empty(), "an empty vocabulary has no token to choose");
    let token = match processed(logits, sampling) {
        None => choose(logits, position, sampling),
        Some(changed) => choose(&changed, position, sampling),
    };
    let (logprob, top) = match sampling.logprobs {
        None => (None, Vec::new()),
        Some(count) => log_probabilities(logits, token, count as usize),
    };
    Sampled { token, logprob, top }
}

/// The logits after penalties, bias and bans; `None` if nothing changes them.
fn processed(logits: &[f32], sampling: &Sampling) -> Option<Vec<f32>> {
    let penalised = (sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0)
        && !sampling.output_counts.is_empty();
    if !penalised && sampling.bias.is_empty() && sampling.banned.is_empty() {
        return None;
    }
    let mut changed = logits.to_vec();
    if penalised {
        for &(token, count) in &sampling.output_counts {
            if let Some(x) = changed.get_mut(token as usize) {
                *x -= sampling.presence_penalty + sampling.frequency_penalty * count as f32;
            }
        }
    }
    for &(token, bias) in &sampling.bias {
        if let Some(x) = changed.get_mut(token as usize) {
            *x += bias;
        }
    }
    for &token in &sampling.banned {
        if let Some(x) = changed.get_mut(token as usize) {
            *x = f32::NEG_INFINITY;
        }
    }
    Some(changed)
}

fn choose(logits: &[f32], position: u32, sampling: &Sampling) -> u32 {
    if sampling.temperature <= 0.0 {
        return id(argmax(logits.iter().copied()));
    }
    let key = split(sampling.seed);
    let scaled = |token: usize| logits[token] / sampling.temperature;
    let noisy = |token: u32| scaled(token as usize) + gumbel(key, position, token);
    if sampling.top_k == 0 && sampling.top_p >= 1.0 && sampling.min_p <= 0.0 {
        return id(argmax((0..logits.len()).map(|token| noisy(id(token)))));
    }
    let kept = filtered(logits, sampling);
    kept[argmax(kept.iter().map(|&token| noisy(token)))]
}

/// Index of the first largest value; NaN never wins over a number.
fn argmax(values: impl Iterator<Item = f32>) -> usize {
    let mut best = (0, f32::NEG_INFINITY);
    for (i, value) in values.enumerate() {
        if value > best.1 {
            best = (i, value);
        }
    }
    best.0
}

/// The tokens that `min_p`, `top_k` and `top_p` leave, likeliest first. Never empty.
fn filtered(logits: &[f32], sampling: &Sampling) -> Vec<u32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // Weight of a token relative to the likeliest one.
    let weight =
        |token: u32| f64::from((logits[token as usize] - max) / sampling.temperature).exp();
    let mut kept: Vec<u32> = (0..logits.len())
        .map(id)
        .filter(|&t| logits[t as usize] > f32::NEG_INFINITY)
        .filter(|&t| sampling.min_p <= 0.0 || weight(t) >= f64::from(sampling.min_p))
        .collect();
    if kept.is_empty() {
        return vec![id(argmax(logits.iter().copied()))];
    }
    if sampling.top_k > 0 {
        keep_likeliest(&mut kept, sampling.top_k as usize, logits);
    }
    if sampling.top_p < 1.0 {
        let total: f64 = kept.iter().map(|&t| weight(t)).sum();
        let goal = f64::from(sampling.top_p) * total;
        // Most distributions are done within the first few tokens; sorting all of a vocabulary of
        // 202 048 for them would cost more than the rest of the step.
        let mut sorted = 256;
        loop {
            let mut head = kept.clone();
            keep_likeliest(&mut head, sorted, logits);
            let mut mass = 0.0;
            // A token goes when the mass before it reaches the goal; the likeliest always stays.
            let len = head.iter().take_while(|&&t| {
                let before = mass;
                mass += weight(t);
                before < goal
            });
            let len = len.count().max(1);
            if len < head.len() || head.len() == kept.len() {
                head.truncate(len);
                return head;
            }
            sorted *= 8;
        }
    }
    kept
}

/// Cuts `tokens` to the `count` likeliest, sorted; ties go to the lowest id.
fn keep_likeliest(tokens: &mut Vec<u32>, count: usize, logits: &[f32]) {
    let order = |a: &u32, b: &u32| -> Ordering {
        logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b))
    };
    if count < tokens.len() {
        tokens.select_nth_unstable_by(count, order);
        tokens.truncate(count);
    }
    tokens.sort_unstable_by(order);
}

/// A standard Gumbel variable for (seed, position, token).
fn gumbel(key: [u32; 2], position: u32, token: u32) -> f32 {
    let words = philox4x32([position, token / 4, 0, 0], key);
    let word = words[(token % 4) as usize];
    // 23 random bits, centred in their cell: never 0 or 1.
    let uniform = (f64::from(word >> 9) + 0.5) / f64::from(1_u32 << 23);
    let g = -(-uniform.ln()).ln();
    #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is the purpose")]
    let g = g as f32;
    g
}

/// The key of a seed.
pub(crate) fn split(seed: u64) -> [u32; 2] {
    let bytes = seed.to_le_bytes();
    let word = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
    [word(0), word(4)]
}

fn id(index: usize) -> u32 {
    u32::try_from(index).expect("vocabularies have fewer than 2^32 tokens")
}

/// Log-probability of `token`, and the `count` likeliest tokens with theirs.
fn log_probabilities(logits: &[f32], token: u32, count: usize) -> (Option<f32>, Vec<(u32, f32)>) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
    let log_sum = f64::from(max) + sum.ln();
    #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is the purpose")]
    let of = |token: u32| (f64::from(logits[token as usize]) - log_sum) as f32;
    let mut likeliest: Vec<u32> = (0..logits.len()).map(id).collect();
    keep_likeliest(&mut likeliest, count, logits);
    (Some(of(token)), likeliest.into_iter().map(|t| (t, of(t))).collect())
}

#[cfg(test)]
mod tests;
