//! The CPU as a device: one pool of threads per worker, every operation done when its call returns.

use crate::attention::{RowJob, attend_bf16, attend_f32};
use crate::cache::Cache;
use crate::device::{
    AttentionLayer, Device, DeviceError, Pool, Positional, RopeTable, StepBatch, StepLimits,
};
use crate::embedding::Embedding;
use crate::gemm::{Exec, GemmScratch, linear};
use crate::level::{Dtype, Level};
use crate::math::{bf16_bits, bf16_to_f32};
use crate::matrix::Matrix;
use crate::norm::Rounding;
use crate::rope;
use crate::sample::{Sampled, sample_row};
use crate::{gate, norm};
use rayon::prelude::*;
use std::sync::Arc;

pub(crate) mod check;
mod wire;

pub use wire::{RowMemory, Wire};

/// Multiply-adds of an attention below which a second thread costs more than it gains.
const ATTENTION_WORK_MIN: usize = 1 << 16;

/// Activations `[rows, columns]` in f32. In the bf16 profile, operands of products hold values that
/// were rounded to bf16.
#[derive(Default)]
pub struct Tensor {
    data: Vec<f32>,
    rows: usize,
    columns: usize,
}

impl Tensor {
    /// Rows of the last result.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The last result, row-major.
    #[must_use]
    pub fn data(&self) -> &[f32] {
        &self.data[..self.rows * self.columns]
    }

    /// Makes room for a result of `rows` rows. Grows only beyond the largest step so far.
    fn resize(&mut self, rows: usize) -> &mut [f32] {
        self.rows = rows;
        let len = rows * self.columns;
        if self.data.len() < len {
            self.data.resize(len, 0.0);
        }
        &mut self.data[..len]
    }
}

/// Chosen expert and score of every row.
#[derive(Default)]
pub struct Route {
    experts: Vec<u16>,
    scores: Vec<f32>,
}

impl Route {
    /// The chosen expert per row.
    #[must_use]
    pub fn experts(&self) -> &[u16] {
        &self.experts
    }
}

/// Weights of one routed expert: `[2 * width, hidden]` with the gate first, and `[hidden, width]`.
pub struct ExpertWeights {
    pub gate_up: Matrix,
    pub down: Matrix,
}

impl ExpertWeights {
    /// The images of both matrices; see [`Matrix::image`].
    #[must_use]
    pub fn image(&self) -> [&[u8]; 4] {
        let ([gate_up, gate_up_scales], [down, down_scales]) =
            (self.gate_up.image(), self.down.image());
        [gate_up, gate_up_scales, down, down_scales]
    }

    /// The same, to be filled.
    pub fn image_mut(&mut self) -> [&mut [u8]; 4] {
        let [gate_up, gate_up_scales] = self.gate_up.image_mut();
        let [down, down_scales] = self.down.image_mut();
        [gate_up, gate_up_scales, down, down_scales]
    }
}

/// The experts of one MoE layer that this rank holds, by slot.
pub struct Experts {
    pub slots: Vec<Arc<ExpertWeights>>,
}

/// A step in the device's form.
pub struct CpuBatch {
    step: StepBatch,
    /// `[rows][head_dim / 2][cos, sin]`
    angles: Vec<f32>,
    angle_columns: usize,
}

/// The CPU device. Make it on the thread that uses it: that thread becomes the first of its pool.
pub struct Cpu {
    exec: Exec,
    scratch: GemmScratch,
    expert_x: Tensor,
    expert_gate_up: Tensor,
    expert_act: Tensor,
    expert_y: Tensor,
    row_memory: Option<RowMemory>,
    /// Keeps the threads alive; parallel loops of this thread run on it.
    _pool: Option<rayon::ThreadPool>,
}

