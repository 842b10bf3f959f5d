//! What the worker's thread does about copies: before a step it fills blocks from them, after it it sends rows.

use super::{Backups, RowBytes, Sender};
use crate::engine::Engine;
use crate::error::EngineError;
use kernels::{Pool, RowsAt};
use proto::pb;
use std::ops::Range;

/// Bytes of rows that travel in one message: enough to cost little, and little enough for others to pass.
const MESSAGE_BYTES: usize = 1 << 20;

/// The thread's end of the copies.
pub(crate) struct Keeper {
    backups: Backups,
    sender: Sender,
}

impl Keeper {
    pub(crate) fn new(backups: Backups, sender: Sender) -> Self {
        Self { backups, sender }
    }

    /// The worker serves a view of these members.
    pub(crate) fn sit_among(&mut self, addresses: &[String]) {
        self.sender.retain(addresses);
    }

    /// Lets go of copies that nobody needs, and fills the blocks of sequences that go on from one.
    ///
    /// # Errors
    ///
    /// [`EngineError::Missing`] if a copy is not here.
    pub(crate) fn restore(
        &mut self,
        engine: &mut Engine,
        step: &pb::Step,
    ) -> Result<(), EngineError> {
        let mut copies = self.backups.lock();
        copies.follow(step.journal, &step.released);
        let mut missing = Vec::new();
        for slice in step.slices.iter().filter(|slice| slice.restored != 0) {
            let positions = slice.restored;
            let Some(rows) = copies.restored(slice.sequence, positions) else {
                missing.push(slice.sequence);
                continue;
            };
            let row = copies.row;
            let [(full, _), (chunked, _)] = row.pools();
            engine.write_rows(&rows_at(slice, full, 0..positions), rows.full)?;
            let chunk = row.chunk_start(positions)..positions;
            engine.write_rows(&rows_at(slice, chunked, chunk), rows.chunked)?;
        }
        if missing.is_empty() { Ok(()) } else { Err(EngineError::Missing(missing)) }
    }

    /// What the router shall know of the copies here.
    pub(crate) fn take_news(&self) -> Vec<pb::Held> {
        self.backups.lock().take_news()
    }

    /// After a step that this rank has ended well: rows go where the router wants copies of them. `addresses` are the
    /// ranks' services.
    pub(crate) fn send(&mut self, engine: &mut Engine, step: &pb::Step, addresses: &[String]) {
        let row = self.backups.lock().row;
        for slice in &step.slices {
            let Some(pb::Backup { rank, start, end }) = slice.backup else { continue };
            let Some(address) = usize::try_from(rank).ok().and_then(|rank| addresses.get(rank))
            else {
                tracing::warn!(rank, "KV rows for a rank that there is not");
                continue;
            };
            let positions = MESSAGE_BYTES.div_ceil(row.sum().max(1));
            let most = u32::try_from(positions).unwrap_or(u32::MAX).max(1);
            let mut at = start;
            while at < end {
                let next = end.min(at.saturating_add(most));
                match read(engine, slice, (row, at..next)) {
                    Ok([full, chunked]) => {
                        let rows = pb::BackupRows {
                            journal: step.journal,
                            sequence: slice.sequence,
                            start: at,
                            positions: next - at,
                            crc32c: super::checksum(&full, &chunked),
                            full,
                            chunked,
                        };
                        self.sender.send(address, rows);
                    }
                    Err(error) => {
                        tracing::warn!(%error, sequence = slice.sequence, "KV rows cannot be read");
                        break;
                    }
                }
                at = next;
            }
        }
    }
}

/// Rows of the layers of either pool. Of those with chunks there are those of the present chunk.
fn read(
    engine: &mut Engine,
    slice: &pb::Slice,
    (row, positions): (RowBytes, Range<u32>),
) -> Result<[Vec<u8>; 2], EngineError> {
    let [(full, _), (chunked, _)] = row.pools();
    let first = positions.end.min(positions.start.max(row.chunk_start(slice.start)));
    let mut rows = [Vec::new(), Vec::new()];
    let kinds = [(full, positions.clone()), (chunked, first..positions.end)];
    for ((pool, positions), rows) in kinds.into_iter().zip(&mut rows) {
        engine.read_rows(&rows_at(slice, pool, positions), rows)?;
    }
    Ok(rows)
}

/// Where a slice's sequence has its rows.
fn rows_at(slice: &pb::Slice, pool: Pool, positions: Range<u32>) -> RowsAt<'_> {
    let (table, table_first) = match pool {
        Pool::Full => (&slice.full_blocks, 0),
        Pool::Chunked(_) => (&slice.chunked_blocks, slice.chunked_first),
    };
    RowsAt { pool, table, table_first, positions }
}
