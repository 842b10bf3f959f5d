//! One attention rank: its running sequences and its two pools.

use crate::{
    KvPools, RankStats, Slice,
    backup::Released,
    pool::Pool,
    sequence::{Fate, Sequence},
    share::{self, Claim, UnitClaim},
};
use ids::SeqId;
use std::collections::VecDeque;

/// What a rank could still take in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    pub(crate) full: u32,
    pub(crate) sequences: u32,
    pub(crate) chunked: u32,
    /// Sequences that are there.
    running: u32,
}

impl Room {
    /// What the rank holds or will hold: positions, sequences, and positions of chunks.
    pub(crate) fn taken(self, kv: &KvPools) -> (u64, u32, u64) {
        let positions = |blocks: u32| u64::from(blocks) * u64::from(kv.block_tokens);
        let full = positions(kv.full_blocks - self.full);
        (full, self.running, positions(kv.chunked_blocks.saturating_sub(self.chunked)))
    }

    pub(crate) fn fits(self, (full, chunked): (u32, u32)) -> bool {
        1 <= self.sequences && full <= self.full && chunked <= self.chunked
    }

    /// What remains after one more sequence, which keeps a spare block like every other.
    pub(crate) fn take(&mut self, (full, chunked): (u32, u32)) {
        self.sequences -= 1;
        self.running += 1;
        self.full = self.full.saturating_sub(full + 1);
        self.chunked = self.chunked.saturating_sub(chunked + 1);
    }
}

/// What one rank may compute in a step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    /// In all.
    pub(crate) step_tokens: u32,
    /// Of it, prefill. 0: none.
    pub(crate) prefill_tokens: u32,
    /// Of it, prefill of sequences that resume; what they take of it new ones do not get.
    pub(crate) resumed_tokens: u32,
}

/// A block taken for the step in flight, for `running[index]`.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(test, derive(PartialEq, Eq))]
enum Grant {
    Full { index: usize },
    Chunked { index: usize },
}

#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq))]
pub(crate) struct RankState {
    kv: KvPools,
    /// Oldest first.
    running: Vec<Sequence>,
    full: Pool,
    chunked: Pool,
    /// In the order of taking, so that an abort can restore the pools exactly.
    grants: Vec<Grant>,
    /// Copies on this rank that nobody needs any more; the first `telling` are said with the step in flight.
    released: Vec<SeqId>,
    telling: usize,
    /// Copies, on whatever rank, of sequences that have left this one.
    dropped: Vec<Released>,
    // Buffers of `share_budget`.
    claims: Vec<Claim>,
    units: Vec<UnitClaim>,
}

impl RankState {
    pub(crate) fn new(kv: KvPools) -> Self {
        Self {
            kv,
            running: Vec::new(),
            full: Pool::new(kv.full_blocks),
            chunked: Pool::new(if kv.chunk_tokens.is_some() { kv.chunked_blocks } else { 0 }),
            grants: Vec::new(),
            released: Vec::new(),
            telling: 0,
            dropped: Vec::new(),
            claims: Vec::new(),
            units: Vec::new(),
        }
    }

    pub(crate) fn kv(&self) -> &KvPools {
        &self.kv
    }

    pub(crate) fn stats(&self) -> RankStats {
        RankStats {
            running: self.running_count(),
            full_free_blocks: self.full.free_blocks(),
            chunked_free_blocks: self.chunked.free_blocks(),
            backup_tokens: 0,
        }
    }

    /// Its sequences, oldest first.
    pub(crate) fn running(&self) -> impl Iterator<Item = &Sequence> {
        self.running.iter()
    }

    pub(crate) fn running_mut(&mut self) -> impl Iterator<Item = &mut Sequence> {
        self.running.iter_mut()
    }

    /// It needs to keep no copy of this sequence any more.
    pub(crate) fn release(&mut self, sequence: SeqId) {
        self.released.push(sequence);
    }

    /// Copies of sequences that have left it since the last call.
    pub(crate) fn take_dropped(&mut self) -> impl Iterator<Item = Released> {
        self.dropped.drain(..)
    }

    /// Writes what it is told with the step that is planned.
    pub(crate) fn write_released(&mut self, released: &mut Vec<SeqId>) {
        released.clear();
        released.extend_from_slice(&self.released);
        self.telling = self.released.len();
    }

    /// The copies are gone that its sequences of these ids were to go on from.
    pub(crate) fn unrestore(&mut self, ids: &[SeqId]) {
        let Self { running, full, chunked, dropped, .. } = self;
        for sequence in running.iter_mut().filter(|sequence| ids.contains(&sequence.id)) {
            dropped.extend(sequence.unrestore(full, chunked));
        }
    }

