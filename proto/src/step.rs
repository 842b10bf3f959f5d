//! Slices of a step: scheduler -> wire -> worker.

use crate::pb;
use ids::{BlockId, SeqId};
use scheduler::Slice;

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
    }
}

/// The core form of a slice and how to sample after it.
#[must_use]
pub fn slice_from_wire(wire: pb::Slice) -> (Slice, Option<pb::Sample>) {
    let slice = Slice {
        sequence: SeqId(wire.sequence),
        start: wire.start,
        tokens: wire.tokens,
        full_blocks: wire.full_blocks.into_iter().map(BlockId).collect(),
        chunked_blocks: wire.chunked_blocks.into_iter().map(BlockId).collect(),
        chunked_first: wire.chunked_first,
        samples: wire.sample.is_some(),
    };
    (slice, wire.sample)
}
