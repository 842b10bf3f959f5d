//! The rows of one layer on their way: which go to whom, where they come to lie, and back.
//!
//! A lane holds what concerns one rank. The rows for it and the results from it stand at the same places of
//! the caller's buffers, and so do the rows from it and the results for it; so one pair of run lists serves
//! both halves of a layer. The lane of this rank itself has no connection, and its rows are copied.

use super::arena::{Arena, Buffer};
use super::inbound::Inbound;
use super::link::{Link, Streams};
use super::outbound::Outbound;
use super::runs::{Place, Runs, gather, scatter, transfer};
use crate::{HostRows, View, active_ranks};
use ids::Rank;
use std::sync::Arc;

/// What concerns one rank.
#[derive(Default)]
pub(super) struct Lane {
    pub(super) wire: Option<Wire>,
    /// Rows for that rank, in the caller's rows; and their slots there.
    pub(super) own: Runs,
    pub(super) own_slots: Vec<u16>,
    /// Rows from that rank, among the arrived ones.
    pub(super) theirs: Runs,
}

/// A connection in use.
pub(super) struct Wire {
    pub(super) link: Arc<Link>,
    pub(super) inbound: Inbound,
    pub(super) outbound: Outbound,
}

impl Wire {
    pub(super) fn take(link: Arc<Link>) -> Option<Self> {
        let Streams { inbound, outbound } = link.take_streams()?;
        Some(Self { link, inbound, outbound })
    }

    /// Leaves the connection to the next epoch, or the next exchange.
    pub(super) fn give_back(mut self) {
        self.outbound.abandon(&self.link.data);
        let streams = Streams { inbound: self.inbound, outbound: self.outbound };
        self.link.give_back(streams);
    }
}

/// Results of so many bytes are kept where the arrived rows were, at once and whole: connections would not take
/// them while they are lent. Of fewer, most go out without another copy.
const KEPT_MIN: usize = 256 * 1024;

/// Buffers and bookkeeping of one layer; reused by the next.
#[derive(Default)]
pub(super) struct Layer {
    pub(super) row_bytes: usize,
    /// Arrived rows, sorted by local expert, source and row; and what is left of larger layers, since
    /// growing again would clear memory that is overwritten anyway.
    pub(super) rows: Buffer,
    /// Where `rows` are allocated.
    arena: Option<Arc<Arena>>,
    /// `[local experts + 1]`
    pub(super) offsets: Vec<u32>,
    /// Next free position of every expert while sorting.
    cursors: Vec<u32>,
    /// Whether it is known where every row comes to lie.
    pub(super) laid_out: bool,
    /// Rows or results of this rank for itself, while the caller lends them no longer.
    own: Vec<u8>,
    own_staged: bool,
    /// How far the rows of this rank for itself are copied: in the caller's buffer, and in `rows`.
    own_from: Place,
    own_to: Place,
    /// Whether `rows` are the results by now.
    pub(super) kept: bool,
}

impl Layer {
    pub(super) fn new(arena: Option<Arc<Arena>>) -> Self {
        Self { arena, ..Self::default() }
    }

