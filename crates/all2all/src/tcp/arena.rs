//! Memory of a process that its peers on the same host can read.
//!
//! Rows in it are copied by their receiver with plain loads, once. Every mesh has one memory file of a fixed size,
//! mapped at once and filled as it is used; peers find it as they find the rings ([`ring`](super::ring)) and map all
//! of it, so that no buffer has to be told of. It is sealed: nobody but this process can ever write it, or make it
//! shorter.
//!
//! Blocks have sizes of powers of two, and those that are free wait for the next one of their size.

use crate::lock;
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind};
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

/// Addresses that the file takes in this process and in every peer; pages come with use. Rows and results of the
/// largest steps take a few hundred MiB.
const ARENA: usize = 8 << 30;

/// Bytes of a large page, of x86-64 and of most ARM systems. Elsewhere small ones serve as well.
const LARGE_PAGE: usize = 2 << 20;

/// Smallest block.
const BLOCK_MIN: usize = LARGE_PAGE;

/// Blocks have sizes of so many powers of two.
const SIZES: usize = 13;

/// The memory file of a mesh.
pub(super) struct Arena {
    file: OwnedFd,
    map: Map,
    /// Stands in the file's first bytes, by which peers know it.
    sign: u64,
    free: Mutex<Free>,
}

/// Blocks that are not in use.
struct Free {
    /// Everything from here on.
    end: usize,
    /// `[SIZES]`: blocks that were used.
    used: [Vec<usize>; SIZES],
}

/// Where an arena is found, and where its process has mapped it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Place {
    pub(super) file: u32,
    pub(super) base: u64,
    pub(super) sign: u64,
}

impl Arena {
    pub(super) fn new() -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("rows", flags)?;
        rustix::fs::ftruncate(&file, ARENA as u64)?;
        let mut map = Map::new(&file, ProtFlags::READ | ProtFlags::WRITE)?;
        // Behind the only writable mapping, so that there will be no other.
        rustix::fs::fcntl_add_seals(&file, SEALS | SealFlags::GROW | SealFlags::SEAL)?;
        let sign = RandomState::new().hash_one(std::process::id());
        map.slice_mut(0, 8).copy_from_slice(&sign.to_ne_bytes());
        let free = Mutex::new(Free { end: BLOCK_MIN, used: Default::default() });
        Ok(Self { file, map, sign, free })
    }

    pub(super) fn place(&self) -> io::Result<Place> {
        let file = u32::try_from(self.file.as_raw_fd()).map_err(|_| ErrorKind::InvalidInput)?;
        Ok(Place { file, base: self.map.base.as_ptr() as u64, sign: self.sign })
    }

    /// Whether all of these bytes lie here.
    pub(super) fn holds(&self, bytes: &[u8]) -> bool {
        let base = self.map.base.as_ptr() as usize;
        let at = (bytes.as_ptr() as usize).checked_sub(base);
        at.is_some_and(|at| at < ARENA && bytes.len() <= ARENA - at)
    }

    /// Takes a block for so many bytes; `None` if there is no room.
    fn take(self: &Arc<Self>, bytes: usize) -> Option<Block> {
        let size = bytes.max(BLOCK_MIN).checked_next_power_of_two()?;
        let which = (size / BLOCK_MIN).trailing_zeros() as usize;
        let mut free = lock(&self.free);
        let start = match free.used.get_mut(which)?.pop() {
            Some(start) => start,
            None if ARENA - free.end < size => return None,
            None => {
                free.end += size;
                free.end - size
            }
        };
        drop(free);
        let block = Block { arena: Arc::clone(self), start, which, bytes };
        self.map.use_large_pages(start, bytes.next_multiple_of(LARGE_PAGE));
        Some(block)
    }
}

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::FUTURE_WRITE);

/// A part of an arena, for one owner.
struct Block {
    arena: Arc<Arena>,
    start: usize,
    which: usize,
    bytes: usize,
}

impl Drop for Block {
    fn drop(&mut self) {
        lock(&self.arena.free).used[self.which].push(self.start);
    }
}

/// Bytes for rows that processes of the same host can read right where they are, if that works; else just bytes.
#[derive(Default)]
pub struct Buffer(Bytes);

enum Bytes {
    Block(Block),
    Heap(Vec<u8>),
}

impl Default for Bytes {
    fn default() -> Self {
        Self::Heap(Vec::new())
    }
}

