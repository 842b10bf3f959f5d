//! Attention against the definition in f64, and its independence of chunking; step checks.

use super::*;
use crate::attention::AttentionShape;
use crate::device::{Row, SampleRow, Table};
use crate::rope::RopeSpec;
use crate::sample::Sampling;

fn noise(i: usize) -> f32 {
    let x = u32::try_from(i)
        .unwrap()
        .wrapping_mul(2_654_435_761)
        .rotate_left(13)
        .wrapping_mul(0x9e37_79b9);
    (x >> 8) as f32 / 8_388_608.0 - 1.0
}

const SHAPE: AttentionShape = AttentionShape { heads: 6, kv_heads: 2, head_dim: 24 };
const POSITIONS: usize = 75;

fn rope_table() -> RopeTable {
    let spec = RopeSpec { head_dim: SHAPE.head_dim, theta: 1e4, scaling: None, chunk_tokens: None };
    RopeTable { inv_freq: rope::inv_freq(&spec), spec }
}

/// Runs positions `0..POSITIONS` through one layer in slices of `slice` rows.
fn run(level: Level, dtype: Dtype, pool: Pool, slice: usize, threads: usize) -> Vec<f32> {
    std::thread::scope(|scope| {
        scope.spawn(|| run_here(level, dtype, pool, slice, threads)).join().unwrap()
    })
}

fn run_here(level: Level, dtype: Dtype, pool: Pool, slice: usize, threads: usize) -> Vec<f32> {
    let mut cpu = Cpu::new(level, dtype, threads).unwrap();
    let mut cache = Cache::new(dtype, SHAPE.kv_heads, SHAPE.head_dim, &[pool], |_| 9).unwrap();
    let layer =
        AttentionLayer { layer: 0, shape: SHAPE, position: Positional::None { temperature: None } };
    let limits = StepLimits { vocab: 10, full_blocks: 9, chunked_blocks: 9, chunk_tokens: None };
    // Blocks in an odd order: position order must come from the table.
    let blocks = vec![7, 2, 5, 0, 8];
    let table = Table { full: blocks.clone(), chunked: blocks, chunked_first: 0 };
    let mut all = Vec::new();
    let positions: Vec<usize> = (0..POSITIONS).collect();
    for part in positions.chunks(slice) {
        let rows = part
            .iter()
            .map(|&p| Row { token: 0, position: u32::try_from(p).unwrap(), table: 0 })
            .collect();
        let step = StepBatch { rows, tables: vec![table.clone()], samples: vec![] };
        let batch = cpu.upload(&step, &rope_table(), limits).unwrap();
        let mut qkv = cpu.tensor(part.len(), SHAPE.qkv());
        let mut out = cpu.tensor(part.len(), SHAPE.q());
        let data = qkv.resize(part.len());
        for (row, &p) in data.chunks_mut(SHAPE.qkv()).zip(part) {
            for (i, x) in row.iter_mut().enumerate() {
                *x = noise(p * SHAPE.qkv() + i) * 2.0;
            }
        }
        cpu.attention(&batch, &layer, &mut qkv, &mut cache, &mut out);
        all.extend_from_slice(out.data());
    }
    all
}

/// Softmax attention as written in a textbook.
fn definition(first_of: impl Fn(usize) -> usize) -> Vec<f64> {
    let (d, width) = (SHAPE.head_dim, SHAPE.qkv());
    let at = |p: usize, column: usize| f64::from(noise(p * width + column) * 2.0);
    let mut out = Vec::new();
    for p in 0..POSITIONS {
        for head in 0..SHAPE.heads {
            let kv = head / (SHAPE.heads / SHAPE.kv_heads);
            let score = |s: usize| {
                let dot: f64 =
                    (0..d).map(|i| at(p, head * d + i) * at(s, SHAPE.q() + kv * d + i)).sum();
                (dot / (d as f64).sqrt()).exp()
            };
            let weights: Vec<f64> = (first_of(p)..=p).map(score).collect();
            let sum: f64 = weights.iter().sum();
            for i in 0..d {
                let value = |s: usize| at(s, SHAPE.q() + SHAPE.kv() + kv * d + i);
                let mixed: f64 =
                    weights.iter().zip(first_of(p)..).map(|(w, s)| w / sum * value(s)).sum();
                out.push(mixed);
            }
        }
    }
    out
}

#[test]
fn attention_matches_the_definition() {
    for (pool, chunk) in [(Pool::Full, 1000), (Pool::Chunked(32), 32), (Pool::Chunked(20), 20)] {
        let want = definition(|p| p / chunk * chunk);
        let got = run(Level::detect(), Dtype::F32, pool, POSITIONS, 1);
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(&want) {
            assert!((f64::from(*got) - want).abs() < 2e-5, "{pool:?}: {got} {want}");
        }
    }
}

#[test]
fn attention_bits_do_not_depend_on_slices_threads_or_level() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        for pool in [Pool::Full, Pool::Chunked(20)] {
            let want = run(Level::Portable, dtype, pool, POSITIONS, 1);
            for level in Level::available() {
                for (slice, threads) in [(1, 1), (7, 2), (16, 1), (POSITIONS, 3)] {
                    let got = run(level, dtype, pool, slice, threads);
                    assert_eq!(got, want, "{level} {dtype} {pool:?} {slice} {threads}");
                }
            }
        }
    }
}

#[track_caller]
fn check_refused(change: impl Fn(&mut StepBatch), want: &str) {
    let table = Table { full: vec![0], chunked: vec![1], chunked_first: 1 };
    let mut step = StepBatch {
        rows: vec![Row { token: 1, position: 3, table: 0 }],
        tables: vec![Table { chunked_first: 0, ..table }],
        samples: vec![SampleRow { row: 0, sampling: Sampling::default() }],
    };
    let limits =
        StepLimits { vocab: 10, full_blocks: 4, chunked_blocks: 4, chunk_tokens: Some(32) };
    let mut cpu = Cpu::new(Level::Portable, Dtype::F32, 1).unwrap();
    assert!(cpu.upload(&step, &rope_table(), limits).is_ok());
    change(&mut step);
    let error = cpu.upload(&step, &rope_table(), limits).err().expect("refused").to_string();
    assert_eq!(error, want);
}

#[test]
fn steps_that_point_outside_are_refused() {
    check_refused(|s| s.rows[0].token = 10, "step: token is 10, the limit is 10");
    check_refused(|s| s.rows[0].table = 1, "step: table of a row is 1, the limit is 1");
    check_refused(
        |s| s.rows[0].position = 16,
        "step: block number in the full table is 1, the limit is 1",
    );
    check_refused(|s| s.tables[0].full[0] = 4, "step: block of the full pool is 4, the limit is 4");
    check_refused(
        |s| s.tables[0].chunked_first = 1,
        "step: first block of the chunked table is 1, the limit is 1",
    );
    check_refused(|s| s.samples[0].row = 1, "step: row to sample is 1, the limit is 1");
}
