//! A step in device memory: one buffer, written once per step.

use super::buffer::Buffer;
use super::driver::{CudaError, Driver};
use crate::cpu::check;
use crate::device::{RopeTable, StepBatch, StepLimits, StepRoom, Table, Temperature};
use crate::rope;
use std::sync::Arc;

/// What a model makes of positions, and what its steps are checked against.
pub(super) struct StepRules<'a> {
    pub(super) rope: &'a RopeTable,
    /// Of the layers without rotary embedding.
    pub(super) temperature: Option<Temperature>,
    pub(super) limits: StepLimits,
}

/// An array of a step. Elements are u32 unless it says otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Part {
    /// `[rows]`
    Tokens,
    /// `[rows]`
    Positions,
    /// `[rows]`: the row's block table.
    Tables,
    /// `[tables + 1]`: where each begins in `Full`, and the end.
    FullStart,
    /// `[tables + 1]`
    ChunkedStart,
    /// `[tables]`: the block number that each begins with.
    ChunkedFirst,
    /// `[rows][head_dim / 2][cos, sin]` f32
    Angles,
    /// `[rows]` f32: what layers without rotary embedding multiply queries by.
    Factors,
    /// `[samples]`: rows whose logits are wanted.
    Samples,
    /// `[samples]`: the position of the token that is chosen.
    SamplePositions,
    /// `[samples]` f32
    Temperatures,
    /// `[samples][2]`: lower half first.
    Seeds,
    /// Tables of the full pool, one after the other. They grow from step to step; what stands before them keeps its place
    /// while the rows are as many, and what stands behind them while they have room.
    Full,
    /// Tables of the chunked pool.
    Chunked,
}

const PARTS: usize = Part::Chunked as usize + 1;

const ALL_PARTS: [Part; PARTS] = [
    Part::Tokens,
    Part::Positions,
    Part::Tables,
    Part::FullStart,
    Part::ChunkedStart,
    Part::ChunkedFirst,
    Part::Angles,
    Part::Factors,
    Part::Samples,
    Part::SamplePositions,
    Part::Temperatures,
    Part::Seeds,
    Part::Full,
    Part::Chunked,
];

/// Arrays begin at multiples of so many words: 16 bytes.
const ALIGNMENT: usize = 4;

/// A step's rows, positions, block tables and samples on the device.
pub(super) struct Batch {
    buffer: Buffer,
    /// What is uploaded: all elements are 4 bytes wide.
    words: Vec<u32>,
    /// By `Part`: its first word.
    starts: [usize; PARTS],
    rows: usize,
    samples: usize,
    /// Columns of the angles.
    head_dim: usize,
    temperature: Option<Temperature>,
    limits: StepLimits,
}

impl Batch {
    /// An empty step.
    pub(super) fn new(driver: &Arc<Driver>) -> Result<Self, CudaError> {
        Ok(Self {
            buffer: Buffer::new(driver, "step", 0)?,
            words: Vec::new(),
            starts: [0; PARTS],
            rows: 0,
            samples: 0,
            head_dim: 0,
            temperature: None,
            limits: StepLimits { vocab: 0, full_blocks: 0, chunked_blocks: 0, chunk_tokens: None },
        })
    }

    /// Has room for steps of this size. Every sequence has a row, and every block belongs to one sequence.
    ///
    /// * `head_dim`: columns of the angles
    pub(super) fn reserve(
        &mut self,
        StepRoom { rows, samples }: StepRoom,
        limits: StepLimits,
        head_dim: usize,
    ) -> Result<(), CudaError> {
        let part = |part: Part| match part {
            Part::Tokens | Part::Positions | Part::Tables | Part::Factors => rows,
            Part::Full => (limits.full_blocks as usize).next_power_of_two(),
            Part::Chunked => limits.chunked_blocks as usize,
            Part::FullStart | Part::ChunkedStart => rows + 1,
            Part::ChunkedFirst => rows,
            Part::Angles => rows * head_dim,
            Part::Samples | Part::SamplePositions | Part::Temperatures => samples,
            Part::Seeds => samples * 2,
        };
        let words: usize = ALL_PARTS.map(|of| part(of).next_multiple_of(ALIGNMENT)).iter().sum();
        self.buffer.reserve("step", words * 4)
    }

