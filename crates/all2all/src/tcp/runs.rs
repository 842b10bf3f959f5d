//! Rows that lie together: where the rows of one peer stand in a larger buffer.

use super::socket::PIECES;
use std::ops::Deref;

/// Bytes that lie together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Run {
    pub(super) start: usize,
    pub(super) bytes: usize,
}

/// The runs of a peer's rows, in the order of its rows.
#[derive(Default)]
pub(super) struct Runs {
    list: Vec<Run>,
    bytes: usize,
}

impl Runs {
    /// Makes room for so many rows, so that pushing them allocates nothing.
    pub(super) fn clear(&mut self, rows: usize) {
        self.list.clear();
        self.list.reserve(rows);
        self.bytes = 0;
    }

    pub(super) fn push(&mut self, start: usize, bytes: usize) {
        self.bytes += bytes;
        match self.list.last_mut() {
            Some(last) if last.start + last.bytes == start => last.bytes += bytes,
            _ => self.list.push(Run { start, bytes }),
        }
    }

    /// The runs, in order.
    pub(super) fn iter(&self) -> impl ExactSizeIterator<Item = Run> + '_ {
        self.list.iter().copied()
    }

    /// Bytes of all runs.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The piece at a place: the rest of its run, but at most `most` bytes. Empty at the end.
    pub(super) fn piece(&self, place: Place, most: usize) -> Run {
        match self.list.get(place.run) {
            Some(run) => {
                let (start, bytes) = (run.start + place.within, run.bytes - place.within);
                Run { start, bytes: bytes.min(most) }
            }
            None => Run { start: 0, bytes: 0 },
        }
    }

    /// Visits the pieces of the next `bytes` bytes and moves the place behind them.
    pub(super) fn walk(&self, place: &mut Place, bytes: usize, mut visit: impl FnMut(Run)) {
        let mut rest = bytes;
        while 0 < rest {
            let piece = self.piece(*place, rest);
            assert!(0 < piece.bytes, "nobody walks beyond the end");
            visit(piece);
            rest -= piece.bytes;
            self.step(place, piece.bytes);
        }
    }

    /// Moves a place by a piece of its run.
    pub(super) fn step(&self, place: &mut Place, bytes: usize) {
        place.at += bytes;
        place.within += bytes;
        if self.list.get(place.run).is_some_and(|run| run.bytes == place.within) {
            (place.run, place.within) = (place.run + 1, 0);
        }
    }
}

/// The next pieces of runs, for one call of the system: start and length.
pub(super) struct Pieces {
    list: [(usize, usize); PIECES],
    count: usize,
    bytes: usize,
}

impl Pieces {
    pub(super) fn one(start: usize, bytes: usize) -> Self {
        let mut list = [(0, 0); PIECES];
        list[0] = (start, bytes);
        Self { list, count: 1, bytes }
    }

    /// Those from a place on, `most` bytes of them.
    pub(super) fn next(runs: &Runs, mut place: Place, most: usize) -> Self {
        let mut pieces = Self { list: [(0, 0); PIECES], count: 0, bytes: 0 };
        while pieces.count < PIECES {
            let run = runs.piece(place, most - pieces.bytes);
            if run.bytes == 0 {
                break;
            }
            pieces.list[pieces.count] = (run.start, run.bytes);
            pieces.count += 1;
            pieces.bytes += run.bytes;
            runs.step(&mut place, run.bytes);
        }
        pieces
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Deref for Pieces {
    type Target = [(usize, usize)];

    fn deref(&self) -> &[(usize, usize)] {
        &self.list[..self.count]
    }
}

/// A place between the bytes of runs.
#[derive(Clone, Copy, Default)]
pub(super) struct Place {
    run: usize,
    within: usize,
    /// Bytes before it.
    pub(super) at: usize,
}

/// Copies the runs of `from` into `to`, one after the other.
pub(super) fn gather(from: &[u8], runs: &Runs, to: &mut Vec<u8>) {
    to.clear();
    to.reserve(runs.bytes());
    runs.walk(&mut Place::default(), runs.bytes(), |run| {
        to.extend_from_slice(&from[run.start..][..run.bytes]);
    });
}

/// Copies bytes that lie together into runs.
pub(super) fn scatter(from: &[u8], to: &mut [u8], runs: &Runs) {
    let mut rest = from;
    runs.walk(&mut Place::default(), from.len(), |run| {
        let (here, behind) = rest.split_at(run.bytes);
        to[run.start..][..run.bytes].copy_from_slice(here);
        rest = behind;
    });
}

/// Copies the next bytes of runs, from a place on, into other runs, and moves both places behind them.
pub(super) fn transfer(
    bytes: usize,
    (from, runs, at): (&[u8], &Runs, &mut Place),
    (to, into, place): (&mut [u8], &Runs, &mut Place),
) {
    runs.walk(at, bytes, |piece| {
        let mut rest = &from[piece.start..][..piece.bytes];
        into.walk(place, piece.bytes, |run| {
            let (here, behind) = rest.split_at(run.bytes);
            to[run.start..][..run.bytes].copy_from_slice(here);
            rest = behind;
        });
    });
}
