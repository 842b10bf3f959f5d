//! Attention of one query position over the paged KV cache.
//!
//! Softmax is computed on line, block by block (Milakov & Gimelshein 2018; FlashAttention's inner
//! loop): a running maximum, a running sum and an unnormalised output per head. Blocks are cut at
//! absolute positions, so the sequence of operations for a position depends on nothing but the
//! position: prefill, decode and any chunking of the prompt give the same bits.

use crate::math::{LANES, bf16_to_f32, exp, per_level};

/// Positions of one KV block. It is also the width of the score vectors.
pub const BLOCK_TOKENS: usize = 16;

const _: () = assert!(BLOCK_TOKENS == LANES);

/// Query heads of one KV head that are worked on together; Maverick has five.
const GROUP_MAX: usize = 5;

/// The heads of a layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AttentionShape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl AttentionShape {
    /// Columns of a fused projection `[q | k | v]`.
    #[must_use]
    pub fn qkv(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Columns of the queries, and of the attention's result.
    #[must_use]
    pub fn q(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns of the keys.
    #[must_use]
    pub fn kv(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// An element of the cache.
pub(crate) trait KvElement: Copy {
    fn widen(self) -> f32;
}

impl KvElement for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

/// bf16 bits.
impl KvElement for u16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        bf16_to_f32(self)
    }
}

/// One query row.
#[derive(Clone, Copy)]
pub(crate) struct RowJob<'a, E> {
    pub(crate) shape: AttentionShape,
    /// `[heads, head_dim]`
    pub(crate) q: &'a [f32],
    /// The layer's memory in the cache.
    pub(crate) kv: &'a [E],
    /// Block table; entry 0 covers block number `table_first`.
    pub(crate) table: &'a [u32],
    pub(crate) table_first: u32,
    /// First visible position and the query's own.
    pub(crate) visible: (u32, u32),
}

per_level! {
    /// f32 cache; `out` is `[heads, head_dim]`.
    fn attend_f32(job: RowJob<'_, f32>, out: &mut [f32]) {
        attend(job, out);
    }
}

per_level! {
    /// bf16 cache; `out` is `[heads, head_dim]`.
    fn attend_bf16(job: RowJob<'_, u16>, out: &mut [f32]) {
        attend(job, out);
    }
}

#[inline(always)]
fn attend<E: KvElement>(job: RowJob<'_, E>, out: &mut [f32]) {
    let d = job.shape.head_dim;
    let group = job.shape.heads / job.shape.kv_heads;
    for kv_head in 0..job.shape.kv_heads {
        let mut head = kv_head * group;
        let end = head + group;
        while head < end {
            let heads = (end - head).min(GROUP_MAX);
            let q = &job.q[head * d..][..heads * d];
            let out = &mut out[head * d..][..heads * d];
            match heads {
                1 => attend_group::<E, 1>(&job, kv_head, q, out),
                2 => attend_group::<E, 2>(&job, kv_head, q, out),
                3 => attend_group::<E, 3>(&job, kv_head, q, out),
                4 => attend_group::<E, 4>(&job, kv_head, q, out),
                _ => attend_group::<E, 5>(&job, kv_head, q, out),
            }
            head += heads;
        }
    }
}

/// `G` query heads over one KV head. `q`, `out`: `[G, head_dim]`.
#[inline(always)]
fn attend_group<E: KvElement, const G: usize>(
    job: &RowJob<'_, E>,
    kv_head: usize,
    q: &[f32],
    out: &mut [f32],
) {
    let d = job.shape.head_dim;
    let head_elements = 2 * d * BLOCK_TOKENS;
    let scale = 1.0 / (d as f32).sqrt();
    let (first, last) = job.visible;
    let block_tokens = 16_u32;
    out.fill(0.0);
    let mut max = [f32::NEG_INFINITY; G];
    let mut sum = [0.0_f32; G];
    for block in first / block_tokens..=last / block_tokens {
        let id = job.table[(block - job.table_first) as usize] as usize;
        let at = (id * job.shape.kv_heads + kv_head) * head_elements;
        let (keys, values) = job.kv[at..at + head_elements].split_at(d * BLOCK_TOKENS);
        // Visible positions of this block.
        let start = block * block_tokens;
        let from = first.saturating_sub(start) as usize;
        let to = (last - start + 1).min(block_tokens) as usize;

        let mut p = scores::<E, G>(q, keys, d);
        for g in 0..G {
            let mut new_max = max[g];
            for (j, p) in p[g].iter_mut().enumerate() {
                let seen = from <= j && j < to;
                *p = if seen { *p * scale } else { f32::NEG_INFINITY };
                new_max = if *p > new_max { *p } else { new_max };
            }
            for p in &mut p[g] {
                *p = exp(*p - new_max);
            }
            let shrink = exp(max[g] - new_max);
            max[g] = new_max;
            sum[g] = sum[g].mul_add(shrink, crate::math::sum_lanes(p[g]));
            for x in &mut out[g * d..][..d] {
                *x *= shrink;
            }
        }
        add_values::<E, G>(&p, &values[..to * d], from, d, out);
    }
    for g in 0..G {
        let scale = 1.0 / sum[g];
        for x in &mut out[g * d..][..d] {
            *x *= scale;
        }
    }
}

/// Products of `G` queries with the 16 keys of a block.
#[inline(always)]
fn scores<E: KvElement, const G: usize>(q: &[f32], keys: &[E], d: usize) -> [[f32; LANES]; G] {
    let mut s = [[0.0_f32; LANES]; G];
    for (i, column) in keys.chunks_exact(BLOCK_TOKENS).enumerate() {
        let column: [f32; LANES] = std::array::from_fn(|j| column[j].widen());
        for g in 0..G {
            let q = q[g * d + i];
            for j in 0..LANES {
                s[g][j] = q.mul_add(column[j], s[g][j]);
            }
        }
    }
    s
}

/// `out[g] += sum over positions from.. of p[g][j] * values[j]`, in the order of the positions.
#[inline(always)]
fn add_values<E: KvElement, const G: usize>(
    p: &[[f32; LANES]; G],
    values: &[E],
    from: usize,
    d: usize,
    out: &mut [f32],
) {
    let whole = d / LANES * LANES;
    for c in (0..whole).step_by(LANES) {
        let mut acc: [[f32; LANES]; G] =
            std::array::from_fn(|g| std::array::from_fn(|i| out[g * d + c + i]));
        for (j, row) in values.chunks_exact(d).enumerate().skip(from) {
            let v: [f32; LANES] = std::array::from_fn(|i| row[c + i].widen());
            for g in 0..G {
                for i in 0..LANES {
                    acc[g][i] = p[g][j].mul_add(v[i], acc[g][i]);
                }
            }
        }
        for g in 0..G {
            out[g * d + c..][..LANES].copy_from_slice(&acc[g]);
        }
    }
    for c in whole..d {
        for (j, row) in values.chunks_exact(d).enumerate().skip(from) {
            for g in 0..G {
                out[g * d + c] = p[g][j].mul_add(row[c].widen(), out[g * d + c]);
            }
        }
    }
}
