//! Looking for values that are infinite or no numbers: what a step has found is read once at its end.

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

/// Findings of a step, one slot per tensor that was looked at.
pub(super) struct Flags {
    buffer: Buffer,
    slots: usize,
}

impl Flags {
    /// For so many tensors. [`Flags::reset`] comes first.
    pub(super) fn new(driver: &Arc<Driver>, slots: usize) -> Result<Self, CudaError> {
        Ok(Self { buffer: Buffer::new(driver, "flags", slots * 4)?, slots })
    }

    /// Nothing was found.
    pub(super) fn reset(&self, driver: &Driver) -> Result<(), CudaError> {
        let grid = [blocks(self.slots.div_ceil(THREADS as usize)), 1, 1];
        let launch = Launch { kernel: "herd_finite_reset", grid, block: THREADS, shared: 0 };
        // SAFETY: the kernel's two parameters; the buffer has so many slots.
        unsafe { driver.launch(launch, &args![&self.buffer, int(self.slots)]) }
    }

    /// Notes in `slot` the first row of `x` with a value that is not finite.
    ///
    /// # Panics
    ///
    /// If there is no such slot.
    pub(super) fn look(&self, driver: &Driver, x: &Tensor, slot: usize) -> Result<(), CudaError> {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        let kernel = match x.dtype() {
            Dtype::F32 => "herd_finite_f32",
            Dtype::Bf16 => "herd_finite_bf16",
        };
        let launch = Launch { kernel, grid: [blocks(x.rows()), 1, 1], block: THREADS, shared: 0 };
        let flag = self.buffer.address() + slot as u64 * 4;
        // SAFETY: the kernel's three parameters: a tensor of so many rows and columns, and a slot of the buffer.
        unsafe { driver.launch(launch, &args![x.buffer(), int(x.columns()), flag]) }
    }

    /// By slot: the first row that was not finite. Waits for the device.
    pub(super) fn found(&self) -> Result<Vec<Option<u32>>, CudaError> {
        let mut rows = vec![NO_ROW; self.slots];
        self.buffer.read(bytemuck::cast_slice_mut(&mut rows))?;
        Ok(rows.into_iter().map(|row| (row != NO_ROW).then_some(row)).collect())
    }
}
