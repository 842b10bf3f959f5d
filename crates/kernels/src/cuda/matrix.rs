//! Row-major weight matrices in device memory.

use super::buffer::Buffer;
use super::driver::{CudaError, Driver};
use std::sync::Arc;

/// How the elements of a row-major matrix are stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Storage {
    F32,
    Bf16,
}

impl Storage {
    fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// The shape of a matrix, `[outputs, inputs]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct MatrixShape {
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

/// Weights `[outputs, inputs]`, row-major.
pub(super) struct Matrix {
    weights: Buffer,
    /// f32 `[outputs]`: factors of the finished sums.
    scales: Option<Buffer>,
    storage: Storage,
    shape: MatrixShape,
}

impl Matrix {
    /// A matrix without content.
    pub(super) fn new(
        driver: &Arc<Driver>,
        storage: Storage,
        shape: MatrixShape,
    ) -> Result<Self, CudaError> {
        let bytes = shape.outputs * shape.inputs * storage.bytes();
        let weights = Buffer::new(driver, "weights", bytes)?;
        Ok(Self { weights, scales: None, storage, shape })
    }

    /// Copies all weights, little-endian.
    pub(super) fn bring(&self, content: &[u8]) -> Result<(), CudaError> {
        self.weights.bring(0, content)
    }

    /// Sets the factors of the finished sums.
    ///
    /// # Panics
    ///
    /// If there is not one per output.
    pub(super) fn set_scales(
        &mut self,
        driver: &Arc<Driver>,
        scales: &[f32],
    ) -> Result<(), CudaError> {
        assert_eq!(scales.len(), self.shape.outputs, "one scale per output");
        self.scales = Some(Buffer::of(driver, "scales", bytemuck::cast_slice(scales))?);
        Ok(())
    }

    pub(super) fn weights(&self) -> &Buffer {
        &self.weights
    }

    pub(super) fn scales(&self) -> Option<&Buffer> {
        self.scales.as_ref()
    }

    pub(super) fn storage(&self) -> Storage {
        self.storage
    }

    pub(super) fn shape(&self) -> MatrixShape {
        self.shape
    }
}
