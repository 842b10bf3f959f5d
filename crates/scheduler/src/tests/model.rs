//! Workers as simple as they can be: the oracle of the scheduler's tests.
//!
//! A block remembers, per position in it, a hash of the tokens up to there: what a KV entry depends
//! on. Before a token is computed, every entry it attends to must be that of its own history. So a
//! block with two owners, a table that is short or shifted, a block freed too early and a lost
//! token all show as a wrong hash, with no knowledge of how the scheduler works.

use crate::{KvPools, Plan, Slice};
use ids::{BlockId, SeqId};
use std::collections::BTreeMap;

/// Hash of `tokens[..=position]` for every position.
fn histories(tokens: &[u32]) -> Vec<u64> {
    let mut hash = 0xcbf2_9ce4_8422_2325;
    let step = |token: &u32| {
        hash = (hash ^ u64::from(*token)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
        hash
    };
    tokens.iter().map(step).collect()
}

/// The token that the model samples after `tokens`.
pub(super) fn next_token(tokens: &[u32]) -> u32 {
    let hash = histories(tokens).last().copied().unwrap();
    u32::try_from(hash >> 33).unwrap()
}

/// `prompt` and the `count` tokens that follow it, one sequence alone.
pub(super) fn generate(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        tokens.push(next_token(&tokens));
    }
    tokens
}

type Memory = BTreeMap<(BlockId, usize), u64>;

/// One rank: its KV memory.
pub(super) struct Worker {
    kv: KvPools,
    full: Memory,
    chunked: Memory,
}

impl Worker {
    pub(super) fn new(kv: KvPools) -> Self {
        Self { kv, full: Memory::new(), chunked: Memory::new() }
    }

    /// Computes a slice of the sequence whose tokens are `history`.
    #[track_caller]
    fn run(&mut self, slice: &Slice, history: &[u32]) {
        let (start, end) = (slice.start as usize, slice.start as usize + slice.tokens.len());
        let block = self.kv.block_tokens as usize;
        let id = slice.sequence;
        assert!(start < end, "{id}: an empty slice");
        assert_eq!(slice.tokens, history[start..end], "{id}: tokens at {start}");
        assert_eq!(slice.samples, end == history.len(), "{id}: samples at {end}");
        assert_eq!(slice.full_blocks.len(), end.div_ceil(block), "{id}: length of the full table");
        let hashes = histories(&history[..end]);
        for p in start..end {
            write(&mut self.full, &slice.full_blocks, p, block, hashes[p]);
            for (q, &want) in hashes.iter().enumerate().take(p + 1) {
                let got = self.full.get(&(slice.full_blocks[q / block], q % block));
                assert_eq!(got, Some(&want), "{id}: position {p} attends to {q}");
            }
        }
        self.run_chunked(slice, &hashes);
    }

    #[track_caller]
    fn run_chunked(&mut self, slice: &Slice, hashes: &[u64]) {
        let id = slice.sequence;
        let Some(chunk) = self.kv.chunk_tokens else {
            assert!(slice.chunked_blocks.is_empty(), "{id}: no layer is chunked");
            return;
        };
        let (block, chunk) = (self.kv.block_tokens as usize, chunk as usize);
        let (start, end) = (slice.start as usize, hashes.len());
        let first = slice.chunked_first as usize;
        assert_eq!(first, start / chunk * chunk / block, "{id}: first block of the chunk");
        assert_eq!(slice.chunked_blocks.len(), end.div_ceil(block) - first, "{id}: chunked table");
        for p in start..end {
            let offset = first * block;
            write(&mut self.chunked, &slice.chunked_blocks, p - offset, block, hashes[p]);
            for (q, want) in hashes.iter().enumerate().take(p + 1).skip(p / chunk * chunk) {
                let q = q - offset;
                let got = self.chunked.get(&(slice.chunked_blocks[q / block], q % block));
                assert_eq!(got, Some(want), "{id}: chunked position {p} attends to {q}");
            }
        }
    }

    /// A step that fails half way: what it may have written is garbage.
    fn scribble(&mut self, slice: &Slice) {
        let block = self.kv.block_tokens as usize;
        for p in slice.start as usize..slice.start as usize + slice.tokens.len() {
            write(&mut self.full, &slice.full_blocks, p, block, 0);
            if self.kv.chunk_tokens.is_some() {
                let p = p - slice.chunked_first as usize * block;
                write(&mut self.chunked, &slice.chunked_blocks, p, block, 0);
            }
        }
    }
}

#[track_caller]
fn write(memory: &mut Memory, table: &[BlockId], position: usize, block: usize, value: u64) {
    memory.insert((table[position / block], position % block), value);
}

/// A step on all ranks; returns what they sample.
#[track_caller]
pub(super) fn run(
    workers: &mut [Worker],
    plan: &Plan,
    histories: &BTreeMap<SeqId, Vec<u32>>,
) -> Vec<(SeqId, u32)> {
    let mut sampled = Vec::new();
    for (worker, slices) in workers.iter_mut().zip(&plan.ranks) {
        for slice in slices {
            let history = &histories[&slice.sequence];
            worker.run(slice, history);
            if slice.samples {
                sampled.push((slice.sequence, next_token(history)));
            }
        }
    }
    sampled
}

/// A step that fails on all ranks.
pub(super) fn fail(workers: &mut [Worker], plan: &Plan) {
    for (worker, slices) in workers.iter_mut().zip(&plan.ranks) {
        for slice in slices {
            worker.scribble(slice);
        }
    }
}
