//! Memory of a device.

use super::driver::{CudaError, Driver};
use std::sync::Arc;

/// A piece of device memory; freed when dropped, after what was enqueued before.
pub(crate) struct Buffer {
    driver: Arc<Driver>,
    address: u64,
    bytes: usize,
}

impl Buffer {
    /// `what` names it in the error. Its content is undefined; 0 bytes need no memory.
    pub(crate) fn new(
        driver: &Arc<Driver>,
        what: &'static str,
        bytes: usize,
    ) -> Result<Self, CudaError> {
        let address = if bytes == 0 { 0 } else { driver.allocate(what, bytes)? };
        Ok(Self { driver: Arc::clone(driver), address, bytes })
    }

    /// A buffer of these bytes.
    pub(crate) fn of(
        driver: &Arc<Driver>,
        what: &'static str,
        content: &[u8],
    ) -> Result<Self, CudaError> {
        let buffer = Self::new(driver, what, content.len())?;
        // Nobody else knows it yet.
        buffer.bring(0, content)?;
        Ok(buffer)
    }

    pub(crate) fn driver(&self) -> &Driver {
        &self.driver
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies `content` to byte `at`; later operations of the stream see it.
    ///
    /// # Panics
    ///
    /// If it does not fit.
    pub(crate) fn fill(&self, at: usize, content: &[u8]) -> Result<(), CudaError> {
        assert!(at + content.len() <= self.bytes, "outside the buffer");
        self.driver.write(self.address + at as u64, content)
    }

    /// Copies `content` to byte `at` beside the steps, and waits until it is there. Nobody else uses these bytes.
    ///
    /// # Panics
    ///
    /// If it does not fit.
    pub(crate) fn bring(&self, at: usize, content: &[u8]) -> Result<(), CudaError> {
        assert!(at + content.len() <= self.bytes, "outside the buffer");
        self.driver.bring(self.address + at as u64, content)
    }

    /// Copies the bytes from `at` on to the host beside the steps. They were brought here, or a step that is over
    /// made them.
    ///
    /// # Panics
    ///
    /// If the buffer ends before.
    pub(crate) fn fetch(&self, at: usize, out: &mut [u8]) -> Result<(), CudaError> {
        assert!(at + out.len() <= self.bytes, "outside the buffer");
        self.driver.fetch(self.address + at as u64, out)
    }

    /// Has so many bytes afterwards, if not more; loses its content if it had fewer.
    pub(crate) fn reserve(&mut self, what: &'static str, bytes: usize) -> Result<(), CudaError> {
        if self.bytes < bytes {
            let driver = Arc::clone(&self.driver);
            // What it had is free before more is taken.
            *self = Self::new(&driver, what, 0)?;
            *self = Self::new(&driver, what, bytes)?;
        }
        Ok(())
    }

    /// Puts `content` at the start; grows if it must, and loses what was behind.
    pub(crate) fn put(&mut self, what: &'static str, content: &[u8]) -> Result<(), CudaError> {
        if self.bytes < content.len() {
            *self = Self::new(&Arc::clone(&self.driver), what, content.len().next_power_of_two())?;
        }
        self.fill(0, content)
    }

    /// Waits for the stream and copies the first bytes to the host.
    ///
    /// # Panics
    ///
    /// If the buffer has fewer.
    pub(crate) fn read(&self, out: &mut [u8]) -> Result<(), CudaError> {
        self.read_at(0, out)
    }

    /// The same from byte `at` on.
    ///
    /// # Panics
    ///
    /// If the buffer ends before.
    pub(crate) fn read_at(&self, at: usize, out: &mut [u8]) -> Result<(), CudaError> {
        assert!(at + out.len() <= self.bytes, "outside the buffer");
        self.driver.read(self.address + at as u64, out)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.address != 0 {
            self.driver.free(self.address, self.bytes);
        }
    }
}
