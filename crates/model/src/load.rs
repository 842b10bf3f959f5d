//! From checkpoint bytes to a device's weights: packed matrices of the CPU, rows for others.
//!
//! A rank reads the bytes of its own shard and no others: dense tensors by runs of output rows, a
//! fused expert tensor by the slices of the wanted experts. Many pieces are read at once, each with a
//! positioned read, and packed where they are read.

use crate::checkpoint::names::{self, Attention, Fused};
use crate::checkpoint::{Checkpoint, CheckpointError, Dtype as Stored, ExpertFormat, TensorInfo};
use crate::config::Config;
use crate::weights::{Dense, FeedForward, Layer, Mlp};
use half::{bf16, f16};
use kernels::{Cpu, Device, Dtype, Embedding, ExpertWeights, Matrix, MatrixError, Panel, Storage};
use rayon::prelude::*;
use std::sync::Arc;

/// Outputs of one panel, the unit that a thread fills.
const PANEL: usize = 16;
/// Bytes read at once from a fused expert tensor; small enough to be packed from the cache.
const PIECE_BYTES: usize = 1 << 20;

/// Why weights could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("{tensor}: {source}")]
    Matrix { tensor: String, source: MatrixError },
}

/// What to load from, and for which arithmetic.
#[derive(Clone, Copy)]
pub struct Loader<'a> {
    pub checkpoint: &'a Checkpoint,
    pub config: &'a Config,
    pub dtype: Dtype,
}

/// Makes a device's dense weights of a checkpoint's tensors.
pub trait Make<D: Device> {
    /// Why a weight could not be made.
    type Error;

    /// A matrix of `[out, in]` tensors, one below the other.
    ///
    /// # Errors
    ///
    /// If it cannot be read, or the device refuses it.
    fn matrix(&self, tensors: &[&TensorInfo]) -> Result<D::Matrix, Self::Error>;

    /// # Errors
    ///
    /// As for [`Make::matrix`].
    fn norm(&self, tensor: &TensorInfo) -> Result<D::Norm, Self::Error>;

    /// # Errors
    ///
    /// As for [`Make::matrix`].
    fn embedding(&self, tensor: &TensorInfo) -> Result<D::Embedding, Self::Error>;
}

