//! A worker: experts, KV memory, seats, and one step at a time through the exchange.

use ids::{ExpertId, Rank, SeqId};
use placement::View;
use scheduler::{BackupOrder, Held, Slice};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::Bug;
use crate::net::Time;

pub(crate) const BLOCK_TOKENS: u32 = 4;
const SEATS_MAX: usize = 4;

/// The token after `history`.
pub(crate) fn next_token(history: &[u32], seed: u64) -> u32 {
    let mix = |hash: u64, value: u64| (hash ^ value).wrapping_mul(0x0000_0100_0000_01b3);
    let hash = history.iter().fold(seed ^ 0xcbf2_9ce4, |hash, &t| mix(hash, u64::from(t)));
    u32::try_from((hash ^ (hash >> 29)) % 50).expect("below 50")
}

/// A place in a view.
#[derive(Debug, Clone)]
pub(crate) struct Seat {
    pub(crate) view: Arc<View>,
    pub(crate) rank: Rank,
    /// A step failed: the exchange serves no other one before the next view.
    pub(crate) is_poisoned: bool,
}

/// A step in which this worker takes part.
#[derive(Debug, Clone)]
pub(crate) struct Running {
    pub(crate) session: u64,
    pub(crate) step: u64,
    pub(crate) outcome: Outcome,
}

/// What a step comes to, if it completes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outcome {
    pub(crate) sampled: Vec<(SeqId, u32)>,
    /// Rows that go to other ranks then.
    pub(crate) pieces: Vec<(Rank, Piece)>,
}

/// Rows of a sequence, for who keeps a copy.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    sequence: SeqId,
    start: u32,
    tokens: Vec<u32>,
}

/// What the router asks of a rank.
#[derive(Debug, Clone)]
pub(crate) struct StepOrder {
    pub(crate) session: u64,
    pub(crate) epoch: u64,
    pub(crate) step: u64,
    pub(crate) slices: Vec<Slice>,
    /// By sequence, in the order of the slices.
    pub(crate) seeds: Vec<u64>,
    /// Copies that nobody needs any more.
    pub(crate) released: Vec<SeqId>,
}

