//! Steps for the tests, on both devices.

use super::super::batch::{Batch, StepRules};
use super::driver;
use crate::cpu::{Cpu, CpuBatch, Tensor as CpuTensor};
use crate::device::{Device, RopeTable, Row, StepBatch, StepLimits, Table, Temperature};
use crate::embedding::Embedding;
use crate::level::{Dtype, Level};
use crate::rope::{self, RopeSpec};

pub(super) const LIMITS: StepLimits =
    StepLimits { vocab: 64, full_blocks: 30, chunked_blocks: 30, chunk_tokens: None };

pub(super) const TEMPERATURE: Temperature = Temperature { floor_scale: 16.0, attn_scale: 0.1 };

pub(super) fn cpu(dtype: Dtype) -> Cpu {
    Cpu::new(Level::Portable, dtype, 1).unwrap()
}

pub(super) fn rope(head_dim: usize) -> RopeTable {
    let spec = RopeSpec { head_dim, theta: 1e4, scaling: None, chunk_tokens: None };
    RopeTable { inv_freq: rope::inv_freq(&spec), spec }
}

/// A step whose rows have these tokens.
pub(super) fn of_tokens(tokens: &[u32]) -> StepBatch {
    let row = |(i, token): (usize, &u32)| Row {
        token: *token,
        position: u32::try_from(i).unwrap(),
        table: 0,
    };
    let table = Table { full: (0..30).collect(), chunked: vec![], chunked_first: 0 };
    StepBatch {
        rows: tokens.iter().enumerate().map(row).collect(),
        tables: vec![table],
        samples: vec![],
    }
}

/// The step on the emulated device.
pub(super) fn upload(step: &StepBatch, rope: &RopeTable, limits: StepLimits) -> Batch {
    let mut batch = Batch::new(driver()).unwrap();
    batch.upload(step, &StepRules { rope, temperature: Some(TEMPERATURE), limits }).unwrap();
    batch
}

/// Values as a tensor of the CPU: looked up in a table that holds them.
pub(super) fn on_cpu(cpu: &mut Cpu, values: &[f32], columns: usize) -> CpuTensor {
    let rows = values.len() / columns;
    let mut table = Embedding::zeroed(Dtype::F32, rows, columns).unwrap();
    table.bytes_mut().copy_from_slice(bytemuck::cast_slice(values));
    let tokens: Vec<u32> = (0..u32::try_from(rows).unwrap()).collect();
    let limits = StepLimits { vocab: u32::MAX, ..LIMITS };
    let batch: CpuBatch = cpu.upload(&of_tokens(&tokens), &rope(2), limits).unwrap();
    let mut x = cpu.tensor(0, columns);
    cpu.embed(&batch, &table, &mut x);
    x
}
