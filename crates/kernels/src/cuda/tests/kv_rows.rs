//! Rows out of a device's cache are those of the CPU's, and make them again.

use super::super::cache::Cache as OnDevice;
use super::super::kv_rows::KvRows;
use super::super::positions::positions;
use super::super::tensor::Tensor;
use super::step::{rope, upload};
use super::{driver, noise};
use crate::attention::AttentionShape;
use crate::cache::{Cache, RowsAt};
use crate::device::{AttentionLayer, Pool, Positional, Row, StepBatch, StepLimits, Table};
use crate::level::Dtype;

const CHUNKED: Pool = Pool::Chunked(64);
const LAYERS: [Pool; 5] = [Pool::Full, CHUNKED, CHUNKED, Pool::Full, CHUNKED];
const BLOCKS: u32 = 9;
/// Of the sequence: no two neighbours.
const TABLE: [u32; 6] = [7, 2, 8, 0, 5, 3];
const POSITIONS: u32 = 90;

/// Caches of either device with the same keys and values in every layer, as steps write them.
fn caches(dtype: Dtype, shape: AttentionShape) -> (OnDevice, Cache) {
    let mut device = OnDevice::new(driver(), dtype, shape, &LAYERS, |_| BLOCKS).unwrap();
    let AttentionShape { kv_heads, head_dim, .. } = shape;
    let mut cpu = Cache::new(dtype, kv_heads, head_dim, &LAYERS, |_| BLOCKS).unwrap();
    let table = Table { full: TABLE.to_vec(), chunked: TABLE.to_vec(), chunked_first: 0 };
    let row = |position| Row { token: 0, position, table: 0 };
    let rows = (0..POSITIONS).map(row).collect();
    let step = StepBatch { rows, tables: vec![table], samples: vec![] };
    let limits = StepLimits {
        vocab: 1,
        full_blocks: BLOCKS,
        chunked_blocks: BLOCKS,
        chunk_tokens: Some(64),
    };
    let batch = upload(&step, &rope(head_dim), limits);
    for layer in 0..LAYERS.len() {
        let values = noise(POSITIONS as usize * shape.qkv(), u32::try_from(layer).unwrap(), 2.0);
        let mut qkv = Tensor::of(driver(), Dtype::F32, shape.qkv(), &values);
        let of = AttentionLayer { layer, shape, position: Positional::None { temperature: None } };
        positions(driver(), &batch, &of, &mut qkv, &mut device).unwrap();
        for (position, row) in (0..).zip(values.chunks_exact(shape.qkv())) {
            let (k, v) = row[shape.q()..].split_at(shape.kv());
            let at = (TABLE[position as usize / 16], position % 16);
            cpu.write(layer, at, k, v);
        }
    }
    (device, cpu)
}

fn at(pool: Pool, table_first: u32, positions: std::ops::Range<u32>) -> RowsAt<'static> {
    RowsAt { pool, table: &TABLE[table_first as usize..], table_first, positions }
}

fn shapes() -> [AttentionShape; 3] {
    [(4, 2, 16), (5, 1, 128), (8, 8, 8)].map(|(heads, kv_heads, head_dim)| AttentionShape {
        heads,
        kv_heads,
        head_dim,
    })
}

#[test]
fn rows_are_those_of_the_cpu() {
    for shape in shapes() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let (device, cpu) = caches(dtype, shape);
            let mut rows = KvRows::new(driver()).unwrap();
            for pool in [Pool::Full, CHUNKED] {
                // Around the 64 positions that travel at a time.
                for (first, positions) in
                    [(0, 0..0), (0, 0..90), (0, 3..67), (1, 17..18), (2, 40..90)]
                {
                    let (mut got, mut want) = (vec![1, 2], vec![1, 2]);
                    let at = [at(pool, first, positions.clone())];
                    rows.read(&device, &at, &mut got).unwrap();
                    cpu.read_rows(&at, &mut want).unwrap();
                    assert!(got == want, "{shape:?} {dtype} {pool:?} {positions:?}");
                }
            }
        }
    }
}

#[test]
fn rows_of_several_sequences_and_pools_come_at_once() {
    let (device, cpu) = caches(Dtype::Bf16, shapes()[0]);
    let of = [
        at(Pool::Full, 0, 3..70),
        at(Pool::Full, 1, 88..90),
        at(CHUNKED, 2, 40..40),
        at(CHUNKED, 0, 0..1),
        at(Pool::Full, 0, 9..10),
    ];
    let (mut got, mut want) = (Vec::new(), Vec::new());
    KvRows::new(driver()).unwrap().read(&device, &of, &mut got).unwrap();
    cpu.read_rows(&of, &mut want).unwrap();
    assert!(got == want && !got.is_empty());
}

#[test]
fn rows_of_one_cache_make_those_of_another() {
    for shape in shapes() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let (device, cpu) = caches(dtype, shape);
            let mut rows = KvRows::new(driver()).unwrap();
            let mut other = OnDevice::new(driver(), dtype, shape, &LAYERS, |_| BLOCKS).unwrap();
            for pool in [Pool::Full, CHUNKED] {
                let all = [at(pool, 0, 0..POSITIONS)];
                let (mut sent, mut got) = (Vec::new(), Vec::new());
                cpu.read_rows(&all, &mut sent).unwrap();
                rows.write(&mut other, &all[0], &sent).unwrap();
                rows.read(&other, &all, &mut got).unwrap();
                assert!(got == sent, "{shape:?} {dtype} {pool:?}");
            }
            // The blocks, all of them: what was never written is 0 in both.
            for layer in 0..LAYERS.len() {
                let bytes = |cache: &OnDevice| {
                    let mut bytes = vec![0; cache.buffer(layer).bytes()];
                    cache.buffer(layer).read(&mut bytes).unwrap();
                    bytes
                };
                assert!(bytes(&other) == bytes(&device), "{shape:?} {dtype} layer {layer}");
            }
        }
    }
}

#[test]
fn places_that_do_not_exist_are_refused_and_nothing_is_written() {
    let (mut device, _) = caches(Dtype::Bf16, shapes()[0]);
    let mut rows = KvRows::new(driver()).unwrap();
    let far = RowsAt { table: &[BLOCKS], ..at(Pool::Full, 0, 0..1) };
    let text = rows.read(&device, &[far], &mut Vec::new()).unwrap_err().to_string();
    assert_eq!(text, "step: block of the KV cache is 9, the limit is 9");
    let text = rows.write(&mut device, &at(Pool::Full, 0, 0..2), &[0; 9]).unwrap_err().to_string();
    assert_eq!(text, "step: bytes of KV rows is 9, the limit is 512");
    let text = rows.read(&device, &[at(CHUNKED, 2, 31..33)], &mut Vec::new()).unwrap_err();
    assert_eq!(text.to_string(), "step: position is 31, the limit is 96");
}
