//! Activations in device memory.

use super::buffer::Buffer;
use super::driver::{CudaError, Driver};
use crate::level::Dtype;
use std::sync::Arc;

/// Activations `[rows, columns]`: f32, or bf16 where they are operands of products in the bf16 profile.
pub struct Tensor {
    driver: Arc<Driver>,
    buffer: Arc<Buffer>,
    dtype: Dtype,
    rows: usize,
    columns: usize,
}

impl Tensor {
    /// No rows yet; room for `room` of them.
    pub(super) fn new(
        driver: &Arc<Driver>,
        dtype: Dtype,
        (room, columns): (usize, usize),
    ) -> Result<Self, CudaError> {
        let buffer = Buffer::new(driver, "activations", room * columns * dtype.bytes())?;
        Ok(Self { driver: Arc::clone(driver), buffer: Arc::new(buffer), dtype, rows: 0, columns })
    }

    /// A tensor of these values, rounded if it is bf16. For tests.
    #[cfg(test)]
    #[cfg(feature = "emulated")]
    pub(super) fn of(driver: &Arc<Driver>, dtype: Dtype, columns: usize, values: &[f32]) -> Self {
        let bytes: Vec<u8> = match dtype {
            Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Dtype::Bf16 => {
                values.iter().flat_map(|x| crate::math::bf16_bits(*x).to_le_bytes()).collect()
            }
        };
        let mut tensor = Self::new(driver, dtype, (0, columns)).unwrap();
        tensor.put(&bytes);
        tensor
    }

    /// Rows of these bytes. For tests.
    #[cfg(test)]
    #[cfg(feature = "emulated")]
    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.resize(bytes.len() / (self.columns * self.dtype.bytes())).unwrap();
        self.buffer.fill(0, bytes).unwrap();
    }

    /// The values on the host, widened. Waits for the device.
    ///
    /// # Errors
    ///
    /// What went wrong on the device before.
    pub fn to_host(&self) -> Result<Vec<f32>, CudaError> {
        let mut bytes = vec![0; self.rows * self.columns * self.dtype.bytes()];
        self.buffer.read(&mut bytes)?;
        Ok(match self.dtype {
            Dtype::F32 => bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
            Dtype::Bf16 => bytes
                .chunks_exact(2)
                .map(|b| crate::math::bf16_to_f32(u16::from_le_bytes([b[0], b[1]])))
                .collect(),
        })
    }

    /// Rows of the last result.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    pub(super) fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub(super) fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// What the next result is.
    pub(super) fn become_of(&mut self, dtype: Dtype, columns: usize) {
        (self.dtype, self.columns, self.rows) = (dtype, columns, 0);
    }

    pub(super) fn driver(&self) -> &Arc<Driver> {
        &self.driver
    }

    /// The memory, which stays as it is while somebody has it.
    pub(super) fn share(&self) -> Arc<Buffer> {
        Arc::clone(&self.buffer)
    }

    /// Has room for so many rows of f32, whatever it becomes.
    pub(super) fn reserve(&mut self, rows: usize) -> Result<(), CudaError> {
        self.reserve_bytes(rows * self.columns * Dtype::F32.bytes())
    }

    pub(super) fn reserve_bytes(&mut self, bytes: usize) -> Result<(), CudaError> {
        remake(&mut self.buffer, &self.driver, ("activations", bytes))
    }

    /// Makes room for a result of `rows` rows; its content is lost if the buffer must be another, which happens only
    /// beyond the largest step so far, and after a step in which somebody did not give back what it [shared](Self::share).
    pub(super) fn resize(&mut self, rows: usize) -> Result<(), CudaError> {
        self.reserve_bytes(rows * self.columns * self.dtype.bytes())?;
        self.rows = rows;
        Ok(())
    }
}

/// Another buffer instead of one that is too small, or that somebody else has, who may still let kernels read it and
/// write to it.
pub(super) fn remake(
    buffer: &mut Arc<Buffer>,
    driver: &Arc<Driver>,
    (what, bytes): (&'static str, usize),
) -> Result<(), CudaError> {
    if let Some(own) = Arc::get_mut(buffer) {
        return own.reserve(what, bytes);
    }
    *buffer = Arc::new(Buffer::new(driver, what, bytes.max(buffer.bytes()))?);
    Ok(())
}
