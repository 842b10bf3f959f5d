//! One sequence: its tokens, how far they are computed, and the blocks that hold the result.

use crate::{
    KvPools, NewSequence, Slice,
    backup::{Backup, Released},
    pool::Pool,
    share::Unit,
};
use ids::{BlockId, SeqId};

/// Whether the router still wants a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Wanted,
    /// Cancelled while a step is in flight, which may still write its blocks.
    Cancelled,
}

/// A sequence, queued or running. A queued one holds no blocks and has nothing computed.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq))]
pub(crate) struct Sequence {
    pub(crate) id: SeqId,
    /// Order of arrival; it survives preemption, so the oldest always gets through.
    pub(crate) born: u64,
    pub(crate) fate: Fate,
    group: Option<u64>,
    /// A client has a part of it and waits for the next.
    has_begun: bool,
    /// Prompt and everything sampled so far.
    tokens: Vec<u32>,
    /// Length at which the sequence is over.
    limit_tokens: u32,
    /// Positions `0..computed` are in the KV cache.
    computed: u32,
    /// Tokens of the step in flight.
    planned: u32,
    full: Vec<BlockId>,
    chunked: Vec<BlockId>,
    chunked_first: u32,
    /// Where a copy of its KV rows is.
    pub(crate) backup: Option<Backup>,
    /// Positions `0..restored` count as computed, but are still to come out of the copy, which is on the
    /// sequence's own rank. 0: nothing is.
    restored: u32,
}

impl Sequence {
    /// A sequence of which nothing is computed. The prompt must be shorter than `context_tokens`.
    pub(crate) fn new(new: NewSequence, born: u64, context_tokens: u32) -> Self {
        let limit_tokens = tokens_of(&new.prompt).saturating_add(new.tokens_max);
        Self {
            id: new.id,
            born,
            fate: Fate::Wanted,
            group: new.group,
            has_begun: new.has_begun,
            tokens: new.prompt,
            limit_tokens: limit_tokens.min(context_tokens),
            computed: 0,
            planned: 0,
            full: Vec::new(),
            chunked: Vec::new(),
            chunked_first: 0,
            backup: None,
            restored: 0,
        }
    }

    pub(crate) fn len_tokens(&self) -> u32 {
        tokens_of(&self.tokens)
    }

    /// Tokens that are not computed yet, at least one. One: it decodes.
    pub(crate) fn pending_tokens(&self) -> u32 {
        self.len_tokens() - self.computed
    }

    /// Its KV cache misses nothing but the newest token.
    pub(crate) fn decodes(&self) -> bool {
        self.pending_tokens() == 1
    }

    /// Somebody waits for its next token, but what was computed of it is lost.
    pub(crate) fn resumes(&self) -> bool {
        self.has_begun && !self.decodes()
    }

    pub(crate) fn computed_tokens(&self) -> u32 {
        self.computed
    }

    pub(crate) fn is_at_limit(&self) -> bool {
        self.limit_tokens <= self.len_tokens()
    }

    pub(crate) fn samples(&self) -> bool {
        0 < self.planned && self.planned == self.pending_tokens()
    }

    pub(crate) fn unit(&self, index: usize) -> Unit {
        self.group.map_or(Unit::Alone(index), Unit::Group)
    }

    /// Blocks `(full, chunked)` that computing all tokens needs at a time, when taken in slices
    /// that end with their chunk.
    pub(crate) fn needed_blocks(&self, kv: &KvPools) -> (u32, u32) {
        let blocks = kv.blocks(self.len_tokens());
        (blocks, blocks.min(kv.window_blocks()))
    }

    /// Blocks `(full, chunked)` still to come until [`Self::needed_blocks`] are held.
    pub(crate) fn promised_blocks(&self, kv: &KvPools) -> (u32, u32) {
        let (full, chunked) = self.needed_blocks(kv);
        (full.saturating_sub(count(&self.full)), chunked.saturating_sub(count(&self.chunked)))
    }

    /// Blocks `(full, chunked)` missing to compute positions up to `end`.
    pub(crate) fn missing_blocks(&self, end: u32, kv: &KvPools) -> (u32, u32) {
        let blocks = kv.blocks(end);
        let chunked = match kv.chunk_tokens {
            Some(_) => (blocks - self.chunked_first).saturating_sub(count(&self.chunked)),
            None => 0,
        };
        (blocks.saturating_sub(count(&self.full)), chunked)
    }

    /// The furthest end that the held blocks and this many more can serve.
    pub(crate) fn reach(&self, full: u32, chunked: u32, kv: &KvPools) -> u32 {
        let full_end = (count(&self.full) + full).saturating_mul(kv.block_tokens);
        match kv.chunk_tokens {
            Some(_) => (self.chunked_first + count(&self.chunked) + chunked)
                .saturating_mul(kv.block_tokens)
                .min(full_end),
            None => full_end,
        }
    }

    pub(crate) fn push_full(&mut self, block: BlockId) {
        self.full.push(block);
    }

