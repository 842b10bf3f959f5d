//! Weight matrices, packed for the matrix product.
//!
//! A matrix `[outputs, inputs]` is stored as panels of 16 outputs; a panel is a run of lines, one per
//! `k` (f32: `[inputs][16]`) or per pair of `k` (bf16: `[inputs / 2][16][2]`). A product reads every
//! panel front to back: the order of memory is the order of use. Outputs are padded with zeros to
//! whole panels.
//!
//! FP8 weights (e4m3fn with a scale per output) are stored as bf16: every e4m3 value is a bf16, and
//! the scale multiplies the finished sum.

use crate::lines::{LINE_BYTES, Lines};

/// Outputs of one panel.
pub(crate) const PANEL: usize = 16;

/// How the elements of a packed matrix are stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Storage {
    F32,
    Bf16,
}

impl Storage {
    fn lines_per_panel(self, inputs: usize) -> usize {
        match self {
            Self::F32 => inputs,
            Self::Bf16 => inputs / 2,
        }
    }
}

/// Why a matrix could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MatrixError {
    /// bf16 is packed in pairs of inputs.
    #[error("a bf16 matrix needs an even number of inputs, this one has {inputs}")]
    OddInputs { inputs: usize },
    /// The operating system refused the memory.
    #[error("no memory for a matrix of {bytes} bytes")]
    Memory {
        bytes: usize,
        #[source]
        source: std::io::Error,
    },
}

/// A packed weight matrix `[outputs, inputs]`.
pub struct Matrix {
    lines: Lines,
    pub(crate) storage: Storage,
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    /// `[outputs]` factors of the finished sums (FP8 packaging).
    pub(crate) scales: Option<Vec<f32>>,
}

impl Matrix {
    /// A matrix of zeros.
    ///
    /// # Errors
    ///
    /// [`MatrixError`] if bf16 has an odd number of inputs, or the memory is refused.
    pub fn zeroed(storage: Storage, outputs: usize, inputs: usize) -> Result<Self, MatrixError> {
        if storage == Storage::Bf16 && !inputs.is_multiple_of(2) {
            return Err(MatrixError::OddInputs { inputs });
        }
        let lines = outputs.div_ceil(PANEL) * storage.lines_per_panel(inputs);
        let lines = Lines::zeroed(lines)
            .map_err(|source| MatrixError::Memory { bytes: lines * LINE_BYTES, source })?;
        Ok(Self { lines, storage, outputs, inputs, scales: None })
    }

    /// Rows of the result this matrix gives.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Columns of the operand it takes.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes that a product reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.lines.as_slice().len()
    }

    /// Sets the factors of the finished sums, `[outputs]`.
    ///
    /// # Panics
    ///
    /// If there is not one per output.
    pub fn set_scales(&mut self, scales: Vec<f32>) {
        assert_eq!(scales.len(), self.outputs, "one scale per output");
        self.scales = Some(scales);
    }

    /// The packed weights and their scales, as they lie in memory. Equal on all processes that hold this
    /// matrix: what one sends another may put into a matrix of the same shape ([`Matrix::image_mut`]).
    #[must_use]
    pub fn image(&self) -> [&[u8]; 2] {
        let scales = self.scales.as_deref().unwrap_or_default();
        [self.lines.as_slice(), bytemuck::cast_slice(scales)]
    }

    /// The same, to be filled.
    pub fn image_mut(&mut self) -> [&mut [u8]; 2] {
        let scales = self.scales.as_deref_mut().unwrap_or_default();
        [self.lines.as_mut_slice(), bytemuck::cast_slice_mut(scales)]
    }

    pub(crate) fn panels(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }

    pub(crate) fn panel_bytes(&self) -> usize {
        self.storage.lines_per_panel(self.inputs) * LINE_BYTES
    }

    pub(crate) fn panel_ptr(&self, panel: usize) -> *const u8 {
        assert!(panel < self.panels(), "panel {panel} of {}", self.panels());
        // SAFETY: within the mapping: `panel < panels`.
        unsafe { self.lines.as_ptr().add(panel * self.panel_bytes()) }
    }

    /// The panels as byte slices, for filling from several threads: panel `i` holds the outputs
    /// `16 * i ..`. Write them with [`Matrix::put`].
    pub fn panels_mut(&mut self) -> impl Iterator<Item = Panel<'_>> {
        let (storage, inputs) = (self.storage, self.inputs);
        let bytes = self.panel_bytes().max(1);
        self.lines.as_mut_slice().chunks_exact_mut(bytes).map(move |bytes| Panel {
            bytes,
            storage,
            inputs,
        })
    }
}