impl Loader<'_> {
    /// The dense part.
    ///
    /// # Errors
    ///
    /// [`LoadError`] if a file cannot be read or the memory is refused.
    pub fn dense(&self) -> Result<Dense<Cpu>, LoadError> {
        self.dense_by(self)
    }

    /// The dense part of a device.
    ///
    /// # Errors
    ///
    /// Those of `make`.
    pub fn dense_by<D: Device, M: Make<D>>(&self, make: &M) -> Result<Dense<D>, M::Error> {
        let layers = (0..self.config.layers).map(|layer| self.layer(make, layer));
        let layers = layers.collect::<Result<_, _>>()?;
        let head = if self.config.tied_embeddings { names::EMBED } else { names::LM_HEAD };
        Ok(Dense {
            embed: make.embedding(self.tensor(names::EMBED))?,
            layers,
            final_norm: make.norm(self.tensor(names::NORM))?,
            lm_head: make.matrix(&[self.tensor(head)])?,
        })
    }

    fn layer<D: Device, M: Make<D>>(&self, make: &M, layer: usize) -> Result<Layer<D>, M::Error> {
        let matrix = |names: &[String]| {
            let tensors: Vec<&TensorInfo> = names.iter().map(|name| self.tensor(name)).collect();
            make.matrix(&tensors)
        };
        let norm = |name: String| make.norm(self.tensor(&name));
        let mlp = |name: fn(usize, names::Mlp) -> String| -> Result<Mlp<D>, M::Error> {
            use names::Mlp::{Down, Gate, Up};
            Ok(Mlp {
                gate_up: matrix(&[name(layer, Gate), name(layer, Up)])?,
                down: matrix(&[name(layer, Down)])?,
            })
        };
        let feed_forward = if self.config.moe[layer] {
            FeedForward::Moe {
                router: matrix(&[names::router(layer)])?,
                shared: mlp(names::shared_expert)?,
            }
        } else {
            FeedForward::Dense(mlp(names::dense)?)
        };
        let qkv = [Attention::Query, Attention::Key, Attention::Value];
        Ok(Layer {
            input_norm: norm(names::input_norm(layer))?,
            qkv: matrix(&qkv.map(|part| names::attention(layer, part)))?,
            output: matrix(&[names::attention(layer, Attention::Output)])?,
            post_attention_norm: norm(names::post_attention_norm(layer))?,
            feed_forward,
        })
    }

    /// Routed expert `expert` of layer `layer` (an index into all layers).
    ///
    /// # Errors
    ///
    /// As [`Loader::dense`].
    pub fn expert(&self, layer: usize, expert: usize) -> Result<Arc<ExpertWeights>, LoadError> {
        let weights = match self.checkpoint.expert_format(layer) {
            Some(ExpertFormat::PerExpertFp8) => {
                use names::Mlp::{Down, Gate, Up};
                ExpertWeights {
                    gate_up: self.scaled(layer, expert, &[Gate, Up])?,
                    down: self.scaled(layer, expert, &[Down])?,
                }
            }
            Some(ExpertFormat::Fused) | None => ExpertWeights {
                gate_up: self.fused(layer, expert, Fused::GateUp)?,
                down: self.fused(layer, expert, Fused::Down)?,
            },
        };
        Ok(Arc::new(weights))
    }

    /// An expert of zeros in the shape of this layer's, for weights that come from elsewhere.
    ///
    /// # Errors
    ///
    /// [`LoadError::Matrix`] if the memory is refused.
    pub fn empty_expert(&self, layer: usize) -> Result<ExpertWeights, LoadError> {
        use names::Mlp::{Down, Gate, Up};
        match self.checkpoint.expert_format(layer) {
            Some(ExpertFormat::PerExpertFp8) => {
                let scaled = |parts: &[names::Mlp]| {
                    let tensors: Vec<&TensorInfo> = parts
                        .iter()
                        .map(|&part| self.tensor(&names::expert(layer, 0, part)))
                        .collect();
                    let mut matrix = self.zeroed_stack(&tensors)?;
                    matrix.set_scales(vec![0.0; matrix.outputs()]);
                    Ok::<_, LoadError>(matrix)
                };
                Ok(ExpertWeights { gate_up: scaled(&[Gate, Up])?, down: scaled(&[Down])? })
            }
            Some(ExpertFormat::Fused) | None => Ok(ExpertWeights {
                gate_up: self.zeroed_slice(layer, Fused::GateUp)?,
                down: self.zeroed_slice(layer, Fused::Down)?,
            }),
        }
    }

    /// A tensor of the text model.
    ///
    /// # Panics
    ///
    /// If the checkpoint has none of this name.
    #[must_use]
    pub fn tensor(&self, name: &str) -> &TensorInfo {
        self.checkpoint.tensor(name).expect("`Checkpoint::open` found every tensor of the config")
    }

    /// bf16 and FP8 weights are exact in bf16; f32 and f16 keep f32 unless the profile is bf16.
    #[must_use]
    pub fn storage(&self, stored: Stored) -> Storage {
        match (self.dtype, stored) {
            (Dtype::Bf16, _) | (Dtype::F32, Stored::Bf16 | Stored::F8E4M3) => Storage::Bf16,
            (Dtype::F32, Stored::F32 | Stored::F16) => Storage::F32,
        }
    }

    fn bytes(&self, tensor: &TensorInfo, at: u64, len: usize) -> Result<Vec<u8>, LoadError> {
        let mut bytes = vec![0; len];
        self.checkpoint.read_at(tensor, at, &mut bytes)?;
        Ok(bytes)
    }

    /// A whole tensor, widened.
    ///
    /// # Errors
    ///
    /// [`LoadError::Checkpoint`].
    pub fn values(&self, tensor: &TensorInfo) -> Result<Vec<f32>, LoadError> {
        let bytes = self.bytes(tensor, 0, length(tensor.bytes))?;
        Ok((0..bytes.len() / tensor.dtype.bytes()).map(widener(tensor.dtype, &bytes)).collect())
    }

    /// The output rows `rows` of several `[out, in]` tensors, one below the other, in bf16: what the bf16 profile
    /// makes of them.
    ///
    /// # Errors
    ///
    /// [`LoadError::Checkpoint`].
    ///
    /// # Panics
    ///
    /// If `out` has not just the size of these rows.
    pub fn bf16_rows(
        &self,
        tensors: &[&TensorInfo],
        rows: std::ops::Range<usize>,
        out: &mut [u8],
    ) -> Result<(), LoadError> {
        let row_bytes = tensors[0].shape[1] * 2;
        assert_eq!(out.len(), rows.len() * row_bytes, "room for the rows");
        let mut above = 0;
        for tensor in tensors {
            let (from, to) = (rows.start.max(above), rows.end.min(above + tensor.shape[0]));
            if from < to {
                let out = &mut out[(from - rows.start) * row_bytes..(to - rows.start) * row_bytes];
                let stored = tensor.shape[1] * tensor.dtype.bytes();
                let at = ((from - above) * stored) as u64;
                if tensor.dtype == Stored::Bf16 {
                    self.checkpoint.read_at(tensor, at, out)?;
                } else {
                    let bytes = self.bytes(tensor, at, (to - from) * stored)?;
                    let value = widener(tensor.dtype, &bytes);
                    for (i, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
                        *out = bf16::from_f32(value(i)).to_le_bytes();
                    }
                }
            }
            above += tensor.shape[0];
        }
        Ok(())
    }

    /// The matrix of several tensors, one below the other, before it is filled.
    fn zeroed_stack(&self, tensors: &[&TensorInfo]) -> Result<Matrix, LoadError> {
        let (first, inputs) = (tensors[0], tensors[0].shape[1]);
        let outputs = tensors.iter().map(|tensor| tensor.shape[0]).sum();
        // Exact for every part: f32 if any of them needs it.
        let storage = match tensors.iter().any(|t| self.storage(t.dtype) == Storage::F32) {
            true => Storage::F32,
            false => Storage::Bf16,
        };
        zeroed(storage, (outputs, inputs), first)
    }

    /// The matrix of one expert's slice of a fused tensor, before it is filled.
    fn zeroed_slice(&self, layer: usize, part: Fused) -> Result<Matrix, LoadError> {
        let tensor = self.tensor(&names::fused_experts(layer, part));
        let (inputs, outputs) = (tensor.shape[1], tensor.shape[2]);
        zeroed(self.storage(tensor.dtype), (outputs, inputs), tensor)
    }

    /// Fills a panel with the output rows `rows` of the stacked tensors.
    fn fill_rows(
        &self,
        tensors: &[&TensorInfo],
        rows: std::ops::Range<usize>,
        panel: &mut Panel<'_>,
    ) -> Result<(), LoadError> {
        let mut above = 0;
        for tensor in tensors {
            let (outputs, inputs) = (tensor.shape[0], tensor.shape[1]);
            let from = rows.start.max(above);
            let to = rows.end.min(above + outputs);
            if from < to {
                let row_bytes = inputs * tensor.dtype.bytes();
                let at = (from - above) as u64 * row_bytes as u64;
                let bytes = self.bytes(tensor, at, (to - from) * row_bytes)?;
                for (row, bytes) in (from..to).zip(bytes.chunks_exact(row_bytes)) {
                    let values = (0..inputs).map(widener(tensor.dtype, bytes));
                    panel.put_output(row - rows.start, 0, values);
                }
            }
            above += outputs;
        }
        Ok(())
    }

    /// An expert of the FP8 packaging: `[out, in]` matrices with a scale per output.
    fn scaled(
        &self,
        layer: usize,
        expert: usize,
        parts: &[names::Mlp],
    ) -> Result<Matrix, LoadError> {
        let weights: Vec<&TensorInfo> =
            parts.iter().map(|&part| self.tensor(&names::expert(layer, expert, part))).collect();
        let mut matrix = self.matrix(&weights)?;
        let mut scales = Vec::new();
        for &part in parts {
            let tensor = self.tensor(&names::expert_scale(layer, expert, part));
            scales.extend(self.values(tensor)?);
        }
        matrix.set_scales(scales);
        Ok(matrix)
    }

    /// One expert's slice `[in, out]` of a fused tensor, transposed on the way.
    fn fused(&self, layer: usize, expert: usize, part: Fused) -> Result<Matrix, LoadError> {
        let tensor = self.tensor(&names::fused_experts(layer, part));
        let (inputs, outputs) = (tensor.shape[1], tensor.shape[2]);
        let mut matrix = self.zeroed_slice(layer, part)?;
        let mut panels: Vec<Panel<'_>> = matrix.panels_mut().collect();
        let row_bytes = outputs * tensor.dtype.bytes();
        let start = expert as u64 * inputs as u64 * row_bytes as u64;
        let rows_at_once = (PIECE_BYTES / row_bytes).max(1);
        let mut bytes = vec![0; rows_at_once * row_bytes];
        for k0 in (0..inputs).step_by(rows_at_once) {
            let rows = rows_at_once.min(inputs - k0);
            let piece = &mut bytes[..rows * row_bytes];
            self.checkpoint.read_at(tensor, start + k0 as u64 * row_bytes as u64, piece)?;
            let value = widener(tensor.dtype, piece);
            for (index, panel) in panels.iter_mut().enumerate() {
                let lanes = PANEL.min(outputs - index * PANEL);
                for row in 0..rows {
                    let at = row * outputs + index * PANEL;
                    panel.put_input(k0 + row, (at..at + lanes).map(&value));
                }
            }
        }
        Ok(matrix)
    }
}