    pub(crate) fn push_chunked(&mut self, block: BlockId) {
        self.chunked.push(block);
    }

    pub(crate) fn pop_full(&mut self) -> Option<BlockId> {
        self.full.pop()
    }

    pub(crate) fn pop_chunked(&mut self) -> Option<BlockId> {
        self.chunked.pop()
    }

    /// Makes the next `tokens` tokens part of the step in flight.
    pub(crate) fn set_planned(&mut self, tokens: u32) {
        debug_assert!(tokens <= self.pending_tokens());
        self.planned = tokens;
    }

    pub(crate) fn planned_tokens(&self) -> u32 {
        self.planned
    }

    /// Overwrites `slice` with what was planned, keeping its memory.
    pub(crate) fn write_slice(&self, slice: &mut Slice, kv: &KvPools) {
        let end = self.computed + self.planned;
        let blocks = kv.blocks(end);
        slice.sequence = self.id;
        slice.start = self.computed;
        slice.restored = self.restored;
        slice.backup = self.backup.as_ref().and_then(|backup| backup.order());
        slice.samples = self.samples();
        slice.tokens.clear();
        slice.tokens.extend_from_slice(&self.tokens[index(self.computed)..index(end)]);
        slice.full_blocks.clear();
        slice.full_blocks.extend_from_slice(&self.full[..index(blocks)]);
        slice.chunked_blocks.clear();
        slice.chunked_first = 0;
        if kv.chunk_tokens.is_some() {
            let chunked = index(blocks - self.chunked_first);
            slice.chunked_first = self.chunked_first;
            slice.chunked_blocks.extend_from_slice(&self.chunked[..chunked]);
        }
    }

    /// How many positions could come out of its copy, where that is.
    pub(crate) fn restorable(&self, kv: &KvPools) -> u32 {
        let copy = self.backup.as_ref();
        copy.map_or(0, |backup| backup.restorable(self.len_tokens() - 1, kv.chunk_tokens))
    }

    /// It comes to the rank of its copy and goes on from there.
    pub(crate) fn restore(&mut self, positions: u32, kv: &KvPools) {
        debug_assert!(self.full.is_empty() && positions < self.len_tokens());
        (self.restored, self.computed) = (positions, positions);
        self.chunked_first = kv.first_of_chunk(positions);
    }

    /// There is no such copy: what was to come out of it is not computed after all.
    pub(crate) fn unrestore(&mut self, full: &mut Pool, chunked: &mut Pool) -> Option<Released> {
        if self.restored == 0 {
            return None;
        }
        self.release(full, chunked);
        self.let_go()
    }

    /// The end of the slice of the step in flight, if it has one.
    pub(crate) fn planned_end(&self) -> Option<u32> {
        (0 < self.planned).then_some(self.computed + self.planned)
    }

    /// The step succeeded. Blocks of chunks that are over go back to `chunked`. Returns a copy that nobody
    /// needs any more.
    pub(crate) fn commit(
        &mut self,
        sampled: Option<u32>,
        kv: &KvPools,
        chunked: &mut Pool,
    ) -> Option<Released> {
        let released = match &mut self.backup {
            Some(_) if 0 < self.restored && 0 < self.planned => {
                self.restored = 0;
                self.let_go()
            }
            Some(backup) => {
                backup.commit();
                None
            }
            None => None,
        };
        self.computed += std::mem::take(&mut self.planned);
        self.tokens.extend(sampled);
        self.has_begun |= sampled.is_some();
        if kv.chunk_tokens.is_some() {
            let first = kv.first_of_chunk(self.computed);
            for block in self.chunked.drain(..index(first - self.chunked_first)) {
                chunked.give(block);
            }
            self.chunked_first = first;
        }
        released
    }

    /// The step failed.
    pub(crate) fn abort(&mut self) {
        self.planned = 0;
        if let Some(backup) = &mut self.backup {
            backup.abort();
        }
    }

    /// Nobody needs its copy any more: where that is.
    pub(crate) fn let_go(&mut self) -> Option<Released> {
        let backup = self.backup.take()?;
        Some(Released { rank: backup.rank, sequence: self.id })
    }

    /// Gives all blocks back; what was computed is lost, the tokens stay, and so does a copy elsewhere.
    pub(crate) fn release(&mut self, full: &mut Pool, chunked: &mut Pool) {
        full.give_all(&mut self.full);
        chunked.give_all(&mut self.chunked);
        self.chunked_first = 0;
        self.computed = 0;
        self.planned = 0;
        self.restored = 0;
        if let Some(backup) = &mut self.backup {
            backup.abort();
        }
    }
}

fn tokens_of(tokens: &[u32]) -> u32 {
    u32::try_from(tokens.len()).expect("a sequence is no longer than its context")
}

fn count(blocks: &[BlockId]) -> u32 {
    u32::try_from(blocks.len()).expect("blocks are numbered in 32 bits")
}

fn index(position: u32) -> usize {
    usize::try_from(position).expect("a usize has at least 32 bits")
}