    /// Room for new sequences: free blocks, less those that running sequences need for the tokens
    /// they have, less one spare per running sequence. Without the spare a sequence would be
    /// admitted only to be preempted as soon as an older one grows.
    pub(crate) fn room(&self, sequences_max: u32) -> Room {
        let mut room = Room {
            sequences: sequences_max - self.running_count(),
            full: self.full.free_blocks(),
            chunked: self.chunked.free_blocks(),
            running: self.running_count(),
        };
        for sequence in &self.running {
            let (full, chunked) = sequence.promised_blocks(&self.kv);
            room.full = room.full.saturating_sub(full + 1);
            room.chunked = room.chunked.saturating_sub(chunked + 1);
        }
        room
    }

    pub(crate) fn admit(&mut self, sequence: Sequence) {
        let at = self.running.partition_point(|other| other.born < sequence.born);
        self.running.insert(at, sequence);
    }

    /// Gives every running sequence the blocks of its next position, oldest first. What does not
    /// fit preempts the youngest, which goes to the front of `queue`. Returns the preemptions.
    pub(crate) fn secure(&mut self, queue: &mut VecDeque<Sequence>) -> u64 {
        let mut preemptions = 0;
        let mut index = 0;
        while index < self.running.len() {
            let end = self.running[index].computed_tokens() + 1;
            if self.grow(index, end) {
                index += 1;
                continue;
            }
            // The youngest comes last, so it has no block of this step yet. It may be the
            // sequence itself.
            let mut youngest = self.running.pop().expect("index is in range");
            assert!(!self.running.is_empty(), "{} alone exceeds the pools", youngest.id);
            youngest.release(&mut self.full, &mut self.chunked);
            queue.push_front(youngest);
            preemptions += 1;
        }
        preemptions
    }

    /// Running sequences that decode, and those that resume.
    pub(crate) fn waiting(&self) -> (u32, u32) {
        let count = |is_so: fn(&Sequence) -> bool| {
            self.running.iter().map(|sequence| u32::from(is_so(sequence))).sum()
        };
        (count(Sequence::decodes), count(Sequence::resumes))
    }

    /// Decides how many tokens every running sequence computes, and returns how many are prefill. Every
    /// one of them has the blocks of its next position.
    pub(crate) fn share_budget(&mut self, budget: Budget) -> u32 {
        let mut left = budget.step_tokens;
        for sequence in self.running.iter_mut().filter(|sequence| sequence.decodes()) {
            sequence.set_planned(1);
            left -= 1;
        }
        let resumed = self.share_prefill(left, budget.resumed_tokens, Sequence::resumes);
        let limit = budget.prefill_tokens.saturating_sub(resumed);
        let is_new = |sequence: &Sequence| !sequence.resumes() && !sequence.decodes();
        resumed + self.share_prefill(left - resumed, limit, is_new)
    }

    /// Shares up to `limit` of the tokens that are left between those of whom it is true, and returns what
    /// they take. If there is a limit at all, each of them gets on, however many they are.
    fn share_prefill(&mut self, left: u32, limit: u32, is_meant: fn(&Sequence) -> bool) -> u32 {
        self.claims.clear();
        let running = self.running.iter().enumerate();
        self.claims.extend(running.filter(|(_, sequence)| is_meant(sequence)).map(
            |(owner, sequence)| Claim {
                owner,
                unit: sequence.unit(owner),
                demand_tokens: sequence.pending_tokens(),
                share_tokens: 0,
            },
        ));
        let claims = u32::try_from(self.claims.len()).expect("sequences of a rank are bounded");
        let limit = if limit == 0 { 0 } else { limit.max(claims) };
        share::divide(left.min(limit), &mut self.claims, &mut self.units);
        let mut planned = 0;
        for claim in 0..self.claims.len() {
            let Claim { owner, share_tokens, .. } = self.claims[claim];
            self.plan_prefill(owner, share_tokens);
            planned += self.running[owner].planned_tokens();
        }
        self.claims.clear();
        planned
    }

    /// Plans up to `share_tokens` tokens of a prefill, fewer if there are not blocks for all.
    fn plan_prefill(&mut self, index: usize, share_tokens: u32) {
        let sequence = &self.running[index];
        let reach = sequence.reach(self.full.free_blocks(), self.chunked.free_blocks(), &self.kv);
        let start = sequence.computed_tokens();
        let end = reach.min(start + share_tokens);
        let grown = self.grow(index, end);
        assert!(grown, "the reach was computed from the free blocks");
        self.running[index].set_planned(end - start);
    }

