//! The device operations of the engine, and their implementation on a CPU.
//!
//! **Law of this crate**: a row of any result depends on that row's operands alone, bit for bit.
//! Every reduction runs in one fixed order that knows nothing of the number of rows, of threads or
//! of the vector width: each output element of a matrix product is one chain of fused
//! multiply-adds over `k = 0, 1, 2, …`, and attention walks blocks of absolute positions.
//!
//! Floating point is never contracted or reassociated by the compiler, and every fused operation is
//! written as one, so all instruction sets agree bit for bit, with one exception: AVX-512 BF16 adds
//! its pairs in the hardware's own order. It is a numeric profile of its own ([`Level::profile`]).

// SIMD intrinsics and the disjoint column writes of `linear` need it; each block says why.
#![allow(unsafe_code, reason = "SIMD intrinsics and disjoint writes from several threads")]

mod attention;
mod bandwidth;
mod cache;
mod cpu;
pub mod cuda;
mod device;
mod embedding;
mod gate;
mod gemm;
mod isa;
mod level;
mod lines;
mod math;
mod matrix;
mod norm;
mod philox;
mod rope;
mod sample;
mod staged;

pub use attention::{AttentionShape, BLOCK_TOKENS};
pub use bandwidth::read_bandwidth;
pub use cache::{Cache, RowsAt};
pub use cpu::{Cpu, CpuBatch, ExpertWeights, Experts, Route, RowMemory, Tensor, Wire};
pub use device::{
    AttentionLayer, Device, DeviceError, Pool, Positional, Room, RopeTable, Row, SampleRow,
    StepBatch, StepLimits, StepRoom, StepShape, Table, Temperature,
};
pub use embedding::Embedding;
pub use level::{Dtype, Level};
pub use matrix::{Matrix, MatrixError, Panel, Storage};
pub use philox::philox4x32;
pub use rope::{Llama3Scaling, RopeSpec, inv_freq};
pub use sample::{Sampled, Sampling, sample_row};
pub use staged::{Bad, BadPlace, Loan, Noted, RouteOnHost, Staged, TensorOnHost, WireOnHost};
