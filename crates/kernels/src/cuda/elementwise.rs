//! Operations that treat every element of a row alike, and the gathering of rows.

use super::args::{Launch, args, blocks, int};
use super::batch::{Batch, Part};
use super::buffer::Buffer;
use super::driver::{CudaError, Driver};
use super::gate::Route;
use super::tensor::Tensor;
use crate::level::Dtype;

/// As the kernels' block.
const THREADS: u32 = 256;

/// Columns of a block: 4 per thread.
const COLUMNS: usize = 1024;

/// Blocks that cover a result: a row each, then its columns.
pub(super) fn grid(out: &Tensor) -> [u32; 3] {
    [blocks(out.rows()), blocks(out.columns().div_ceil(COLUMNS)), 1]
}

fn covering(kernel: &'static str, out: &Tensor) -> Launch {
    Launch { kernel, grid: grid(out), block: THREADS, shared: 0 }
}

fn shape(x: &Tensor) -> (usize, usize) {
    (x.rows(), x.columns())
}

/// `out = silu(gate) * up` for rows `[gate | up]`, rounded to the type of `out`.
///
/// # Errors
///
/// [`CudaError`] if memory is refused or CUDA fails.
///
/// # Panics
///
/// If the shapes disagree.
pub(super) fn swiglu(driver: &Driver, gate_up: &Tensor, out: &mut Tensor) -> Result<(), CudaError> {
    assert_eq!(gate_up.columns(), 2 * out.columns(), "gate and up");
    assert_eq!(gate_up.dtype(), Dtype::F32, "a sum");
    out.resize(gate_up.rows())?;
    let kernel = match out.dtype() {
        Dtype::F32 => "herd_swiglu_f32",
        Dtype::Bf16 => "herd_swiglu_bf16",
    };
    let args = args![gate_up.buffer(), out.buffer(), int(out.columns())];
    // SAFETY: the kernel's three parameters, of as many rows, the first of twice as many columns.
    unsafe { driver.launch(covering(kernel, out), &args) }
}

/// `x += y`, with `y` in f32 or, as it travels in the bf16 profile, in bf16.
///
/// # Errors
///
/// [`CudaError`] if CUDA fails.
///
/// # Panics
///
/// If the shapes disagree.
pub(super) fn add(driver: &Driver, x: &mut Tensor, y: &Tensor) -> Result<(), CudaError> {
    assert_eq!((shape(x), x.dtype()), (shape(y), Dtype::F32), "terms of a sum");
    let kernel = match y.dtype() {
        Dtype::F32 => "herd_add_f32",
        Dtype::Bf16 => "herd_add_bf16",
    };
    let args = args![x.buffer(), y.buffer(), int(x.columns())];
    // SAFETY: the kernel's three parameters, of the same shape.
    unsafe { driver.launch(covering(kernel, x), &args) }
}

/// `wire = h * score`: the experts' input, in the form that travels.
///
/// # Errors
///
/// [`CudaError`] if memory is refused or CUDA fails.
///
/// # Panics
///
/// If the shapes or types disagree.
pub(super) fn pack(
    driver: &Driver,
    h: &Tensor,
    route: &Route,
    wire: &mut Tensor,
) -> Result<(), CudaError> {
    assert_eq!((h.columns(), h.dtype()), (wire.columns(), wire.dtype()), "rows as they travel");
    assert_eq!(h.rows(), route.rows(), "a score per row");
    wire.resize(h.rows())?;
    let kernel = match wire.dtype() {
        Dtype::F32 => "herd_pack_f32",
        Dtype::Bf16 => "herd_pack_bf16",
    };
    let args = args![h.buffer(), route.scores(), wire.buffer(), int(h.columns())];
    // SAFETY: the kernel's four parameters: as many rows and scores, and as many columns.
    unsafe { driver.launch(covering(kernel, wire), &args) }
}

/// `out` = the rows of `x` whose logits are wanted, in order.
///
/// # Errors
///
/// [`CudaError`] if memory is refused or CUDA fails.
///
/// # Panics
///
/// If the shapes disagree.
pub(super) fn select(
    driver: &Driver,
    batch: &Batch,
    x: &Tensor,
    out: &mut Tensor,
) -> Result<(), CudaError> {
    assert_eq!((x.rows(), x.columns()), (batch.rows(), out.columns()), "rows of the step");
    assert_eq!((x.dtype(), out.dtype()), (Dtype::F32, Dtype::F32), "the residual stream");
    out.resize(batch.samples())?;
    let args = args![x.buffer(), batch.address(Part::Samples), out.buffer(), int(x.columns())];
    // SAFETY: the kernel's four parameters. The step's samples are below the number of its rows, which `x` has, and
    // `out` has a row for each.
    unsafe { driver.launch(covering("herd_select", out), &args) }
}

/// Fills a buffer with zeros, up to its last whole 16 bytes.
pub(super) fn zero(driver: &Driver, buffer: &Buffer) -> Result<(), CudaError> {
    let count = buffer.bytes() / 16;
    let grid = [blocks(count.div_ceil(THREADS as usize)), 1, 1];
    let launch = Launch { kernel: "herd_zero", grid, block: THREADS, shared: 0 };
    // SAFETY: the kernel's two parameters; the buffer has so many times 16 bytes.
    unsafe { driver.launch(launch, &args![buffer, count as u64]) }
}
