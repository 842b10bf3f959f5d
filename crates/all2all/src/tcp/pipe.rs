//! How the bytes of a data connection travel: through the connection, or through shared memory beside it.

use super::ring::{Ring, Room, Wants};
use super::socket::{self, watch};
use std::io::{self, IoSlice};
use std::net::{Shutdown, TcpStream};

pub(super) struct Pipe {
    stream: TcpStream,
    /// If the peer shares memory with this process, the connection carries only bytes that wake.
    ring: Option<Ring>,
    /// The connection does not leave this machine.
    is_near: bool,
}

impl Pipe {
    pub(super) fn new(stream: TcpStream, ring: Option<Ring>) -> Self {
        let is_near = socket::is_near(&stream);
        Self { stream, ring, is_near }
    }

    /// Whether rows need a checksum. Memory keeps its bytes; what does not is a broken machine, whose own
    /// rows would not be safe either.
    pub(super) fn sums(&self) -> bool {
        self.ring.is_none()
    }

    /// Sends what fits; `None` if nothing does.
    pub(super) fn send(&self, pieces: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        match &self.ring {
            Some(ring) => Ok(self.woken(ring.send(pieces)?)),
            None => socket::send(&self.stream, pieces),
        }
    }

    /// Receives into a buffer; `None` if nothing is there, 0 at the end.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match &self.ring {
            Some(ring) => Ok(self.woken(ring.receive(&mut [], &[], buffer)?)),
            None => socket::receive(&self.stream, buffer),
        }
    }

    /// Receives into the pieces of `rows` (offset, length) and then into `rest`.
    pub(super) fn receive_pieces(
        &self,
        rows: &mut [u8],
        pieces: &[(usize, usize)],
        rest: &mut [u8],
    ) -> io::Result<Option<usize>> {
        match &self.ring {
            Some(ring) => Ok(self.woken(ring.receive(rows, pieces, rest)?)),
            None => socket::receive_pieces(&self.stream, rows, pieces, rest),
        }
    }

    /// Whether rows of large frames should go to one peer after the other. Between machines that would leave the
    /// network idle.
    pub(super) fn is_paired(&self) -> bool {
        self.is_near && self.ring.is_none()
    }

    /// The memory beside the connection.
    pub(super) fn ring(&self) -> Option<&Ring> {
        self.ring.as_ref()
    }

    /// Notes how many bytes of a frame were copied right out of the peer's memory.
    pub(super) fn took(&self, sequence: u64, bytes: u32) {
        let wakes = self.ring.as_ref().is_some_and(|ring| ring.took(sequence, bytes));
        self.woken((None, wakes));
    }

    /// Wakes the peer if it sleeps. A connection too full for one more byte has woken it already, and who is gone
    /// needs it no more: perhaps because it had waited for just these bytes. Its end is noticed by other means.
    fn woken(&self, (moved, wakes): (Option<usize>, bool)) -> Option<usize> {
        if wakes {
            let _gone = socket::send(&self.stream, &[IoSlice::new(&[1])]);
        }
        moved
    }

    /// What to poll for to know whether there is anything to read; none where a look into memory tells.
    pub(super) fn readable(&self) -> Option<libc::pollfd> {
        self.ring.is_none().then(|| watch(&self.stream, libc::POLLIN))
    }

    /// What to poll for before sleeping; `None` if there is no need to sleep.
    pub(super) fn fall_asleep(&self, wants: Wants) -> Option<libc::pollfd> {
        let reads = if wants.reads { libc::POLLIN } else { 0 };
        let writes = if wants.writes != Room::Enough { libc::POLLOUT } else { 0 };
        match &self.ring {
            Some(ring) if ring.fall_asleep(wants) => None,
            Some(_) => Some(watch(&self.stream, libc::POLLIN)),
            None => Some(watch(&self.stream, reads | writes)),
        }
    }

    /// After sleeping. False if the peer is gone.
    pub(super) fn wake_up(&self) -> bool {
        let Some(ring) = &self.ring else { return true };
        ring.wake_up();
        !matches!(socket::receive(&self.stream, &mut [0; 64]), Ok(Some(0)) | Err(_))
    }

    pub(super) fn close(&self) {
        let _was_over = self.stream.shutdown(Shutdown::Both);
    }
}
