//! The paged KV cache of one rank: bytes only. Which block belongs to whom is the router's business.
//!
//! Two pools share the design: layers that attend to every earlier position use the *full* pool,
//! layers with chunked attention the *chunked* one, whose blocks are freed at chunk borders. Block `b`
//! of a pool exists in every layer of that pool.
//!
//! One block of one layer is `[kv_heads]` times `K [head_dim][16]` then `V [16][head_dim]`: the scores
//! of 16 positions are one vector per dimension, and so is a slice of a value.

use crate::attention::BLOCK_TOKENS;
use crate::device::{DeviceError, Pool};
use crate::level::Dtype;
use crate::lines::{LINE_BYTES, Lines};

/// KV blocks of every layer.
pub struct Cache {
    dtype: Dtype,
    kv_heads: usize,
    head_dim: usize,
    /// Per layer: its pool and its memory, `blocks` blocks.
    layers: Vec<(Pool, Lines)>,
}

impl Cache {
    /// Maps the cache; pages are touched when they are first written.
    ///
    /// * `layers`: the pool of every layer
    /// * `blocks`: capacity of a pool
    ///
    /// # Errors
    ///
    /// [`DeviceError::Memory`] if the operating system refuses the address space.
    pub fn new(
        dtype: Dtype,
        kv_heads: usize,
        head_dim: usize,
        layers: &[Pool],
        blocks: impl Fn(Pool) -> u32,
    ) -> Result<Self, DeviceError> {
        let elements = 2 * kv_heads * head_dim * BLOCK_TOKENS;
        let layers = layers
            .iter()
            .map(|&pool| {
                let bytes = elements * dtype.bytes() * blocks(pool) as usize;
                let lines = Lines::zeroed(bytes.div_ceil(LINE_BYTES))
                    .map_err(|source| DeviceError::Memory { what: "kv cache", bytes, source })?;
                Ok((pool, lines))
            })
            .collect::<Result<_, DeviceError>>()?;
        Ok(Self { dtype, kv_heads, head_dim, layers })
    }

    /// Bytes that one block takes in one layer.
    #[must_use]
    pub fn block_bytes(dtype: Dtype, kv_heads: usize, head_dim: usize) -> usize {
        2 * kv_heads * head_dim * BLOCK_TOKENS * dtype.bytes()
    }

    pub(crate) fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub(crate) fn pool(&self, layer: usize) -> Pool {
        self.layers[layer].0
    }

    /// The whole memory of a layer as elements of type `E`.
    pub(crate) fn layer<E: bytemuck::Pod>(&self, layer: usize) -> &[E] {
        bytemuck::cast_slice(self.layers[layer].1.as_slice())
    }

    /// Writes the keys and values of one position. `k`, `v`: `[kv_heads, head_dim]`.
    pub(crate) fn write(&mut self, layer: usize, at: (u32, u32), k: &[f32], v: &[f32]) {
        match self.dtype {
            Dtype::F32 => self.put(layer, at, k, v, |x| x),
            Dtype::Bf16 => self.put(layer, at, k, v, crate::math::bf16_bits),
        }
    }

    fn put<E: bytemuck::Pod>(
        &mut self,
        layer: usize,
        (block, slot): (u32, u32),
        k: &[f32],
        v: &[f32],
        narrow: impl Fn(f32) -> E,
    ) {
        let (d, slot) = (self.head_dim, slot as usize);
        let head_elements = 2 * d * BLOCK_TOKENS;
        let memory: &mut [E] = bytemuck::cast_slice_mut(self.layers[layer].1.as_mut_slice());
        let block = &mut memory[block as usize * self.kv_heads * head_elements..]
            [..self.kv_heads * head_elements];
        for (head, (k, v)) in
            block.chunks_exact_mut(head_elements).zip(k.chunks_exact(d).zip(v.chunks_exact(d)))
        {
            let (keys, values) = head.split_at_mut(d * BLOCK_TOKENS);
            for (column, k) in keys.chunks_exact_mut(BLOCK_TOKENS).zip(k) {
                column[slot] = narrow(*k);
            }
            for (to, v) in values[slot * d..][..d].iter_mut().zip(v) {
                *to = narrow(*v);
            }
        }
    }
}