impl Cpu {
    /// A device of `threads` threads, the caller's included.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Threads`] if they cannot be started, or this thread already belongs to a device.
    pub fn new(level: Level, dtype: Dtype, threads: usize) -> Result<Self, DeviceError> {
        let threads = threads.max(1);
        let pool = (threads > 1)
            .then(|| {
                rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .use_current_thread()
                    .thread_name(|i| format!("herd-cpu-{i}"))
                    .build()
                    .map_err(|e| DeviceError::Threads { threads, reason: e.to_string() })
            })
            .transpose()?;
        Ok(Self {
            exec: Exec { level, dtype, threads },
            scratch: GemmScratch::default(),
            expert_x: Tensor::default(),
            expert_gate_up: Tensor::default(),
            expert_act: Tensor::default(),
            expert_y: Tensor::default(),
            row_memory: None,
            _pool: pool,
        })
    }

    /// Rows that it sends lie in this memory.
    #[must_use]
    pub fn with_row_memory(self, memory: RowMemory) -> Self {
        Self { row_memory: Some(memory), ..self }
    }

    /// Bytes of a row of `columns` elements on the wire.
    #[must_use]
    pub fn row_bytes(&self, columns: usize) -> usize {
        columns * self.exec.dtype.bytes()
    }

    fn rounding(&self) -> Rounding {
        Rounding::from(self.exec.dtype)
    }

    /// Positions into one row of `[q | k | v]`.
    fn position_row(
        &self,
        batch: &CpuBatch,
        layer: &AttentionLayer,
        index: usize,
        row: &mut [f32],
    ) {
        let (level, round) = (self.exec.level, self.rounding());
        let (q, kv) = row.split_at_mut(layer.shape.q());
        let k = &mut kv[..layer.shape.kv()];
        match layer.position {
            Positional::Rope { qk_norm_eps } => {
                let table = &batch.angles[index * batch.angle_columns..][..batch.angle_columns];
                rope::rotate(level, q, table, qk_norm_eps, round);
                rope::rotate(level, k, table, qk_norm_eps, round);
            }
            Positional::None { temperature } => {
                let position = batch.step.rows[index].position;
                let factor = temperature.map_or(1.0, |t| rope::factor(position, t));
                rope::scale(level, q, factor, round);
                rope::scale(level, k, 1.0, round);
            }
        }
    }

    /// Attention of row `index`.
    fn attend_row(
        &self,
        batch: &CpuBatch,
        layer: &AttentionLayer,
        (index, qkv): (usize, &[f32]),
        cache: &Cache,
        out: &mut [f32],
    ) {
        let row = batch.step.rows[index];
        let table = &batch.step.tables[row.table as usize];
        let (blocks, table_first, first) = match cache.pool(layer.layer) {
            Pool::Full => (&table.full, 0, 0),
            Pool::Chunked(chunk) => {
                (&table.chunked, table.chunked_first, row.position / chunk * chunk)
            }
        };
        let visible = (first, row.position);
        let (shape, q, table) = (layer.shape, &qkv[..layer.shape.q()], &blocks[..]);
        match cache.dtype() {
            Dtype::F32 => {
                let kv = cache.layer::<f32>(layer.layer);
                let job = RowJob { shape, q, kv, table, table_first, visible };
                attend_f32(self.exec.level, job, out);
            }
            Dtype::Bf16 => {
                let kv = cache.layer::<u16>(layer.layer);
                let job = RowJob { shape, q, kv, table, table_first, visible };
                attend_bf16(self.exec.level, job, out);
                for x in out {
                    *x = crate::math::round_bf16(*x);
                }
            }
        }
    }

    fn to_wire(&self, x: &[f32], bytes: &mut [u8]) {
        match self.exec.dtype {
            Dtype::F32 => bytes.copy_from_slice(bytemuck::cast_slice(x)),
            Dtype::Bf16 => {
                for (to, x) in bytes.chunks_exact_mut(2).zip(x) {
                    to.copy_from_slice(&bf16_bits(*x).to_le_bytes());
                }
            }
        }
    }

