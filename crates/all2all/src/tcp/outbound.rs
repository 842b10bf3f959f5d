//! The frames that go out on one connection, written piece by piece and never waited for.
//!
//! Rows are sent from where the caller has them. What the connection does not take while the caller lends
//! them is staged: copied once, and sent later. A frame that its step does not wait for any more is sent to
//! its end all the same, before the next one: the peer skips it, and the connection stays in order.
//!
//! Of a large frame to a process that reads this one's memory only the places of its rows are sent; see
//! [`direct`](super::direct). It is done when the peer has copied all of them.

use super::direct::Where;
use super::frame::{Head, Sum, TRAILER};
use super::inbound::{SUM_BYTES, Trouble};
use super::pipe::Pipe;
use super::ring::{Ring, Room};
use super::runs::{Place, Run, Runs};
use super::socket::PIECES;
use std::io::IoSlice;

pub(super) struct Outbound {
    /// Whether rows are summed.
    sums: bool,
    /// The rest of a frame of an old epoch. There is never more than one: the next one is begun behind it.
    old: Vec<u8>,
    old_sent: usize,
    /// Whether a frame is under way.
    open: bool,
    /// Head and slots of the frame.
    front: Vec<u8>,
    front_sent: usize,
    /// How far the rows are sent, and how far they are summed.
    place: Place,
    summed: Place,
    sum: Sum,
    trailer_sent: usize,
    /// The rows that are still to be sent, if they are no longer lent.
    stage: Vec<u8>,
    staged: Runs,
    lent: bool,
    /// The frame under way, if the peer copies its rows itself.
    direct: Option<Direct>,
    /// Send the next byte of a row with a bit flipped, once: a planted fault.
    flips: bool,
    /// Frames that were begun, and those that have gone out whole.
    begun: u64,
    frames: u64,
}

/// How much of a frame may go out for now.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Share {
    /// What its peer needs to find a place for the rows.
    Front,
    Whole,
}

/// A frame whose rows the peer copies itself.
#[derive(Clone, Copy)]
struct Direct {
    sequence: u64,
    /// Bytes of all rows.
    bytes: u64,
    /// Bytes that had been taken when the rest was staged.
    before: usize,
}

impl Outbound {
    pub(super) fn new(pipe: &Pipe) -> Self {
        Self {
            sums: pipe.sums(),
            old: Vec::new(),
            old_sent: 0,
            open: false,
            front: Vec::new(),
            front_sent: 0,
            place: Place::default(),
            summed: Place::default(),
            sum: Sum::default(),
            trailer_sent: 0,
            stage: Vec::new(),
            staged: Runs::default(),
            lent: false,
            direct: None,
            flips: false,
            begun: 0,
            frames: 0,
        }
    }

    /// Begins a frame of the rows that `push` will be given.
    pub(super) fn begin(
        &mut self,
        pipe: &Pipe,
        (head, slots): (Head, &[u16]),
        (rows, runs): (&[u8], &Runs),
    ) {
        assert!(!self.open, "the last frame is sent or abandoned");
        let ring = pipe.ring().filter(|ring| ring.lends(rows, head.rows_bytes()));
        let lent = if ring.is_some() { runs.iter().len() } else { 0 };
        let lent = u32::try_from(lent).expect("there are no more runs than rows");
        let head = Head { lent, sequence: self.begun, ..head };
        self.direct = ring.map(|ring| {
            ring.put(head.sequence, Where::Lent);
            Direct { sequence: head.sequence, bytes: head.rows_bytes(), before: 0 }
        });
        self.front.clear();
        self.front.extend_from_slice(&head.encode());
        self.sum = Sum::default();
        if 0 < head.slot_bytes() {
            self.front.extend(slots.iter().flat_map(|slot| slot.to_le_bytes()));
        }
        if 0 < lent {
            let place = |run: Run| [rows[run.start..].as_ptr() as u64, run.bytes as u64];
            self.front.extend(runs.iter().flat_map(place).flat_map(u64::to_le_bytes));
        }
        if self.sums {
            self.sum.add(&self.front[head.encode().len()..]);
        }
        (self.front_sent, self.trailer_sent) = (0, 0);
        (self.place, self.summed) = (Place::default(), Place::default());
        (self.open, self.lent, self.flips) = (true, true, false);
        self.begun += 1;
    }

    /// Plants a fault in the frame that was begun: one bit of its rows changes after it was summed. False
    /// if nobody would notice, because rows are not summed here.
    pub(super) fn corrupt(&mut self) -> bool {
        self.flips = self.sums;
        self.flips
    }

    /// Whether everything has gone out.
    pub(super) fn done(&self) -> bool {
        !self.open && self.old.is_empty()
    }