/// 16 outputs of a matrix that is being filled.
pub struct Panel<'a> {
    bytes: &'a mut [u8],
    storage: Storage,
    inputs: usize,
}

impl Panel<'_> {
    /// Writes the inputs `k0..k0 + row.len()` of one output; `lane` is the output within the panel.
    ///
    /// Values are rounded to the storage of the matrix.
    ///
    /// # Panics
    ///
    /// If the lane or the inputs lie outside the panel.
    pub fn put_output(&mut self, lane: usize, k0: usize, row: impl ExactSizeIterator<Item = f32>) {
        assert!(lane < PANEL && k0 + row.len() <= self.inputs, "outside the panel");
        for (k, value) in (k0..).zip(row) {
            self.put(lane, k, value);
        }
    }

    /// Writes the outputs `0..column.len()` of one input `k`.
    ///
    /// # Panics
    ///
    /// If the input or the outputs lie outside the panel.
    pub fn put_input(&mut self, k: usize, column: impl ExactSizeIterator<Item = f32>) {
        assert!(k < self.inputs && column.len() <= PANEL, "outside the panel");
        for (lane, value) in column.enumerate() {
            self.put(lane, k, value);
        }
    }

    #[inline(always)]
    fn put(&mut self, lane: usize, k: usize, value: f32) {
        match self.storage {
            Storage::F32 => {
                let at = (k * PANEL + lane) * 4;
                self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
            Storage::Bf16 => {
                let at = (k / 2) * LINE_BYTES + lane * 4 + (k % 2) * 2;
                let bits = crate::math::bf16_bits(value);
                self.bytes[at..at + 2].copy_from_slice(&bits.to_le_bytes());
            }
        }
    }
}

impl Matrix {
    /// Some of the outputs, row-major, in the matrix's own storage (little-endian) and without their scales.
    ///
    /// # Panics
    ///
    /// If there are fewer outputs.
    #[must_use]
    pub fn rows(&self, outputs: std::ops::Range<usize>) -> Vec<u8> {
        assert!(outputs.end <= self.outputs, "outside the matrix");
        // Bytes of a lane in a line: one input in f32, a pair of them in bf16.
        let lane_bytes = LINE_BYTES / PANEL;
        let row_bytes = self.panel_bytes() / LINE_BYTES * lane_bytes;
        let mut rows = Vec::with_capacity(outputs.len() * row_bytes);
        for output in outputs {
            let panel =
                &self.lines.as_slice()[output / PANEL * self.panel_bytes()..][..self.panel_bytes()];
            let at = output % PANEL * lane_bytes;
            for line in panel.chunks_exact(LINE_BYTES) {
                rows.extend_from_slice(&line[at..at + lane_bytes]);
            }
        }
        rows
    }

    /// One weight, widened and without its scale. Slow; for tests.
    ///
    /// # Panics
    ///
    /// If the position lies outside the matrix.
    #[must_use]
    pub fn get(&self, output: usize, input: usize) -> f32 {
        assert!(output < self.outputs && input < self.inputs, "outside the matrix");
        let panel = &self.lines.as_slice()[output / PANEL * self.panel_bytes()..];
        let lane = output % PANEL;
        match self.storage {
            Storage::F32 => {
                let at = (input * PANEL + lane) * 4;
                f32::from_le_bytes(panel[at..at + 4].try_into().expect("4 bytes"))
            }
            Storage::Bf16 => {
                let at = (input / 2) * LINE_BYTES + lane * 4 + (input % 2) * 2;
                let bits = u16::from_le_bytes(panel[at..at + 2].try_into().expect("2 bytes"));
                crate::math::bf16_to_f32(bits)
            }
        }
    }
}
