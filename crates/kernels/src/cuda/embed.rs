//! Looking up the embeddings of a step's tokens.

use super::args::{Launch, args, blocks, int};
use super::batch::{Batch, Part};
use super::buffer::Buffer;
use super::driver::{CudaError, Driver};
use super::elementwise::grid;
use super::tensor::Tensor;
use crate::level::Dtype;
use std::sync::Arc;

/// Token embeddings `[vocab, hidden]`, f32 or bf16.
pub(super) struct Embedding {
    buffer: Buffer,
    dtype: Dtype,
    vocab: usize,
    hidden: usize,
}

impl Embedding {
    /// A table without content.
    pub(super) fn new(
        driver: &Arc<Driver>,
        dtype: Dtype,
        (vocab, hidden): (usize, usize),
    ) -> Result<Self, CudaError> {
        let buffer = Buffer::new(driver, "embeddings", vocab * hidden * dtype.bytes())?;
        Ok(Self { buffer, dtype, vocab, hidden })
    }

    /// Copies all rows, in little-endian f32 or bf16.
    pub(super) fn bring(&self, content: &[u8]) -> Result<(), CudaError> {
        self.buffer.bring(0, content)
    }
}

/// `x = table[token of each row]`.
///
/// # Errors
///
/// [`CudaError`] if memory is refused or CUDA fails.
///
/// # Panics
///
/// If the shapes disagree, or the step was checked against a larger vocabulary.
pub(super) fn embed(
    driver: &Driver,
    batch: &Batch,
    table: &Embedding,
    x: &mut Tensor,
) -> Result<(), CudaError> {
    assert_eq!((x.columns(), x.dtype()), (table.hidden, Dtype::F32), "the residual stream");
    assert!(batch.limits().vocab <= blocks(table.vocab), "tokens of another vocabulary");
    x.resize(batch.rows())?;
    let kernel = match table.dtype {
        Dtype::F32 => "herd_embed_f32",
        Dtype::Bf16 => "herd_embed_bf16",
    };
    let launch = Launch { kernel, grid: grid(x), block: 256, shared: 0 };
    let args = args![batch.address(Part::Tokens), &table.buffer, x.buffer(), int(table.hidden)];
    // SAFETY: the kernel's four parameters. Tokens are below the vocabulary, whose rows the table has; `x` has as many
    // rows as there are tokens.
    unsafe { driver.launch(launch, &args) }
}
