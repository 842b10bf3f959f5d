//! The GPU as a device: kernels in CUDA, compiled when the process starts, launched on one stream.
//!
//! CUDA and NVRTC are loaded at run time, so one binary serves machines with and without a GPU. The same kernels
//! also run on a CPU through an emulator (feature `emulated`), for tests on machines that have none.

mod args;
mod attention_bf16;
mod buffer;
pub mod compile;
mod dispatch;
mod driver;
#[cfg(feature = "emulated")]
mod emulated;
mod experts;
mod experts_f32;
mod linear_bf16;
mod real;
mod rms_norm;
pub mod sources;
mod tensor;
// Two attributes: clippy knows a module of tests by the plain one.
#[cfg(test)]
#[cfg(feature = "emulated")]
mod tests;
mod tiles;

pub use driver::{CudaError, Driver};
pub use tensor::Tensor;
pub use tiles::{Placement, TileShape, TileStorage, TiledMatrix};
