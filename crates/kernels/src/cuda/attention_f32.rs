//! Attention in the f32 profile: the CPU's order of operations.

use super::args::{Launch, args, blocks, int};
use super::batch::{Batch, Part};
use super::cache::Cache;
use super::driver::{CudaError, Driver};
use super::positions::{check_layer, tables_of};
use super::tensor::Tensor;
use crate::attention::AttentionShape;
use crate::device::{AttentionLayer, Pool};
use crate::level::Dtype;

/// As the kernel's block: a warp per row and query head.
const HEADS: usize = 4;

/// Dimensions that the kernel's registers hold.
const HEAD_DIM_MAX: usize = 256;

/// Attention of every row of `qkv`, whose keys and values are in the cache, into `out`.
///
/// # Errors
///
/// [`CudaError`] if memory is refused or CUDA fails.
///
/// # Panics
///
/// If the shapes disagree, the cache is not f32, or the step was checked against other limits.
pub(super) fn attention_f32(
    driver: &Driver,
    (batch, layer): (&Batch, &AttentionLayer),
    qkv: &Tensor,
    cache: &Cache,
    out: &mut Tensor,
) -> Result<(), CudaError> {
    let AttentionShape { heads, kv_heads, head_dim } = layer.shape;
    check_layer(batch, layer, cache);
    assert!(head_dim <= HEAD_DIM_MAX, "heads of {head_dim} dimensions");
    assert_eq!((qkv.rows(), qkv.columns()), (batch.rows(), layer.shape.qkv()), "q, k and v");
    assert_eq!(out.columns(), layer.shape.q(), "the result");
    assert_eq!([qkv.dtype(), cache.dtype(), out.dtype()], [Dtype::F32; 3], "the f32 profile");
    out.resize(qkv.rows())?;
    let grid = [blocks((qkv.rows() * heads).div_ceil(HEADS)), 1, 1];
    let launch =
        Launch { kernel: "herd_attention_f32", grid, block: 32 * blocks(HEADS), shared: 0 };
    let pool = cache.pool(layer.layer);
    let chunk = match pool {
        Pool::Full => 0,
        Pool::Chunked(chunk) => chunk,
    };
    let [table, start, first] = tables_of(batch, pool);
    let args = args![
        qkv.buffer(),
        int(qkv.rows()),
        int(heads),
        int(kv_heads),
        int(head_dim),
        cache.buffer(layer.layer),
        batch.address(Part::Positions),
        batch.address(Part::Tables),
        table,
        start,
        first,
        chunk,
        out.buffer(),
    ];
    // SAFETY: the kernel's 13 parameters. `qkv` and `out` have the rows of the step and the columns of the heads; the
    // step was checked: its tables cover all positions that the rows see with blocks that the cache's layer has.
    unsafe { driver.launch(launch, &args) }
}
