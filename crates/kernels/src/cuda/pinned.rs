//! Host memory that a GPU reads and writes by itself.
//!
//! Copies from and to other memory may wait for the stream inside the driver, without a limit. Those that go through
//! here only ever wait where the caller can give up.

use cudarc::driver::result::{self, DriverError};
use std::ffi::c_void;

/// Large enough for the rows of most steps to travel in one piece.
pub(super) const PINNED_BYTES: usize = 4 << 20;

/// [`PINNED_BYTES`] of it.
pub(super) struct Pinned(*mut c_void);

// SAFETY: plain memory, and CUDA's calls with it are allowed in any thread.
unsafe impl Send for Pinned {}

impl Pinned {
    /// The context must be current.
    pub(super) fn new() -> Result<Self, DriverError> {
        // SAFETY: nobody reads the memory before something is written.
        Ok(Self(unsafe { result::malloc_host(PINNED_BYTES, 0) }?))
    }

    pub(super) fn address(&self) -> *mut c_void {
        self.0
    }

    /// Puts `content` at its start.
    ///
    /// # Panics
    ///
    /// If it is longer.
    ///
    /// # Safety
    ///
    /// The device neither reads nor writes it now.
    pub(super) unsafe fn put(&mut self, content: &[u8]) {
        assert!(content.len() <= PINNED_BYTES, "one piece");
        // SAFETY: there is room, the memory is of this object alone, and the caller promises that the device is not
        // there.
        unsafe {
            std::ptr::copy_nonoverlapping(content.as_ptr(), self.0.cast(), content.len());
        }
    }

    /// Takes what is at its start.
    ///
    /// # Panics
    ///
    /// If `out` is longer.
    ///
    /// # Safety
    ///
    /// The device has written so many bytes, and does not write now.
    pub(super) unsafe fn take(&self, out: &mut [u8]) {
        assert!(out.len() <= PINNED_BYTES, "one piece");
        // SAFETY: as for `put`.
        unsafe { std::ptr::copy_nonoverlapping(self.0.cast(), out.as_mut_ptr(), out.len()) };
    }

    /// Gives it back. The context must be current, and the device through with it; not done when it is dropped, since
    /// a device that hangs never is.
    pub(super) fn free(&mut self) {
        // SAFETY: `new` got it there, and this is called once, at the end of the device.
        let _failed = unsafe { result::free_host(self.0) };
    }
}
