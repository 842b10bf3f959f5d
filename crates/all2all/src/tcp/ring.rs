//! Bytes between two processes of one host, through memory that both have mapped.
//!
//! The side that connects makes a memory file with a ring for each direction and says in its greeting where
//! the file is found; the other side opens it, if it can, and compares the greeting at its start. So nothing
//! has a name that could be left behind, and where the two cannot share memory they keep to the connection.
//!
//! ```text
//!   file:  greeting │ caller's ring: written, read, flags, place of rows │ other ring: the same │ bytes │ bytes
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
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::arena::{Arena, Place, Window};
use super::direct::{LENT_MIN, Reach, SEEN_MIN, Secret, Where};
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
/// Sequence of the writer's frame, and bytes of it that the reader has copied right out of the writer's memory.
const TAKEN: usize = 512;
/// What of that memory the reader can read: sum of the two.
const TAKES: usize = 520;
const ALL: u32 = 1;
const ITS_ARENA: u32 = 2;
/// Where the rows of the writer's frame are: sequence and kind, byte, address.
const LENDS: usize = 640;
const STAGE_FROM: usize = 648;
const STAGE_AT: usize = 656;
/// How to reach the writer's memory.
const PROCESS: usize = 768;
const SECRET_AT: usize = 776;
const SECRET: usize = 784;
/// Its arena.
const ARENA_FILE: usize = 792;
const ARENA_AT: usize = 800;
const ARENA_SIGN: usize = 808;
const BYTES: [usize; 2] = [4096, 4096 + RING];
const FILE: usize = 4096 + 2 * RING;

/// A memory file that a caller offers.
pub(super) struct Offer {
    file: OwnedFd,
    map: Map,
    own: Own,
}

/// What a peer may read of this process's memory.
struct Own {
    secret: Secret,
    arena: Option<Arc<Arena>>,
}

/// Where an offered file is found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Found {
    pub(super) process: u32,
    pub(super) file: u32,
}

impl Offer {
    /// Makes a file that can neither shrink nor grow, so that a peer's access to it cannot fail.
    pub(super) fn new(arena: Option<&Arc<Arena>>) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("exchange", flags)?;
        rustix::fs::ftruncate(&file, FILE as u64)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
        let (map, own) = (Map::new(&file)?, Own::new(arena));
        map.introduce(0, &own)?;
        Ok(Self { file, map, own })
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
        let Self { map, own, .. } = self;
        Ring::new(map, 0, own)
    }
}

/// Opens an offered file, if it is the one that was meant.
pub(super) fn accept(
    found: Found,
    hello: &[u8; HELLO],
    arena: Option<&Arc<Arena>>,
) -> io::Result<Ring> {
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
    if there != *hello {
        return Err(ErrorKind::InvalidData.into());
    }
    let own = Own::new(arena);
    map.introduce(1, &own)?;
    Ok(Ring::new(map, 1, own))
}

impl Own {
    fn new(arena: Option<&Arc<Arena>>) -> Self {
        Self { secret: Secret::new(), arena: arena.cloned() }
    }
}

/// One side of a pair of rings.
pub(super) struct Ring {
    map: Map,
    /// The ring that this side writes.
    out: usize,
    /// The peer's memory.
    reach: Reach,
    /// A part of it that is mapped here.
    window: Option<Window>,
    /// What the peer finds in this process's memory.
    own: Own,
}

impl Ring {
    /// Both sides are known by now.
    fn new(map: Map, out: usize, own: Own) -> Self {
        let (reach, place) = map.introduced(1 - out);
        // None if the peer has no arena, or it cannot be reached.
        let window = Window::open(reach.process, place).ok();
        let all = if reach.works() { ALL } else { 0 };
        let takes = all + if window.is_some() { ITS_ARENA } else { 0 };
        map.flag(RINGS[1 - out] + TAKES).store(takes, Ordering::Release);
        Self { map, out, reach, window, own }
    }

    /// Whether the peer should copy so many bytes of rows right out of this process's memory. What is staged later is
    /// not in the arena, so it has to be able to read all.
    pub(super) fn lends(&self, rows: &[u8], bytes: u64) -> bool {
        let takes = self.map.flag(RINGS[self.out] + TAKES).load(Ordering::Acquire);
        let seen = takes & ITS_ARENA != 0;
        let seen = seen && self.own.arena.as_ref().is_some_and(|arena| arena.holds(rows));
        takes & ALL != 0 && (if seen { SEEN_MIN } else { LENT_MIN }) <= bytes
    }

    /// Copies pieces of the peer's memory (address, length) into the pieces of `rows` (offset, length), as many bytes
    /// as both hold, and returns how many.
    pub(super) fn copy(
        &self,
        from: &[(usize, usize)],
        rows: &mut [u8],
        pieces: &[(usize, usize)],
    ) -> io::Result<usize> {
        let seen = self.window.as_ref().and_then(|window| window.copy(from, rows, pieces));
        seen.map_or_else(|| self.reach.copy(from, rows, pieces), Ok)
    }

