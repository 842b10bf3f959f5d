//! A step is checked once, before anything runs: behind this no index can point outside.

use crate::attention::BLOCK_TOKENS;
use crate::device::{DeviceError, Row, StepBatch, StepLimits, Table};

/// Checks every index of a step.
pub(crate) fn step(step: &StepBatch, limits: StepLimits) -> Result<(), DeviceError> {
    for row in &step.rows {
        below("token", row.token, limits.vocab)?;
        below("table of a row", row.table, count(step.tables.len()))?;
        covered(row, &step.tables[row.table as usize], limits)?;
    }
    for table in &step.tables {
        for &block in &table.full {
            below("block of the full pool", block, limits.full_blocks)?;
        }
        for &block in &table.chunked {
            below("block of the chunked pool", block, limits.chunked_blocks)?;
        }
    }
    for sample in &step.samples {
        below("row to sample", sample.row, count(step.rows.len()))?;
    }
    Ok(())
}

/// Both tables cover all positions that the row may see.
fn covered(row: &Row, table: &Table, limits: StepLimits) -> Result<(), DeviceError> {
    let block = row.position / count(BLOCK_TOKENS);
    if limits.full_blocks > 0 {
        below("block number in the full table", block, count(table.full.len()))?;
    }
    if let Some(chunk) = limits.chunk_tokens {
        let first = row.position / chunk * chunk / count(BLOCK_TOKENS);
        let end = table.chunked_first + count(table.chunked.len());
        below("block number in the chunked table", block, end)?;
        below("first block of the chunked table", table.chunked_first, first + 1)?;
    }
    Ok(())
}

fn below(what: &'static str, value: u32, limit: u32) -> Result<(), DeviceError> {
    if value < limit {
        return Ok(());
    }
    Err(DeviceError::Step { what, value: value.into(), limit: limit.into() })
}

fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}