    /// Finds out which rows go to whom.
    pub(super) fn plan(
        &mut self,
        (view, layer): (&View, u16),
        (rows, experts): (HostRows<'_>, &[u16]),
        lanes: &mut [Lane],
    ) {
        assert_eq!(rows.len(), experts.len(), "one expert per row");
        self.row_bytes = rows.row_bytes;
        (self.laid_out, self.own_staged, self.kept) = (false, false, false);
        (self.own_from, self.own_to) = (Place::default(), Place::default());
        for lane in &mut *lanes {
            lane.own.clear(experts.len());
            lane.own_slots.clear();
            lane.own_slots.reserve(experts.len());
        }
        for (row, &expert) in experts.iter().enumerate() {
            let (to, slot) = view.routes.target(layer, expert, row);
            let lane = &mut lanes[to.index()];
            lane.own.push(row * rows.row_bytes, rows.row_bytes);
            lane.own_slots.push(slot);
        }
    }

    /// Gives every row its place, once all slots are known.
    ///
    /// Errors with the rank that names an expert that is not here.
    pub(super) fn lay_out(
        &mut self,
        view: &View,
        local_experts: usize,
        lanes: &mut [Lane],
    ) -> Result<(), Rank> {
        self.offsets.clear();
        self.offsets.resize(local_experts + 1, 0);
        for from in active_ranks(view) {
            for &slot in lanes[from.index()].slots() {
                *self.offsets[1..].get_mut(usize::from(slot)).ok_or(from)? += 1;
            }
        }
        for expert in 0..local_experts {
            self.offsets[expert + 1] += self.offsets[expert];
        }
        self.cursors.clear();
        self.cursors.extend_from_slice(&self.offsets);
        let bytes = self.arrived_bytes();
        if self.rows.len() < bytes {
            // What is in the smaller ones is not needed, nor is their memory.
            self.rows = Buffer::default();
            self.rows = Buffer::new(self.arena.as_ref(), bytes);
        }
        for from in active_ranks(view) {
            let Lane { wire, own_slots, theirs, .. } = &mut lanes[from.index()];
            let slots = slots_of(wire.as_ref(), own_slots);
            theirs.clear(slots.len());
            for &slot in slots {
                let cursor = &mut self.cursors[usize::from(slot)];
                theirs.push(*cursor as usize * self.row_bytes, self.row_bytes);
                *cursor += 1;
            }
        }
        self.laid_out = true;
        Ok(())
    }

    /// Bytes of the arrived rows.
    pub(super) fn arrived_bytes(&self) -> usize {
        self.offsets.last().map_or(0, |rows| *rows as usize) * self.row_bytes
    }

    /// Bytes of own rows that the caller has to lend on: they are neither in their places nor staged.
    pub(super) fn own_left(&self, lane: &Lane) -> usize {
        if self.own_staged { 0 } else { lane.own.bytes() - self.own_from.at }
    }

    /// Brings own rows to their places, at most so many bytes of them; whether there were any.
    pub(super) fn keep_own(&mut self, rows: &[u8], lane: &Lane, most: usize) -> bool {
        let bytes = self.own_left(lane).min(most);
        let from = (rows, &lane.own, &mut self.own_from);
        transfer(bytes, from, (&mut self.rows, &lane.theirs, &mut self.own_to));
        0 < bytes
    }

    /// Brings the rest of the own rows to their places, or copies them, if those are not known yet.
    pub(super) fn stage_own(&mut self, rows: &[u8], lane: &Lane) {
        if self.laid_out {
            self.keep_own(rows, lane, usize::MAX);
        } else {
            gather(rows, &lane.own, &mut self.own);
            self.own_staged = true;
        }
    }

    /// Brings own rows that were staged to their places.
    pub(super) fn keep_staged(&mut self, lane: &Lane) {
        if self.own_staged {
            scatter(&self.own, &mut self.rows, &lane.theirs);
        }
    }

    /// Copies the results of the own rows; or all, if they are many.
    pub(super) fn stage_results(&mut self, results: &[u8], lane: &Lane) {
        assert_eq!(results.len(), self.arrived_bytes(), "one result per arrived row");
        self.kept = KEPT_MIN <= results.len();
        if self.kept {
            self.rows[..results.len()].copy_from_slice(results);
        } else {
            gather(results, &lane.theirs, &mut self.own);
        }
    }

    /// Brings the results of the own rows to their places.
    pub(super) fn keep_results(&self, out: &mut [u8], lane: &Lane) {
        if self.kept {
            let (mut from, mut to) = <(Place, Place)>::default();
            let results = (&self.rows[..], &lane.theirs, &mut from);
            transfer(lane.own.bytes(), results, (out, &lane.own, &mut to));
        } else {
            scatter(&self.own, out, &lane.own);
        }
    }
}

impl Lane {
    /// The slots of the rows from that rank, as far as they are known.
    fn slots(&self) -> &[u16] {
        slots_of(self.wire.as_ref(), &self.own_slots)
    }
}

/// A rank knows its own slots without a connection.
fn slots_of<'a>(wire: Option<&'a Wire>, own: &'a [u16]) -> &'a [u16] {
    wire.map_or(own, |wire| wire.inbound.slots().unwrap_or_default())
}
