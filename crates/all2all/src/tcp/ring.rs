//! Bytes between two processes of one host, through memory that both have mapped.
//!
//! The side that connects makes a memory file with a ring for each direction and says in its greeting where
//! the file is found; the other side opens it, if it can, and compares the greeting at its start. So nothing
//! has a name that could be left behind, and where the two cannot share memory they keep to the connection.
//!
//! ```text
//!   file:  greeting │ caller's ring: written, read, flags │ other ring: the same │ bytes │ bytes
//! ```
//!
//! One side only writes a ring and the other only reads it. Both counters only rise. What the peer says is
//! not believed: a counter that cannot be right ends the connection, and the bytes are judged like those of
//! any connection.
//!
//! Who sleeps says so in a flag, looks once more, and is woken by a byte on the data connection; so a rank
//! can wait for rings and connections at once.

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::frame::HELLO;

/// Bytes that a ring holds: what a decode step sends, or pieces of a large frame that both sides work on
/// while they lie in the cache. Measured with 2, 4 and 8 ranks on 2 cores: a quarter is slower where ranks
/// share a core, since each turn moves less; four times as much is slower for frames up to 1 MiB.
const RING: usize = 1024 * 1024;

/// The other side sees bytes after so many, so that both copy at the same time.
const PUBLISH: usize = 32 * 1024;

/// Where things are in the file. Counters of different writers are on different cache lines.
const RINGS: [usize; 2] = [1024, 2048];
const WRITTEN: usize = 0;
const READ: usize = 128;
const READER_SLEEPS: usize = 256;
const WRITER_SLEEPS: usize = 384;
const BYTES: [usize; 2] = [4096, 4096 + RING];
const FILE: usize = 4096 + 2 * RING;

/// A memory file that a caller offers.
pub(super) struct Offer {
    file: OwnedFd,
    map: Map,
}

/// Where an offered file is found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Found {
    pub(super) process: u32,
    pub(super) file: u32,
}

impl Offer {
    /// Makes a file that can neither shrink nor grow, so that a peer's access to it cannot fail.
    pub(super) fn new() -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("exchange", flags)?;
        rustix::fs::ftruncate(&file, FILE as u64)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
        let map = Map::new(&file)?;
        Ok(Self { file, map })
    }

    pub(super) fn found(&self) -> io::Result<Found> {
        let file = u32::try_from(self.file.as_raw_fd()).map_err(|_| ErrorKind::InvalidInput)?;
        Ok(Found { process: std::process::id(), file })
    }

    /// Writes the greeting by which the other side knows the file.
    pub(super) fn sign(&self, hello: &[u8; HELLO]) {
        self.map.write(0, hello);
    }

    /// The caller's side, once the other one has the file.
    pub(super) fn taken(self) -> Ring {
        Ring { map: self.map, out: 0 }
    }
}

/// Opens an offered file, if it is the one that was meant.
pub(super) fn accept(found: Found, hello: &[u8; HELLO]) -> io::Result<Ring> {
    let path = format!("/proc/{}/fd/{}", found.process, found.file);
    // Another namespace may have another file by this name: opening it must not wait for anything.
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    let seals = rustix::fs::fcntl_get_seals(&file)?;
    let size = rustix::fs::fstat(&file)?.st_size;
    if !seals.contains(SealFlags::SHRINK) || usize::try_from(size) != Ok(FILE) {
        return Err(ErrorKind::InvalidData.into());
    }
    let map = Map::new(&file)?;
    let mut there = [0; HELLO];
    map.read(0, &mut there);
    if there == *hello { Ok(Ring { map, out: 1 }) } else { Err(ErrorKind::InvalidData.into()) }
}

/// One side of a pair of rings.
pub(super) struct Ring {
    map: Map,
    /// The ring that this side writes.
    out: usize,
}

impl Ring {
    /// Writes what fits; `None` if nothing does. The second tells whether the reader has to be woken.
    pub(super) fn send(&self, pieces: &[IoSlice<'_>]) -> io::Result<(Option<usize>, bool)> {
        let end = End::new(&self.map, self.out);
        let mut written = end.written.load(Ordering::Relaxed);
        let mut free = RING - self.filled(&end)?;
        let mut sent = 0;
        for piece in pieces {
            for part in piece.chunks(PUBLISH) {
                let part = &part[..part.len().min(free)];
                end.write(written, part);
                written += part.len() as u64;
                (sent, free) = (sent + part.len(), free - part.len());
                end.written.store(written, Ordering::Release);
            }
        }
        let wakes = 0 < sent && wake(end.reader_sleeps);
        Ok(((0 < sent).then_some(sent), wakes))
    }

    /// Reads into the pieces of `rows` (offset, length) and then into `rest`; `None` if nothing is there.
    pub(super) fn receive(
        &self,
        rows: &mut [u8],
        pieces: &[(usize, usize)],
        rest: &mut [u8],
    ) -> io::Result<(Option<usize>, bool)> {
        let end = End::new(&self.map, 1 - self.out);
        let mut read = end.read.load(Ordering::Relaxed);
        let mut here = self.filled(&end)?;
        let before = read;
        let mut take = |into: &mut [u8]| {
            for part in into.chunks_mut(PUBLISH) {
                let bytes = part.len().min(here);
                end.fetch(read, &mut part[..bytes]);
                read += bytes as u64;
                here -= bytes;
                end.read.store(read, Ordering::Release);
            }
        };
        for &(offset, bytes) in pieces {
            take(&mut rows[offset..][..bytes]);
        }
        take(rest);
        let came = usize::try_from(read - before).map_err(|_| ErrorKind::InvalidData)?;
        let wakes = 0 < came && wake(end.writer_sleeps);
        Ok(((0 < came).then_some(came), wakes))
    }

    /// Bytes in a ring.
    fn filled(&self, end: &End<'_>) -> io::Result<usize> {
        let written = end.written.load(Ordering::Acquire);
        let filled = written.wrapping_sub(end.read.load(Ordering::Acquire));
        let filled = usize::try_from(filled).ok().filter(|filled| *filled <= RING);
        filled.ok_or_else(|| ErrorKind::InvalidData.into())
    }

    /// Asks to be woken when there is something to read, or room to write. Returns whether there is already.
    pub(super) fn fall_asleep(&self, wants: Wants) -> bool {
        let (into, out) = (End::new(&self.map, 1 - self.out), End::new(&self.map, self.out));
        if wants.reads {
            into.reader_sleeps.store(1, Ordering::Relaxed);
        }
        if wants.writes {
            out.writer_sleeps.store(1, Ordering::Relaxed);
        }
        // The flags before the counters: the other side moves its counter before it looks at the flag.
        fence(Ordering::SeqCst);
        let comes = wants.reads && self.filled(&into).map_or(true, |filled| 0 < filled);
        let goes = wants.writes && self.filled(&out).map_or(true, |filled| filled < RING);
        comes || goes
    }

    /// Needs no waking any more.
    pub(super) fn wake_up(&self) {
        End::new(&self.map, 1 - self.out).reader_sleeps.store(0, Ordering::Relaxed);
        End::new(&self.map, self.out).writer_sleeps.store(0, Ordering::Relaxed);
    }
}

/// What a rank waits for at a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Wants {
    pub(super) reads: bool,
    pub(super) writes: bool,
}

