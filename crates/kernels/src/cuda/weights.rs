//! Weights in the device's form, made of rows as they are read.

use super::buffer::Buffer;
use super::driver::{CudaError, Driver};
use super::embed::Embedding;
use super::experts::{ExpertShape, TiledExpert};
use super::experts_f32::{PlainExpert, PlainShape};
use super::matrix::{self, MatrixShape};
use super::tiles::{TileShape, TileStorage, TiledMatrix};
use crate::level::Dtype;
use crate::matrix::{Matrix, Storage};
use std::ops::Range;
use std::sync::Arc;

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

/// One routed expert. Its parts in memory are weights and scales of gate and up, then those of down; they are the same on
/// all processes that hold this expert in this profile.
pub struct ExpertOnDevice {
    pub(super) expert: Expert,
}

pub(super) enum Expert {
    Plain(Arc<PlainExpert>, PlainShape),
    Tiled(Arc<TiledExpert>, ExpertShape),
}

/// Sizes of a routed expert.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExpertSizes {
    /// Columns of what goes in and of what comes out.
    pub hidden: usize,
    /// Columns in between.
    pub width: usize,
    pub storage: ExpertStorage,
}

/// How the weights of routed experts are stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExpertStorage {
    /// Numbers of 2 bytes.
    Bf16,
    /// Numbers of 4 bytes, in the f32 profile only.
    F32,
    /// e4m3 with a scale per output, in the bf16 profile only.
    Fp8,
    /// FP8 that was widened to bf16, with the scales: in the f32 profile only.
    Widened,
}

/// A matrix of a routed expert.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExpertPart {
    Gate,
    Up,
    Down,
}

/// Reads rows of a matrix: which of its outputs, and where they go.
pub type ReadRows<'a, E> = dyn Fn(Range<usize>, &mut [u8]) -> Result<(), E> + Sync + 'a;

/// Reads rows of a matrix of an expert.
pub type ReadExpert<'a, E> =
    dyn Fn(ExpertPart, Range<usize>, &mut [u8]) -> Result<(), E> + Sync + 'a;

