//! The frames that come in on one connection, read piece by piece and never waited for.
//!
//! ```text
//!            old epoch                       all skipped
//!   head ────────────────▶ skip ───────────────────────────────▶ head
//!    │ the expected frame                                         ▲
//!    └──────▶ slots ──────▶ rows ──────▶ trailer ──────▶ done ────┘ expect
//!              ├──▶ places ──▶ lent ──────────────────────▶ │
//!              └──────────────┴─────────────┴── expect of a newer epoch ──▶ skip
//! ```
//!
//! A frame of a newer epoch, or one that does not belong to the step, stays where it is.

use super::direct::{PIECE_BYTES, Where};
use super::frame::{HEAD, Head, PLACE, Sum, TRAILER};
use super::pipe::Pipe;
use super::runs::{Pieces, Place, Runs};
use std::io;

/// Small frames come whole in one call of the system; of larger ones so much is copied once more.
const AHEAD: usize = 32 * 1024;

/// Where reading calls nobody, only heads and slots take the way through the buffer.
const AHEAD_IN_MEMORY: usize = 1024;

/// Rows are summed, sent and received in pieces of at most so many bytes: a core's own cache holds one on its way in, one
/// on its way out and what the kernel has of both, and calls of the system are still few (4 ranks on 2 cores, 10 MiB per
/// pair: 25.8 ms; 26.4 ms with half as much and 26.8 ms with twice as much).
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
    Places,
    Rows,
    Lent,
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
    /// Places of lent rows in the sender's memory: address and length, little-endian as on the wire.
    places: Vec<[u64; 2]>,
    place_bytes: usize,
    /// The same, and how far the rows are copied.
    lent: Runs,
    lent_place: Place,
    /// The peer has given up its frame.
    void: bool,
    /// Bytes of lent rows of the current frame: who skips them has to say that it takes no more.
    owed: u64,
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
            places: Vec::new(),
            place_bytes: 0,
            lent: Runs::default(),
            lent_place: Place::default(),
            void: false,
            owed: 0,
            place: Place::default(),
            frames: 0,
            dropped: 0,
        }
    }

    /// Awaits the next frame. What is left of an unfinished one is skipped.
    pub(super) fn expect(&mut self, expected: Head) {
        self.expected = expected;
        self.slots.clear();
        self.void = false;
        self.stage = match self.stage {
            Stage::Head | Stage::Done => Stage::Head,
            Stage::Slots
            | Stage::Places
            | Stage::Rows
            | Stage::Lent
            | Stage::Trailer
            | Stage::Skip => Stage::Skip,
        };
    }

    /// The slots of the frame's rows, once they are all there.
    pub(super) fn slots(&self) -> Option<&[u16]> {
        match self.stage {
            Stage::Head | Stage::Slots | Stage::Places | Stage::Skip => None,
            Stage::Rows | Stage::Lent | Stage::Trailer | Stage::Done => Some(&self.slots),
        }
    }

    pub(super) fn done(&self) -> bool {
        self.stage == Stage::Done
    }

    /// Whether there is something that was read and not used: no news of it will come.
    pub(super) fn is_ahead(&self) -> bool {
        self.start < self.end
    }

    /// Whether the peer has given up its frame.
    pub(super) fn is_void(&self) -> bool {
        self.void
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
                Stage::Places => self.fill_places(pipe)?,
                Stage::Rows | Stage::Lent | Stage::Trailer | Stage::Done => return Ok(moved),
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
                Stage::Lent => self.take_rows(pipe, rows, runs)?,
                Stage::Trailer => self.check_trailer(pipe)?,
                Stage::Done | Stage::Head | Stage::Skip | Stage::Slots | Stage::Places => {
                    return Ok(moved);
                }
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
                self.rest = head.following();
                self.owed = if head.lent == 0 { 0 } else { head.rows_bytes() };
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
        let (rows, lent, sequence) = (head.rows, head.lent, head.sequence);
        let fits = head == Head { rows, row_bytes, lent, sequence, ..self.expected };
        if !fits || (0 < lent && pipe.ring().is_none()) {
            return Err(Trouble::Corrupt);
        }
        self.head = None;
        self.sum = Sum::default();
        self.place = Place::default();
        self.slot_bytes = 0;
        self.slots.resize(usize_of(head.slot_bytes()) / 2, 0);
        self.place_bytes = 0;
        self.places.clear();
        self.places.resize(usize_of(head.lent_bytes()) / PLACE, [0; 2]);
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
        self.stage = if self.places.is_empty() { Stage::Rows } else { Stage::Places };
        Ok(true)
    }

    fn fill_places(&mut self, pipe: &Pipe) -> Result<bool, Trouble> {
        let places: &mut [u8] = bytemuck::cast_slice_mut(&mut self.places);
        let missing = &mut places[self.place_bytes..];
        let here = &self.buffer[self.start..self.end];
        let bytes = missing.len().min(here.len());
        missing[..bytes].copy_from_slice(&here[..bytes]);
        let all = bytes == missing.len();
        self.place_bytes += bytes;
        self.used(bytes);
        if !all {
            return self.refill(pipe);
        }
        self.lent.clear(self.places.len());
        self.lent_place = Place::default();
        for [address, bytes] in self.places.iter().map(|place| place.map(u64::from_le)) {
            let [address, bytes] = [address, bytes].map(usize::try_from);
            let (Ok(address), Ok(bytes)) = (address, bytes) else { return Err(Trouble::Garbled) };
            // No run is empty or ends beyond all addresses, and sums of so many lengths cannot be too large.
            if bytes == 0 || address.checked_add(bytes).is_none() || usize::MAX >> 32 < bytes {
                return Err(Trouble::Garbled);
            }
            self.lent.push(address, bytes);
        }
        self.stage = Stage::Lent;
        Ok(true)
    }

    /// Copies rows out of the peer's memory, a piece of them at a time.
    fn take_rows(&mut self, pipe: &Pipe, rows: &mut [u8], runs: &Runs) -> Result<bool, Trouble> {
        if self.lent.bytes() != runs.bytes() {
            return Err(Trouble::Corrupt);
        }
        let ring = pipe.ring().ok_or(Trouble::Garbled)?;
        let place = ring.find(self.frames).map_err(|_| Trouble::Garbled)?;
        let into = Pieces::next(runs, self.place, PIECE_BYTES);
        let from = match place {
            Where::Lent => Pieces::next(&self.lent, self.lent_place, into.bytes()),
            Where::Staged { from, address } => {
                let within = (self.place.at as u64).checked_sub(from);
                let at = within.and_then(|within| address.checked_add(within));
                let at = at.and_then(|at| usize::try_from(at).ok()).ok_or(Trouble::Garbled)?;
                Pieces::one(at, runs.bytes() - self.place.at)
            }
            // The peer tells why, on the other connection.
            Where::Void => {
                self.void = true;
                return Ok(false);
            }
        };
        let copied = ring.copy(&from, rows, &into);
        if ring.find(self.frames).ok() != Some(place) {
            // What was copied may have been written meanwhile.
            return Ok(true);
        }
        let is_over = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        let copied = copied.map_err(|error| match is_over(&error) {
            true => Trouble::Closed,
            false => Trouble::Garbled,
        })?;
        if copied == 0 {
            return Err(Trouble::Garbled);
        }
        runs.walk(&mut self.place, copied, |_| {});
        self.lent.walk(&mut self.lent_place, copied, |_| {});
        let taken = u32::try_from(self.place.at).map_err(|_| Trouble::Garbled)?;
        pipe.took(self.frames, taken);
        if self.place.at == runs.bytes() {
            (self.frames, self.stage) = (self.frames + 1, Stage::Done);
        }
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
        let pieces = Pieces::next(runs, self.place, SUM_BYTES);
        let bytes = pieces.bytes();
        let last = self.place.at + bytes == runs.bytes();
        let behind = if last { &mut self.buffer[..] } else { &mut [] };
        let read = pipe.receive_pieces(rows, &pieces, behind);
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
        if 0 < self.owed {
            // The peer may serve the old epoch still, and waits until its rows are taken.
            let all = u32::try_from(self.owed).map_err(|_| Trouble::Garbled)?;
            pipe.took(self.frames, all);
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
