//! The paged KV cache of one rank in device memory. Which block belongs to whom is the router's business.
//!
//! Per layer one buffer, `[blocks][kv_heads]` times
//! * f32: K `[head_dim][16]`, then V `[16][head_dim]`, as on the CPU;
//! * bf16: K `[16][head_dim]`, then V `[head_dim][16]`: tensor cores take both operands along the summed index.

use super::buffer::Buffer;
use super::driver::{CudaError, Driver};
use super::elementwise::zero;
use crate::attention::{AttentionShape, BLOCK_TOKENS};
use crate::device::Pool;
use crate::level::Dtype;
use std::collections::BTreeSet;
use std::sync::Arc;

/// KV blocks of every layer.
pub(super) struct Cache {
    dtype: Dtype,
    kv_heads: usize,
    head_dim: usize,
    layers: Vec<Layer>,
    /// By pool: the addresses of its layers' buffers.
    addresses: Vec<(Pool, Buffer)>,
}

struct Layer {
    pool: Pool,
    blocks: u32,
    buffer: Buffer,
}

impl Cache {
    /// A cache of zeros.
    ///
    /// * `layers`: the pool of every layer
    /// * `blocks`: capacity of a pool
    ///
    /// # Errors
    ///
    /// [`CudaError`] if memory is refused or CUDA fails.
    pub(super) fn new(
        driver: &Arc<Driver>,
        dtype: Dtype,
        shape: AttentionShape,
        layers: &[Pool],
        blocks: impl Fn(Pool) -> u32,
    ) -> Result<Self, CudaError> {
        let AttentionShape { heads: _, kv_heads, head_dim } = shape;
        let block_bytes = crate::Cache::block_bytes(dtype, kv_heads, head_dim);
        let layer = |&pool: &Pool| {
            let blocks = blocks(pool);
            let buffer = Buffer::new(driver, "kv cache", block_bytes * blocks as usize)?;
            zero(driver, &buffer)?;
            Ok(Layer { pool, blocks, buffer })
        };
        let layers: Vec<Layer> = layers.iter().map(layer).collect::<Result<_, CudaError>>()?;
        let pools: BTreeSet<Pool> = layers.iter().map(|layer| layer.pool).collect();
        let addresses = |pool| {
            let of_pool = layers.iter().filter(|layer| layer.pool == pool);
            let addresses: Vec<u64> = of_pool.map(|layer| layer.buffer.address()).collect();
            let content = bytemuck::cast_slice(&addresses);
            Ok((pool, Buffer::of(driver, "addresses of the kv cache", content)?))
        };
        let addresses = pools.into_iter().map(addresses).collect::<Result<_, CudaError>>()?;
        Ok(Self { dtype, kv_heads, head_dim, layers, addresses })
    }

    /// The addresses of the buffers of a pool's layers; `None` if it has none.
    pub(super) fn addresses(&self, pool: Pool) -> Option<&Buffer> {
        self.addresses.iter().find(|(of, _)| *of == pool).map(|(_, addresses)| addresses)
    }

    pub(super) fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub(super) fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    pub(super) fn head_dim(&self) -> usize {
        self.head_dim
    }

    pub(super) fn pool(&self, layer: usize) -> Pool {
        self.layers[layer].pool
    }

    /// The layers of a pool.
    pub(super) fn layers_of(&self, pool: Pool) -> impl Iterator<Item = usize> {
        (0..self.layers.len()).filter(move |&layer| self.layers[layer].pool == pool)
    }

    /// Bytes of one position's keys and values in all layers of a pool.
    pub(super) fn row_bytes(&self, pool: Pool) -> usize {
        row_bytes(self.dtype, (self.kv_heads, self.head_dim), self.layers_of(pool).count())
    }

    /// Blocks of a layer.
    pub(super) fn blocks(&self, layer: usize) -> u32 {
        self.layers[layer].blocks
    }

    /// A layer's memory.
    pub(super) fn buffer(&self, layer: usize) -> &Buffer {
        &self.layers[layer].buffer
    }
}

/// Bytes of one position's keys and values in so many layers.
pub(super) fn row_bytes(
    dtype: Dtype,
    (kv_heads, head_dim): (usize, usize),
    layers: usize,
) -> usize {
    layers * crate::Cache::block_bytes(dtype, kv_heads, head_dim) / BLOCK_TOKENS
}
