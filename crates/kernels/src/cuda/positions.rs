//! Positions into queries and keys, and keys and values into the cache.

use super::args::{Launch, args, blocks, int};
use super::batch::{Batch, Part};
use super::cache::Cache;
use super::driver::{CudaError, Driver};
use super::tensor::Tensor;
use crate::attention::AttentionShape;
use crate::device::{AttentionLayer, Pool, Positional};
use crate::level::Dtype;

/// As the kernel's block: a warp per head.
const HEADS: usize = 4;

/// What the kernel takes for "no QK norm".
const NO_NORM: f32 = -1.0;

/// Device addresses of the block tables of a pool: blocks, where each table starts, and its first block number (0: all
/// begin with block 0).
pub(super) fn tables_of(batch: &Batch, pool: Pool) -> [u64; 3] {
    match pool {
        Pool::Full => [batch.address(Part::Full), batch.address(Part::FullStart), 0],
        Pool::Chunked(_) => {
            [Part::Chunked, Part::ChunkedStart, Part::ChunkedFirst].map(|part| batch.address(part))
        }
    }
}

/// Whether a step's tables cover what its rows see of a layer, and all their blocks are in the cache.
///
/// # Panics
///
/// If not, or if the shapes of layer and cache disagree.
pub(super) fn check_layer(batch: &Batch, layer: &AttentionLayer, cache: &Cache) {
    let (shape, limits) = (layer.shape, batch.limits());
    assert_eq!((cache.kv_heads(), cache.head_dim()), (shape.kv_heads, shape.head_dim), "the cache");
    assert!(shape.kv_heads > 0 && shape.heads.is_multiple_of(shape.kv_heads), "groups of heads");
    let (limit, is_checked) = match cache.pool(layer.layer) {
        Pool::Full => (limits.full_blocks, true),
        Pool::Chunked(chunk) => (limits.chunked_blocks, limits.chunk_tokens == Some(chunk)),
    };
    assert!(is_checked, "a step that was checked against another chunk");
    assert!(0 < limit && limit <= cache.blocks(layer.layer), "a step of a larger pool");
}

/// Positions into `qkv` (`[rows, q | k | v]`), of which q is written back, and k and v into the cache.
///
/// # Errors
///
/// [`CudaError`] if CUDA fails.
///
/// # Panics
///
/// If the shapes disagree, or the step was checked against other limits.
pub(super) fn positions(
    driver: &Driver,
    batch: &Batch,
    layer: &AttentionLayer,
    qkv: &mut Tensor,
    cache: &mut Cache,
) -> Result<(), CudaError> {
    let AttentionShape { heads, kv_heads, head_dim } = layer.shape;
    check_layer(batch, layer, cache);
    assert_eq!((qkv.rows(), qkv.columns()), (batch.rows(), layer.shape.qkv()), "q, k and v");
    assert_eq!(qkv.dtype(), Dtype::F32, "a sum");
    let (angles, factors, eps) = match layer.position {
        Positional::Rope { qk_norm_eps } => {
            assert_eq!(batch.head_dim(), head_dim, "angles of another model");
            (batch.address(Part::Angles), 0, qk_norm_eps.unwrap_or(NO_NORM))
        }
        Positional::None { temperature: None } => (0, 0, NO_NORM),
        Positional::None { temperature: Some(temperature) } => {
            assert_eq!(batch.temperature(), Some(temperature), "factors of another model");
            (0, batch.address(Part::Factors), NO_NORM)
        }
    };
    let kernel = match cache.dtype() {
        Dtype::F32 => "herd_positions_f32",
        Dtype::Bf16 => "herd_positions_bf16",
    };
    let grid = [blocks(batch.rows()), blocks((heads + 2 * kv_heads).div_ceil(HEADS)), 1];
    let shared = blocks(HEADS * head_dim * size_of::<f32>());
    let launch = Launch { kernel, grid, block: 32 * blocks(HEADS), shared };
    let [table, start, first] = tables_of(batch, cache.pool(layer.layer));
    let args = args![
        qkv.buffer(),
        int(heads),
        int(kv_heads),
        int(head_dim),
        angles,
        factors,
        eps,
        batch.address(Part::Positions),
        batch.address(Part::Tables),
        table,
        start,
        first,
        cache.buffer(layer.layer),
    ];
    // SAFETY: the kernel's 13 parameters. `qkv` has the rows of the step and the columns of the heads; the step was
    // checked: its tables cover the rows' positions with blocks that the cache's layer has.
    unsafe { driver.launch(launch, &args) }
}
