//! The GPU as a device: kernels in CUDA, compiled when the process starts, launched on one stream.
//!
//! CUDA and NVRTC are loaded at run time, so one binary serves machines with and without a GPU. The same kernels
//! also run on a CPU through an emulator (feature `emulated`), for tests on machines that have none.

mod args;
mod attention_bf16;
mod attention_f32;
mod attention_plans;
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
#[cfg(feature = "emulated")]
pub mod emulator;
mod experts;
mod experts_f32;
mod finite;
mod gate;
mod graphs;
mod image_cache;
mod kv_rows;
mod lent;
mod linear_bf16;
mod linear_f32;
mod matrix;
pub mod nvml;
mod pinned;
mod positions;
mod queue;
mod read;
mod real;
mod rms_norm;
mod routed;
mod sample;
pub mod sources;
mod tables;
mod tensor;
// Two attributes: clippy knows a module of tests by the plain one.
#[cfg(test)]
#[cfg(feature = "emulated")]
mod tests;
mod tiles;
mod timing;
pub(crate) mod travel;
mod wait;
pub mod weights;

pub use device::{Arriving, CacheOnDevice, Cuda};
pub use dispatch::{RouteTable, RouteTableParts};
pub use driver::{CudaError, Driver, Options, Taken};
pub use graphs::GraphFigures;
pub use image_cache::ImageCache;
pub use read::read_bandwidth;
pub use real::{Memory, memory};
pub use routed::ExpertsOnDevice;
pub use tensor::Tensor;
pub use timing::KernelTime;
pub use travel::WireOnDevice;
pub use wait::exit;
