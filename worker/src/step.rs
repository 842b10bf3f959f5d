//! A step between wire and device. What it names is checked by the device, which knows the limits.

use kernels::{Row, SampleRow, Sampled, Sampling, StepBatch, Table};
use proto::pb;

/// Fills `batch` with a step's slices; its buffers are used again.
pub(crate) fn fill(batch: &mut StepBatch, step: &pb::Step) {
    batch.rows.clear();
    batch.samples.clear();
    batch.tables.resize_with(step.slices.len(), Table::default);
    for ((index, slice), table) in (0..).zip(&step.slices).zip(&mut batch.tables) {
        let rows = (slice.start..).zip(&slice.tokens);
        batch.rows.extend(rows.map(|(position, &token)| Row { token, position, table: index }));
        if let (Some(sample), Some(last)) = (&slice.sample, batch.rows.len().checked_sub(1)) {
            let row = u32::try_from(last).expect("a message of 64 MiB has fewer than 2^32 tokens");
            batch.samples.push(SampleRow { row, sampling: sampling(sample) });
        }
        table.full.clone_from(&slice.full_blocks);
        table.chunked.clone_from(&slice.chunked_blocks);
        table.chunked_first = slice.chunked_first;
    }
}

fn sampling(wire: &pb::Sample) -> Sampling {
    Sampling {
        seed: wire.seed,
        temperature: wire.temperature,
        top_p: wire.top_p,
        top_k: wire.top_k,
        min_p: wire.min_p,
        presence_penalty: wire.presence_penalty,
        frequency_penalty: wire.frequency_penalty,
        output_counts: wire.output_counts.iter().map(|c| (c.token, c.count)).collect(),
        bias: wire.bias.iter().map(|b| (b.token, b.bias)).collect(),
        banned: wire.banned.clone(),
        logprobs: wire.logprobs,
    }
}

/// The chosen tokens, each with its sequence.
pub(crate) fn sampled(step: &pb::Step, sampled: Vec<Sampled>) -> Vec<pb::Sampled> {
    let asked = step.slices.iter().filter(|slice| slice.sample.is_some());
    let to_wire = |(slice, sampled): (&pb::Slice, Sampled)| {
        let top = |(token, logprob)| pb::TokenLogprob { token, logprob };
        pb::Sampled {
            sequence: slice.sequence,
            token: sampled.token,
            logprob: sampled.logprob,
            top: sampled.top.into_iter().map(top).collect(),
        }
    };
    asked.zip(sampled).map(to_wire).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_become_rows_and_samples_find_their_sequence() {
        let slice = |sequence, start, tokens: &[u32], samples: bool| pb::Slice {
            sequence,
            start,
            tokens: tokens.to_vec(),
            full_blocks: vec![7, 8],
            chunked_blocks: vec![3],
            chunked_first: 1,
            sample: samples.then(|| pb::Sample { seed: sequence, ..Default::default() }),
            ..Default::default()
        };
        let slices = vec![slice(5, 0, &[1, 2], false), slice(6, 20, &[3], true)];
        let step = pb::Step { slices, ..Default::default() };
        let mut batch = StepBatch::default();
        for _ in 0..2 {
            fill(&mut batch, &step);
            let row = |token, position, table| Row { token, position, table };
            assert_eq!(batch.rows, [row(1, 0, 0), row(2, 1, 0), row(3, 20, 1)]);
            assert_eq!(batch.samples.len(), 1);
            assert_eq!((batch.samples[0].row, batch.samples[0].sampling.seed), (2, 6));
            let table = Table { full: vec![7, 8], chunked: vec![3], chunked_first: 1 };
            assert_eq!(batch.tables, [table.clone(), table]);
        }
        let got = sampled(&step, vec![Sampled { token: 9, logprob: Some(-1.0), top: vec![] }]);
        assert_eq!((got.len(), got[0].sequence, got[0].token), (1, 6, 9));
    }
}