    /// Whether the peer has everything. It may have copied the last rows, and be gone, before this side looks again.
    pub(super) fn is_taken(&self, pipe: &Pipe) -> bool {
        let taken = |(ring, direct): (&Ring, Direct)| ring.taken(direct.sequence) == direct.bytes;
        let copied = || pipe.ring().zip(self.direct).is_some_and(taken);
        self.done() || (self.open && self.is_front_sent() && copied())
    }

    /// Frames that have gone out whole.
    pub(super) fn frames(&self) -> u64 {
        self.frames
    }

    /// Bytes of `runs` that staging would copy.
    pub(super) fn unsent(&self, runs: &Runs) -> usize {
        if self.open && self.lent { runs.bytes() - self.place.at } else { 0 }
    }

    /// Sends until nothing is left or the connection is full. Returns whether anything went out.
    pub(super) fn push(
        &mut self,
        pipe: &Pipe,
        (rows, runs): (&[u8], &Runs),
        share: Share,
    ) -> Result<bool, Trouble> {
        let staged = std::mem::take(&mut self.staged);
        let stage = std::mem::take(&mut self.stage);
        let source = if self.lent { (rows, runs) } else { (&stage[..], &staged) };
        let mut moved = false;
        let result = loop {
            if self.done() || (share == Share::Front && self.is_front_sent()) {
                break Ok(moved);
            }
            let went = match (pipe.ring(), self.direct) {
                (Some(ring), Some(direct)) if self.open && self.is_front_sent() => {
                    self.note_taken(ring, direct, source.1)
                }
                _ => self.send(pipe, source, share),
            };
            match went {
                Ok(true) => moved = true,
                Ok(false) => break Ok(moved),
                Err(trouble) => break Err(trouble),
            }
        };
        (self.staged, self.stage) = (staged, stage);
        result
    }

    /// What a connection is waited for.
    pub(super) fn room(&self) -> Room {
        match self.direct {
            _ if self.done() => Room::Enough,
            Some(Direct { sequence, before, .. }) if self.open && self.is_front_sent() => {
                Room::Taken { sequence, bytes: (before + self.place.at) as u64 }
            }
            _ => Room::Bytes,
        }
    }

    fn is_front_sent(&self) -> bool {
        self.old.is_empty() && self.front_sent == self.front.len()
    }

    /// Looks how much the peer has copied; whether that is more than before.
    fn note_taken(&mut self, ring: &Ring, of: Direct, runs: &Runs) -> Result<bool, Trouble> {
        let taken = usize::try_from(ring.taken(of.sequence)).map_err(|_| Trouble::Garbled)?;
        let more = taken.checked_sub(of.before + self.place.at).ok_or(Trouble::Garbled)?;
        if runs.bytes() - self.place.at < more {
            return Err(Trouble::Garbled);
        }
        runs.walk(&mut self.place, more, |_| {});
        if self.place.at == runs.bytes() {
            (self.open, self.direct, self.frames) = (false, None, self.frames + 1);
        }
        Ok(0 < more)
    }

