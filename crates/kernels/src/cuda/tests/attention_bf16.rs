//! Attention on tensor cores against the CPU's, and its independence of how a step is cut.

use super::super::attention_bf16::{
    AttentionTask, AttentionWork, Plan, Sight, Tables, attention_bf16, partial_bytes,
};
use super::super::buffer::Buffer;
use super::super::tensor::Tensor;
use super::{assert_same, driver, noise};
use crate::attention::{AttentionShape, RowJob, attend_bf16};
use crate::device::Row;
use crate::level::{Dtype, Level};
use crate::math::{bf16_bits, round_bf16};

/// What a position that was never written holds.
const GARBAGE: u16 = 0xffff;

/// Some sequences of one layer.
struct Scene {
    shape: AttentionShape,
    chunk: u32,
    /// Number of the first block in every table.
    blocks_first: u32,
    /// By sequence: `[positions][k | v]`.
    kv: Vec<Vec<f32>>,
}

impl Scene {
    fn new(shape: AttentionShape, chunk: u32, lengths: &[usize]) -> Self {
        let columns = 2 * shape.kv();
        let kv = |(seed, length): (u32, &usize)| {
            noise(columns * length, seed + 3, 1.0).into_iter().map(round_bf16).collect()
        };
        Self { shape, chunk, blocks_first: 0, kv: (0..).zip(lengths).map(kv).collect() }
    }

    /// Blocks of a sequence in the cache: no two neighbours, and none shared.
    fn block(&self, sequence: usize, number: usize) -> usize {
        number * self.kv.len() + (sequence + number) % self.kv.len()
    }

    fn queries(&self, rows: &[Row]) -> Vec<f32> {
        let of_row = |row: &Row| {
            let mut qkv = noise(self.shape.q(), row.position * 5 + row.table, 3.0);
            qkv.resize(self.shape.qkv(), f32::NAN);
            qkv.into_iter().map(round_bf16)
        };
        rows.iter().flat_map(of_row).collect()
    }

    /// The cache while sequences have `lengths` positions: for the device, with what is missing being garbage, and as
    /// the CPU has it.
    fn cache(&self, lengths: &[usize]) -> (Vec<u16>, Vec<u16>) {
        let AttentionShape { kv_heads, head_dim: d, .. } = self.shape;
        let numbers =
            self.kv.iter().map(|kv| kv.len() / (2 * self.shape.kv() * 16) + 1).max().unwrap();
        let elements = numbers * self.kv.len() * kv_heads * 2 * d * 16;
        let (mut device, mut cpu) = (vec![GARBAGE; elements], vec![0; elements]);
        for (sequence, kv) in self.kv.iter().enumerate() {
            let rows = kv.chunks_exact(2 * self.shape.kv()).take(lengths[sequence]);
            for (position, row) in rows.enumerate() {
                let block = self.block(sequence, position / 16);
                for (i, x) in row.iter().enumerate() {
                    let (is_value, head, dim) = (i / self.shape.kv(), i / d % kv_heads, i % d);
                    let base = ((block * kv_heads + head) * 2 + is_value) * d * 16;
                    let (by_dim, by_position) = (dim * 16 + position % 16, position % 16 * d + dim);
                    let ours = [by_position, by_dim][is_value];
                    device[base + ours] = bf16_bits(*x);
                    cpu[base + by_dim + by_position - ours] = bf16_bits(*x);
                }
            }
        }
        (device, cpu)
    }

    fn tables(&self) -> Vec<Vec<u32>> {
        let of = |(sequence, kv): (usize, &Vec<f32>)| {
            let numbers = (kv.len() / (2 * self.shape.kv())).div_ceil(16);
            let block = |number| u32::try_from(self.block(sequence, number)).unwrap();
            (self.blocks_first as usize..numbers).map(block).collect()
        };
        self.kv.iter().enumerate().map(of).collect()
    }

    /// Attention on the device.
    fn attend(&self, rows: &[Row], lengths: &[usize], partials_max: usize) -> Vec<f32> {
        let AttentionShape { heads, kv_heads, .. } = self.shape;
        let upload =
            |words: &[u32]| Buffer::of(driver(), "words", bytemuck::cast_slice(words)).unwrap();
        let word = |pick: fn(&Row) -> u32| upload(&rows.iter().map(pick).collect::<Vec<_>>());
        let (position, table) = (word(|row| row.position), word(|row| row.table));
        let tables = self.tables();
        let mut starts = vec![0];
        for table in &tables {
            starts.push(starts[starts.len() - 1] + u32::try_from(table.len()).unwrap());
        }
        let (blocks, blocks_start) = (upload(&tables.concat()), upload(&starts));
        let blocks_first = upload(&vec![self.blocks_first; tables.len()]);
        let sight = Sight { chunk: self.chunk, group: heads / kv_heads, partials_max };
        let work = AttentionWork::new(driver(), Plan::new(rows, sight)).unwrap();
        let cache = Buffer::of(driver(), "cache", bytemuck::cast_slice(&self.cache(lengths).0));
        let partials =
            Buffer::new(driver(), "partials", partials_max * partial_bytes(self.shape)).unwrap();
        let task = AttentionTask {
            shape: self.shape,
            chunk: self.chunk,
            tables: Tables {
                position: position.address(),
                table: table.address(),
                blocks: blocks.address(),
                blocks_start: blocks_start.address(),
                blocks_first: if self.blocks_first > 0 { blocks_first.address() } else { 0 },
            },
            work: &work,
            cache: &cache.unwrap(),
            partials: &partials,
        };
        let qkv = Tensor::of(driver(), Dtype::F32, self.shape.qkv(), &self.queries(rows));
        let mut out = Tensor::new(driver(), Dtype::Bf16, (0, self.shape.q())).unwrap();
        attention_bf16(driver(), &task, &qkv, &mut out).unwrap();
        out.to_host().unwrap()
    }