    /// Says where the rows of this side's frame are now. Behind this, those that lay elsewhere may be changed.
    pub(super) fn put(&self, sequence: u64, place: Where) {
        let at = RINGS[self.out];
        let kind = match place {
            Where::Lent => 0,
            Where::Staged { from, address } => {
                self.map.counter(at + STAGE_FROM).store(from, Ordering::Relaxed);
                self.map.counter(at + STAGE_AT).store(address, Ordering::Relaxed);
                1
            }
            Where::Void => 2,
        };
        self.map.counter(at + LENDS).store(sequence << 2 | kind, Ordering::Release);
        // The word before whatever the caller writes next.
        fence(Ordering::SeqCst);
    }

    /// Where the rows of the peer's frame are; an error if it never had such a frame.
    pub(super) fn find(&self, sequence: u64) -> io::Result<Where> {
        let at = RINGS[1 - self.out];
        // What was copied before this was copied before the word is read.
        fence(Ordering::SeqCst);
        let word = self.map.counter(at + LENDS).load(Ordering::Acquire);
        let from = self.map.counter(at + STAGE_FROM).load(Ordering::Relaxed);
        let address = self.map.counter(at + STAGE_AT).load(Ordering::Relaxed);
        match (word >> 2, word & 3) {
            (now, 0) if now == sequence => Ok(Where::Lent),
            (now, 1) if now == sequence => Ok(Where::Staged { from, address }),
            (now, 2) if now == sequence => Ok(Where::Void),
            // A frame that is not taken whole is followed by another one only if it was given up.
            (now, 0..=2) if sequence < now => Ok(Where::Void),
            _ => Err(ErrorKind::InvalidData.into()),
        }
    }

    /// Notes how many bytes of a frame were copied out of the peer's memory. Returns whether it has to be woken.
    pub(super) fn took(&self, sequence: u64, bytes: u32) -> bool {
        let taken = self.map.counter(RINGS[1 - self.out] + TAKEN);
        taken.store(sequence << 32 | u64::from(bytes), Ordering::Release);
        wake(End::new(&self.map, 1 - self.out).writer_sleeps)
    }

    /// How many bytes of a frame the peer has copied out of this process's memory. What it says late of a
    /// frame that was given up does not count for the next one.
    pub(super) fn taken(&self, sequence: u64) -> u64 {
        let word = self.map.counter(RINGS[self.out] + TAKEN).load(Ordering::Acquire);
        if word >> 32 == sequence & 0xffff_ffff { word & 0xffff_ffff } else { 0 }
    }

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
        if wants.writes != Room::Enough {
            out.writer_sleeps.store(1, Ordering::Relaxed);
        }
        // The flags before the counters: the other side moves its counter before it looks at the flag.
        fence(Ordering::SeqCst);
        let comes = wants.reads && self.filled(&into).map_or(true, |filled| 0 < filled);
        let goes = match wants.writes {
            Room::Enough => false,
            Room::Bytes => self.filled(&out).map_or(true, |filled| filled < RING),
            Room::Taken { sequence, bytes } => self.taken(sequence) != bytes,
        };
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
    pub(super) writes: Room,
}

/// What a writer waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// Nothing.
    Enough,
    /// That bytes can be written.
    Bytes,
    /// That the peer takes more than these bytes of the frame that it was lent.
    Taken { sequence: u64, bytes: u64 },
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

    /// Tells the reader of a ring how to reach its writer's memory.
    fn introduce(&self, ring: usize, own: &Own) -> io::Result<()> {
        let Reach { process, address, secret } = own.secret.reach();
        let arena = own.arena.as_ref().map(|arena| arena.place()).transpose()?;
        let Place { file, base, sign } = arena.unwrap_or(Place { file: 0, base: 0, sign: 0 });
        self.flag(RINGS[ring] + ARENA_FILE).store(file, Ordering::Relaxed);
        self.counter(RINGS[ring] + ARENA_AT).store(base, Ordering::Relaxed);
        self.counter(RINGS[ring] + ARENA_SIGN).store(sign, Ordering::Relaxed);
        self.flag(RINGS[ring] + PROCESS).store(process, Ordering::Relaxed);
        self.counter(RINGS[ring] + SECRET_AT).store(address, Ordering::Relaxed);
        self.counter(RINGS[ring] + SECRET).store(secret, Ordering::Release);
        Ok(())
    }

    fn introduced(&self, ring: usize) -> (Reach, Place) {
        let secret = self.counter(RINGS[ring] + SECRET).load(Ordering::Acquire);
        let address = self.counter(RINGS[ring] + SECRET_AT).load(Ordering::Relaxed);
        let process = self.flag(RINGS[ring] + PROCESS).load(Ordering::Relaxed);
        let file = self.flag(RINGS[ring] + ARENA_FILE).load(Ordering::Relaxed);
        let base = self.counter(RINGS[ring] + ARENA_AT).load(Ordering::Relaxed);
        let sign = self.counter(RINGS[ring] + ARENA_SIGN).load(Ordering::Relaxed);
        (Reach { process, address, secret }, Place { file, base, sign })
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
