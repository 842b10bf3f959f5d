//! Choosing tokens on the device, for rows that need no more than their logits.

use super::args::{Launch, args, blocks, int};
use super::batch::{Batch, Part};
use super::buffer::Buffer;
use super::driver::{CudaError, Driver};
use super::tensor::Tensor;
use crate::level::Dtype;
use crate::sample::Sampling;
use std::sync::Arc;

/// As the kernel's block.
const THREADS: u32 = 1024;

/// Whether the device's choice is the row's token: neither filters nor penalties, bias, bans or log-probabilities.
/// Others need the row's logits on the host.
pub(super) fn is_plain(sampling: &Sampling) -> bool {
    let Sampling {
        seed: _,
        temperature,
        top_p,
        top_k,
        min_p,
        presence_penalty,
        frequency_penalty,
        output_counts,
        bias,
        banned,
        logprobs,
    } = sampling;
    let is_greedy = *temperature <= 0.0;
    let is_filtered = !is_greedy && (*top_p < 1.0 || *top_k != 0 || *min_p > 0.0);
    let is_penalised =
        (*presence_penalty != 0.0 || *frequency_penalty != 0.0) && !output_counts.is_empty();
    let is_changed = is_penalised || !bias.is_empty() || !banned.is_empty();
    !is_filtered && !is_changed && logprobs.is_none()
}

/// Chosen tokens of a step.
pub(super) struct Choices {
    tokens: Buffer,
    rows: usize,
}

impl Choices {
    /// Of no rows.
    pub(super) fn new(driver: &Arc<Driver>) -> Result<Self, CudaError> {
        let tokens = Buffer::new(driver, "tokens", 0)?;
        Ok(Self { tokens, rows: 0 })
    }

    /// A token per sample of the step; those of samples that are not [plain](is_plain) mean nothing. Waits for the
    /// device.
    ///
    /// # Errors
    ///
    /// What went wrong on the device before.
    pub(super) fn to_host(&self) -> Result<Vec<u32>, CudaError> {
        let mut tokens = vec![0; self.rows];
        self.tokens.read(bytemuck::cast_slice_mut(&mut tokens))?;
        Ok(tokens)
    }

    /// Has room for so many rows.
    pub(super) fn reserve(&mut self, rows: usize) -> Result<(), CudaError> {
        self.tokens.reserve("tokens", rows * 4)
    }

    /// Grows only beyond the largest step so far.
    fn resize(&mut self, rows: usize) -> Result<(), CudaError> {
        self.reserve(rows)?;
        self.rows = rows;
        Ok(())
    }
}

/// Chooses a token per row of `logits` (`[samples, vocab]`), as if every sample were plain.
///
/// # Errors
///
/// [`CudaError`] if memory is refused or CUDA fails.
///
/// # Panics
///
/// If the shapes disagree, or the vocabulary is empty.
pub(super) fn sample(
    driver: &Driver,
    batch: &Batch,
    logits: &Tensor,
    choices: &mut Choices,
) -> Result<(), CudaError> {
    let (rows, vocab) = (logits.rows(), logits.columns());
    assert_eq!((rows, logits.dtype()), (batch.samples(), Dtype::F32), "a row per sample");
    assert!(vocab > 0, "an empty vocabulary has no token to choose");
    choices.resize(rows)?;
    let grid = [blocks(rows), 1, 1];
    let launch = Launch { kernel: "herd_sample", grid, block: THREADS, shared: 0 };
    let args = args![
        logits.buffer(),
        int(vocab),
        batch.address(Part::Temperatures),
        batch.address(Part::Seeds),
        batch.address(Part::SamplePositions),
        &choices.tokens,
    ];
    // SAFETY: the kernel's six parameters: logits of so many rows, and a temperature, a seed, a position and a place
    // for the token per row.
    unsafe { driver.launch(launch, &args) }
}
