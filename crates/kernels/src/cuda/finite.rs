//! What is noted of a step on the device, and read once at its end: values that are infinite or no numbers, and how many
//! rows the experts had.

use super::args::{Launch, args, blocks, int};
use super::buffer::Buffer;
use super::driver::{CudaError, Driver};
use super::tensor::Tensor;
use crate::level::Dtype;
use std::sync::Arc;

/// As the kernel's block.
const THREADS: u32 = 256;

/// What the kernel leaves where it finds nothing.
const NO_ROW: u32 = u32::MAX;

/// Notes of a step: a flag per tensor that was looked at, then a number of rows per expert.
pub(super) struct Notes {
    buffer: Buffer,
    flags: usize,
    /// The same on the host, once read.
    host: Vec<u32>,
}

impl Notes {
    /// For so many tensors and numbers. [`Notes::reset`] comes first.
    pub(super) fn new(
        driver: &Arc<Driver>,
        (flags, numbers): (usize, usize),
    ) -> Result<Self, CudaError> {
        let buffer = Buffer::new(driver, "notes", (flags + numbers) * 4)?;
        Ok(Self { buffer, flags, host: vec![NO_ROW; flags + numbers] })
    }

    /// Nothing was found. The numbers stay: each is overwritten whole.
    pub(super) fn reset(&self, driver: &Driver) -> Result<(), CudaError> {
        let grid = [blocks(self.flags.div_ceil(THREADS as usize)), 1, 1];
        let launch = Launch { kernel: "herd_finite_reset", grid, block: THREADS, shared: 0 };
        // SAFETY: the kernel's two parameters; the buffer has so many flags.
        unsafe { driver.launch(launch, &args![&self.buffer, int(self.flags)]) }
    }

    /// Notes in `flag` the first row of `x` with a value that is not finite.
    ///
    /// # Panics
    ///
    /// If there is no such flag.
    pub(super) fn look(&self, driver: &Driver, x: &Tensor, flag: usize) -> Result<(), CudaError> {
        assert!(flag < self.flags, "flag {flag} of {}", self.flags);
        let kernel = match x.dtype() {
            Dtype::F32 => "herd_finite_f32",
            Dtype::Bf16 => "herd_finite_bf16",
        };
        let launch = Launch { kernel, grid: [blocks(x.rows()), 1, 1], block: THREADS, shared: 0 };
        let flag = self.buffer.address() + flag as u64 * 4;
        // SAFETY: the kernel's three parameters: a tensor of so many rows and columns, and a flag of the buffer.
        unsafe { driver.launch(launch, &args![x.buffer(), int(x.columns()), flag]) }
    }

    /// Where numbers from this one on are noted, of which `count` are there.
    ///
    /// # Panics
    ///
    /// If there are fewer.
    pub(super) fn numbers_at(&self, first: usize, count: usize) -> u64 {
        let first = self.flags + first;
        assert!(first + count <= self.host.len(), "{first} and {count} of {}", self.host.len());
        self.buffer.address() + first as u64 * 4
    }

    /// Where the last flag is.
    pub(super) fn last_flag(&self) -> u64 {
        self.buffer.address() + (self.flags as u64 - 1) * 4
    }

    /// By flag the first row that was not finite, and the numbers. Waits for the device.
    pub(super) fn read(
        &mut self,
    ) -> Result<(impl DoubleEndedIterator<Item = Option<u32>> + ExactSizeIterator, &[u32]), CudaError>
    {
        self.buffer.read(bytemuck::cast_slice_mut(&mut self.host))?;
        let (flags, numbers) = self.host.split_at(self.flags);
        Ok((flags.iter().map(|row| (*row != NO_ROW).then_some(*row)), numbers))
    }
}
