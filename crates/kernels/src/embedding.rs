//! The token embedding table: rows are looked up, never multiplied, so it is kept as it is stored.

use crate::level::Dtype;
use crate::lines::{LINE_BYTES, Lines};
use crate::matrix::MatrixError;

/// Rows `[vocab, hidden]` in f32 or bf16.
pub struct Embedding {
    lines: Lines,
    dtype: Dtype,
    hidden: usize,
    bytes: usize,
}

impl Embedding {
    /// A table of zeros.
    ///
    /// # Errors
    ///
    /// [`MatrixError::Memory`] if the memory is refused.
    pub fn zeroed(dtype: Dtype, vocab: usize, hidden: usize) -> Result<Self, MatrixError> {
        let bytes = vocab * hidden * dtype.bytes();
        let lines = Lines::zeroed(bytes.div_ceil(LINE_BYTES))
            .map_err(|source| MatrixError::Memory { bytes, source })?;
        Ok(Self { lines, dtype, hidden, bytes })
    }

    /// The rows in little-endian f32 or bf16, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.lines.as_mut_slice()[..self.bytes]
    }

    /// The same, to be read.
    #[must_use]
    pub fn content(&self) -> &[u8] {
        &self.lines.as_slice()[..self.bytes]
    }

    /// How the rows are stored.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Tokens and columns.
    #[must_use]
    pub fn shape(&self) -> (usize, usize) {
        (self.bytes.checked_div(self.hidden * self.dtype.bytes()).unwrap_or(0), self.hidden)
    }

    /// Bytes of the table.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies the row of `token`, widened.
    pub(crate) fn row(&self, token: usize, out: &mut [f32]) {
        match self.dtype {
            Dtype::F32 => {
                let all: &[f32] = bytemuck::cast_slice(&self.lines.as_slice()[..self.bytes]);
                out.copy_from_slice(&all[token * self.hidden..][..self.hidden]);
            }
            Dtype::Bf16 => {
                let all: &[u16] = bytemuck::cast_slice(&self.lines.as_slice()[..self.bytes]);
                for (out, bits) in out.iter_mut().zip(&all[token * self.hidden..]) {
                    *out = crate::math::bf16_to_f32(*bits);
                }
            }
        }
    }
}
