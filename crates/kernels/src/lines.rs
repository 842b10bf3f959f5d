//! Memory for packed weights: zeroed, aligned to cache lines, in huge pages where it is large.

use std::ptr::NonNull;

/// 64 bytes: the unit in which weights are packed and read.
pub(crate) const LINE_BYTES: usize = 64;

/// An owned, zeroed region of cache lines.
///
/// It is mapped straight from the kernel: pages appear when they are first written (several readers
/// then fill a checkpoint in parallel), and huge pages spare the walk of page tables, which costs a
/// third of the read bandwidth of a large matrix.
pub(crate) struct Lines {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain memory with one owner; shared references only read.
unsafe impl Send for Lines {}
// SAFETY: as above.
unsafe impl Sync for Lines {}

impl Lines {
    /// Maps `lines` zeroed lines.
    ///
    /// # Errors
    ///
    /// The operating system's error when it refuses the memory.
    pub(crate) fn zeroed(lines: usize) -> std::io::Result<Self> {
        let bytes = lines * LINE_BYTES;
        if bytes == 0 {
            return Ok(Self { start: NonNull::dangling(), bytes });
        }
        // SAFETY: an anonymous private mapping of a non-zero length touches no existing memory.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        // Advice only: where the system has no huge pages the call fails and nothing is lost.
        // SAFETY: the range was just mapped.
        #[cfg(target_os = "linux")]
        unsafe {
            libc::madvise(start, bytes, libc::MADV_HUGEPAGE);
        }
        let start = NonNull::new(start.cast()).expect("a successful mmap is not null");
        Ok(Self { start, bytes })
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.start.as_ptr()
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: `bytes` readable, initialised (zeroed) bytes, owned by `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` is the only access.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: the mapping made by `zeroed`, whole, and not used after this.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
        }
    }
}
