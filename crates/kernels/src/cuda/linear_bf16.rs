//! Products of bf16 rows with tiled weights.

use super::args::{Launch, args, blocks, int};
use super::driver::{CudaError, Driver};
use super::tensor::Tensor;
use super::tiles::{THREADS, TileShape, TileStorage, TiledMatrix, wide_shared};
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
    /// Bytes of shared memory of a block: the rings of its 8 warps.
    shared: u32,
}

/// By rising number of rows. More rows share the weights, but need more registers and shared memory.
const CUTS: [Cut; 4] = [
    Cut {
        kernels: ["herd_linear_bf16_8", "herd_linear_fp8_8"],
        rows: 8,
        tiles: 2,
        shared: 8 * (12 << 10),
    },
    Cut {
        kernels: ["herd_linear_bf16_16", "herd_linear_fp8_16"],
        rows: 16,
        tiles: 2,
        shared: 8 * (12 << 10),
    },
    Cut {
        kernels: ["herd_linear_bf16_32", "herd_linear_fp8_32"],
        rows: 32,
        tiles: 4,
        shared: 8 * (24 << 10),
    },
    Cut {
        kernels: ["herd_linear_bf16_64", "herd_linear_fp8_64"],
        rows: 64,
        tiles: 4,
        shared: 8 * (24 << 10),
    },
];

/// Rows, and outputs, of a block for many rows.
const WIDE: usize = 128;

/// Blocks for many rows that are worth it: fewer leave many of some 130 SMs idle.
const WIDE_BLOCKS_MIN: usize = 100;

/// The launch for so many rows, on a device that gives a block so many bytes of shared memory.
fn launch(shape: TileShape, rows: usize, shared_max: u32) -> Launch {
    let of_storage = |[bf16, fp8]: [&'static str; 2]| match shape.storage {
        TileStorage::Bf16 => bf16,
        TileStorage::Fp8 => fp8,
    };
    let wide = [rows.div_ceil(WIDE), shape.outputs.div_ceil(WIDE)];
    let fitting = || CUTS.iter().filter(|cut| cut.shared <= shared_max);
    let last = fitting().next_back().unwrap_or(&CUTS[0]);
    if last.rows < rows && wide[0] * wide[1] >= WIDE_BLOCKS_MIN {
        return Launch {
            kernel: of_storage(["herd_linear_bf16_wide", "herd_linear_fp8_wide"]),
            grid: [blocks(wide[0]), blocks(wide[1]), 1],
            block: THREADS,
            shared: wide_shared(shape.storage),
        };
    }
    let cut = fitting().find(|cut| rows <= cut.rows).unwrap_or(last);
    Launch {
        kernel: of_storage(cut.kernels),
        grid: [blocks(shape.down().div_ceil(cut.tiles)), blocks(rows.div_ceil(cut.rows)), 1],
        block: THREADS,
        shared: cut.shared,
    }
}

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
    let (inputs, outputs) = (int(shape.inputs), int(shape.outputs));
    let args = args![x.buffer(), w.tiles(), w.scales(), out.buffer(), int(rows), inputs, outputs];
    // SAFETY: the kernel's seven parameters. It reads `rows` rows of `inputs` bf16, which the tensor has, and the tiles
    // and scales that a matrix of this shape has; it writes `rows` rows of `outputs` f32, made room for above.
    unsafe { driver.launch(launch(shape, rows, driver.shared_max()), &args) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_with_little_shared_memory_takes_more_blocks_of_fewer_rows() {
        let shape = TileShape { storage: TileStorage::Bf16, outputs: 5120, inputs: 5120 };
        let hopper = launch(shape, 64, 227 << 10);
        let ampere = launch(shape, 64, 163 << 10);
        assert_eq!((hopper.kernel, hopper.grid[1]), ("herd_linear_bf16_64", 1));
        assert_eq!((ampere.kernel, ampere.grid[1]), ("herd_linear_bf16_16", 4));
        assert!(ampere.shared <= 163 << 10);
    }
}
