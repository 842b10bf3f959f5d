//! A worker: experts, KV memory, seats, and one step at a time through the exchange.

use ids::{ExpertId, Rank, SeqId};
use placement::View;
use scheduler::Slice;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

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
    pub(crate) sampled: Vec<(SeqId, u32)>,
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

    /// Writes the slices into the memory and samples, as the step would if it completed.
    pub(crate) fn compute(&mut self, order: &StepOrder) -> Vec<(SeqId, u32)> {
        let mut sampled = Vec::new();
        for (slice, &seed) in order.slices.iter().zip(&order.seeds) {
            let at = |position: u32| {
                let block = slice.full_blocks[(position / BLOCK_TOKENS) as usize];
                (block.0, position % BLOCK_TOKENS)
            };
            let end = slice.start + u32::try_from(slice.tokens.len()).expect("a step is small");
            for (position, &token) in (slice.start..end).zip(&slice.tokens) {
                self.memory.insert(at(position), token);
            }
            if slice.samples {
                // What was never written reads as garbage.
                let read = |position| self.memory.get(&at(position)).copied().unwrap_or(9999);
                let history: Vec<u32> = (0..end).map(read).collect();
                sampled.push((slice.sequence, next_token(&history, seed)));
            }
        }
        sampled
    }
}