    /// One call of the system.
    fn send(
        &mut self,
        pipe: &Pipe,
        (rows, runs): (&[u8], &Runs),
        share: Share,
    ) -> Result<bool, Trouble> {
        let inline = share == Share::Whole && self.open && self.direct.is_none();
        if inline && runs.bytes() - self.place.at <= SUM_BYTES {
            // The last rows, so that their checksum goes with them.
            self.sum_to(runs.bytes(), (rows, runs));
        }
        if inline && self.flips {
            return self.send_flipped(pipe, (rows, runs));
        }
        let trailer = self.sum.trailer();
        let mut pieces = [IoSlice::new(&[]); PIECES];
        let mut count = 0;
        let mut add = |piece| {
            pieces[count] = IoSlice::new(piece);
            count += 1;
        };
        add(&self.old[self.old_sent..]);
        if self.open {
            add(&self.front[self.front_sent..]);
            let mut ahead = self.place;
            let end = runs.bytes().min(ahead.at + SUM_BYTES);
            let most = if inline { PIECES - 3 } else { 0 };
            for _ in 0..most {
                let run = runs.piece(ahead, end - ahead.at);
                add(&rows[run.start..][..run.bytes]);
                runs.step(&mut ahead, run.bytes);
                if ahead.at == end {
                    break;
                }
            }
            if inline && ahead.at == runs.bytes() {
                assert_eq!(self.summed.at, ahead.at, "the last piece is summed before it is sent");
                add(&trailer[self.trailer_sent..]);
            }
        }
        match pipe.send(&pieces[..count]) {
            Ok(Some(sent)) => {
                self.went(sent, runs);
                if inline {
                    // Sending has brought them into the cache.
                    self.sum_to(self.place.at, (rows, runs));
                }
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(_) => Err(Trouble::Closed),
        }
    }

    /// Sends up to the next byte of a row, and that one with a bit flipped.
    fn send_flipped(&mut self, pipe: &Pipe, (rows, runs): (&[u8], &Runs)) -> Result<bool, Trouble> {
        // A fault strikes what was summed.
        self.sum_to(self.place.at + 1, (rows, runs));
        let flipped = [rows[runs.piece(self.place, 1).start] ^ 1];
        let (old, front) = (&self.old[self.old_sent..], &self.front[self.front_sent..]);
        let all = old.len() + front.len() + flipped.len();
        let pieces = [old, front, &flipped].map(IoSlice::new);
        match pipe.send(&pieces) {
            Ok(Some(sent)) => {
                self.flips = sent < all;
                self.went(sent, runs);
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(_) => Err(Trouble::Closed),
        }
    }

    /// Sums the rows before `end`, if they are not yet.
    fn sum_to(&mut self, end: usize, (rows, runs): (&[u8], &Runs)) {
        let Self { sums, sum, summed, .. } = self;
        let bytes = end.saturating_sub(summed.at);
        runs.walk(summed, bytes, |run| {
            if *sums {
                sum.add(&rows[run.start..][..run.bytes]);
            }
        });
    }

    /// So many bytes of what was to be sent are sent.
    fn went(&mut self, sent: usize, runs: &Runs) {
        let mut rest = sent;
        let mut part = |bytes: usize| {
            let part = rest.min(bytes);
            rest -= part;
            part
        };
        self.old_sent += part(self.old.len() - self.old_sent);
        if self.old_sent == self.old.len() && 0 < self.old_sent {
            (self.old_sent, self.frames) = (0, self.frames + 1);
            self.old.clear();
        }
        if !self.open {
            return;
        }
        self.front_sent += part(self.front.len() - self.front_sent);
        if self.direct.is_some() {
            return;
        }
        let rows = part(runs.bytes() - self.place.at);
        runs.walk(&mut self.place, rows, |_| {});
        self.trailer_sent += rest;
        if self.trailer_sent == TRAILER {
            (self.open, self.frames) = (false, self.frames + 1);
        }
    }

    /// Makes room, so that staging these rows later allocates nothing. Costs no memory until then.
    pub(super) fn reserve(&mut self, runs: &Runs) {
        self.stage.clear();
        self.stage.reserve(runs.bytes());
        self.old.reserve(self.front.len() + runs.bytes() + TRAILER);
    }

    /// Copies what is not sent, since the rows are lent no longer.
    pub(super) fn stage(&mut self, pipe: &Pipe, (rows, runs): (&[u8], &Runs)) {
        if self.unsent(runs) == 0 {
            return;
        }
        let is_summed = self.direct.is_some() || self.place.at <= self.summed.at;
        assert!(is_summed, "all that was sent is summed, unless the peer copies it");
        let (bytes, summed) = (self.unsent(runs), self.summed.at.saturating_sub(self.place.at));
        let taken = self.place.at;
        self.stage.clear();
        let stage = &mut self.stage;
        runs.walk(&mut self.place, bytes, |run| {
            stage.extend_from_slice(&rows[run.start..][..run.bytes]);
        });
        self.staged.clear(1);
        self.staged.push(0, bytes);
        (self.place, self.summed) = (Place::default(), Place::default());
        self.staged.walk(&mut self.summed, summed, |_| {});
        self.lent = false;
        if let (Some(ring), Some(direct)) = (pipe.ring(), &mut self.direct) {
            direct.before = taken;
            let address = self.stage.as_ptr() as u64;
            ring.put(direct.sequence, Where::Staged { from: taken as u64, address });
        }
    }

    /// Gives up a frame of a step that has failed; its rows are staged.
    pub(super) fn abandon(&mut self, pipe: &Pipe) {
        if !std::mem::take(&mut self.open) {
            return;
        }
        let direct = self.direct.take();
        if let (Some(ring), Some(Direct { sequence, .. })) = (pipe.ring(), direct) {
            ring.put(sequence, Where::Void);
        }
        if self.front_sent == 0 {
            self.begun -= 1;
            return;
        }
        assert!(self.old.is_empty(), "a frame goes out behind the one before it");
        self.old.extend_from_slice(&self.front[self.front_sent..]);
        if direct.is_some() {
            // Whoever skips the frame skips its places only.
            self.frames += u64::from(self.old.is_empty());
            return;
        }
        if !self.lent {
            if self.sums {
                self.sum.add(&self.stage[self.summed.at..]);
            }
            self.old.extend_from_slice(&self.stage[self.place.at..]);
        }
        self.old.extend_from_slice(&self.sum.trailer()[self.trailer_sent..]);
    }
}