    fn unpack(&self, bytes: &[u8], mut put: impl FnMut(usize, f32)) {
        match self.exec.dtype {
            Dtype::F32 => {
                for (i, b) in bytes.chunks_exact(4).enumerate() {
                    put(i, f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                }
            }
            Dtype::Bf16 => {
                for (i, b) in bytes.chunks_exact(2).enumerate() {
                    put(i, bf16_to_f32(u16::from_le_bytes([b[0], b[1]])));
                }
            }
        }
    }

    /// One expert over its rows.
    fn expert(&mut self, arrived: &[u8], rows: usize, expert: &ExpertWeights, results: &mut [u8]) {
        let mut x = std::mem::take(&mut self.expert_x);
        x.columns = expert.gate_up.inputs;
        let data = x.resize(rows);
        self.unpack(arrived, |i, value| data[i] = value);
        let mut gate_up = std::mem::take(&mut self.expert_gate_up);
        let mut act = std::mem::take(&mut self.expert_act);
        let mut y = std::mem::take(&mut self.expert_y);
        gate_up.columns = expert.gate_up.outputs;
        act.columns = expert.down.inputs;
        y.columns = expert.down.outputs;
        self.linear(&x, &expert.gate_up, &mut gate_up);
        self.swiglu(&gate_up, &mut act);
        self.linear(&act, &expert.down, &mut y);
        self.to_wire(y.data(), results);
        (self.expert_x, self.expert_gate_up, self.expert_act, self.expert_y) = (x, gate_up, act, y);
    }
}

impl Device for Cpu {
    type Tensor = Tensor;
    type Matrix = Matrix;
    type Norm = Vec<f32>;
    type Embedding = Embedding;
    type Cache = Cache;
    type Batch = CpuBatch;
    type Route = Route;
    type Wire = Wire;
    type Experts = Experts;
    type Arrived = [u8];
    type Offsets = [u32];

    fn tensor(&self, rows: usize, columns: usize) -> Tensor {
        Tensor { data: vec![0.0; rows * columns], rows: 0, columns }
    }

    fn wire(&self) -> Wire {
        Wire::new(self.row_memory.clone())
    }

    fn route(&self) -> Route {
        Route::default()
    }

    fn upload(
        &mut self,
        step: &StepBatch,
        rope: &RopeTable,
        limits: StepLimits,
    ) -> Result<CpuBatch, DeviceError> {
        check::step(step, limits)?;
        let angle_columns = rope.inv_freq.len() * 2;
        let mut angles = vec![0.0; step.rows.len() * angle_columns];
        if angle_columns > 0 {
            for (row, angles) in step.rows.iter().zip(angles.chunks_exact_mut(angle_columns)) {
                rope::angles(&rope.spec, &rope.inv_freq, row.position, angles);
            }
        }
        Ok(CpuBatch { step: step.clone(), angles, angle_columns })
    }

    fn embed(&mut self, batch: &CpuBatch, table: &Embedding, x: &mut Tensor) {
        let columns = x.columns;
        let data = x.resize(batch.step.rows.len());
        for (row, out) in batch.step.rows.iter().zip(data.chunks_exact_mut(columns)) {
            table.row(row.token as usize, out);
        }
    }

    fn rms_norm(&mut self, x: &Tensor, weight: &Vec<f32>, eps: f32, out: &mut Tensor) {
        let round = self.rounding();
        norm::rms_norm(self.exec.level, x.data(), weight, eps, round, out.resize(x.rows));
    }

    fn linear(&mut self, x: &Tensor, w: &Matrix, out: &mut Tensor) {
        let rows = x.rows;
        linear(self.exec, &mut self.scratch, x.data(), rows, w, out.resize(rows));
    }

