//! Workers as simple as they can be: the oracle of the scheduler's tests.
//!
//! A block remembers, per position in it, a hash of the tokens up to there: what a KV entry depends
//! on. Before a token is computed, every entry it attends to must be that of its own history. So a
//! block with two owners, a table that is short or shifted, a block freed too early and a lost
//! token all show as a wrong hash, with no knowledge of how the scheduler works.

use crate::{BackupOrder, Held, KvPools, Plan, Slice};
use ids::{BlockId, Rank, SeqId};
use std::collections::{BTreeMap, BTreeSet};

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

/// A copy of another rank's sequence: the hashes of its rows.
#[derive(Default, Clone)]
struct Copy {
    /// From position 0.
    full: Vec<u64>,
    /// By position.
    chunked: BTreeMap<u32, u64>,
}

/// Rows on their way to the rank that keeps a copy.
pub(super) struct Piece {
    sequence: SeqId,
    order: BackupOrder,
    full: Vec<u64>,
    chunked: BTreeMap<u32, u64>,
}

/// One rank: its KV memory, and its copies.
pub(super) struct Worker {
    kv: KvPools,
    full: Memory,
    chunked: Memory,
    copies: BTreeMap<SeqId, Copy>,
    /// Those that have changed since it was asked, and whether they have a gap.
    news: BTreeMap<SeqId, bool>,
    /// Positions that it has restored, in all.
    pub(super) restored: u64,
}

impl Worker {
    pub(super) fn new(kv: KvPools) -> Self {
        Self {
            kv,
            full: Memory::new(),
            chunked: Memory::new(),
            copies: BTreeMap::new(),
            news: BTreeMap::new(),
            restored: 0,
        }
    }

    /// Sequences of which it keeps a copy.
    pub(super) fn copies(&self) -> BTreeSet<SeqId> {
        self.copies.keys().copied().collect()
    }

    /// It forgets all of its copies, and says so when more of them comes.
    pub(super) fn evict(&mut self) {
        self.copies.clear();
    }

    fn release(&mut self, released: &[SeqId]) {
        self.copies.retain(|id, _| !released.contains(id));
    }

    /// Rows arrive.
    pub(super) fn keep(&mut self, piece: Piece) {
        let copy = self.copies.entry(piece.sequence).or_default();
        let start = piece.order.start as usize;
        let follows = start <= copy.full.len();
        self.news.insert(piece.sequence, !follows);
        if follows {
            let (len, end) = (copy.full.len(), piece.order.end as usize);
            copy.full.resize(len.max(end), 0);
            copy.full[start..end].copy_from_slice(&piece.full);
            copy.chunked.extend(piece.chunked);
        }
    }

    /// What it has to say of its copies.
    pub(super) fn take_news(&mut self) -> Vec<Held> {
        let news = std::mem::take(&mut self.news).into_iter();
        let held = |(sequence, has_gap)| {
            let positions = self.copies.get(&sequence).map_or(0, |copy| copy.full.len());
            Held { sequence, positions: u32::try_from(positions).unwrap(), has_gap }
        };
        news.map(held).collect()
    }

    /// Fills the blocks before a slice from a copy; false: there is none.
    fn restore(&mut self, slice: &Slice) -> bool {
        let (positions, block) = (slice.restored as usize, self.kv.block_tokens as usize);
        let Some(copy) = self.copies.get(&slice.sequence) else { return positions == 0 };
        if copy.full.len() < positions {
            return false;
        }
        for p in 0..positions {
            write(&mut self.full, &slice.full_blocks, p, block, copy.full[p]);
            let at = u32::try_from(p).unwrap();
            if let (Some(chunk), Some(&hash)) = (self.kv.chunk_tokens, copy.chunked.get(&at))
                && slice.start / chunk * chunk <= at
            {
                let p = p - slice.chunked_first as usize * block;
                write(&mut self.chunked, &slice.chunked_blocks, p, block, hash);
            }
        }
        self.restored += positions as u64;
        true
    }

    /// The rows that go to another rank after a step.
    fn piece(&self, slice: &Slice, order: BackupOrder) -> Piece {
        let block = self.kv.block_tokens as usize;
        let end = slice.start as usize + slice.tokens.len();
        assert!(order.start < order.end && order.end as usize <= end, "{order:?} of {end}");
        let at = |p: u32| p as usize;
        let full = |p: u32| self.full[&(slice.full_blocks[at(p) / block], at(p) % block)];
        let chunked = |p: u32| {
            let q = at(p) - slice.chunked_first as usize * block;
            (p, self.chunked[&(slice.chunked_blocks[q / block], q % block)])
        };
        // Earlier rows of layers with chunks are gone.
        let first = self.kv.chunk_tokens.map_or(order.end, |chunk| slice.start / chunk * chunk);
        Piece {
            sequence: slice.sequence,
            order,
            full: (order.start..order.end).map(full).collect(),
            chunked: (order.start.max(first)..order.end).map(chunked).collect(),
        }
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

/// What came of a step.
#[derive(Default)]
pub(super) struct Ran {
    pub(super) sampled: Vec<(SeqId, u32)>,
    /// Rows that are on their way.
    pub(super) pieces: Vec<(Rank, Piece)>,
}

/// Copies that a rank lacks from which sequences were to go on.
pub(super) type Missing = (Rank, Vec<SeqId>);

/// A step on all ranks.
#[track_caller]
pub(super) fn run(
    workers: &mut [Worker],
    plan: &Plan,
    histories: &BTreeMap<SeqId, Vec<u32>>,
) -> Result<Ran, Missing> {
    let mut ran = Ran::default();
    for (index, worker) in workers.iter_mut().enumerate() {
        let slices = &plan.ranks[index];
        worker.release(&plan.released[index]);
        let missing: Vec<SeqId> =
            slices.iter().filter(|slice| !worker.restore(slice)).map(|s| s.sequence).collect();
        if !missing.is_empty() {
            return Err((Rank(u16::try_from(index).unwrap()), missing));
        }
        for slice in slices {
            let history = &histories[&slice.sequence];
            worker.run(slice, history);
            if slice.samples {
                ran.sampled.push((slice.sequence, next_token(history)));
            }
            if let Some(order) = slice.backup {
                assert_ne!(order.rank.index(), index, "{}: its own copy", slice.sequence);
                ran.pieces.push((order.rank, worker.piece(slice, order)));
            }
        }
    }
    Ok(ran)
}

/// A step that fails on all ranks.
pub(super) fn fail(workers: &mut [Worker], plan: &Plan) {
    for (worker, slices) in workers.iter_mut().zip(&plan.ranks) {
        for slice in slices {
            worker.scribble(slice);
        }
    }
}
