//! What the worker's thread does about copies: before a step it fills blocks from them, after it it sends rows.

use super::{Backups, Restored, RowBytes, Sender};
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
    /// Services of the ranks of the view that is served.
    addresses: Vec<String>,
}

impl Keeper {
    pub(crate) fn new(backups: Backups, sender: Sender) -> Self {
        Self { backups, sender, addresses: Vec::new() }
    }

    /// The worker serves a view of these members.
    pub(crate) fn sit_among(&mut self, addresses: Vec<String>) {
        self.sender.retain(&addresses);
        self.addresses = addresses;
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
        let gone = self.backups.lock().follow(step.journal, &step.released);
        drop(gone);
        let mut missing = Vec::new();
        for slice in step.slices.iter().filter(|slice| slice.restored != 0) {
            // It takes a while to write it, and rows of other sequences arrive meanwhile.
            let Some(copy) = self.backups.lock().take(slice.sequence) else {
                missing.push(slice.sequence);
                continue;
            };
            let restored = copy.restored(slice.restored, self.backups.row);
            let written = restored.map(|rows| write(engine, slice, (rows, self.backups.row)));
            // The step may fail, and be tried again.
            self.backups.lock().put_back(slice.sequence, copy);
            match written {
                Some(written) => written?,
                None => missing.push(slice.sequence),
            }
        }
        if missing.is_empty() { Ok(()) } else { Err(EngineError::Missing(missing)) }
    }

    /// What the router shall know of the copies here.
    pub(crate) fn take_news(&self) -> Vec<pb::Held> {
        self.backups.lock().take_news()
    }

    /// After a step that this rank has ended well: rows go where the router wants copies of them.
    pub(crate) fn send(&mut self, engine: &mut Engine, step: &pb::Step) {
        let pieces = pieces(step, self.backups.row);
        let rows = match read(engine, &pieces, (step.journal, self.backups.row)) {
            Ok(rows) => rows,
            Err(error) => return tracing::warn!(%error, "KV rows cannot be read"),
        };
        let mut batches = Batches { journal: step.journal, of_ranks: BTreeMap::new() };
        let mut send = |rank: u32, batch| {
            let address = usize::try_from(rank).ok().and_then(|rank| self.addresses.get(rank));
            match address {
                Some(address) => self.sender.send(address, batch),
                None => tracing::warn!(rank, "KV rows for a rank that there is not"),
            }
        };
        for (piece, rows) in pieces.iter().zip(rows) {
            if let Some(batch) = batches.add(piece.rank, rows) {
                send(piece.rank, batch);
            }
        }
        for (rank, batch) in batches.rest() {
            send(rank, batch);
        }
    }
}

/// Positions of a slice's sequence whose rows go to a rank in one piece.
struct Piece<'a> {
    slice: &'a pb::Slice,
    rank: u32,
    positions: Range<u32>,
}

/// What the router wants sent after a step.
fn pieces(step: &pb::Step, row: RowBytes) -> Vec<Piece<'_>> {
    let most = u32::try_from(MESSAGE_BYTES / row.sum().max(1)).unwrap_or(u32::MAX).max(1);
    let ordered = step.slices.iter().filter_map(|slice| Some((slice, slice.backup?)));
    let of_slice = |(slice, pb::Backup { rank, start, end })| {
        let starts = (start..end).step_by(most as usize);
        starts.map(move |start| {
            let positions = start..end.min(start.saturating_add(most));
            Piece { slice, rank, positions }
        })
    };
    ordered.flat_map(of_slice).collect()
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

