//! The GPU as a device: kernels in CUDA, compiled when the process starts, launched on one stream.
//!
//! CUDA and NVRTC are loaded at run time, so one binary serves machines with and without a GPU. The same kernels
//! also run on a CPU through an emulator (feature `emulated`), for tests on machines that have none.

mod args;
mod attention_f32;
mod batch;
mod buffer;
mod cache;
pub mod compile;
pub(crate) mod device;
mod dispatch;
mod driver;
mod elementwise;
mod embed;
#[cfg(feature = "emulated")]
mod emulated;
mod experts;
mod finite;
mod gate;
mod linear_bf16;
mod linear_f32;
mod matrix;
mod positions;
mod real;
mod rms_norm;
mod sample;
pub mod sources;
mod tensor;
#[cfg(test)]
#[cfg(feature = "emulated")]
mod tests;
mod tiles;
pub(crate) mod travel;
pub mod weights;

pub use real::{Memory, memory};
pub use device::{CacheOnDevice, Cuda, ExpertsOnDevice};
pub use driver::{CudaError, Driver};
pub use tensor::Tensor;
pub use tiles::{Placement, TileShape, TileStorage, TiledMatrix};
