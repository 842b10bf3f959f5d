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
use std::ops::Range;

/// The keys and values of consecutive positions of a sequence, in all layers of a pool.
///
/// Outside of the cache they are `[positions][layers][K, V][kv_heads][head_dim]`, in the elements of the profile: any
/// rank of it can take them in, whatever its blocks look like.
#[derive(Clone, Debug)]
pub struct RowsAt<'a> {
    pub pool: Pool,
    /// Block table; entry 0 covers block number `table_first`.
    pub table: &'a [u32],
    pub table_first: u32,
    pub positions: Range<u32>,
}

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

    /// Bytes of one position's keys and values in all layers of a pool.
    #[must_use]
    pub fn row_bytes(&self, pool: Pool) -> usize {
        let block_bytes = Self::block_bytes(self.dtype, self.kv_heads, self.head_dim);
        self.layers_of(pool).count() * block_bytes / BLOCK_TOKENS
    }

    /// Appends rows to `out`.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Step`] if a table does not cover its positions, or names a block that does not exist.
    pub fn read_rows(&self, at: &[RowsAt<'_>], out: &mut Vec<u8>) -> Result<(), DeviceError> {
        at.iter().try_for_each(|at| match self.dtype {
            Dtype::F32 => self.gather::<u32>(at, out),
            Dtype::Bf16 => self.gather::<u16>(at, out),
        })
    }

    /// Puts rows into blocks, as [`Cache::read_rows`] gives them.
    ///
    /// # Errors
    ///
    /// As for [`Cache::read_rows`], and if there are not as many rows; nothing is written then.
    pub fn write_rows(&mut self, at: &RowsAt<'_>, rows: &[u8]) -> Result<(), DeviceError> {
        match self.dtype {
            Dtype::F32 => self.scatter::<u32>(at, rows),
            Dtype::Bf16 => self.scatter::<u16>(at, rows),
        }
    }

    fn gather<E: bytemuck::Pod>(
        &self,
        at: &RowsAt<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), DeviceError> {
        let (d, places) = (self.head_dim, places(at, self.blocks_of(at.pool))?);
        out.reserve(places.len() * self.row_bytes(at.pool));
        for (block, slot) in places {
            for layer in self.layers_of(at.pool) {
                let block = self.block(block);
                let memory: &[E] = &bytemuck::cast_slice(self.layers[layer].1.as_slice())[block];
                let heads = memory.chunks_exact(2 * d * BLOCK_TOKENS);
                let heads = || heads.clone().map(|head| head.split_at(d * BLOCK_TOKENS));
                for (keys, _) in heads() {
                    for column in keys.chunks_exact(BLOCK_TOKENS) {
                        out.extend_from_slice(bytemuck::bytes_of(&column[slot]));
                    }
                }
                for (_, values) in heads() {
                    out.extend_from_slice(bytemuck::cast_slice(&values[slot * d..][..d]));
                }
            }
        }
        Ok(())
    }

    fn scatter<E: bytemuck::Pod>(
        &mut self,
        at: &RowsAt<'_>,
        rows: &[u8],
    ) -> Result<(), DeviceError> {
        let places = places(at, self.blocks_of(at.pool))?;
        let wanted = places.len() * self.row_bytes(at.pool);
        if rows.len() != wanted {
            let (value, limit) = (rows.len() as u64, wanted as u64);
            return Err(DeviceError::Step { what: "bytes of KV rows", value, limit });
        }
        let (d, layers): (usize, Vec<usize>) = (self.head_dim, self.layers_of(at.pool).collect());
        let mut elements = rows.chunks_exact(size_of::<E>()).map(bytemuck::pod_read_unaligned);
        for (block, slot) in places {
            for &layer in &layers {
                let block = self.block(block);
                let memory = self.layers[layer].1.as_mut_slice();
                let memory: &mut [E] = &mut bytemuck::cast_slice_mut(memory)[block];
                for head in memory.chunks_exact_mut(2 * d * BLOCK_TOKENS) {
                    let keys = head[..d * BLOCK_TOKENS].chunks_exact_mut(BLOCK_TOKENS);
                    keys.zip(&mut elements).for_each(|(column, k)| column[slot] = k);
                }
                for head in memory.chunks_exact_mut(2 * d * BLOCK_TOKENS) {
                    let value = &mut head[d * BLOCK_TOKENS..][slot * d..][..d];
                    value.iter_mut().zip(&mut elements).for_each(|(to, v)| *to = v);
                }
            }
        }
        Ok(())
    }

    fn layers_of(&self, pool: Pool) -> impl Iterator<Item = usize> {
        (0..self.layers.len()).filter(move |&layer| self.layers[layer].0 == pool)
    }

    /// A block's elements in a layer.
    fn block(&self, block: u32) -> Range<usize> {
        let elements = 2 * self.kv_heads * self.head_dim * BLOCK_TOKENS;
        block as usize * elements..(block as usize + 1) * elements
    }

    /// How many a pool has; 0 without layers.
    fn blocks_of(&self, pool: Pool) -> u64 {
        let block_bytes = Self::block_bytes(self.dtype, self.kv_heads, self.head_dim);
        let bytes = self.layers_of(pool).map(|layer| self.layers[layer].1.as_slice().len());
        bytes.min().map_or(0, |bytes| (bytes / block_bytes) as u64)
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

/// Block and slot of every position in a pool of so many blocks. One without blocks has no rows.
pub(crate) fn places(at: &RowsAt<'_>, blocks: u64) -> Result<Vec<(u32, usize)>, DeviceError> {
    let place = |position: u32| {
        let number = position as usize / BLOCK_TOKENS;
        let entry = number.checked_sub(at.table_first as usize);
        let block = entry.and_then(|entry| at.table.get(entry)).copied();
        let limit = (at.table_first as usize + at.table.len()) * BLOCK_TOKENS;
        let (value, limit) = (u64::from(position), limit as u64);
        let block = block.ok_or(DeviceError::Step { what: "position", value, limit })?;
        if blocks <= u64::from(block) {
            let (what, value) = ("block of the KV cache", u64::from(block));
            return Err(DeviceError::Step { what, value, limit: blocks });
        }
        Ok((block, position as usize % BLOCK_TOKENS))
    };
    let positions = if blocks == 0 { 0..0 } else { at.positions.clone() };
    positions.map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNKED: Pool = Pool::Chunked(32);
    const HEADS: (usize, usize) = (2, 6);

    fn cache(dtype: Dtype) -> Cache {
        let layers = [Pool::Full, CHUNKED, CHUNKED, Pool::Full, CHUNKED];
        Cache::new(dtype, HEADS.0, HEADS.1, &layers, |_| 7).unwrap()
    }

    /// Keys and values of a position, different everywhere and the same in bf16.
    fn row(layer: usize, position: u32) -> (Vec<f32>, Vec<f32>) {
        let value = |i: usize| (layer * 40 + position as usize) as f32 + (i as f32) / 64.0;
        let columns = HEADS.0 * HEADS.1;
        ((0..columns).map(value).collect(), (columns..2 * columns).map(value).collect())
    }

    fn filled(dtype: Dtype, table: &[u32]) -> Cache {
        let mut cache = cache(dtype);
        for layer in 0..5 {
            for position in 0..40 {
                let (k, v) = row(layer, position);
                let at = (table[position as usize / 16], position % 16);
                cache.write(layer, at, &k, &v);
            }
        }
        cache
    }

    fn at(pool: Pool, table: &[u32], table_first: u32, positions: Range<u32>) -> RowsAt<'_> {
        RowsAt { pool, table, table_first, positions }
    }

    #[test]
    fn rows_are_the_keys_and_values_of_their_positions() {
        let cache = filled(Dtype::F32, &[5, 0, 3]);
        let mut rows = Vec::new();
        cache.read_rows(&[at(Pool::Full, &[5, 0, 3], 0, 15..18)], &mut rows).unwrap();
        let of = |position| [0, 3].map(|layer| row(layer, position));
        let want: Vec<f32> = (15..18).flat_map(of).flat_map(|(k, v)| [k, v].concat()).collect();
        assert_eq!(rows, bytemuck::cast_slice::<f32, u8>(&want));
        assert_eq!(rows.len(), 3 * cache.row_bytes(Pool::Full));
    }

    #[test]
    fn rows_of_one_cache_make_those_of_another() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let from = filled(dtype, &[5, 0, 3]);
            let mut to = cache(dtype);
            for (pool, table, first) in [(Pool::Full, &[1, 2, 6][..], 0), (CHUNKED, &[4, 2], 1)] {
                let positions = first * 16..40;
                let from_table = &[5, 0, 3][first as usize..];
                let mut rows = Vec::new();
                from.read_rows(&[at(pool, from_table, first, positions.clone())], &mut rows)
                    .unwrap();
                to.write_rows(&at(pool, table, first, positions.clone()), &rows).unwrap();
                let mut again = Vec::new();
                to.read_rows(&[at(pool, table, first, positions)], &mut again).unwrap();
                assert_eq!(again, rows);
            }
            let want = filled(dtype, &[1, 2, 6]);
            for layer in [0, 3] {
                for block in [1_u32, 2] {
                    let block = to.block(block);
                    let bytes = block.start * dtype.bytes()..block.end * dtype.bytes();
                    let memory =
                        |cache: &Cache| cache.layers[layer].1.as_slice()[bytes.clone()].to_vec();
                    assert_eq!(memory(&to), memory(&want), "layer {layer}");
                }
            }
        }
    }

    #[test]
    fn places_that_do_not_exist_are_refused_and_nothing_is_written() {
        let mut cache = filled(Dtype::Bf16, &[5, 0, 3]);
        let refused = |result: Result<(), DeviceError>| result.unwrap_err().to_string();
        let rows = &mut Vec::new();
        let text = refused(cache.read_rows(&[at(Pool::Full, &[5], 0, 15..17)], rows));
        assert_eq!(text, "step: position is 16, the limit is 16");
        let text = refused(cache.read_rows(&[at(CHUNKED, &[0, 3], 1, 15..17)], rows));
        assert_eq!(text, "step: position is 15, the limit is 48");
        let text = refused(cache.read_rows(&[at(Pool::Full, &[7], 0, 0..1)], rows));
        assert_eq!(text, "step: block of the KV cache is 7, the limit is 7");
        assert!(rows.is_empty());
        let text = refused(cache.write_rows(&at(Pool::Full, &[5], 0, 0..2), &[0; 95]));
        assert_eq!(text, "step: bytes of KV rows is 95, the limit is 192");
    }

    #[test]
    fn pool_without_layers_has_no_rows() {
        let cache = Cache::new(Dtype::F32, 1, 4, &[Pool::Full], |_| 2).unwrap();
        let mut rows = Vec::new();
        cache.read_rows(&[at(CHUNKED, &[], 0, 0..9)], &mut rows).unwrap();
        assert_eq!((rows.len(), cache.row_bytes(CHUNKED)), (0, 0));
    }
}
