//! Positions, the cache and attention, step by step on both devices.

use super::super::attention_f32::attention_f32;
use super::super::cache::Cache;
use super::super::positions::positions;
use super::super::tensor::Tensor;
use super::step::{LIMITS, TEMPERATURE, cpu, on_cpu, rope, upload};
use super::{assert_same, driver, noise};
use crate::attention::AttentionShape;
use crate::device::{AttentionLayer, Device, Pool, Positional, Row, StepBatch, StepLimits, Table};
use crate::level::Dtype;

/// Blocks of a sequence.
const BLOCKS: u32 = 10;

const SEQUENCES: u32 = 3;

const SHAPES: [AttentionShape; 6] = [
    AttentionShape { heads: 6, kv_heads: 2, head_dim: 24 },
    AttentionShape { heads: 5, kv_heads: 1, head_dim: 64 },
    AttentionShape { heads: 3, kv_heads: 3, head_dim: 2 },
    AttentionShape { heads: 2, kv_heads: 1, head_dim: 130 },
    AttentionShape { heads: 1, kv_heads: 1, head_dim: 256 },
    AttentionShape { heads: 10, kv_heads: 2, head_dim: 128 },
];

const ROPE: Positional = Positional::Rope { qk_norm_eps: None };
const ROPE_AND_NORM: Positional = Positional::Rope { qk_norm_eps: Some(1e-5) };
const NONE: Positional = Positional::None { temperature: None };
const TUNED: Positional = Positional::None { temperature: Some(TEMPERATURE) };

/// Rows of a step: for each sequence its first position, and how many.
type Slice<'a> = &'a [(u32, u32, u32)];

/// Blocks in an odd order: the order of positions must come from the table.
fn block(sequence: u32, number: u32) -> u32 {
    (number * 3 + 1 + sequence) % BLOCKS + sequence * BLOCKS
}

fn step_of(slice: Slice<'_>, chunk: u32) -> StepBatch {
    let mut step = StepBatch { tables: vec![Table::default(); 3], ..StepBatch::default() };
    for &(table, first, count) in slice {
        let row = |position| Row { token: 0, position, table };
        step.rows.extend((first..first + count).map(row));
        let (end, chunked_first) = ((first + count).div_ceil(16), first / chunk * chunk / 16);
        step.tables[table as usize] = Table {
            full: (0..end).map(|number| block(table, number)).collect(),
            chunked: (chunked_first..end).map(|number| block(table, number)).collect(),
            chunked_first,
        };
    }
    step
}

/// What a device's cache holds, in the order of the CPU's.
fn cache_to_host(cache: &Cache, shape: AttentionShape) -> Vec<f32> {
    let mut bytes = vec![0; cache.buffer(0).bytes()];
    cache.buffer(0).read(&mut bytes).unwrap();
    if cache.dtype() == Dtype::F32 {
        return bytemuck::pod_collect_to_vec(&bytes);
    }
    let stored: Vec<u16> = bytemuck::pod_collect_to_vec(&bytes);
    let (d, mut all) = (shape.head_dim, Vec::new());
    for head in stored.chunks_exact(2 * 16 * d) {
        let (keys, values) = head.split_at(16 * d);
        all.extend((0..16 * d).map(|i| keys[i % 16 * d + i / 16]));
        all.extend((0..16 * d).map(|i| values[i % d * 16 + i / d]));
    }
    all.into_iter().map(crate::math::bf16_to_f32).collect()
}

struct Case<'a> {
    dtype: Dtype,
    pool: Pool,
    layer: AttentionLayer,
    slices: &'a [Slice<'a>],
}