impl StepOrder {
    /// What an answer has to name of its order: session, epoch and step.
    pub(crate) fn empty((session, epoch, step): (u64, u64, u64)) -> Self {
        let (slices, seeds, released) = (Vec::new(), Vec::new(), Vec::new());
        Self { session, epoch, step, slices, seeds, released }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Worker {
    pub(crate) frozen_until: Time,
    /// The newest epoch it was asked to prepare.
    pub(crate) epoch: u64,
    /// The newest leader that asked; an older one is not obeyed. A deposed leader may try the same
    /// epoch with another view.
    pub(crate) leader: u32,
    pub(crate) experts: BTreeSet<(usize, ExpertId)>,
    /// Prepared seats that no step has come for, by epoch.
    pub(crate) waiting: BTreeMap<u64, Seat>,
    pub(crate) seat: Option<Seat>,
    pub(crate) running: Option<Running>,
    /// KV memory: the token at a block and a place in it.
    memory: BTreeMap<(u32, u32), u32>,
    /// Of other ranks' sequences, from position 0.
    copies: BTreeMap<SeqId, Vec<u32>>,
    /// Copies that have changed since it said so last, and whether they have a gap.
    news: BTreeMap<SeqId, bool>,
}

impl Worker {
    /// Experts that a rank of a view needs.
    pub(crate) fn needs(view: &View, rank: Rank) -> BTreeSet<(usize, ExpertId)> {
        let layer = |layer| {
            view.placement.local_experts(layer, rank).into_iter().map(move |expert| (layer, expert))
        };
        (0..view.placement.moe_layers()).flat_map(layer).collect()
    }

    /// Forgets what no seat needs.
    pub(crate) fn forget(&mut self) {
        let seats = self.seat.iter().chain(self.waiting.values());
        let needed: BTreeSet<_> = seats.flat_map(|s| Self::needs(&s.view, s.rank)).collect();
        self.experts.retain(|expert| needed.contains(expert));
    }

    /// A seat is prepared, and waits for a step of its epoch.
    pub(crate) fn offer(&mut self, seat: Seat) {
        self.waiting.insert(seat.view.epoch.0, seat);
        while SEATS_MAX < self.waiting.len() {
            self.waiting.pop_first();
        }
    }

    /// Takes the seat of an epoch if it is prepared. False: it serves another one.
    pub(crate) fn sits_in(&mut self, epoch: u64) -> bool {
        // Seats of earlier epochs will never be taken.
        self.waiting = self.waiting.split_off(&epoch);
        if let Some(seat) = self.waiting.remove(&epoch) {
            self.seat = Some(seat);
        }
        self.seat.as_ref().is_some_and(|seat| seat.view.epoch.0 == epoch)
    }

    /// Rows arrive for a copy, which takes them if they follow what is there.
    pub(crate) fn keep(&mut self, piece: Piece, bug: Option<Bug>) {
        let start = piece.start as usize;
        let known = self.copies.get(&piece.sequence).map_or(0, Vec::len);
        let follows = start <= known || bug == Some(Bug::GapsIgnored);
        self.news.insert(piece.sequence, !follows);
        if follows {
            let copy = self.copies.entry(piece.sequence).or_default();
            let end = start + piece.tokens.len();
            copy.resize(copy.len().max(end), 9999);
            copy[start..end].copy_from_slice(&piece.tokens);
        }
    }

    /// It has no room for the n-th copy, counted round.
    pub(crate) fn evict(&mut self, nth: u64) {
        let nth = usize::try_from(nth).unwrap_or(0) % self.copies.len().max(1);
        if let Some(&id) = self.copies.keys().nth(nth) {
            self.copies.remove(&id);
            self.news.insert(id, true);
        }
    }

    /// What it has to say of its copies.
    pub(crate) fn take_news(&mut self) -> Vec<Held> {
        let held = |(sequence, has_gap)| {
            let positions = self.copies.get(&sequence).map_or(0, Vec::len);
            let positions = u32::try_from(positions).expect("sequences are short");
            Held { sequence, positions, has_gap }
        };
        std::mem::take(&mut self.news).into_iter().map(held).collect()
    }

    /// Sequences of an order that are to go on from copies which are not here.
    pub(crate) fn missing(&mut self, order: &StepOrder) -> Vec<SeqId> {
        self.copies.retain(|id, _| !order.released.contains(id));
        let has = |slice: &Slice| {
            let copy = self.copies.get(&slice.sequence).map_or(0, Vec::len);
            slice.restored as usize <= copy
        };
        order.slices.iter().filter(|slice| !has(slice)).map(|slice| slice.sequence).collect()
    }

    /// Writes the slices into the memory and samples, as the step would if it completed.
    pub(crate) fn compute(&mut self, order: &StepOrder) -> Outcome {
        let (mut sampled, mut pieces) = (Vec::new(), Vec::new());
        for (slice, &seed) in order.slices.iter().zip(&order.seeds) {
            let at = |position: u32| {
                let block = slice.full_blocks[(position / BLOCK_TOKENS) as usize];
                (block.0, position % BLOCK_TOKENS)
            };
            if let Some(copy) = self.copies.get(&slice.sequence) {
                for (position, &token) in (0..slice.restored).zip(copy) {
                    self.memory.insert(at(position), token);
                }
            }
            let end = slice.start + u32::try_from(slice.tokens.len()).expect("a step is small");
            for (position, &token) in (slice.start..end).zip(&slice.tokens) {
                self.memory.insert(at(position), token);
            }
            // What was never written reads as garbage.
            let read = |position| self.memory.get(&at(position)).copied().unwrap_or(9999);
            if slice.samples {
                let history: Vec<u32> = (0..end).map(read).collect();
                sampled.push((slice.sequence, next_token(&history, seed)));
            }
            if let Some(BackupOrder { rank, start, end }) = slice.backup {
                let (sequence, tokens) = (slice.sequence, (start..end).map(read).collect());
                pieces.push((rank, Piece { sequence, start, tokens }));
            }
        }
        Outcome { sampled, pieces }
    }
}