impl Make<Cpu> for Loader<'_> {
    type Error = LoadError;

    fn matrix(&self, tensors: &[&TensorInfo]) -> Result<Matrix, LoadError> {
        let mut matrix = self.zeroed_stack(tensors)?;
        let outputs = matrix.outputs();
        let mut panels: Vec<(usize, Panel<'_>)> = matrix.panels_mut().enumerate().collect();
        panels.par_iter_mut().try_for_each(|(index, panel)| {
            let rows = *index * PANEL..((*index + 1) * PANEL).min(outputs);
            self.fill_rows(tensors, rows, panel)
        })?;
        Ok(matrix)
    }

    fn norm(&self, tensor: &TensorInfo) -> Result<Vec<f32>, LoadError> {
        self.values(tensor)
    }

    fn embedding(&self, tensor: &TensorInfo) -> Result<Embedding, LoadError> {
        let dtype = match self.storage(tensor.dtype) {
            Storage::F32 => Dtype::F32,
            Storage::Bf16 => Dtype::Bf16,
        };
        let mut table = Embedding::zeroed(dtype, tensor.shape[0], tensor.shape[1])
            .map_err(|source| LoadError::Matrix { tensor: tensor.name.clone(), source })?;
        let piece = PIECE_BYTES / dtype.bytes();
        let fill = |(index, out): (usize, &mut [u8])| -> Result<(), LoadError> {
            let count = out.len() / dtype.bytes();
            let width = tensor.dtype.bytes();
            let bytes = self.bytes(tensor, (index * piece * width) as u64, count * width)?;
            let value = widener(tensor.dtype, &bytes);
            match dtype {
                Dtype::F32 => out.chunks_exact_mut(4).enumerate().for_each(|(i, out)| {
                    out.copy_from_slice(&value(i).to_le_bytes());
                }),
                Dtype::Bf16 => out.chunks_exact_mut(2).enumerate().for_each(|(i, out)| {
                    out.copy_from_slice(&bf16::from_f32(value(i)).to_le_bytes());
                }),
            }
            Ok(())
        };
        table.bytes_mut().par_chunks_mut(piece * dtype.bytes()).enumerate().try_for_each(fill)?;
        Ok(table)
    }
}