#[track_caller]
fn check(case: &Case<'_>) {
    let Case { dtype, pool, layer, slices } = case;
    let (shape, blocks) = (layer.shape, SEQUENCES * BLOCKS);
    let chunk_tokens = match pool {
        Pool::Full => None,
        Pool::Chunked(chunk) => Some(*chunk),
    };
    let limits = StepLimits { chunk_tokens, ..LIMITS };
    let AttentionShape { heads: _, kv_heads, head_dim } = shape;
    let mut cpu = cpu(*dtype);
    let mut want_cache =
        crate::Cache::new(*dtype, kv_heads, head_dim, &[*pool], |_| blocks).unwrap();
    let mut cache = Cache::new(driver(), *dtype, shape, &[*pool], |_| blocks).unwrap();
    for (index, slice) in slices.iter().enumerate() {
        let step = step_of(slice, chunk_tokens.unwrap_or(16));
        let values = noise(step.rows.len() * shape.qkv(), u32::try_from(index).unwrap(), 2.0);
        let what = format!("{pool:?} {layer:?} {dtype} step {index}");

        let on_host = cpu.upload(&step, &rope(head_dim), limits).unwrap();
        let mut want_qkv = on_cpu(&mut cpu, &values, shape.qkv());
        let mut want = cpu.tensor(0, shape.q());
        cpu.attention(&on_host, layer, &mut want_qkv, &mut want_cache, &mut want);

        let batch = upload(&step, &rope(head_dim), limits);
        let mut qkv = Tensor::of(driver(), Dtype::F32, shape.qkv(), &values);
        positions(driver(), &batch, layer, &mut qkv, &mut cache).unwrap();
        let queries = |qkv: &[f32]| -> Vec<f32> {
            qkv.chunks_exact(shape.qkv()).flat_map(|row| row[..shape.q()].to_vec()).collect()
        };
        let got = qkv.to_host().unwrap();
        assert_same(&queries(&got), &queries(want_qkv.data()), &format!("queries, {what}"));
        let stored: Vec<f32> = match dtype {
            Dtype::F32 => want_cache.layer::<f32>(0).to_vec(),
            Dtype::Bf16 => {
                want_cache.layer::<u16>(0).iter().map(|x| crate::math::bf16_to_f32(*x)).collect()
            }
        };
        let got = cache_to_host(&cache, shape);
        assert_same(&got, &stored[..got.len()], &format!("cache, {what}"));
        if *dtype == Dtype::F32 {
            let mut out = Tensor::of(driver(), Dtype::F32, shape.q(), &[]);
            attention_f32(driver(), (&batch, layer), &qkv, &cache, &mut out).unwrap();
            assert_same(&out.to_host().unwrap(), want.data(), &format!("attention, {what}"));
        }
    }
}

/// A prompt in slices that cut blocks, beside a sequence that decodes; then all decode.
const SLICES: [Slice<'static>; 6] = [
    &[(0, 0, 15), (1, 0, 1)],
    &[(0, 15, 2), (2, 0, 33), (1, 1, 1)],
    &[],
    &[(0, 17, 15)],
    &[(2, 33, 1), (0, 32, 1), (1, 2, 20)],
    &[(2, 34, 45), (0, 33, 1)],
];

/// Every pool with one kind of positions, and every kind of positions with the last pool.
fn check_all(dtype: Dtype, pools: &[Pool]) {
    for shape in SHAPES {
        let check = |pool, position| {
            let layer = AttentionLayer { layer: 0, shape, position };
            check(&Case { dtype, pool, layer, slices: &SLICES });
        };
        for pool in pools {
            check(*pool, ROPE_AND_NORM);
        }
        for position in [ROPE, NONE, TUNED] {
            check(pools[pools.len() - 1], position);
        }
    }
}

#[test]
fn steps_match_the_cpu_bit_for_bit() {
    // A chunk of whole blocks, and two that end within one.
    check_all(Dtype::F32, &[Pool::Full, Pool::Chunked(32), Pool::Chunked(7), Pool::Chunked(20)]);
}

#[test]
fn queries_and_cache_match_the_cpu_in_bf16() {
    check_all(Dtype::Bf16, &[Pool::Full, Pool::Chunked(20)]);
}

#[test]
fn long_contexts_match_the_cpu_bit_for_bit() {
    let layer = AttentionLayer { layer: 0, shape: SHAPES[0], position: ROPE };
    let slices: [Slice<'_>; 2] = [&[(1, 0, 150)], &[(1, 150, 1), (0, 0, 1)]];
    for pool in [Pool::Full, Pool::Chunked(64)] {
        check(&Case { dtype: Dtype::F32, pool, layer, slices: &slices });
    }
}
