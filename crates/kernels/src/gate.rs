//! The router of a MoE layer: top-1 of the raw logits, sigmoid of the chosen one.

use crate::math::sigmoid;

/// Chooses per row: the expert with the largest logit (ties and NaN: the lowest id wins) and the
/// sigmoid of that logit. `logits`: `[rows, experts]`.
pub(crate) fn top1(logits: &[f32], experts: usize, chosen: &mut Vec<u16>, scores: &mut Vec<f32>) {
    chosen.clear();
    scores.clear();
    for row in logits.chunks_exact(experts) {
        let mut best = 0;
        for (e, logit) in row.iter().enumerate() {
            if *logit > row[best] {
                best = e;
            }
        }
        chosen.push(u16::try_from(best).expect("experts are numbered in 16 bits"));
        scores.push(sigmoid(row[best]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(logits: &[f32], want: u16) {
        let (mut chosen, mut scores) = (vec![], vec![]);
        top1(logits, logits.len(), &mut chosen, &mut scores);
        assert_eq!(chosen, [want]);
        let exact = 1.0 / (1.0 + (-f64::from(logits[usize::from(want)])).exp());
        assert!((f64::from(scores[0]) - exact).abs() < 1e-6);
    }

    #[test]
    fn largest_logit_wins_and_ties_go_to_the_lowest_id() {
        check(&[0.0, 2.0, 1.0], 1);
        check(&[3.0, 3.0, 1.0], 0);
        check(&[-5.0, -1.0, -1.0], 1);
    }
}
