//! Copies of other ranks' KV rows, in the host's memory: sequences that lose their rank go on from them.
//!
//! The router says what is sent where, after which step, and which copies nobody needs any more. Rows travel beside the
//! steps (`send`, `service`) and may be lost; what there is of a copy this worker says in its step results. The rows of a
//! position are a function of the sequence's tokens alone, so it does not matter which step they come from, and late
//! ones of a worker that is no member any more do no harm.

mod send;
mod service;
#[cfg(test)]
mod tests;
mod thread;

use kernels::Pool;
use proto::pb;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(crate) use send::Sender;
pub(crate) use service::server;
pub(crate) use thread::Keeper;

/// Rows for which memory is taken at a time.
const GROW_ROWS: usize = 64;

/// Bytes of one position's rows, in the layers of either pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowBytes {
    pub(crate) full: usize,
    pub(crate) chunked: usize,
    /// Positions of a chunk; `None` if no layer is chunked.
    pub(crate) chunk_tokens: Option<u32>,
}

impl RowBytes {
    pub(crate) fn sum(self) -> usize {
        self.full + self.chunked
    }

    /// The pools, each with what of a position's rows is in it.
    pub(crate) fn pools(self) -> [(Pool, usize); 2] {
        [(Pool::Full, self.full), (Pool::Chunked(self.chunk_tokens.unwrap_or(0)), self.chunked)]
    }

    /// The first position of the chunk of a position.
    pub(crate) fn chunk_start(self, position: u32) -> u32 {
        self.chunk_tokens.map_or(position, |chunk| position / chunk * chunk)
    }
}

/// Why rows are refused. Whoever sent them is of another mind about the model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RowsError {
    #[error("rows of sequence {0} changed on their way")]
    Checksum(u64),
    #[error(
        "{positions} positions of sequence {sequence} have {full} and {chunked} bytes of rows, here they have {row:?}"
    )]
    Size { sequence: u64, positions: u32, full: usize, chunked: usize, row: RowBytes },
}

/// The copies of a worker, for its thread and its service. Nobody holds them for longer than it takes to copy a message.
#[derive(Clone)]
pub(crate) struct Backups {
    row: RowBytes,
    copies: Arc<Mutex<Copies>>,
}

impl Backups {
    /// None yet, and so many bytes of them at most.
    pub(crate) fn new(row: RowBytes, bytes_max: u64) -> Self {
        Self { row, copies: Arc::new(Mutex::new(Copies::new(row, bytes_max))) }
    }