    /// Takes the blocks for positions up to `end`: all of them, or none and returns false.
    fn grow(&mut self, index: usize, end: u32) -> bool {
        let (full, chunked) = self.running[index].missing_blocks(end, &self.kv);
        if self.full.free_blocks() < full || self.chunked.free_blocks() < chunked {
            return false;
        }
        for _ in 0..full {
            let block = self.full.take().expect("counted above");
            self.running[index].push_full(block);
            self.grants.push(Grant::Full { index });
        }
        for _ in 0..chunked {
            let block = self.chunked.take().expect("counted above");
            self.running[index].push_chunked(block);
            self.grants.push(Grant::Chunked { index });
        }
        true
    }

    /// Writes the planned slices over those in `slices`, whose memory is kept.
    pub(crate) fn write_slices(&self, slices: &mut Vec<Slice>) {
        let mut written = 0;
        for sequence in self.running.iter().filter(|s| 0 < s.planned_tokens()) {
            if slices.len() == written {
                slices.push(Slice {
                    sequence: sequence.id,
                    start: 0,
                    tokens: Vec::new(),
                    full_blocks: Vec::new(),
                    chunked_blocks: Vec::new(),
                    chunked_first: 0,
                    samples: false,
                    restored: 0,
                    backup: None,
                });
            }
            sequence.write_slice(&mut slices[written], &self.kv);
            written += 1;
        }
        slices.truncate(written);
    }

    /// The step succeeded. `sampled` is ordered by sequence. Sequences that were cancelled
    /// meanwhile or reached their limit leave.
    pub(crate) fn commit(&mut self, sampled: &[(SeqId, u32)]) {
        self.grants.clear();
        self.released.drain(..std::mem::take(&mut self.telling));
        for sequence in &mut self.running {
            let token = (sequence.samples() && sequence.fate == Fate::Wanted).then(|| {
                let found = sampled.binary_search_by_key(&sequence.id, |&(id, _)| id);
                sampled[found.expect("the caller checks that every slice was sampled")].1
            });
            self.dropped.extend(sequence.commit(token, &self.kv, &mut self.chunked));
        }
        self.drop_running(|sequence| sequence.fate == Fate::Cancelled || sequence.is_at_limit());
    }

    /// The step failed: the blocks taken for it go back, in reverse order.
    pub(crate) fn abort(&mut self) {
        while let Some(grant) = self.grants.pop() {
            match grant {
                Grant::Full { index } => {
                    let block = self.running[index].pop_full();
                    self.full.give(block.expect("granted for this step"));
                }
                Grant::Chunked { index } => {
                    let block = self.running[index].pop_chunked();
                    self.chunked.give(block.expect("granted for this step"));
                }
            }
        }
        self.telling = 0;
        for sequence in &mut self.running {
            sequence.abort();
        }
        self.drop_running(|sequence| sequence.fate == Fate::Cancelled);
    }

    /// Ends a running sequence at once. Only while no step is in flight.
    pub(crate) fn remove(&mut self, id: SeqId) {
        self.drop_running(|sequence| sequence.id == id);
    }

    /// Ends the running sequences that are not wanted. Only while no step is in flight.
    pub(crate) fn retain(&mut self, wanted: impl Fn(SeqId) -> bool) {
        self.drop_running(|sequence| !wanted(sequence.id));
    }

    /// Its sequences, without their blocks: the rank is gone.
    pub(crate) fn into_waiting(mut self) -> impl Iterator<Item = Sequence> {
        for sequence in &mut self.running {
            sequence.release(&mut self.full, &mut self.chunked);
        }
        self.running.into_iter()
    }

    /// Marks a running sequence, which then ends with the step in flight.
    pub(crate) fn doom(&mut self, id: SeqId) {
        for sequence in self.running.iter_mut().filter(|sequence| sequence.id == id) {
            sequence.fate = Fate::Cancelled;
        }
    }

    pub(crate) fn has(&self, id: SeqId) -> bool {
        self.running.iter().any(|sequence| sequence.id == id)
    }

    fn drop_running(&mut self, leaves: impl Fn(&Sequence) -> bool) {
        let Self { running, full, chunked, dropped, .. } = self;
        running.retain_mut(|sequence| {
            let leaves = leaves(sequence);
            if leaves {
                sequence.release(full, chunked);
                dropped.extend(sequence.let_go());
            }
            !leaves
        });
    }

    fn running_count(&self) -> u32 {
        u32::try_from(self.running.len()).expect("at most sequences_max")
    }
}