/// Makes a device's weights.
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
        device.bring(table.content())?;
        Ok(EmbeddingTable(device))
    }

    /// A matrix of the f32 profile.
    ///
    /// # Errors
    ///
    /// As for [`Loader::norm`].
    pub fn matrix(&self, weights: &Matrix) -> Result<Weights, CudaError> {
        let shape = MatrixShape { outputs: weights.outputs(), inputs: weights.inputs() };
        let storage = match weights.storage {
            Storage::F32 => matrix::Storage::F32,
            Storage::Bf16 => matrix::Storage::Bf16,
        };
        let mut device = matrix::Matrix::new(&self.driver, storage, shape)?;
        device.bring(&weights.rows(0..weights.outputs()))?;
        if let Some(scales) = &weights.scales {
            device.set_scales(&self.driver, scales)?;
        }
        Ok(Weights(Stored::Plain(device)))
    }

    /// A matrix `[outputs, inputs]` of the bf16 profile. Several threads of the current pool read.
    ///
    /// # Errors
    ///
    /// As for [`Loader::norm`], and those of `read`.
    pub fn bf16_matrix<E: From<CudaError> + Send>(
        &self,
        (outputs, inputs): (usize, usize),
        read: &ReadRows<'_, E>,
    ) -> Result<Weights, E> {
        let shape = TileShape { storage: TileStorage::Bf16, outputs, inputs };
        let tiled = TiledMatrix::new(&self.driver, shape)?;
        tiled.bring((1, outputs), &|_, some, rows| read(some, rows))?;
        Ok(Weights(Stored::Tiled(tiled)))
    }

    /// An expert of the bf16 profile. Several threads of the current pool read.
    ///
    /// * `scales`: of FP8 weights, those of gate, up and down
    ///
    /// # Errors
    ///
    /// As for [`Loader::norm`], and those of `read`; [`CudaError::NotFinite`] if an FP8 weight is no number.
    ///
    /// # Panics
    ///
    /// If FP8 weights have no scales.
    pub fn tiled_expert<E: From<CudaError> + Send>(
        &self,
        sizes: ExpertSizes,
        scales: Option<[&[f32]; 3]>,
        read: &ReadExpert<'_, E>,
    ) -> Result<ExpertOnDevice, E> {
        let expert = self.empty_expert(sizes)?;
        let Expert::Tiled(tiled, shape) = &expert.expert else {
            unreachable!("experts of the bf16 profile are tiled")
        };
        tiled.gate_up.bring((2, shape.width), &|matrix, some, rows| {
            read(if matrix == 0 { ExpertPart::Gate } else { ExpertPart::Up }, some, rows)
        })?;
        tiled.down.bring((1, shape.hidden), &|_, some, rows| read(ExpertPart::Down, some, rows))?;
        if shape.storage == TileStorage::Fp8 {
            let [gate, up, down] = scales.expect("FP8 weights have scales");
            tiled.gate_up.set_scales(&[gate, up])?;
            tiled.down.set_scales(&[down])?;
        }
        Ok(expert)
    }

    /// An expert of the f32 profile, made of the CPU's.
    ///
    /// # Errors
    ///
    /// As for [`Loader::norm`].
    pub fn plain_expert(
        &self,
        weights: &crate::ExpertWeights,
    ) -> Result<ExpertOnDevice, CudaError> {
        let crate::ExpertWeights { gate_up, down } = weights;
        let storage = match (gate_up.storage, &gate_up.scales) {
            (Storage::F32, _) => ExpertStorage::F32,
            (Storage::Bf16, None) => ExpertStorage::Bf16,
            (Storage::Bf16, Some(_)) => ExpertStorage::Widened,
        };
        let sizes = ExpertSizes { hidden: gate_up.inputs(), width: down.inputs(), storage };
        let expert = self.empty_expert(sizes)?;
        for (part, matrix) in [(0, gate_up), (2, down)] {
            expert.put(part, 0, &matrix.rows(0..matrix.outputs()))?;
            if let Some(scales) = &matrix.scales {
                expert.put(part + 1, 0, bytemuck::cast_slice(scales))?;
            }
        }
        Ok(expert)
    }

    /// An expert whose content is still to be put there.
    ///
    /// # Errors
    ///
    /// [`CudaError`] if memory is refused.
    ///
    /// # Panics
    ///
    /// If the profile has no such storage.
    pub fn empty_expert(&self, sizes: ExpertSizes) -> Result<ExpertOnDevice, CudaError> {
        let ExpertSizes { hidden, width, storage } = sizes;
        let driver = &self.driver;
        let expert = match (self.dtype, storage) {
            (Dtype::Bf16, ExpertStorage::Bf16 | ExpertStorage::Fp8) => {
                let is_fp8 = storage == ExpertStorage::Fp8;
                let storage = if is_fp8 { TileStorage::Fp8 } else { TileStorage::Bf16 };
                let shape = ExpertShape { storage, hidden, width };
                let tiled = TiledExpert {
                    gate_up: TiledMatrix::new(driver, shape.gate_up())?,
                    down: TiledMatrix::new(driver, shape.down())?,
                };
                Expert::Tiled(Arc::new(tiled), shape)
            }
            (Dtype::F32, ExpertStorage::F32 | ExpertStorage::Bf16 | ExpertStorage::Widened) => {
                let dtype = if storage == ExpertStorage::F32 { Dtype::F32 } else { Dtype::Bf16 };
                let weights = |count: usize| Buffer::new(driver, "weights", count * dtype.bytes());
                let scales = |count: usize| {
                    let is_scaled = storage == ExpertStorage::Widened;
                    is_scaled.then(|| Buffer::new(driver, "scales", count * 4)).transpose()
                };
                let plain = PlainExpert {
                    gate_up: weights(2 * width * hidden)?,
                    gate_up_scales: scales(2 * width)?,
                    down: weights(hidden * width)?,
                    down_scales: scales(hidden)?,
                };
                Expert::Plain(Arc::new(plain), PlainShape { dtype, hidden, width })
            }
            (Dtype::Bf16, ExpertStorage::F32 | ExpertStorage::Widened)
            | (Dtype::F32, ExpertStorage::Fp8) => {
                panic!("no {storage:?} experts in the {} profile", self.dtype)
            }
        };
        Ok(ExpertOnDevice { expert })
    }
}

impl ExpertOnDevice {
    fn parts(&self) -> [Option<&Buffer>; 4] {
        match &self.expert {
            Expert::Plain(plain, _) => [
                Some(&plain.gate_up),
                plain.gate_up_scales.as_ref(),
                Some(&plain.down),
                plain.down_scales.as_ref(),
            ],
            Expert::Tiled(tiled, _) => {
                let TiledExpert { gate_up, down } = &**tiled;
                [Some(gate_up.tiles()), gate_up.scales(), Some(down.tiles()), down.scales()]
            }
        }
    }

    /// Bytes of the parts.
    #[must_use]
    pub fn part_bytes(&self) -> [usize; 4] {
        self.parts().map(|part| part.map_or(0, Buffer::bytes))
    }

    /// Copies what is at byte `at` of a part to the host, beside the steps.
    ///
    /// # Errors
    ///
    /// [`CudaError`] if CUDA fails.
    ///
    /// # Panics
    ///
    /// If that lies outside.
    pub fn fetch(&self, part: usize, at: usize, out: &mut [u8]) -> Result<(), CudaError> {
        self.parts()[part].expect("a part that is there").fetch(at, out)
    }

    /// Copies to byte `at` of a part, beside the steps. Nobody uses the expert before all of it is there.
    ///
    /// # Errors
    ///
    /// [`CudaError`] if CUDA fails.
    ///
    /// # Panics
    ///
    /// If that lies outside.
    pub fn put(&self, part: usize, at: usize, content: &[u8]) -> Result<(), CudaError> {
        self.parts()[part].expect("a part that is there").bring(at, content)
    }
}

impl NormWeights {
    /// For kernels.
    pub(super) fn buffer(&self) -> &Buffer {
        &self.0
    }
}