fn zeroed(
    storage: Storage,
    (outputs, inputs): (usize, usize),
    tensor: &TensorInfo,
) -> Result<Matrix, LoadError> {
    Matrix::zeroed(storage, outputs, inputs)
        .map_err(|source| LoadError::Matrix { tensor: tensor.name.clone(), source })
}

fn length(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a tensor that fits the address space")
}

/// Element `i` of `bytes` as f32, without its scale.
fn widener(dtype: Stored, bytes: &[u8]) -> impl Fn(usize) -> f32 + '_ {
    move |i| match dtype {
        Stored::F32 => {
            f32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
        }
        Stored::Bf16 => bf16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32(),
        Stored::F16 => f16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32(),
        Stored::F8E4M3 => e4m3(bytes[i]),
    }
}

/// Value of an e4m3fn byte: bias 7, subnormals, no infinities, 0x7f and 0xff are NaN.
fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 0xf), f32::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2.0_f32.powi(-9),
        (_, _) => (1.0 + mantissa / 8.0) * 2.0_f32.powi(exponent - 7),
    };
    if byte >> 7 == 1 { -magnitude } else { magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_covers_its_range_and_is_exact_in_bf16() {
        assert_eq!(e4m3(0x00), 0.0);
        assert_eq!(e4m3(0x01), 2.0_f32.powi(-9));
        assert_eq!(e4m3(0x38), 1.0);
        assert_eq!(e4m3(0x7e), 448.0);
        assert_eq!(e4m3(0xfe), -448.0);
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        for byte in 0..=u8::MAX {
            let value = e4m3(byte);
            assert!(value.is_nan() || bf16::from_f32(value).to_f32() == value, "{byte:#x}");
        }
    }
}