/// The rows of all pieces. Of layers with chunks there are those of the slice's chunk.
fn read(
    engine: &mut Engine,
    pieces: &[Piece<'_>],
    (journal, row): (u64, RowBytes),
) -> Result<Vec<pb::BackupRows>, EngineError> {
    let [(full, _), (chunked, _)] = row.pools();
    let (mut full_at, mut chunked_at) = (Vec::new(), Vec::new());
    for Piece { slice, positions, .. } in pieces {
        let first = positions.end.min(positions.start.max(row.chunk_start(slice.start)));
        full_at.push(rows_at(slice, full, positions.clone()));
        chunked_at.push(rows_at(slice, chunked, first..positions.end));
    }
    let (mut full_rows, mut chunked_rows) = (Vec::new(), Vec::new());
    engine.read_rows(&full_at, &mut full_rows)?;
    engine.read_rows(&chunked_at, &mut chunked_rows)?;
    let (mut full_rows, mut chunked_rows) = (&full_rows[..], &chunked_rows[..]);
    let taken = |rows: &mut &[u8], positions: &Range<u32>, bytes: usize| {
        let (these, rest) = rows.split_at(positions.len() * bytes);
        *rows = rest;
        these.to_vec()
    };
    let rows =
        pieces.iter().zip(&full_at).zip(&chunked_at).map(|((piece, full_at), chunked_at)| {
            let mut rows = pb::BackupRows {
                sequence: piece.slice.sequence,
                start: piece.positions.start,
                positions: piece.positions.end - piece.positions.start,
                full: taken(&mut full_rows, &full_at.positions, row.full),
                chunked: taken(&mut chunked_rows, &chunked_at.positions, row.chunked),
                crc32c: 0,
            };
            rows.crc32c = super::checksum(&rows, journal);
            rows
        });
    Ok(rows.collect())
}

/// Fills the blocks of a slice's sequence.
fn write(
    engine: &mut Engine,
    slice: &pb::Slice,
    (rows, row): (Restored<'_>, RowBytes),
) -> Result<(), EngineError> {
    let positions = slice.restored;
    let [(full, _), (chunked, _)] = row.pools();
    engine.write_rows(&rows_at(slice, full, 0..positions), rows.full)?;
    let chunk = row.chunk_start(positions)..positions;
    engine.write_rows(&rows_at(slice, chunked, chunk), rows.chunked)
}

/// Where a slice's sequence has its rows.
fn rows_at(slice: &pb::Slice, pool: Pool, positions: Range<u32>) -> RowsAt<'_> {
    let (table, table_first) = match pool {
        Pool::Full => (&slice.full_blocks, 0),
        Pool::Chunked(_) => (&slice.chunked_blocks, slice.chunked_first),
    };
    RowsAt { pool, table, table_first, positions }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(sequence: u64, (start, end): (u32, u32), rank: u32) -> pb::Slice {
        pb::Slice { sequence, backup: Some(pb::Backup { rank, start, end }), ..Default::default() }
    }

    #[test]
    fn rows_travel_in_pieces_of_a_message_at_most() {
        let row =
            RowBytes { full: MESSAGE_BYTES / 4, chunked: MESSAGE_BYTES / 8, chunk_tokens: Some(8) };
        let unwanted = pb::Slice::default();
        let slices = vec![slice(1, (3, 8), 2), unwanted, slice(2, (0, 1), 0)];
        let step = pb::Step { slices, ..Default::default() };
        let got = pieces(&step, row);
        let got: Vec<_> =
            got.iter().map(|p| (p.slice.sequence, p.rank, p.positions.clone())).collect();
        assert_eq!(got, [(1, 2, 3..5), (1, 2, 5..7), (1, 2, 7..8), (2, 0, 0..1)]);
        // Rows that are larger than a message travel one by one.
        let row = RowBytes { full: 2 * MESSAGE_BYTES, ..row };
        assert_eq!(pieces(&step, row).len(), 6);
    }

    #[test]
    fn rows_of_a_step_share_messages_by_rank() {
        let mut batches = Batches { journal: 7, of_ranks: BTreeMap::new() };
        let rows = |sequence, bytes| pb::BackupRows {
            sequence,
            full: vec![0; bytes],
            ..Default::default()
        };
        let sequences = |batch: pb::KeepRequest| {
            assert_eq!(batch.journal, 7);
            batch.rows.iter().map(|rows| rows.sequence).collect::<Vec<_>>()
        };
        assert!(batches.add(1, rows(1, 10)).is_none());
        assert!(batches.add(0, rows(2, 10)).is_none());
        assert_eq!(sequences(batches.add(1, rows(3, MESSAGE_BYTES)).unwrap()), [1, 3]);
        assert!(batches.add(1, rows(4, 10)).is_none());
        assert!(batches.add(2, rows(5, MESSAGE_BYTES)).is_some());
        let rest: Vec<_> = batches.rest().map(|(rank, batch)| (rank, sequences(batch))).collect();
        assert_eq!(rest, [(0, vec![2]), (1, vec![4])]);
    }
}
