//! The product of the f32 profile: one chain of fused multiply-adds per element.

use super::args::{Launch, args, blocks, int};
use super::driver::{CudaError, Driver};
use super::matrix::{Matrix, MatrixShape, Storage};
use super::tensor::Tensor;
use crate::level::Dtype;

/// As the kernel's block.
const THREADS: u32 = 256;

/// Elements of the result that a block makes.
const ROWS: usize = 32;
const OUTPUTS: usize = 64;

/// `out = x * w^T`, times the matrix's scales if it has any.
///
/// # Errors
///
/// [`CudaError`] if memory is refused or CUDA fails.
///
/// # Panics
///
/// If the shapes disagree, or something is not f32.
pub(super) fn linear_f32(
    driver: &Driver,
    x: &Tensor,
    w: &Matrix,
    out: &mut Tensor,
) -> Result<(), CudaError> {
    let MatrixShape { outputs, inputs } = w.shape();
    assert_eq!((x.columns(), x.dtype()), (inputs, Dtype::F32), "the left operand");
    assert_eq!((out.columns(), out.dtype()), (outputs, Dtype::F32), "the result");
    out.resize(x.rows())?;
    let kernel = match w.storage() {
        Storage::F32 => "herd_linear_f32",
        Storage::Bf16 => "herd_linear_f32_bf16",
    };
    let grid = [blocks(outputs.div_ceil(OUTPUTS)), blocks(x.rows().div_ceil(ROWS)), 1];
    let launch = Launch { kernel, grid, block: THREADS, shared: 0 };
    let args = args![
        x.buffer(),
        w.weights(),
        w.scales(),
        out.buffer(),
        int(x.rows()),
        int(outputs),
        int(inputs),
    ];
    // SAFETY: the kernel's seven parameters, of these shapes; scales are null or one per output.
    unsafe { driver.launch(launch, &args) }
}