    fn attention(
        &mut self,
        batch: &CpuBatch,
        layer: &AttentionLayer,
        qkv: &mut Tensor,
        cache: &mut Cache,
        out: &mut Tensor,
    ) {
        let (rows, columns, shape) = (qkv.rows, qkv.columns, layer.shape);
        let chunk_of_pool = cache.pool(layer.layer);
        for (index, row) in qkv.resize(rows).chunks_exact_mut(columns).enumerate() {
            self.position_row(batch, layer, index, row);
            let at = batch.step.rows[index];
            let table = &batch.step.tables[at.table as usize];
            let block = at.position / 16;
            let id = match chunk_of_pool {
                Pool::Full => table.full[block as usize],
                Pool::Chunked(_) => table.chunked[(block - table.chunked_first) as usize],
            };
            let (k, v) = row[shape.q()..].split_at(shape.kv());
            cache.write(layer.layer, (id, at.position % 16), k, v);
        }
        let (device, cache, qkv) = (&*self, &*cache, qkv.data());
        let attend = |(index, out): (usize, &mut [f32])| {
            let qkv = &qkv[index * columns..][..columns];
            device.attend_row(batch, layer, (index, qkv), cache, out);
        };
        let out = out.resize(rows);
        let context: usize = batch.step.rows.iter().map(|row| row.position as usize + 1).sum();
        if device.exec.threads > 1 && rows > 1 && context * shape.q() > ATTENTION_WORK_MIN {
            out.par_chunks_mut(shape.q()).enumerate().for_each(attend);
        } else {
            out.chunks_mut(shape.q()).enumerate().for_each(attend);
        }
    }

    fn swiglu(&mut self, gate_up: &Tensor, out: &mut Tensor) {
        let (round, width) = (self.rounding(), out.columns);
        norm::swiglu(self.exec.level, gate_up.data(), width, round, out.resize(gate_up.rows));
    }

    fn add(&mut self, x: &mut Tensor, y: &Tensor) {
        let rows = x.rows;
        norm::add(self.exec.level, x.resize(rows), y.data());
    }

    fn gate(&mut self, logits: &Tensor, route: &mut Route) {
        gate::top1(logits.data(), logits.columns, &mut route.experts, &mut route.scores);
    }

    fn pack(&mut self, h: &Tensor, route: &Route, wire: &mut Wire) {
        let mut scaled = std::mem::take(&mut self.expert_x);
        scaled.columns = h.columns;
        let (level, round) = (self.exec.level, self.rounding());
        norm::scale_rows(level, h.data(), &route.scores, round, scaled.resize(h.rows));
        self.to_wire(scaled.data(), wire.room(self.row_bytes(h.columns) * h.rows));
        self.expert_x = scaled;
    }

    fn experts(&mut self, arrived: &[u8], offsets: &[u32], experts: &Experts, results: &mut Wire) {
        assert_eq!(
            offsets.len(),
            experts.slots.len() + 1,
            "one offset per local expert and the end"
        );
        let Some(first) = experts.slots.first() else { return };
        let row_bytes = self.row_bytes(first.gate_up.inputs);
        let results = results.room(arrived.len());
        for (slot, expert) in experts.slots.iter().enumerate() {
            let (from, to) = (offsets[slot] as usize, offsets[slot + 1] as usize);
            if from < to {
                let bytes = from * row_bytes..to * row_bytes;
                self.expert(&arrived[bytes.clone()], to - from, expert, &mut results[bytes]);
            }
        }
    }

    fn add_wire(&mut self, wire: &Wire, x: &mut Tensor) {
        let rows = x.rows;
        let data = x.resize(rows);
        self.unpack(wire.bytes(), |i, value| data[i] += value);
    }

    fn select(&mut self, batch: &CpuBatch, x: &Tensor, out: &mut Tensor) {
        let columns = x.columns;
        let data = out.resize(batch.step.samples.len());
        for (sample, out) in batch.step.samples.iter().zip(data.chunks_exact_mut(columns)) {
            out.copy_from_slice(&x.data[sample.row as usize * columns..][..columns]);
        }
    }

    fn finish(
        &mut self,
        _batch: &CpuBatch,
        step: &StepBatch,
        logits: &Tensor,
    ) -> Result<Vec<Sampled>, DeviceError> {
        let vocab = logits.columns;
        let choose = |(sample, row): (&crate::SampleRow, &[f32])| {
            let position = step.rows[sample.row as usize].position + 1;
            sample_row(row, position, &sample.sampling)
        };
        Ok(step.samples.iter().zip(logits.data().chunks_exact(vocab.max(1))).map(choose).collect())
    }
}

#[cfg(test)]
mod tests;