    /// Puts a step in place of the last one. Memory grows only beyond the largest step so far.
    ///
    /// # Errors
    ///
    /// [`CudaError`] if memory is refused or CUDA fails.
    ///
    /// # Panics
    ///
    /// If `check::step` refuses the step: the device asks it before.
    pub(super) fn upload(
        &mut self,
        step: &StepBatch,
        rules: &StepRules<'_>,
    ) -> Result<(), CudaError> {
        check::step(step, rules.limits).expect("the device has checked the step");
        self.rows = step.rows.len();
        self.samples = step.samples.len();
        self.head_dim = rules.rope.inv_freq.len() * 2;
        self.temperature = rules.temperature;
        self.limits = rules.limits;
        self.words.clear();
        self.put(Part::Tokens, step.rows.iter().map(|row| row.token));
        self.put(Part::Positions, step.rows.iter().map(|row| row.position));
        self.put(Part::Tables, step.rows.iter().map(|row| row.table));
        self.put_starts(&step.tables, Part::FullStart, |table| &table.full);
        self.put_starts(&step.tables, Part::ChunkedStart, |table| &table.chunked);
        self.put(Part::ChunkedFirst, step.tables.iter().map(|table| table.chunked_first));
        self.put_angles(step, rules.rope);
        let factor = |position| rules.temperature.map_or(1.0, |t| rope::factor(position, t));
        self.put(Part::Factors, step.rows.iter().map(|row| factor(row.position).to_bits()));
        self.put_samples(step);
        let full: usize = step.tables.iter().map(|table| table.full.len()).sum();
        self.put(Part::Full, step.tables.iter().flat_map(|table| &table.full).copied());
        self.words.resize(self.words.len() - full + full.next_power_of_two(), 0);
        self.put(Part::Chunked, step.tables.iter().flat_map(|table| &table.chunked).copied());
        self.buffer.reserve("step", self.words.len() * 4)?;
        self.buffer.fill(0, bytemuck::cast_slice(&self.words))
    }

    fn begin(&mut self, part: Part) {
        self.words.resize(self.words.len().next_multiple_of(ALIGNMENT), 0);
        self.starts[part as usize] = self.words.len();
    }

    fn put(&mut self, part: Part, values: impl Iterator<Item = u32>) {
        self.begin(part);
        self.words.extend(values);
    }

    /// Where each table begins, and the end of the last.
    fn put_starts(&mut self, tables: &[Table], part: Part, of: impl Fn(&Table) -> &Vec<u32>) {
        let mut end = 0;
        let ends = tables.iter().map(|table| {
            end += super::args::blocks(of(table).len());
            end
        });
        self.put(part, std::iter::once(0).chain(ends));
    }

    fn put_angles(&mut self, step: &StepBatch, rope: &RopeTable) {
        self.begin(Part::Angles);
        let (from, columns) = (self.words.len(), self.head_dim);
        self.words.resize(from + self.rows * columns, 0);
        if columns > 0 {
            let angles: &mut [f32] = bytemuck::cast_slice_mut(&mut self.words[from..]);
            for (row, angles) in step.rows.iter().zip(angles.chunks_exact_mut(columns)) {
                rope::angles(&rope.spec, &rope.inv_freq, row.position, angles);
            }
        }
    }

    fn put_samples(&mut self, step: &StepBatch) {
        let samples = || step.samples.iter();
        self.put(Part::Samples, samples().map(|sample| sample.row));
        let position = |row: u32| step.rows[row as usize].position + 1;
        self.put(Part::SamplePositions, samples().map(|sample| position(sample.row)));
        let temperature = |sample: &crate::SampleRow| sample.sampling.temperature.to_bits();
        self.put(Part::Temperatures, samples().map(temperature));
        let seeds = samples().flat_map(|sample| crate::sample::split(sample.sampling.seed));
        self.put(Part::Seeds, seeds);
    }

    /// The device's address of an array.
    pub(super) fn address(&self, part: Part) -> u64 {
        self.buffer.address() + self.starts[part as usize] as u64 * 4
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Rows whose logits are wanted.
    pub(super) fn samples(&self) -> usize {
        self.samples
    }

    /// Columns of the angles; 0: the model has none.
    pub(super) fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// What the factors were made from.
    pub(super) fn temperature(&self) -> Option<Temperature> {
        self.temperature
    }

    /// What the step was checked against.
    pub(super) fn limits(&self) -> StepLimits {
        self.limits
    }
}
