//! RMS norm, with the residual added before if there is one.

use super::args::{Launch, args, blocks, int};
use super::buffer::Buffer;
use super::driver::{CudaError, Driver};
use super::tensor::Tensor;

/// As the kernel's block; as many chains are the fastest order.
const THREADS: u32 = 256;

/// Chains of the CPU's order of summation.
const CHAINS_OF_CPU: i32 = 16;

/// `x += y` if there is a `y`; `out = x / rms(x) * weight`. The f32 profile sums in the CPU's order.
///
/// # Errors
///
/// [`CudaError`] if memory is refused or CUDA fails.
///
/// # Panics
///
/// If the shapes disagree.
pub(super) fn rms_norm(
    driver: &Driver,
    (x, y): (&Tensor, Option<&Tensor>),
    (weight, eps): (&Buffer, f32),
    out: &mut Tensor,
) -> Result<(), CudaError> {
    let (rows, hidden) = (x.rows(), x.columns());
    assert_eq!((weight.bytes(), out.columns()), (hidden * 4, hidden), "as wide as the row");
    assert!(y.is_none_or(|y| (y.rows(), y.columns()) == (rows, hidden)), "as many rows");
    out.resize(rows)?;
    let (kernel, chains) = match out.dtype() {
        crate::Dtype::F32 => ("herd_rms_norm_f32", CHAINS_OF_CPU),
        crate::Dtype::Bf16 => ("herd_rms_norm_bf16", THREADS.cast_signed()),
    };
    let launch = Launch { kernel, grid: [blocks(rows), 1, 1], block: THREADS, shared: 0 };
    let args =
        args![x.buffer(), y.map(Tensor::buffer), weight, eps, out.buffer(), int(hidden), chains];
    // SAFETY: the kernel's seven parameters. It reads and writes `rows` rows of `hidden` elements, which the tensors
    // have, and `hidden` weights.
    unsafe { driver.launch(launch, &args) }
}
