//! Weights in the device's form, made of the CPU's.

use super::buffer::Buffer;
use super::driver::{CudaError, Driver};
use super::embed::Embedding;
use super::experts::{ExpertShape, TiledExpert};
use super::experts_f32::{PlainExpert, PlainShape};
use super::matrix::{self, MatrixShape};
use super::tiles::{Placement, TileShape, TileStorage, TiledMatrix};
use crate::level::Dtype;
use crate::matrix::{Matrix, Storage};
use std::sync::Arc;

/// Outputs that are converted at once: a few megabytes on the host.
const OUTPUTS_AT_ONCE: usize = 256;

/// A weight matrix `[outputs, inputs]`, as the products of its profile take it.
pub struct Weights(pub(super) Stored);

pub(super) enum Stored {
    /// f32 profile.
    Plain(matrix::Matrix),
    /// bf16 profile.
    Tiled(TiledMatrix),
}

/// Norm weights, `[hidden]` f32.
pub struct NormWeights(pub(super) Buffer);

/// Token embeddings `[vocab, hidden]`.
pub struct EmbeddingTable(pub(super) Embedding);

/// One routed expert.
pub struct ExpertOnDevice {
    pub(super) expert: Expert,
    /// What it was made of, kept for other workers that want a copy.
    _original: Arc<crate::ExpertWeights>,
}

pub(super) enum Expert {
    Plain(Arc<PlainExpert>, PlainShape),
    Tiled(Arc<TiledExpert>, ExpertShape),
}

/// Makes weights of the CPU's.
#[derive(Clone)]
pub struct Loader {
    pub(super) driver: Arc<Driver>,
    pub(super) dtype: Dtype,
}

impl Loader {
    /// For devices of this driver and profile.
    #[must_use]
    pub fn new(driver: &Arc<Driver>, dtype: Dtype) -> Self {
        Self { driver: Arc::clone(driver), dtype }
    }

    /// # Errors
    ///
    /// [`CudaError`] if memory is refused or CUDA fails.
    pub fn norm(&self, weights: &[f32]) -> Result<NormWeights, CudaError> {
        Ok(NormWeights(Buffer::of(&self.driver, "norm", bytemuck::cast_slice(weights))?))
    }

    /// # Errors
    ///
    /// As for [`Loader::norm`].
    pub fn embedding(&self, table: &crate::Embedding) -> Result<EmbeddingTable, CudaError> {
        let device = Embedding::new(&self.driver, table.dtype(), table.shape())?;
        device.fill(0, table.content())?;
        Ok(EmbeddingTable(device))
    }

    /// # Errors
    ///
    /// As for [`Loader::norm`].
    pub fn matrix(&self, weights: &Matrix) -> Result<Weights, CudaError> {
        match self.dtype {
            Dtype::F32 => Ok(Weights(Stored::Plain(self.plain(weights)?))),
            Dtype::Bf16 => {
                let (outputs, inputs) = (weights.outputs(), weights.inputs());
                let shape = TileShape { storage: tile_storage(weights), outputs, inputs };
                let tiled = TiledMatrix::new(&self.driver, shape)?;
                put(&tiled, (weights, 0..outputs), Placement::Run)?;
                Ok(Weights(Stored::Tiled(tiled)))
            }
        }
    }

    /// # Errors
    ///
    /// As for [`Loader::norm`].
    pub fn expert(&self, weights: Arc<crate::ExpertWeights>) -> Result<ExpertOnDevice, CudaError> {
        let crate::ExpertWeights { gate_up, down } = &*weights;
        let expert = match self.dtype {
            Dtype::F32 => {
                let scales = |matrix: &Matrix| -> Result<Option<Buffer>, CudaError> {
                    let scales = matrix.scales.as_deref().map(bytemuck::cast_slice);
                    scales.map(|scales| Buffer::of(&self.driver, "scales", scales)).transpose()
                };
                let rows = |matrix: &Matrix| {
                    Buffer::of(&self.driver, "weights", &matrix.rows(0..matrix.outputs()))
                };
                let dtype = match gate_up.storage {
                    Storage::F32 => Dtype::F32,
                    Storage::Bf16 => Dtype::Bf16,
                };
                let shape = PlainShape { dtype, hidden: gate_up.inputs(), width: down.inputs() };
                let plain = PlainExpert {
                    gate_up: rows(gate_up)?,
                    gate_up_scales: scales(gate_up)?,
                    down: rows(down)?,
                    down_scales: scales(down)?,
                };
                Expert::Plain(Arc::new(plain), shape)
            }
            Dtype::Bf16 => {
                let (hidden, width) = (gate_up.inputs(), down.inputs());
                let shape = ExpertShape { storage: tile_storage(gate_up), hidden, width };
                let tiled = TiledExpert {
                    gate_up: TiledMatrix::new(&self.driver, shape.gate_up())?,
                    down: TiledMatrix::new(&self.driver, shape.down())?,
                };
                put(&tiled.gate_up, (gate_up, 0..width), Placement::Gate)?;
                put(&tiled.gate_up, (gate_up, width..2 * width), Placement::Up)?;
                put(&tiled.down, (down, 0..hidden), Placement::Run)?;
                Expert::Tiled(Arc::new(tiled), shape)
            }
        };
        Ok(ExpertOnDevice { expert, _original: weights })
    }

