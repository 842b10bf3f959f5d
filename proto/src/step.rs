//! Slices of a step: scheduler -> wire. What a rank has to say to the scheduler: wire -> scheduler.

use crate::pb;
use ids::SeqId;
use scheduler::{BackupOrder, Held, Slice};

/// The wire form of a slice; the caller adds how to sample.
#[must_use]
pub fn slice_to_wire(slice: &Slice, sample: Option<pb::Sample>) -> pb::Slice {
    pb::Slice {
        sequence: slice.sequence.0,
        start: slice.start,
        tokens: slice.tokens.clone(),
        full_blocks: slice.full_blocks.iter().map(|b| b.0).collect(),
        chunked_blocks: slice.chunked_blocks.iter().map(|b| b.0).collect(),
        chunked_first: slice.chunked_first,
        sample,
        restored: slice.restored,
        backup: slice.backup.map(|BackupOrder { rank, start, end }| pb::Backup {
            rank: rank.0.into(),
            start,
            end,
        }),
    }
}

/// What a rank says of a copy that it keeps.
#[must_use]
pub fn held_from_wire(held: &pb::Held) -> Held {
    let pb::Held { sequence, positions, has_gap } = *held;
    Held { sequence: SeqId(sequence), positions, has_gap }
}
