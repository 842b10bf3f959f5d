//! Copies of sequences' KV rows on other ranks: who keeps one, and what of it is sent when.
//!
//! A copy grows from position 0. What was sent counts as sent when its step succeeded, and as held when the
//! rank that keeps it says so; what got lost on the way shows as a gap there, and is sent again.

use crate::{BackupOrder, Held, rank::RankState, sequence::Sequence};
use ids::{Rank, SeqId};
use std::collections::VecDeque;

/// Most positions that a rank sends after a step. Decodes need one each; the rest fills copies of prompts, over some
/// steps, lest rows of a long prompt hold up those of the others.
const POSITIONS_MAX: u32 = 256;
/// A copy that lacks no more than this is kept up before others are filled.
const BEHIND_MAX: u32 = 4;

/// A copy of a sequence's rows.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq))]
pub(crate) struct Backup {
    /// Which keeps it: not the sequence's, unless that is to go on from it.
    pub(crate) rank: Rank,
    /// Positions `0..held` are there.
    held: u32,
    /// Positions `0..sent` were sent to it.
    sent: u32,
    /// What the step in flight adds ends here; `sent` if it adds nothing.
    ordered: u32,
    /// Of layers with chunks the rows of positions from here on were sent: those of earlier chunks did not exist any
    /// more.
    chunked_from: u32,
}

impl Backup {
    fn new(rank: Rank) -> Self {
        Self { rank, held: 0, sent: 0, ordered: 0, chunked_from: 0 }
    }

    /// Has rows up to `end` sent, after a step in whose slice the chunk of `chunk_start` is the first whose rows
    /// exist.
    fn send(&mut self, end: u32, chunk_start: u32) {
        self.ordered = end;
        if self.sent < chunk_start {
            self.chunked_from = chunk_start.min(end);
        }
    }

    pub(crate) fn held_tokens(&self) -> u32 {
        self.held
    }

    /// What the step in flight adds to it.
    pub(crate) fn order(&self) -> Option<BackupOrder> {
        let Self { rank, sent, ordered, .. } = *self;
        (sent < ordered).then_some(BackupOrder { rank, start: sent, end: ordered })
    }

    pub(crate) fn commit(&mut self) {
        self.sent = self.ordered;
    }

    /// Rows may have been sent, for nothing: they are sent again.
    pub(crate) fn abort(&mut self) {
        self.ordered = self.sent;
    }

    /// How many positions, of those before `end`, a rank could go on from. Layers with chunks need the rows of the
    /// last position's chunk only.
    pub(crate) fn restorable(&self, end: u32, chunk_tokens: Option<u32>) -> u32 {
        let positions = self.held.min(end);
        match chunk_tokens.map(|chunk| positions / chunk * chunk) {
            Some(chunk_start) if chunk_start < self.chunked_from => chunk_start,
            Some(_) | None => positions,
        }
    }

    /// What its rank says. It may have rows of a step that failed elsewhere.
    fn told(&mut self, held: Held) {
        self.held = held.positions;
        if held.has_gap && held.positions < self.sent {
            (self.sent, self.ordered) = (held.positions, held.positions);
        }
    }
}

/// A copy that nobody needs any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Released {
    pub(crate) rank: Rank,
    pub(crate) sequence: SeqId,
}

/// All copies.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq))]
pub(crate) struct Backups {
    /// Per rank: positions that it can keep. Empty: there are no copies.
    capacity_tokens: Vec<u32>,
    // Buffers of `plan` and `told`.
    /// Per rank: positions that were sent to it.
    sent_tokens: Vec<u64>,
    /// Per rank: copies of the sequences of one rank that it keeps.
    copies: Vec<u32>,
    held: Vec<(Rank, Held)>,
}

impl Backups {
    pub(crate) fn new(capacity_tokens: Vec<u32>) -> Self {
        Self { capacity_tokens, sent_tokens: Vec::new(), copies: Vec::new(), held: Vec::new() }
    }

