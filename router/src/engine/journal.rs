//! The journal: what the router remembers of a live sequence, enough to run it on any worker.
//!
//! A record is pure. It decides when a sequence ends and how its next token is to be sampled, and
//! it can hand the sequence to a new scheduler at any time: prompt and outputs become the prompt,
//! while counts, limits and the sampling seed go on as if nothing had happened.

use super::{Finish, Generate};
use ids::SeqId;
use proto::pb;
use scheduler::NewSequence;
use std::collections::BTreeMap;

/// One live sequence.
#[derive(Debug)]
pub(super) struct Record {
    generate: Generate,
    outputs: Vec<u32>,
    /// How often each token was sampled; kept only if a penalty asks for it.
    counts: BTreeMap<u32, u32>,
}

impl Record {
    pub(super) fn new(generate: Generate) -> Self {
        Self { generate, outputs: Vec::new(), counts: BTreeMap::new() }
    }

    /// Appends a sampled token. `Some`: the sequence ends with it, because it stops here or
    /// because nothing fits behind it.
    pub(super) fn append(&mut self, token: u32, context_tokens: u32) -> Option<Finish> {
        let stops = !self.must_go_on() && self.generate.stop_tokens.contains(&token);
        self.outputs.push(token);
        if self.has_penalty() {
            *self.counts.entry(token).or_insert(0) += 1;
        }
        let is_long = self.outputs_count() >= self.generate.tokens_max
            || self.generate.prompt.len() + self.outputs.len() >= context_tokens as usize;
        match (stops, is_long) {
            (true, _) => Some(Finish::Stop { token }),
            (false, true) => Some(Finish::Length),
            (false, false) => None,
        }
    }

    /// How to sample the next token.
    pub(super) fn sample(&self) -> pb::Sample {
        let sampling = &self.generate.sampling;
        let counts = self.counts.iter();
        let bias = sampling.bias.iter();
        pb::Sample {
            seed: sampling.seed,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            output_counts: counts.map(|(&token, &count)| pb::TokenCount { token, count }).collect(),
            bias: bias.map(|&(token, bias)| pb::TokenBias { token, bias }).collect(),
            banned: if self.must_go_on() { self.generate.stop_tokens.clone() } else { Vec::new() },
            logprobs: sampling.logprobs,
        }
    }

    /// The rest of the sequence, for a scheduler that never saw it.
    pub(super) fn resume(&self, id: SeqId) -> NewSequence {
        let mut prompt = Vec::with_capacity(self.generate.prompt.len() + self.outputs.len());
        prompt.extend_from_slice(&self.generate.prompt);
        prompt.extend_from_slice(&self.outputs);
        NewSequence {
            id,
            prompt,
            tokens_max: self.generate.tokens_max - self.outputs_count(),
            group: Some(self.generate.group),
            has_begun: !self.outputs.is_empty(),
        }
    }

    fn must_go_on(&self) -> bool {
        self.outputs_count() < self.generate.sampling.tokens_min
    }

    fn has_penalty(&self) -> bool {
        let sampling = &self.generate.sampling;
        sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0
    }

    fn outputs_count(&self) -> u32 {
        u32::try_from(self.outputs.len()).expect("at most tokens_max")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Sampling;

    fn generate() -> Generate {
        Generate {
            prompt: vec![1, 2, 3],
            tokens_max: 4,
            sampling: Sampling { seed: 5, ..Sampling::greedy() },
            stop_tokens: vec![9, 8],
            group: 77,
        }
    }

    #[track_caller]
    fn check(generate: Generate, context_tokens: u32, tokens: &[u32], want: Option<Finish>) {
        let mut record = Record::new(generate);
        let (last, before) = tokens.split_last().unwrap();
        for &token in before {
            assert_eq!(record.append(token, context_tokens), None, "before the last token");
        }
        assert_eq!(record.append(*last, context_tokens), want);
    }

    #[test]
    fn stop_token_ends_the_sequence() {
        check(generate(), 100, &[4, 8], Some(Finish::Stop { token: 8 }));
        check(generate(), 100, &[4, 7], None);
    }

    #[test]
    fn limit_and_context_end_the_sequence() {
        check(generate(), 100, &[4, 4, 4, 4], Some(Finish::Length));
        check(generate(), 5, &[4, 4], Some(Finish::Length));
        check(generate(), 100, &[4, 4, 4, 9], Some(Finish::Stop { token: 9 }));
    }

    #[test]
    fn stop_tokens_are_banned_until_tokens_min() {
        let mut generate = generate();
        generate.sampling.tokens_min = 2;
        let mut record = Record::new(generate.clone());
        assert_eq!(record.sample().banned, [9, 8]);
        record.append(4, 100);
        assert_eq!(record.sample().banned, [9, 8]);
        record.append(4, 100);
        assert_eq!(record.sample().banned, [0_u32; 0]);
        check(generate, 100, &[4, 4, 9], Some(Finish::Stop { token: 9 }));
    }

    #[test]
    fn counts_travel_only_with_a_penalty() {
        let mut record = Record::new(generate());
        record.append(4, 100);
        assert!(record.sample().output_counts.is_empty());

        let mut generate = generate();
        generate.sampling.frequency_penalty = 0.5;
        let mut record = Record::new(generate);
        for token in [6, 4, 6] {
            record.append(token, 100);
        }
        let count = |token, count| pb::TokenCount { token, count };
        assert_eq!(record.sample().output_counts, [count(4, 1), count(6, 2)]);
    }

    #[test]
    fn resumed_sequence_goes_on_where_it_was() {
        let mut record = Record::new(generate());
        record.append(4, 100);
        record.append(5, 100);
        let sample = record.sample();
        let want = NewSequence {
            id: SeqId(1),
            prompt: vec![1, 2, 3, 4, 5],
            tokens_max: 2,
            group: Some(77),
            has_begun: true,
        };
        assert_eq!(record.resume(SeqId(1)), want);
        assert_eq!(record.sample(), sample);
    }
}