/// Whether the other side sleeps; it is told once.
fn wake(sleeps: &AtomicU32) -> bool {
    fence(Ordering::SeqCst);
    sleeps.load(Ordering::Relaxed) != 0 && sleeps.swap(0, Ordering::Relaxed) != 0
}

/// A ring within the mapped file.
struct End<'a> {
    map: &'a Map,
    bytes: usize,
    written: &'a AtomicU64,
    read: &'a AtomicU64,
    reader_sleeps: &'a AtomicU32,
    writer_sleeps: &'a AtomicU32,
}

impl<'a> End<'a> {
    fn new(map: &'a Map, ring: usize) -> Self {
        let at = RINGS[ring];
        Self {
            map,
            bytes: BYTES[ring],
            written: map.counter(at + WRITTEN),
            read: map.counter(at + READ),
            reader_sleeps: map.flag(at + READER_SLEEPS),
            writer_sleeps: map.flag(at + WRITER_SLEEPS),
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let (at, first) = split(at, bytes.len());
        self.map.write(self.bytes + at, &bytes[..first]);
        self.map.write(self.bytes, &bytes[first..]);
    }

    fn fetch(&self, at: u64, into: &mut [u8]) {
        let (at, first) = split(at, into.len());
        self.map.read(self.bytes + at, &mut into[..first]);
        self.map.read(self.bytes, &mut into[first..]);
    }
}

/// Where a counter points to in its ring, and how many of `bytes` fit before the end.
fn split(at: u64, bytes: usize) -> (usize, usize) {
    let at = usize::try_from(at % RING as u64).expect("less than the ring");
    (at, bytes.min(RING - at))
}

/// The mapped file.
struct Map(NonNull<u8>);

#[allow(unsafe_code, reason = "a pointer to memory that is mapped until the value is dropped")]
// SAFETY: the mapping belongs to no thread, and is accessed by atomics and by copies of bytes only.
unsafe impl Send for Map {}
#[allow(unsafe_code, reason = "as above")]
// SAFETY: as above; of two threads that share the value, one writes a ring and one reads it.
unsafe impl Sync for Map {}

#[allow(unsafe_code, reason = "memory that another process changes is no Rust reference")]
impl Map {
    fn new(file: &OwnedFd) -> io::Result<Self> {
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: the kernel chooses a free place. The file has at least `FILE` bytes and is sealed
        // against shrinking, so every access below succeeds.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), FILE, protection, flags, file, 0) }?;
        Ok(Self(NonNull::new(base.cast()).ok_or(ErrorKind::OutOfMemory)?))
    }

    fn counter(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= BYTES[0], "a counter of the file");
        // SAFETY: aligned and inside of the mapping, which outlives the borrow; only atomics touch it.
        unsafe { AtomicU64::from_ptr(self.0.as_ptr().wrapping_add(offset).cast()) }
    }

    fn flag(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= BYTES[0], "a flag of the file");
        // SAFETY: as for `counter`.
        unsafe { AtomicU32::from_ptr(self.0.as_ptr().wrapping_add(offset).cast()) }
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset <= FILE && bytes.len() <= FILE - offset, "inside of the file");
        let to = self.0.as_ptr().wrapping_add(offset);
        // SAFETY: the range lies in the mapping, as asserted, and apart from any Rust object. The peer
        // reads it only after the counter has passed it; if it does so before, that harms only the peer.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        assert!(offset <= FILE && into.len() <= FILE - offset, "inside of the file");
        let from = self.0.as_ptr().wrapping_add(offset);
        // SAFETY: as for `write`. A peer that writes at the same time breaks its promise, and leaves bytes
        // of either kind, which are judged like any bytes.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        #[allow(unsafe_code, reason = "the end of the mapping")]
        // SAFETY: mapped by `new` with this length; nobody borrows from it any more.
        let unmapped = unsafe { rustix::mm::munmap(self.0.as_ptr().cast(), FILE) };
        debug_assert!(unmapped.is_ok(), "the mapping is whole");
    }
}
