//! The frames that come in on one connection, read piece by piece and never waited for.
//!
//! ```text
//!            old epoch                       all skipped
//!   head ────────────────▶ skip ───────────────────────────────▶ head
//!    │ the expected frame                                         ▲
//!    └──────▶ slots ──────▶ rows ──────▶ trailer ──────▶ done ────┘ expect
//!              └──────────────┴─────────────┴── expect of a newer epoch ──▶ skip
//! ```
//!
//! A frame of a newer epoch, or one that does not belong to the step, stays where it is.

use super::frame::{HEAD, Head, Sum, TRAILER};
use super::pipe::Pipe;
use super::runs::{Place, Runs};
use super::socket::PIECES;
use std::io;

/// Small frames come whole in one call of the system; of larger ones so much is copied once more.
const AHEAD: usize = 32 * 1024;

/// Where reading calls nobody, only heads and slots take the way through the buffer.
const AHEAD_IN_MEMORY: usize = 1024;

/// Rows are summed in pieces that are still in the core's own cache.
pub(super) const SUM_BYTES: usize = 256 * 1024;

/// Why a peer's frame does not come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Trouble {
    /// The connection is over.
    Closed,
    /// The peer serves a newer epoch.
    Moved,
    /// A whole frame that belongs elsewhere, or rows that have changed on their way.
    Corrupt,
    /// Bytes that are no frame: nothing that follows can be believed.
    Garbled,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Head,
    Slots,
    Rows,
    Trailer,
    Skip,
    Done,
}

pub(super) struct Inbound {
    buffer: Box<[u8]>,
    /// What is read and not yet used.
    start: usize,
    end: usize,
    stage: Stage,
    /// The frame that is awaited; rows and sequence are not known before it is there.
    expected: Head,
    /// The head that was read last, while it may still be judged.
    head: Option<Head>,
    /// Bytes of the current frame behind its head that are still to come.
    rest: u64,
    sum: Sum,
    /// Slot of the expert, per row; little-endian as on the wire.
    slots: Vec<u16>,
    slot_bytes: usize,
    place: Place,
    /// Frames that have come whole.
    pub(super) frames: u64,
    /// Those of them that were of an old epoch.
    pub(super) dropped: u64,
}

impl Inbound {
    pub(super) fn new(expected: Head, pipe: &Pipe) -> Self {
        let ahead = if pipe.sums() { AHEAD } else { AHEAD_IN_MEMORY };
        Self {
            buffer: vec![0; HEAD + ahead].into_boxed_slice(),
            start: 0,
            end: 0,
            stage: Stage::Done,
            expected,
            head: None,
            rest: 0,
            sum: Sum::default(),
            slots: Vec::new(),
            slot_bytes: 0,
            place: Place::default(),
            frames: 0,
            dropped: 0,
        }
    }

    /// Awaits the next frame. What is left of an unfinished one is skipped.
    pub(super) fn expect(&mut self, expected: Head) {
        self.expected = expected;
        self.slots.clear();
        self.stage = match self.stage {
            Stage::Head | Stage::Done => Stage::Head,
            Stage::Slots | Stage::Rows | Stage::Trailer | Stage::Skip => Stage::Skip,
        };
    }

    /// The slots of the frame's rows, once they are all there.
    pub(super) fn slots(&self) -> Option<&[u16]> {
        match self.stage {
            Stage::Head | Stage::Slots | Stage::Skip => None,
            Stage::Rows | Stage::Trailer | Stage::Done => Some(&self.slots),
        }
    }

    pub(super) fn done(&self) -> bool {
        self.stage == Stage::Done
    }

    /// Whether reading on would help before the place of the rows is known.
    pub(super) fn wants_slots(&self) -> bool {
        self.slots().is_none()
    }

    /// Reads until the slots are there or nothing comes. Returns whether anything came.
    pub(super) fn read_slots(&mut self, pipe: &Pipe) -> Result<bool, Trouble> {
        let mut moved = false;
        loop {
            let on = match self.stage {
                Stage::Head => self.read_head(pipe)?,
                Stage::Skip => self.skip(pipe)?,
                Stage::Slots => self.fill_slots(pipe)?,
                Stage::Rows | Stage::Trailer | Stage::Done => return Ok(moved),
            };
            if !on {
                return Ok(moved);
            }
            moved = true;
        }
    }

    /// Reads until the frame is whole or nothing comes; the rows go where `runs` says.
    pub(super) fn read_rows(
        &mut self,
        pipe: &Pipe,
        (rows, runs): (&mut [u8], &Runs),
    ) -> Result<bool, Trouble> {
        let mut moved = self.read_slots(pipe)?;
        loop {
            let on = match self.stage {
                Stage::Rows => self.fill_rows(pipe, rows, runs)?,
                Stage::Trailer => self.check_trailer(pipe)?,
                Stage::Done | Stage::Head | Stage::Skip | Stage::Slots => return Ok(moved),
            };
            if !on {
                return Ok(moved);
            }
            moved = true;
        }
    }