    /// Gives sequences that run a rank for their copy, and decides what of the step that is planned goes there.
    pub(crate) fn plan(&mut self, ranks: &mut [RankState], queue: &VecDeque<Sequence>) {
        if self.capacity_tokens.is_empty() {
            return;
        }
        self.sent_tokens.clear();
        self.sent_tokens.resize(ranks.len(), 0);
        let running = ranks.iter().flat_map(RankState::running);
        for backup in running.chain(queue).filter_map(|sequence| sequence.backup.as_ref()) {
            self.sent_tokens[backup.rank.index()] += u64::from(backup.sent);
        }
        for (home, rank) in ranks.iter_mut().enumerate() {
            self.choose(home, rank);
            self.send(home, rank);
        }
        self.sent_tokens.clear();
        self.copies.clear();
    }

    /// The copies of a rank's sequences are spread over all others, so that each has as many to take over.
    fn choose(&mut self, home: usize, rank: &mut RankState) {
        let lacks = |sequence: &&mut Sequence| {
            sequence.backup.is_none() && sequence.planned_end().is_some()
        };
        if !rank.running_mut().any(|sequence| lacks(&sequence)) {
            return;
        }
        self.copies.clear();
        self.copies.resize(self.capacity_tokens.len(), 0);
        for backup in rank.running().filter_map(|sequence| sequence.backup.as_ref()) {
            self.copies[backup.rank.index()] += 1;
        }
        for sequence in rank.running_mut().filter(lacks) {
            let len = u64::from(sequence.len_tokens());
            let has_room = |&keeper: &usize| {
                let capacity = u64::from(self.capacity_tokens[keeper]);
                keeper != home && self.sent_tokens[keeper] + len <= capacity
            };
            let keepers = (0..self.copies.len()).filter(has_room);
            let taken = |keeper: usize| (self.copies[keeper], self.sent_tokens[keeper]);
            let best = keepers.min_by_key(|&keeper| (taken(keeper), keeper));
            // A shorter one may find room.
            let Some(keeper) = best else { continue };
            self.copies[keeper] += 1;
            sequence.backup = Some(Backup::new(rank_of(keeper)));
        }
    }

    /// Copies that are nearly complete come first: a sequence that decodes needs one more position.
    fn send(&mut self, home: usize, rank: &mut RankState) {
        let chunk_tokens = rank.kv().chunk_tokens;
        let mut left = POSITIONS_MAX;
        let is_near = |lacking: u32| lacking <= BEHIND_MAX;
        for filling in [false, true] {
            for sequence in rank.running_mut() {
                let Some(end) = sequence.planned_end() else { continue };
                let start = sequence.computed_tokens();
                let Some(backup) = &mut sequence.backup else { continue };
                let lacking = end.saturating_sub(backup.sent);
                if backup.rank.index() == home || is_near(lacking) == filling {
                    continue;
                }
                let keeper = backup.rank.index();
                let capacity = u64::from(self.capacity_tokens[keeper]);
                let room = capacity.saturating_sub(self.sent_tokens[keeper]);
                let positions = lacking.min(left).min(u32::try_from(room).unwrap_or(u32::MAX));
                if positions != 0 {
                    let chunk_start = chunk_tokens.map_or(0, |chunk| start / chunk * chunk);
                    backup.send(backup.sent + positions, chunk_start);
                    self.sent_tokens[keeper] += u64::from(positions);
                    left -= positions;
                }
            }
        }
    }

    /// Ranks say what they have.
    pub(crate) fn told<'a>(
        &mut self,
        held: impl IntoIterator<Item = (Rank, Held)>,
        sequences: impl Iterator<Item = &'a mut Sequence>,
    ) {
        let key = |&(rank, held): &(Rank, Held)| (held.sequence, rank);
        self.held.clear();
        self.held.extend(held);
        if self.held.is_empty() {
            return;
        }
        self.held.sort_by_key(key);
        for sequence in sequences {
            let Some(backup) = &mut sequence.backup else { continue };
            let wanted = (sequence.id, backup.rank);
            // The last word counts if a rank has several.
            let behind = self.held.partition_point(|held| key(held) <= wanted);
            let last = behind.checked_sub(1).map(|last| self.held[last]);
            if let Some((_, held)) = last.filter(|held| key(held) == wanted) {
                backup.told(held);
            }
        }
        self.held.clear();
    }
}

pub(crate) fn rank_of(index: usize) -> Rank {
    Rank(u16::try_from(index).expect("ranks are numbered in 16 bits"))
}
