//! What the tensor cores' attention needs beside a step: how its rows are dealt out, for layers of each sight.

use super::attention_bf16::{
    AttentionTask, AttentionWork, Plan, SPLIT, Sight, Tables, attention_bf16, partial_bytes,
};
use super::batch::{Batch, Part};
use super::buffer::Buffer;
use super::cache::Cache;
use super::driver::{CudaError, Driver};
use super::positions::{check_layer, tables_of};
use super::tensor::Tensor;
use crate::attention::{AttentionShape, BLOCK_TOKENS};
use crate::device::{AttentionLayer, Pool, Row};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

/// Memory for partial results, at least: rows that would need more are not split.
const PARTIALS_BYTES_MIN: usize = 64 << 20;

/// Plans of a step: for the sights that are known when it begins, and for others when the first layer asks.
pub(super) struct Attention {
    driver: Arc<Driver>,
    rows: Vec<Row>,
    step: u64,
    /// By chunk; 0: full.
    plans: BTreeMap<u32, Planned>,
    partials: Buffer,
    /// What it may take.
    partials_bytes: usize,
}

struct Planned {
    work: AttentionWork,
    step: u64,
    sight: Sight,
}

impl Attention {
    pub(super) fn new(driver: &Arc<Driver>) -> Result<Self, CudaError> {
        let partials = Buffer::new(driver, "partial attention", 0)?;
        let (rows, plans) = (Vec::new(), BTreeMap::new());
        let partials_bytes = PARTIALS_BYTES_MIN;
        Ok(Self { driver: Arc::clone(driver), rows, step: 0, plans, partials, partials_bytes })
    }

    /// Has room for steps of so many rows, in layers of these pools: as many partial results as decoding needs with all of
    /// the cache in use.
    ///
    /// * `blocks`: of the full pool
    pub(super) fn reserve(
        &mut self,
        shape: AttentionShape,
        layers: &[Pool],
        (rows, blocks): (usize, u32),
    ) -> Result<(), CudaError> {
        let splits = (blocks as usize * BLOCK_TOKENS).div_ceil(SPLIT as usize) + rows;
        self.partials_bytes = PARTIALS_BYTES_MIN.max(splits * partial_bytes(shape));
        self.partials.reserve("partial attention", self.partials_bytes)?;
        for &pool in layers {
            let sight = sight_of(shape, chunk_of(pool), self.partials_bytes);
            let planned = match self.plans.entry(chunk_of(pool)) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => {
                    let work = AttentionWork::new(&self.driver, Plan::default())?;
                    // No step has the number 0.
                    new.insert(Planned { work, step: 0, sight })
                }
            };
            planned.sight = sight;
            planned.work.reserve(rows, sight.partials_max)?;
        }
        Ok(())
    }

    /// A step begins; its number.
    pub(super) fn begin(&mut self, rows: &[Row]) -> Result<u64, CudaError> {
        self.rows.clear();
        self.rows.extend_from_slice(rows);
        self.step += 1;
        for planned in self.plans.values_mut() {
            planned.work.renew(Plan::new(rows, planned.sight))?;
            planned.step = self.step;
        }
        Ok(self.step)
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
        self.partials.reserve("partial attention", self.partials_bytes)?;
        if let Entry::Vacant(new) = self.plans.entry(chunk) {
            let sight = sight_of(shape, chunk, self.partials_bytes);
            let work = AttentionWork::new(&self.driver, Plan::new(&self.rows, sight))?;
            new.insert(Planned { work, step: self.step, sight });
        }
        let [blocks, blocks_start, blocks_first] = tables_of(batch, pool);
        let (position, table) = (batch.address(Part::Positions), batch.address(Part::Tables));
        let tables = Tables { position, table, blocks, blocks_start, blocks_first };
        let Planned { work, step, sight } = &self.plans[&chunk];
        let made_for = (*step, *sight);
        assert_eq!(
            made_for,
            (self.step, sight_of(shape, chunk, self.partials_bytes)),
            "the plan of this step and shape"
        );
        let (cache, partials) = (cache.buffer(layer.layer), &self.partials);
        let task = AttentionTask { shape, chunk, tables, work, cache, partials };
        attention_bf16(&self.driver, &task, qkv, out)
    }
}

/// What rows of a layer see.
fn sight_of(shape: AttentionShape, chunk: u32, partials_bytes: usize) -> Sight {
    let partials_max = partials_bytes / partial_bytes(shape);
    Sight { chunk, group: shape.heads / shape.kv_heads, partials_max }
}

/// Positions that a layer of this pool sees; 0: all.
fn chunk_of(pool: Pool) -> u32 {
    match pool {
        Pool::Full => 0,
        Pool::Chunked(chunk) => chunk,
    }
}
