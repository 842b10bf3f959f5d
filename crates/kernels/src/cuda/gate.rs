//! The router of a MoE layer: top-1 of the logits.

use super::args::{Launch, args, blocks, int};
use super::buffer::Buffer;
use super::driver::{CudaError, Driver};
use super::tensor::{Tensor, remake};
use crate::level::Dtype;
use std::sync::Arc;

/// As the kernel's block: a warp per row.
const ROWS: usize = 4;

/// Chosen expert and score of every row.
pub(super) struct Route {
    driver: Arc<Driver>,
    /// u16 per row.
    experts: Arc<Buffer>,
    /// f32 per row.
    scores: Buffer,
    rows: usize,
}

impl Route {
    /// Of no rows.
    pub(super) fn new(driver: &Arc<Driver>) -> Result<Self, CudaError> {
        let empty = || Buffer::new(driver, "routes", 0);
        let (driver, experts, scores) = (Arc::clone(driver), Arc::new(empty()?), empty()?);
        Ok(Self { driver, experts, scores, rows: 0 })
    }

    /// These choices. For tests.
    #[cfg(test)]
    #[cfg(feature = "emulated")]
    pub(super) fn put(&mut self, experts: &[u16]) {
        self.resize(experts.len()).unwrap();
        self.experts.fill(0, bytemuck::cast_slice(experts)).unwrap();
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// u16 `[rows]` on the device.
    pub(super) fn experts(&self) -> &Arc<Buffer> {
        &self.experts
    }

    /// f32 `[rows]` on the device.
    pub(super) fn scores(&self) -> &Buffer {
        &self.scores
    }

    /// Has room for so many rows. As [`Tensor::resize`]: the experts may be shared.
    pub(super) fn reserve(&mut self, rows: usize) -> Result<(), CudaError> {
        remake(&mut self.experts, &self.driver, ("routes", rows * 2))?;
        self.scores.reserve("routes", rows * 4)
    }

    /// Grows only beyond the largest step so far.
    fn resize(&mut self, rows: usize) -> Result<(), CudaError> {
        self.reserve(rows)?;
        self.rows = rows;
        Ok(())
    }

    /// The chosen experts on the host. Waits for the device.
    ///
    /// # Errors
    ///
    /// What went wrong on the device before.
    pub(super) fn experts_to_host(&self) -> Result<Vec<u16>, CudaError> {
        let mut experts = vec![0; self.rows];
        self.experts.read(bytemuck::cast_slice_mut(&mut experts))?;
        Ok(experts)
    }
}

/// Chooses an expert per row of `logits`, `[rows, experts]`.
///
/// # Errors
///
/// [`CudaError`] if memory is refused or CUDA fails.
///
/// # Panics
///
/// If there are no experts, or more than 16 bits can number.
pub(super) fn gate(driver: &Driver, logits: &Tensor, route: &mut Route) -> Result<(), CudaError> {
    let (rows, experts) = (logits.rows(), logits.columns());
    assert!((1..=1 << 16).contains(&experts), "experts are numbered in 16 bits");
    assert_eq!(logits.dtype(), Dtype::F32, "logits");
    route.resize(rows)?;
    let grid = [blocks(rows.div_ceil(ROWS)), 1, 1];
    let launch = Launch { kernel: "herd_gate", grid, block: 32 * blocks(ROWS), shared: 0 };
    let args = args![logits.buffer(), int(experts), int(rows), &*route.experts, &route.scores];
    // SAFETY: the kernel's five parameters: logits of so many rows and experts, and a place per row in the results.
    unsafe { driver.launch(launch, &args) }
}
