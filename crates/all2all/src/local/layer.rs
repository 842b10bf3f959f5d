//! The rows of one layer on their way: packed by destination, sorted by expert, and back.

use crate::{HostRows, View, active_ranks};
use ids::Rank;

/// Rows from one rank to another.
#[derive(Default)]
pub(super) struct Parcel {
    rows: Vec<u8>,
    /// Slot of the expert at the receiver, per row; empty in the combine phase.
    slots: Vec<u16>,
}

/// Buffers and bookkeeping of one layer; reused by the next.
#[derive(Default)]
pub(super) struct Layer {
    row_bytes: usize,
    /// Own rows: destination and index within its parcel, per row.
    sent: Vec<(Rank, u32)>,
    /// Arrived rows, sorted by local expert.
    rows: Vec<u8>,
    /// `[local experts + 1]`
    offsets: Vec<u32>,
    /// Next free position of every expert while sorting.
    cursors: Vec<u32>,
}

impl Layer {
    /// Packs own rows by destination.
    pub(super) fn pack(
        &mut self,
        view: &View,
        layer: u16,
        (rows, experts): (HostRows<'_>, &[u16]),
        packed: &mut [Parcel],
    ) {
        assert_eq!(rows.len(), experts.len(), "one expert per row");
        self.row_bytes = rows.row_bytes;
        self.sent.clear();
        for parcel in &mut *packed {
            parcel.rows.clear();
            parcel.slots.clear();
        }
        let bytes = rows.bytes.chunks_exact(rows.row_bytes.max(1));
        for (index, (row, &expert)) in bytes.zip(experts).enumerate() {
            let (to, slot) = view.routes.target(layer, expert, index);
            let parcel = &mut packed[to.index()];
            self.sent.push((to, count(parcel.slots.len())));
            parcel.rows.extend_from_slice(row);
            parcel.slots.push(slot);
        }
    }

    /// Sorts the taken parcels by (expert, source, row).
    ///
    /// Errors with the source whose parcel names an expert that is not here, or is cut.
    pub(super) fn sort(
        &mut self,
        view: &View,
        local_experts: usize,
        taken: &[Parcel],
    ) -> Result<(), Rank> {
        self.offsets.clear();
        self.offsets.resize(local_experts + 1, 0);
        for from in active_ranks(view) {
            let parcel = &taken[from.index()];
            if parcel.rows.len() != parcel.slots.len() * self.row_bytes {
                return Err(from);
            }
            for &slot in &parcel.slots {
                *self.offsets[1..].get_mut(usize::from(slot)).ok_or(from)? += 1;
            }
        }
        for expert in 0..local_experts {
            self.offsets[expert + 1] += self.offsets[expert];
        }
        let total = self.offsets[local_experts] as usize;
        self.rows.resize(total * self.row_bytes, 0);
        let row_bytes = self.row_bytes;
        let rows = &mut self.rows;
        walk(view, &self.offsets, &mut self.cursors, taken, |from, index, at| {
            rows[at * row_bytes..][..row_bytes]
                .copy_from_slice(&taken[from.index()].rows[index * row_bytes..][..row_bytes]);
        });
        Ok(())
    }

    pub(super) fn arrived(&self) -> (HostRows<'_>, &[u32]) {
        (HostRows { bytes: &self.rows, row_bytes: self.row_bytes }, &self.offsets)
    }

    /// Packs results, given in the order of the arrived rows, by the rank they go back to.
    pub(super) fn unsort(
        &mut self,
        view: &View,
        results: HostRows<'_>,
        taken: &[Parcel],
        packed: &mut [Parcel],
    ) {
        assert_eq!(results.bytes.len(), self.rows.len(), "one result per arrived row");
        let row_bytes = self.row_bytes;
        for (parcel, taken) in packed.iter_mut().zip(taken) {
            parcel.slots.clear();
            parcel.rows.resize(taken.rows.len(), 0);
        }
        walk(view, &self.offsets, &mut self.cursors, taken, |from, index, at| {
            packed[from.index()].rows[index * row_bytes..][..row_bytes]
                .copy_from_slice(&results.bytes[at * row_bytes..][..row_bytes]);
        });
    }

    /// Brings the results into the order of the own rows.
    ///
    /// Errors with the rank that sent fewer results than it got rows.
    pub(super) fn gather(&self, taken: &[Parcel], out: &mut [u8]) -> Result<(), Rank> {
        assert_eq!(out.len(), self.sent.len() * self.row_bytes, "one result per own row");
        for (&(from, index), out) in
            self.sent.iter().zip(out.chunks_exact_mut(self.row_bytes.max(1)))
        {
            let start = index as usize * self.row_bytes;
            let row = taken[from.index()].rows.get(start..start + self.row_bytes);
            out.copy_from_slice(row.ok_or(from)?);
        }
        Ok(())
    }
}

/// Visits every arrived row with (source, index in its parcel, position among the sorted rows).
fn walk(
    view: &View,
    offsets: &[u32],
    cursors: &mut Vec<u32>,
    taken: &[Parcel],
    mut visit: impl FnMut(Rank, usize, usize),
) {
    cursors.clear();
    cursors.extend_from_slice(offsets);
    for from in active_ranks(view) {
        for (index, &slot) in taken[from.index()].slots.iter().enumerate() {
            let cursor = &mut cursors[usize::from(slot)];
            visit(from, index, *cursor as usize);
            *cursor += 1;
        }
    }
}

fn count(len: usize) -> u32 {
    u32::try_from(len).expect("a step has fewer than 2^32 rows")
}