    /// Takes rows in, as far as they follow those that are here. A copy that finds no room takes it from the one that
    /// has not changed for longest: of sequences that have ended none is as new as those of any that runs.
    ///
    /// # Errors
    ///
    /// [`RowsError`] for the first that cannot be; nothing changes then.
    pub(crate) fn keep(&self, request: &pb::KeepRequest) -> Result<(), RowsError> {
        request.rows.iter().try_for_each(|rows| check(rows, request.journal, self.row))?;
        let evicted = self.lock().keep(request);
        // Given back when others can come to the copies again.
        drop(evicted);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Copies> {
        // Rows are complete before a copy counts them.
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A sequence's rows, as far as they have come.
#[derive(Default)]
struct Copy {
    /// Rows of positions `0..positions` are here.
    positions: u32,
    full: Vec<u8>,
    /// Of layers with chunks those of `chunked_from..positions`.
    chunked_from: u32,
    chunked: Vec<u8>,
    /// When it last changed.
    touched: u64,
}

impl Copy {
    fn bytes(&self) -> u64 {
        (self.full.len() + self.chunked.len()) as u64
    }
}

/// What a sequence goes on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Restored<'a> {
    /// Of positions from 0.
    pub(crate) full: &'a [u8],
    /// Of positions from the start of the chunk in which the sequence goes on.
    pub(crate) chunked: &'a [u8],
}

/// All copies.
struct Copies {
    row: RowBytes,
    bytes_max: u64,
    /// Whose numbers the sequences have.
    journal: u64,
    copies: BTreeMap<u64, Copy>,
    /// Of all copies.
    bytes: u64,
    /// Counts changes.
    now: u64,
    /// Sequences of which nothing was said since they changed, and whether rows are missing between.
    news: BTreeMap<u64, bool>,
}

impl Copies {
    fn new(row: RowBytes, bytes_max: u64) -> Self {
        Self {
            row,
            bytes_max,
            journal: 0,
            copies: BTreeMap::new(),
            bytes: 0,
            now: 0,
            news: BTreeMap::new(),
        }
    }

    /// A step has come: sequences have this journal's numbers now, and some of the copies can go. Returns them.
    fn follow(&mut self, journal: u64, released: &[u64]) -> Vec<Copy> {
        if self.journal != journal {
            let last = std::mem::replace(self, Self::new(self.row, self.bytes_max));
            self.journal = journal;
            return last.copies.into_values().collect();
        }
        for sequence in released {
            self.news.remove(sequence);
        }
        released.iter().filter_map(|sequence| self.take(*sequence)).collect()
    }

    /// Takes rows in that were checked. Returns copies that have made room.
    fn keep(&mut self, request: &pb::KeepRequest) -> Vec<Copy> {
        if request.journal != self.journal {
            return Vec::new();
        }
        request.rows.iter().flat_map(|rows| self.keep_rows(rows)).collect()
    }

    fn keep_rows(&mut self, rows: &pb::BackupRows) -> Vec<Copy> {
        self.now += 1;
        let known = self.copies.get(&rows.sequence).map_or(0, |copy| copy.positions);
        self.news.insert(rows.sequence, known < rows.start);
        if rows.start <= known {
            let copy = self.copies.entry(rows.sequence).or_default();
            let before = copy.bytes();
            copy.touched = self.now;
            put(copy, rows, self.row);
            self.bytes = self.bytes + copy.bytes() - before;
        }
        self.make_room(rows.sequence)
    }

    /// Others go for the sake of this sequence's, and in the end so does that.
    fn make_room(&mut self, sequence: u64) -> Vec<Copy> {
        let mut gone = Vec::new();
        while self.bytes_max < self.bytes {
            let others = self.copies.iter().filter(|(other, _)| **other != sequence);
            let oldest = others.min_by_key(|(_, copy)| copy.touched).map(|(other, _)| *other);
            let evicted = oldest.unwrap_or(sequence);
            let copy = self.take(evicted);
            // Its rank shall know, if it still counts on it.
            self.news.insert(evicted, true);
            if copy.is_none() {
                break;
            }
            gone.extend(copy);
        }
        gone
    }

    fn take(&mut self, sequence: u64) -> Option<Copy> {
        let copy = self.copies.remove(&sequence)?;
        self.bytes -= copy.bytes();
        Some(copy)
    }

    /// Puts back what was taken, unless there is another by now.
    fn put_back(&mut self, sequence: u64, copy: Copy) {
        let bytes = copy.bytes();
        if let Entry::Vacant(place) = self.copies.entry(sequence) {
            place.insert(copy);
            self.bytes += bytes;
        }
    }

    /// What is to be said of copies that have changed.
    fn take_news(&mut self) -> Vec<pb::Held> {
        let held = |(sequence, has_gap)| {
            let positions = self.copies.get(&sequence).map_or(0, |copy| copy.positions);
            pb::Held { sequence, positions, has_gap }
        };
        std::mem::take(&mut self.news).into_iter().map(held).collect()
    }
}

impl Copy {
    /// What its sequence needs to go on after so many positions; `None` if it is not all here.
    fn restored(&self, positions: u32, row: RowBytes) -> Option<Restored<'_>> {
        if self.positions < positions {
            return None;
        }
        let start = row.chunk_start(positions);
        let chunked = match start.checked_sub(self.chunked_from) {
            _ if start == positions => &[],
            Some(skipped) => {
                let end = (positions - self.chunked_from) as usize;
                self.chunked.get(skipped as usize * row.chunked..end * row.chunked)?
            }
            None => return None,
        };
        Some(Restored { full: self.full.get(..positions as usize * row.full)?, chunked })
    }
}

/// Whether rows arrived as they were sent, and are rows of this model.
fn check(rows: &pb::BackupRows, journal: u64, row: RowBytes) -> Result<(), RowsError> {
    let pb::BackupRows { sequence, positions, ref full, ref chunked, crc32c, .. } = *rows;
    if checksum(rows, journal) != crc32c {
        return Err(RowsError::Checksum(sequence));
    }
    let most = positions as usize;
    let is_whole = |bytes: usize, of: usize| match of {
        0 => bytes == 0,
        of => bytes.is_multiple_of(of) && bytes <= most * of,
    };
    let fits = full.len() == most * row.full
        && is_whole(chunked.len(), row.chunked)
        && rows.start.checked_add(positions).is_some();
    if fits {
        return Ok(());
    }
    let (full, chunked) = (full.len(), chunked.len());
    Err(RowsError::Size { sequence, positions, full, chunked, row })
}

/// Writes rows into a copy that has all those before.
fn put(copy: &mut Copy, rows: &pb::BackupRows, row: RowBytes) {
    let end = rows.start + rows.positions;
    write(&mut copy.full, rows.start as usize * row.full, &rows.full, row.full);
    if row.chunked != 0 {
        let count =
            |bytes: &[u8]| u32::try_from(bytes.len() / row.chunked).unwrap_or(rows.positions);
        let from = end - count(&rows.chunked);
        // Rows of a chunk that was over were not sent. What is before such rows is of no use.
        let known = copy.chunked_from..=copy.chunked_from + count(&copy.chunked);
        if rows.start < from || !known.contains(&from) {
            (copy.chunked, copy.chunked_from) = (Vec::new(), from);
            copy.full.truncate(end as usize * row.full);
            copy.positions = end;
        }
        let at = (from - copy.chunked_from) as usize * row.chunked;
        write(&mut copy.chunked, at, &rows.chunked, row.chunked);
    }
    copy.positions = copy.positions.max(end);
}

/// CRC-32C of rows, and of whose they are.
fn checksum(rows: &pb::BackupRows, journal: u64) -> u32 {
    let mut sum = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    sum.update(&journal.to_le_bytes());
    sum.update(&rows.sequence.to_le_bytes());
    sum.update(&rows.start.to_le_bytes());
    sum.update(&rows.positions.to_le_bytes());
    sum.update(&rows.full);
    sum.update(&rows.chunked);
    u32::try_from(sum.finalize()).expect("it has 32 bits")
}

/// Writes over what is at `at`, and what goes beyond the end behind it.
fn write(memory: &mut Vec<u8>, at: usize, bytes: &[u8], row: usize) {
    let missing = (at + bytes.len()).saturating_sub(memory.capacity());
    if missing != 0 {
        let more = at + bytes.len() - memory.len();
        memory.reserve_exact(more.next_multiple_of(GROW_ROWS * row.max(1)));
    }
    let known = memory.len().saturating_sub(at).min(bytes.len());
    memory[at..at + known].copy_from_slice(&bytes[..known]);
    memory.extend_from_slice(&bytes[known..]);
}
