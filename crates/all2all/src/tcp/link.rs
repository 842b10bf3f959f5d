//! A pair of connections to one peer process, shared by the rank and the mesh's thread.
//!
//! The rank alone reads and writes the data connection, and writes the control connection; the mesh's
//! thread alone reads the control connection.

use super::frame::{Head, Notice};
use super::inbound::Inbound;
use super::outbound::Outbound;
use super::pipe::Pipe;
use super::socket;
use crate::LayerKey;
use crate::error::Phase;
use crate::lock;
use ids::{Epoch, Rank, StepId};
use std::io::IoSlice;
use std::net::{Shutdown, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

pub(super) struct Link {
    pub(super) peer: String,
    pub(super) data: Pipe,
    pub(super) control: TcpStream,
    told: Mutex<Told>,
    /// When the last notice came.
    heard: Mutex<Instant>,
    dead: AtomicBool,
    /// Frames that this side has sent whole.
    frames: AtomicU64,
    /// Where the data connection stands, while no rank uses it.
    streams: Mutex<Option<Streams>>,
}

/// Where both directions of a data connection stand.
pub(super) struct Streams {
    pub(super) inbound: Inbound,
    pub(super) outbound: Outbound,
}

/// What the peer has told about itself.
#[derive(Clone, Copy, Default)]
pub(super) struct Told {
    /// The newest epoch that failed there, and the frames before it failed.
    pub(super) faulted: Option<(Epoch, u64)>,
    /// All epochs before this one are left there, and the frames before it left them.
    pub(super) over: Option<(Epoch, u64)>,
}

impl Link {
    pub(super) fn new(peer: String, data: Pipe, control: TcpStream) -> Self {
        let nothing = Head {
            epoch: Epoch(0),
            key: LayerKey { step: StepId(0), layer: 0 },
            phase: Phase::Dispatch,
            from: Rank(0),
            to: Rank(0),
            rows: 0,
            row_bytes: 0,
            lent: 0,
            sequence: 0,
        };
        let streams =
            Streams { inbound: Inbound::new(nothing, &data), outbound: Outbound::new(&data) };
        Self {
            peer,
            data,
            control,
            told: Mutex::default(),
            heard: Mutex::new(Instant::now()),
            dead: AtomicBool::new(false),
            frames: AtomicU64::new(0),
            streams: Mutex::new(Some(streams)),
        }
    }

    /// Takes the data connection for a rank; `None` if it is in use.
    pub(super) fn take_streams(&self) -> Option<Streams> {
        lock(&self.streams).take()
    }

    pub(super) fn give_back(&self, streams: Streams) {
        *lock(&self.streams) = Some(streams);
    }

    pub(super) fn told(&self) -> Told {
        *lock(&self.told)
    }

    /// Notes what the peer tells.
    pub(super) fn heard(&self, notice: Notice) {
        *lock(&self.heard) = Instant::now();
        let mut told = lock(&self.told);
        match notice {
            Notice::Faulted { epoch, frames } => told.faulted = Some((epoch, frames)),
            Notice::Over { before, frames } => told.over = Some((before, frames)),
            Notice::Beat => {}
        }
    }

    /// When the peer last gave a sign of life.
    pub(super) fn last_heard(&self) -> Instant {
        *lock(&self.heard)
    }

    /// Notes how many frames have gone out whole.
    pub(super) fn sent(&self, frames: u64) {
        self.frames.store(frames, Ordering::Relaxed);
    }

    pub(super) fn frames(&self) -> u64 {
        self.frames.load(Ordering::Relaxed)
    }

    /// Tells the peer. Who leaves so many notices unread that one does not fit is given up. Who is gone may have sent
    /// rows before, which are still to be read: closing the data connection would lose them.
    pub(super) fn tell(&self, notice: Notice) {
        let bytes = notice.encode();
        match socket::send(&self.control, &[IoSlice::new(&bytes)]) {
            Ok(Some(sent)) if sent == bytes.len() => {}
            Ok(_) => self.close(),
            Err(_) => self.ended(),
        }
    }

    pub(super) fn dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// The control connection is over; what came on the data connection can still be read.
    pub(super) fn ended(&self) {
        self.dead.store(true, Ordering::Release);
    }

    /// Ends both connections; the peer notices at once.
    pub(super) fn close(&self) {
        self.ended();
        self.data.close();
        let _was_over = self.control.shutdown(Shutdown::Both);
    }
}
