//! Products of bf16 rows with tiled weights.

use super::args::{Launch, args, blocks, int};
use super::driver::{CudaError, Driver};
use super::tensor::Tensor;
use super::tiles::{TileStorage, TiledMatrix};
use crate::level::Dtype;

/// One way to cut a product into blocks. The bits are the same in all.
#[derive(Clone, Copy)]
struct Cut {
    /// For bf16 and for FP8 weights.
    kernels: [&'static str; 2],
    /// Rows of a block.
    rows: usize,
    /// Tiles of outputs of a block.
    tiles: usize,
    /// Bytes of shared memory of a warp.
    ring: u32,
}

/// By rising number of rows. More rows share the weights, but need more registers and shared memory.
const CUTS: [Cut; 4] = [
    Cut { kernels: ["herd_linear_bf16_8", "herd_linear_fp8_8"], rows: 8, tiles: 2, ring: 12 << 10 },
    Cut {
        kernels: ["herd_linear_bf16_16", "herd_linear_fp8_16"],
        rows: 16,
        tiles: 2,
        ring: 12 << 10,
    },
    Cut {
        kernels: ["herd_linear_bf16_32", "herd_linear_fp8_32"],
        rows: 32,
        tiles: 4,
        ring: 24 << 10,
    },
    Cut {
        kernels: ["herd_linear_bf16_64", "herd_linear_fp8_64"],
        rows: 64,
        tiles: 4,
        ring: 24 << 10,
    },
];

/// `out = x * w^T`, times the scales of the matrix if it has any.
///
/// # Errors
///
/// [`CudaError`] if memory is refused or CUDA fails.
///
/// # Panics
///
/// If the shapes or types disagree.
pub(super) fn linear_bf16(
    driver: &Driver,
    x: &Tensor,
    w: &TiledMatrix,
    out: &mut Tensor,
) -> Result<(), CudaError> {
    let (rows, shape) = (x.rows(), w.shape());
    assert_eq!((x.dtype(), out.dtype()), (Dtype::Bf16, Dtype::F32), "bf16 in, f32 out");
    assert_eq!((x.columns(), out.columns()), (shape.inputs, shape.outputs), "as the weights");
    assert!(shape.inputs.is_multiple_of(8), "rows of whole 16 bytes");
    out.resize(rows)?;
    let cut = CUTS.iter().find(|cut| rows <= cut.rows).unwrap_or(&CUTS[CUTS.len() - 1]);
    let [bf16, fp8] = cut.kernels;
    let kernel = match shape.storage {
        TileStorage::Bf16 => bf16,
        TileStorage::Fp8 => fp8,
    };
    let grid = [blocks(shape.down().div_ceil(cut.tiles)), blocks(rows.div_ceil(cut.rows)), 1];
    let segments = shape.segments();
    let launch = Launch { kernel, grid, block: 32 * segments, shared: segments * cut.ring };
    let (inputs, outputs) = (int(shape.inputs), int(shape.outputs));
    let args = args![x.buffer(), w.tiles(), w.scales(), out.buffer(), int(rows), inputs, outputs];
    // SAFETY: the kernel's seven parameters. It reads `rows` rows of `inputs` bf16, which the tensor has, and the tiles
    // and scales that a matrix of this shape has; it writes `rows` rows of `outputs` f32, made room for above.
    unsafe { driver.launch(launch, &args) }
}