impl Buffer {
    pub(super) fn new(arena: Option<&Arc<Arena>>, bytes: usize) -> Self {
        let block = arena.filter(|_| 0 < bytes).and_then(|arena| arena.take(bytes));
        Self(block.map_or_else(|| Bytes::Heap(vec![0; bytes]), Bytes::Block))
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Bytes::Block(block) => block.arena.map.slice(block.start, block.bytes),
            Bytes::Heap(bytes) => bytes,
        }
    }
}

impl DerefMut for Buffer {
    #[allow(unsafe_code, reason = "owners of blocks share the mapping, not their bytes")]
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Bytes::Block(Block { arena, start, bytes, .. }) => {
                let at = arena.map.base.as_ptr().wrapping_add(*start);
                // SAFETY: the block lies inside of the mapping, which lives as long as the arena. It has one owner,
                // which is borrowed mutably, and no other process can write the file.
                unsafe { std::slice::from_raw_parts_mut(at, *bytes) }
            }
            Bytes::Heap(bytes) => bytes,
        }
    }
}

/// A peer's arena, mapped here.
pub(super) struct Window {
    map: Map,
    base: u64,
}

impl Window {
    /// Opens a process's arena, if it is the one that was meant.
    pub(super) fn open(process: u32, place: Place) -> io::Result<Self> {
        let path = format!("/proc/{process}/fd/{}", place.file);
        // As for the rings: opening it must not wait for anything.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = rustix::fs::open(path, flags, Mode::empty())?;
        let seals = rustix::fs::fcntl_get_seals(&file)?;
        let size = rustix::fs::fstat(&file)?.st_size;
        if !seals.contains(SEALS) || usize::try_from(size) != Ok(ARENA) {
            return Err(ErrorKind::InvalidData.into());
        }
        let window = Self { map: Map::new(&file, ProtFlags::READ)?, base: place.base };
        let mut sign = [0; 8];
        window.fetch(0, &mut sign);
        if u64::from_ne_bytes(sign) == place.sign {
            Ok(window)
        } else {
            Err(ErrorKind::NotFound.into())
        }
    }

    /// Copies pieces of that process's memory (address, length) into the pieces of `rows` (offset, length), as many
    /// bytes as both hold, and returns how many; `None` if not all of them are here.
    pub(super) fn copy(
        &self,
        from: &[(usize, usize)],
        rows: &mut [u8],
        pieces: &[(usize, usize)],
    ) -> Option<usize> {
        let within = |&(address, bytes): &(usize, usize)| {
            let at = usize::try_from((address as u64).checked_sub(self.base)?).ok()?;
            (at <= ARENA && bytes <= ARENA - at).then_some(at)
        };
        if !from.iter().all(|piece| within(piece).is_some()) {
            return None;
        }
        let mut sources = from.iter().filter_map(|piece| Some((within(piece)?, piece.1)));
        let (mut at, mut left, mut copied) = (0, 0, 0);
        for &(offset, bytes) in pieces {
            let mut into = &mut rows[offset..][..bytes];
            while !into.is_empty() {
                if left == 0 {
                    let Some(next) = sources.next() else { return Some(copied) };
                    (at, left) = next;
                }
                let now = left.min(into.len());
                let (here, behind) = into.split_at_mut(now);
                self.fetch(at, here);
                into = behind;
                (at, left, copied) = (at + now, left - now, copied + now);
            }
        }
        Some(copied)
    }

    #[allow(unsafe_code, reason = "memory that another process changes is no Rust reference")]
    fn fetch(&self, offset: usize, into: &mut [u8]) {
        assert!(offset <= ARENA && into.len() <= ARENA - offset, "inside of the file");
        let from = self.map.base.as_ptr().wrapping_add(offset);
        // SAFETY: the range lies in the mapping, as asserted, and is no part of `into`, which is memory of this
        // process. A peer that writes at the same time leaves bytes of either kind; who asked forgets them.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }
}

/// All of an arena.
struct Map {
    /// `RESERVED` addresses.
    reserved: NonNull<u8>,
    /// The first of them that begins a large page; the file is mapped from here on.
    base: NonNull<u8>,
}

/// Addresses that hold an arena wherever the kernel puts them.
const RESERVED: usize = ARENA + LARGE_PAGE;

#[allow(unsafe_code, reason = "a pointer to memory that is mapped until the value is dropped")]
// SAFETY: the mapping belongs to no thread.
unsafe impl Send for Map {}
#[allow(unsafe_code, reason = "as above")]
// SAFETY: as above; who may write a block is decided by its owner, and other processes only read.
unsafe impl Sync for Map {}

#[allow(unsafe_code, reason = "a mapping is memory without an owner that Rust knows")]
impl Map {
    fn new(file: &OwnedFd, protection: ProtFlags) -> io::Result<Self> {
        let (flags, free) = (MapFlags::PRIVATE | MapFlags::NORESERVE, std::ptr::null_mut());
        let none = ProtFlags::empty();
        // SAFETY: the kernel chooses a free place. It holds nothing, and nobody can access it yet.
        let reserved = unsafe { rustix::mm::mmap_anonymous(free, RESERVED, none, flags) }?;
        let reserved = NonNull::new(reserved.cast::<u8>()).ok_or(ErrorKind::OutOfMemory)?;
        let within =
            reserved.as_ptr().addr().next_multiple_of(LARGE_PAGE) - reserved.as_ptr().addr();
        let base = reserved.as_ptr().wrapping_add(within);
        let map = Self { reserved, base: NonNull::new(base).ok_or(ErrorKind::OutOfMemory)? };
        let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: it replaces a part of the addresses above, which are nobody else's: they are `LARGE_PAGE` more than
        // `ARENA`, and fewer lie before `base`. The file has `ARENA` bytes, or nobody goes beyond those it has.
        let base = unsafe { rustix::mm::mmap(base.cast(), ARENA, protection, flags, file, 0) }?;
        // SAFETY: the whole of the mapping above; this advice changes no byte. Without large pages it is slower.
        let _small_pages = unsafe { rustix::mm::madvise(base, ARENA, Advice::LinuxHugepage) };
        Ok(map)
    }