    /// Attention on the CPU, not rounded.
    fn attend_on_cpu(&self, row: Row, lengths: &[usize]) -> Vec<f32> {
        let mut out = vec![0.0; self.shape.q()];
        let first = row.position.checked_div(self.chunk).map_or(0, |chunk| chunk * self.chunk);
        let job = RowJob {
            shape: self.shape,
            q: &self.queries(&[row])[..self.shape.q()],
            kv: &self.cache(lengths).1,
            table: &self.tables()[row.table as usize],
            table_first: self.blocks_first,
            visible: (first, row.position),
        };
        attend_bf16(Level::Portable, job, &mut out);
        out
    }
}

fn rows(table: u32, positions: std::ops::Range<u32>) -> Vec<Row> {
    positions.map(|position| Row { token: 0, position, table }).collect()
}

/// Decoded one by one, with nothing behind the row in the cache, and not far from the CPU.
#[track_caller]
fn alone(scene: &Scene, row: Row) -> Vec<f32> {
    let lengths = vec![row.position as usize + 1; scene.kv.len()];
    let got = scene.attend(&[row], &lengths, 64);
    // Weights rounded to bf16 are off by up to 2^-9 of themselves, above and below the line; values are below 1. Then
    // the result is rounded to bf16.
    for (got, want) in got.iter().zip(scene.attend_on_cpu(row, &lengths)) {
        let limit = 2.0_f32.powi(-8) + want.abs() * 2.0_f32.powi(-8);
        assert!((got - want).abs() <= limit, "{row:?}: {got} {want}");
    }
    got
}

#[test]
fn bits_do_not_depend_on_chunks_of_the_prompt_or_on_other_rows() {
    let shape = |heads, kv_heads, head_dim| AttentionShape { heads, kv_heads, head_dim };
    for (shape, chunk, prompt) in [
        (shape(10, 2, 32), 0, 250..263),
        (shape(5, 1, 128), 0, 530..535),
        (shape(2, 2, 48), 24, 40..75),
        (shape(16, 1, 64), 0, 0..18),
        (shape(3, 1, 16), 320, 315..330),
    ] {
        let scene = Scene::new(shape, chunk, &[prompt.end as usize + 3, 40]);
        let all = [prompt.end as usize, 40];
        let rows_of_prompt = rows(0, prompt);
        let want: Vec<f32> = rows_of_prompt.iter().flat_map(|row| alone(&scene, *row)).collect();
        let others = rows(1, 33..35);
        let want_of_others: Vec<f32> = others.iter().flat_map(|row| alone(&scene, *row)).collect();
        for partials_max in [0, 4096] {
            let what = format!("{shape:?} {partials_max}");
            assert_same(&scene.attend(&rows_of_prompt, &all, partials_max), &want, &what);
            let (head, tail) = rows_of_prompt.split_at(rows_of_prompt.len() * 2 / 3);
            let mixed = [head, &others[..], tail].concat();
            let got = scene.attend(&mixed, &all, partials_max);
            let (want_head, want_tail) = want.split_at(head.len() * shape.q());
            let want = [want_head, &want_of_others[..], want_tail].concat();
            assert_same(&got, &want, &what);
        }
    }
}

#[test]
fn tables_of_chunks_begin_at_their_first_block() {
    let shape = AttentionShape { heads: 2, kv_heads: 1, head_dim: 32 };
    let mut scene = Scene::new(shape, 32, &[90, 90]);
    let rows = rows(1, 64..80);
    let want = scene.attend(&rows, &[80, 80], 0);
    scene.blocks_first = 4;
    assert_same(&scene.attend(&rows, &[80, 80], 0), &want, "whole");
    assert_same(&scene.attend(&rows, &[80, 80], 64), &want, "split");
}

#[test]
fn few_rows_are_split_while_there_is_room() {
    let sight = Sight { chunk: 0, group: 5, partials_max: 8 };
    let step = [rows(0, 600..601), rows(1, 254..258), rows(2, 0..1)].concat();
    let plan = format!("{:?}", Plan::new(&step, sight));
    let want = "Plan { split: [[0, 1, 0, 15], [0, 1, 16, 31], [0, 1, 32, 37], [5, 1, 0, 0]], \
                whole: [[1, 4, 0, 16]], joined: [[0, 0, 3], [5, 3, 1]], \
                partials_start: [0, 0, 0, 0, 0, 3], partials: 4 }";
    assert_eq!(plan, want);
    let many = Plan::new(&rows(0, 0..256), Sight { partials_max: 4096, ..sight });
    assert!(format!("{many:?}").contains("split: []"), "{many:?}");
}
