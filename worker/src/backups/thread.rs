//! What the worker's thread does about copies: before a step it fills blocks from them, after it it sends rows.

use super::{Backups, RowBytes, Sender};
use crate::engine::Engine;
use crate::error::EngineError;
use kernels::{Pool, RowsAt};
use proto::pb;
use std::collections::BTreeMap;
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
        let mut batches = Batches { journal: step.journal, of_ranks: BTreeMap::new() };
        for slice in &step.slices {
            let Some(pb::Backup { rank, start, end }) = slice.backup else { continue };
            let Some(address) = usize::try_from(rank).ok().and_then(|rank| addresses.get(rank))
            else {
                tracing::warn!(rank, "KV rows for a rank that there is not");
                continue;
            };
            for positions in pieces(start..end, row) {
                match read(engine, slice, (row, positions)) {
                    Ok(rows) => {
                        let full = batches.add(rank, rows);
                        full.into_iter().for_each(|batch| self.sender.send(address, batch));
                    }
                    Err(error) => {
                        tracing::warn!(%error, sequence = slice.sequence, "KV rows cannot be read");
                        break;
                    }
                }
            }
        }
        for (rank, batch) in batches.rest() {
            self.sender.send(&addresses[rank as usize], batch);
        }
    }
}

/// Rows by the rank that keeps copies of them, until they are worth a message.
struct Batches {
    journal: u64,
    of_ranks: BTreeMap<u32, (usize, Vec<pb::BackupRows>)>,
}

impl Batches {
    /// Returns a message once it is large enough.
    fn add(&mut self, rank: u32, rows: pb::BackupRows) -> Option<pb::KeepRequest> {
        let (bytes, batch) = self.of_ranks.entry(rank).or_default();
        *bytes += rows.full.len() + rows.chunked.len();
        batch.push(rows);
        if *bytes < MESSAGE_BYTES {
            return None;
        }
        *bytes = 0;
        Some(pb::KeepRequest { journal: self.journal, rows: std::mem::take(batch) })
    }

    fn rest(self) -> impl Iterator<Item = (u32, pb::KeepRequest)> {
        let journal = self.journal;
        let rest = self.of_ranks.into_iter().filter(|(_, (_, rows))| !rows.is_empty());
        rest.map(move |(rank, (_, rows))| (rank, pb::KeepRequest { journal, rows }))
    }
}

/// Positions whose rows go together.
fn pieces(positions: Range<u32>, row: RowBytes) -> impl Iterator<Item = Range<u32>> {
    let most = u32::try_from(MESSAGE_BYTES / row.sum().max(1)).unwrap_or(u32::MAX).max(1);
    let end = positions.end;
    let starts = positions.step_by(most as usize);
    starts.map(move |start| start..end.min(start.saturating_add(most)))
}

/// Rows of the layers of either pool. Of those with chunks there are those of the present chunk.
fn read(
    engine: &mut Engine,
    slice: &pb::Slice,
    (row, positions): (RowBytes, Range<u32>),
) -> Result<pb::BackupRows, EngineError> {
    let [(full, _), (chunked, _)] = row.pools();
    let first = positions.end.min(positions.start.max(row.chunk_start(slice.start)));
    let mut rows = pb::BackupRows {
        sequence: slice.sequence,
        start: positions.start,
        positions: positions.end - positions.start,
        ..Default::default()
    };
    engine.read_rows(&rows_at(slice, full, positions.clone()), &mut rows.full)?;
    engine.read_rows(&rows_at(slice, chunked, first..positions.end), &mut rows.chunked)?;
    rows.crc32c = super::checksum(&rows.full, &rows.chunked);
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