    /// Puts a part that nobody uses yet into large pages, if the system has enough of them. The advice given for all of
    /// a mapping is heard only where the system's settings say so for shared memory, which is rare; this is a request.
    /// A peer that maps the file gets the same pages.
    fn use_large_pages(&self, start: usize, bytes: usize) {
        assert!(start <= ARENA && bytes <= ARENA - start, "inside of the file");
        let at = self.base.as_ptr().wrapping_add(start);
        for page in (0..bytes).step_by(LARGE_PAGE) {
            // SAFETY: inside of the mapping, as asserted, which is writable: only the arena's own map has blocks. The
            // block is not given out yet. A large page is made of at least one small one, so one has to be there.
            unsafe { at.wrapping_add(page).write_volatile(0) };
        }
        // SAFETY: the same part. The bytes stay as they are, whatever becomes of the request.
        let _small_pages = unsafe { libc::madvise(at.cast(), bytes, libc::MADV_COLLAPSE) };
    }

    /// Bytes of this process's own arena.
    fn slice(&self, start: usize, bytes: usize) -> &[u8] {
        assert!(start <= ARENA && bytes <= ARENA - start, "inside of the file");
        // SAFETY: inside of the mapping, which the borrow keeps. Only the owner of the block writes it, and the
        // caller borrows from that one.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().wrapping_add(start), bytes) }
    }

    fn slice_mut(&mut self, start: usize, bytes: usize) -> &mut [u8] {
        assert!(start <= ARENA && bytes <= ARENA - start, "inside of the file");
        // SAFETY: as above; nobody else has the mapping.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().wrapping_add(start), bytes) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        #[allow(unsafe_code, reason = "the end of the mapping")]
        // SAFETY: all that `new` has mapped; nobody borrows from it any more.
        let unmapped = unsafe { rustix::mm::munmap(self.reserved.as_ptr().cast(), RESERVED) };
        debug_assert!(unmapped.is_ok(), "the mapping is whole");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_read_through_a_window_and_never_written() {
        let arena = Arc::new(Arena::new().unwrap());
        let place = arena.place().unwrap();
        let window = Window::open(std::process::id(), place).unwrap();
        let mut buffer = Buffer::new(Some(&arena), 100);
        assert!(arena.holds(&buffer) && !arena.holds(&[0; 4]));
        buffer.fill(9);
        let (at, mut rows) = (buffer.as_ptr() as usize, [0; 10]);
        assert_eq!(window.copy(&[(at, 3), (at + 90, 4)], &mut rows, &[(5, 5), (0, 5)]), Some(7));
        assert_eq!(rows, [9, 9, 0, 0, 0, 9, 9, 9, 9, 9]);
        assert_eq!(window.copy(&[(at, 3), (8, 4)], &mut rows, &[(0, 5)]), None);
        drop(buffer);
        assert_eq!(Buffer::new(Some(&arena), 7).as_ptr() as usize, at);
        let path = format!("/proc/self/fd/{}", place.file);
        let file = rustix::fs::open(path, OFlags::RDWR, Mode::empty()).unwrap();
        assert!(Map::new(&file, ProtFlags::READ | ProtFlags::WRITE).is_err());
        let other = Place { sign: !place.sign, ..place };
        assert!(Window::open(std::process::id(), other).is_err());
    }
}