    fn read_head(&mut self, pipe: &Pipe) -> Result<bool, Trouble> {
        let head = match self.head {
            Some(head) => head,
            None => {
                let Some(bytes) = self.buffer[self.start..self.end].first_chunk() else {
                    return self.refill(pipe);
                };
                let head = Head::decode(bytes).ok_or(Trouble::Garbled)?;
                if head.sequence != self.frames {
                    return Err(Trouble::Garbled);
                }
                self.start += HEAD;
                self.rest = head.slot_bytes() + head.rows_bytes() + TRAILER as u64;
                self.head = Some(head);
                head
            }
        };
        if head.epoch < self.expected.epoch {
            (self.head, self.stage) = (None, Stage::Skip);
            return Ok(true);
        }
        if self.expected.epoch < head.epoch {
            return Err(Trouble::Moved);
        }
        // A rank without rows need not know their width.
        let row_bytes = if head.rows == 0 { head.row_bytes } else { self.expected.row_bytes };
        let (rows, sequence) = (head.rows, head.sequence);
        if head != (Head { rows, row_bytes, sequence, ..self.expected }) {
            return Err(Trouble::Corrupt);
        }
        self.head = None;
        self.sum = Sum::default();
        self.place = Place::default();
        self.slot_bytes = 0;
        self.slots.resize(usize_of(head.slot_bytes()) / 2, 0);
        self.stage = Stage::Slots;
        Ok(true)
    }

    fn fill_slots(&mut self, pipe: &Pipe) -> Result<bool, Trouble> {
        let slots: &mut [u8] = bytemuck::cast_slice_mut(&mut self.slots);
        let missing = &mut slots[self.slot_bytes..];
        let here = &self.buffer[self.start..self.end];
        let bytes = missing.len().min(here.len());
        missing[..bytes].copy_from_slice(&here[..bytes]);
        let all = bytes == missing.len();
        self.slot_bytes += bytes;
        self.used(bytes);
        if !all {
            return self.refill(pipe);
        }
        if pipe.sums() {
            self.sum.add(bytemuck::cast_slice(&self.slots));
        }
        for slot in &mut self.slots {
            *slot = u16::from_le(*slot);
        }
        self.stage = Stage::Rows;
        Ok(true)
    }

    fn fill_rows(&mut self, pipe: &Pipe, rows: &mut [u8], runs: &Runs) -> Result<bool, Trouble> {
        // More or fewer rows than were sent to the peer for an answer.
        if usize_of(self.rest) != runs.bytes() - self.place.at + TRAILER {
            return Err(Trouble::Corrupt);
        }
        let missing = runs.bytes() - self.place.at;
        if missing == 0 {
            self.stage = Stage::Trailer;
            return Ok(true);
        }
        let here = missing.min(self.end - self.start);
        if 0 < here {
            let mut from = &self.buffer[self.start..][..here];
            if pipe.sums() {
                self.sum.add(from);
            }
            runs.walk(&mut self.place, here, |run| {
                let (now, behind) = from.split_at(run.bytes);
                rows[run.start..][..run.bytes].copy_from_slice(now);
                from = behind;
            });
            self.used(here);
            return Ok(true);
        }
        self.receive_rows(pipe, rows, runs)
    }

    /// Receives rows right where they belong, and what comes behind them into the buffer.
    fn receive_rows(&mut self, pipe: &Pipe, rows: &mut [u8], runs: &Runs) -> Result<bool, Trouble> {
        let (mut pieces, mut count, mut bytes) = ([(0, 0); PIECES], 0, 0);
        let mut ahead = self.place;
        while count < PIECES && bytes < SUM_BYTES {
            let run = runs.piece(ahead, SUM_BYTES - bytes);
            if run.bytes == 0 {
                break;
            }
            pieces[count] = (run.start, run.bytes);
            (count, bytes) = (count + 1, bytes + run.bytes);
            runs.step(&mut ahead, run.bytes);
        }
        let last = ahead.at == runs.bytes();
        let behind = if last { &mut self.buffer[..] } else { &mut [] };
        let read = pipe.receive_pieces(rows, &pieces[..count], behind);
        let Some(read) = some(read)? else { return Ok(false) };
        let here = read.min(bytes);
        let sum = &mut self.sum;
        runs.walk(&mut self.place, here, |run| {
            if pipe.sums() {
                sum.add(&rows[run.start..][..run.bytes]);
            }
        });
        self.rest -= here as u64;
        (self.start, self.end) = (0, read - here);
        Ok(true)
    }

    fn check_trailer(&mut self, pipe: &Pipe) -> Result<bool, Trouble> {
        let Some(&trailer) = self.buffer[self.start..self.end].first_chunk() else {
            return self.refill(pipe);
        };
        self.used(TRAILER);
        self.frames += 1;
        self.stage = Stage::Done;
        if trailer == self.sum.trailer() { Ok(true) } else { Err(Trouble::Corrupt) }
    }

    fn skip(&mut self, pipe: &Pipe) -> Result<bool, Trouble> {
        let here = usize_of(self.rest).min(self.end - self.start);
        self.used(here);
        if 0 < self.rest {
            return self.refill(pipe);
        }
        self.frames += 1;
        self.dropped += 1;
        self.stage = Stage::Head;
        Ok(true)
    }

    /// Bytes of the current frame have left the buffer.
    fn used(&mut self, bytes: usize) {
        self.start += bytes;
        self.rest -= bytes as u64;
    }

    /// Receives into the free part of the buffer.
    fn refill(&mut self, pipe: &Pipe) -> Result<bool, Trouble> {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let read = pipe.receive(&mut self.buffer[self.end..]);
        let Some(read) = some(read)? else { return Ok(false) };
        self.end += read;
        Ok(true)
    }
}

/// Nothing yet, or so many bytes; the end of a stream is trouble.
fn some(read: io::Result<Option<usize>>) -> Result<Option<usize>, Trouble> {
    match read {
        Ok(Some(0)) | Err(_) => Err(Trouble::Closed),
        Ok(read) => Ok(read),
    }
}

/// A frame that is too long for this machine's memory is refused by its head already.
fn usize_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("the head limits what a frame holds")
}
