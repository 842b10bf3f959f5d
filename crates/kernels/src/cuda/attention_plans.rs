//! What the tensor cores' attention needs beside a step: how its rows are dealt out, for layers of each sight.

use super::attention_bf16::{
    AttentionTask, AttentionWork, Plan, Sight, Tables, attention_bf16, partial_bytes,
};
use super::batch::{Batch, Part};
use super::buffer::Buffer;
use super::cache::Cache;
use super::driver::{CudaError, Driver};
use super::positions::{check_layer, tables_of};
use super::tensor::Tensor;
use crate::attention::AttentionShape;
use crate::device::{AttentionLayer, Pool, Row};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

/// Memory for partial results: rows that would need more are not split.
const PARTIALS_BYTES: usize = 64 << 20;

/// Plans of a step, made when the first layer of their sight asks.
pub(super) struct Attention {
    driver: Arc<Driver>,
    rows: Vec<Row>,
    step: u64,
    /// By chunk (0: full): the plan, and the step that it was made for.
    plans: BTreeMap<u32, (AttentionWork, u64)>,
    partials: Buffer,
}

impl Attention {
    pub(super) fn new(driver: &Arc<Driver>) -> Result<Self, CudaError> {
        let partials = Buffer::new(driver, "partial attention", 0)?;
        let (rows, plans) = (Vec::new(), BTreeMap::new());
        Ok(Self { driver: Arc::clone(driver), rows, step: 0, plans, partials })
    }

    /// Has room for steps of so many rows, in layers of these pools.
    pub(super) fn reserve(
        &mut self,
        shape: AttentionShape,
        layers: &[Pool],
        rows: usize,
    ) -> Result<(), CudaError> {
        self.partials.reserve("partial attention", PARTIALS_BYTES)?;
        for &pool in layers {
            let (work, _) = match self.plans.entry(chunk_of(pool)) {
                Entry::Occupied(known) => known.into_mut(),
                // No step has the number 0.
                Entry::Vacant(new) => {
                    new.insert((AttentionWork::new(&self.driver, Plan::default())?, 0))
                }
            };
            work.reserve(rows, PARTIALS_BYTES / partial_bytes(shape))?;
        }
        Ok(())
    }

    /// A step begins; its number.
    pub(super) fn begin(&mut self, rows: &[Row]) -> u64 {
        self.rows.clear();
        self.rows.extend_from_slice(rows);
        self.step += 1;
        self.step
    }

    /// The number of the step that began last.
    pub(super) fn step(&self) -> u64 {
        self.step
    }

    /// Attention of every row of `qkv`, whose keys and values are in the cache, into `out`.
    pub(super) fn run(
        &mut self,
        (batch, layer): (&Batch, &AttentionLayer),
        qkv: &Tensor,
        cache: &Cache,
        out: &mut Tensor,
    ) -> Result<(), CudaError> {
        check_layer(batch, layer, cache);
        let (shape, pool) = (layer.shape, cache.pool(layer.layer));
        let chunk = chunk_of(pool);
        let partials_max = PARTIALS_BYTES / partial_bytes(shape);
        self.partials.reserve("partial attention", PARTIALS_BYTES)?;
        let sight = Sight { chunk, group: shape.heads / shape.kv_heads, partials_max };
        match self.plans.get_mut(&chunk) {
            Some((_, step)) if *step == self.step => {}
            Some((work, step)) => {
                work.renew(Plan::new(&self.rows, sight))?;
                *step = self.step;
            }
            None => {
                let work = AttentionWork::new(&self.driver, Plan::new(&self.rows, sight))?;
                self.plans.insert(chunk, (work, self.step));
            }
        }
        let [blocks, blocks_start, blocks_first] = tables_of(batch, pool);
        let (position, table) = (batch.address(Part::Positions), batch.address(Part::Tables));
        let tables = Tables { position, table, blocks, blocks_start, blocks_first };
        let (work, _) = &self.plans[&chunk];
        let (cache, partials) = (cache.buffer(layer.layer), &self.partials);
        let task = AttentionTask { shape, chunk, tables, work, cache, partials };
        attention_bf16(&self.driver, &task, qkv, out)
    }
}

/// Positions that a layer of this pool sees; 0: all.
fn chunk_of(pool: Pool) -> u32 {
    match pool {
        Pool::Full => 0,
        Pool::Chunked(chunk) => chunk,
    }
}