    fn plain(&self, weights: &Matrix) -> Result<matrix::Matrix, CudaError> {
        let (outputs, inputs) = (weights.outputs(), weights.inputs());
        let storage = match weights.storage {
            Storage::F32 => matrix::Storage::F32,
            Storage::Bf16 => matrix::Storage::Bf16,
        };
        let mut device =
            matrix::Matrix::new(&self.driver, storage, MatrixShape { outputs, inputs })?;
        let mut at = 0;
        for first in (0..outputs).step_by(OUTPUTS_AT_ONCE) {
            let rows = weights.rows(first..outputs.min(first + OUTPUTS_AT_ONCE));
            device.fill(at, &rows)?;
            at += rows.len();
        }
        if let Some(scales) = &weights.scales {
            device.set_scales(&self.driver, scales)?;
        }
        Ok(device)
    }
}

/// FP8 stays FP8: only matrices of that packaging have scales.
fn tile_storage(weights: &Matrix) -> TileStorage {
    if weights.scales.is_some() { TileStorage::Fp8 } else { TileStorage::Bf16 }
}

/// Tiles some of a matrix's outputs into `to`, from its first tile of that placement on.
fn put(
    to: &TiledMatrix,
    (weights, outputs): (&Matrix, std::ops::Range<usize>),
    placement: Placement,
) -> Result<(), CudaError> {
    for first in outputs.clone().step_by(OUTPUTS_AT_ONCE) {
        let some = first..outputs.end.min(first + OUTPUTS_AT_ONCE);
        let tile = (first - outputs.start) / super::tiles::TILE_OUTPUTS;
        let rows = weights.rows(some.clone());
        let bits: Vec<u16> = match weights.storage {
            Storage::Bf16 => bytemuck::pod_collect_to_vec(&rows),
            Storage::F32 => rows
                .as_chunks()
                .0
                .iter()
                .map(|b| crate::math::bf16_bits(f32::from_le_bytes(*b)))
                .collect(),
        };
        match to.shape().storage {
            TileStorage::Bf16 => to.put(placement, tile, bytemuck::cast_slice(&bits))?,
            TileStorage::Fp8 => {
                let bytes: Option<Vec<u8>> = bits.into_iter().map(e4m3).collect();
                let bytes = bytes.ok_or(CudaError::NotFinite)?;
                to.put(placement, tile, &bytes)?;
            }
        }
        if let Some(scales) = &weights.scales {
            to.put_scales(placement, tile, &scales[some])?;
        }
    }
    Ok(())
}

/// The e4m3fn byte of a bf16 that is one: what was widened when it was loaded. `None` for what is no number.
fn e4m3(bits: u16) -> Option<u8> {
    let [low, high] = bits.to_le_bytes();
    let sign = high & 0x80;
    let exponent = i32::from(bits >> 7 & 0xff) - 127;
    let mantissa = low & 0x7f;
    if exponent < -9 {
        return Some(sign);
    }
    if exponent < -6 {
        // Subnormal: a multiple of 2^-9.
        let whole = 0x80 | mantissa;
        return Some(sign | whole >> (7 - (exponent + 9)));
    }
    let exponent = u8::try_from(exponent + 7).ok().filter(|exponent| *exponent <= 15)?;
    Some(sign | exponent << 3 | mantissa >> 4)
}

impl NormWeights {
    /// For kernels.
    pub(super) fn buffer(&self) -> &Buffer {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_e4m3_comes_back() {
        for byte in (0..=u8::MAX).filter(|byte| byte & 0x7f != 0x7f) {
            let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
            let magnitude = match exponent {
                0 => mantissa * 2.0_f32.powi(-9),
                _ => (8.0 + mantissa) * 2.0_f32.powi(exponent - 10),
            };
            let value = if byte & 0x80 == 0 { magnitude } else { -magnitude };
            assert_eq!(e4m3(crate::math::bf16_bits(value)), Some(byte), "{value}");
        }
        assert_eq!(e4m3(crate::math::bf16_bits(f32::NAN)), None);
    }
}
