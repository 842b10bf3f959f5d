//! Keys and values of positions between the KV cache and the host.

use super::args::{Launch, args, blocks, int};
use super::buffer::Buffer;
use super::cache::Cache;
use super::driver::{CudaError, Driver, StepKind};
use crate::cache::{RowsAt, places};
use crate::device::{DeviceError, Pool};
use crate::level::Dtype;
use std::sync::Arc;

/// Positions that travel at a time: some MB of a large model.
const POSITIONS: usize = 64;

/// As the kernels' block.
const THREADS: u32 = 256;

/// Rows on their way.
pub(super) struct KvRows {
    driver: Arc<Driver>,
    /// `[positions]`
    places: Buffer,
    /// `[positions][layers][K, V][kv_heads][head_dim]`
    rows: Buffer,
}

impl KvRows {
    /// It takes memory when rows travel, unless it is reserved before.
    pub(super) fn new(driver: &Arc<Driver>) -> Result<Self, CudaError> {
        Ok(Self {
            driver: Arc::clone(driver),
            places: Buffer::new(driver, "places of KV rows", 0)?,
            rows: Buffer::new(driver, "KV rows", 0)?,
        })
    }

    /// Has room for rows of so many bytes.
    pub(super) fn reserve(&mut self, row_bytes: usize) -> Result<(), CudaError> {
        self.places.reserve("places of KV rows", POSITIONS * size_of::<u32>())?;
        self.rows.reserve("KV rows", POSITIONS * row_bytes)
    }

    /// Appends rows to `out`; waits for the device.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Step`] if there are no such places, [`DeviceError::Cuda`] if memory is refused or CUDA fails.
    pub(super) fn read(
        &mut self,
        cache: &Cache,
        at: &[RowsAt<'_>],
        out: &mut Vec<u8>,
    ) -> Result<(), DeviceError> {
        for at in at.chunk_by(|left, right| left.pool == right.pool) {
            let (pool, row_bytes) = (at[0].pool, cache.row_bytes(at[0].pool));
            for places in self.prepare(cache, at)?.chunks(POSITIONS) {
                self.launch(cache, (pool, places), Direction::Out)?;
                let begin = out.len();
                out.resize(begin + places.len() * row_bytes, 0);
                self.rows.read(&mut out[begin..])?;
            }
        }
        Ok(())
    }

    /// Puts rows into blocks; later steps see them.
    ///
    /// # Errors
    ///
    /// As for [`KvRows::read`], and if there are not as many rows.
    pub(super) fn write(
        &mut self,
        cache: &mut Cache,
        at: &RowsAt<'_>,
        rows: &[u8],
    ) -> Result<(), DeviceError> {
        let row_bytes = cache.row_bytes(at.pool);
        let places = self.prepare(cache, std::slice::from_ref(at))?;
        if rows.len() != places.len() * row_bytes {
            let (value, limit) = (rows.len() as u64, (places.len() * row_bytes) as u64);
            return Err(DeviceError::Step { what: "bytes of KV rows", value, limit });
        }
        let pieces = rows.chunks((POSITIONS * row_bytes).max(1));
        for (places, rows) in places.chunks(POSITIONS).zip(pieces) {
            self.rows.fill(0, rows)?;
            self.launch(cache, (at.pool, places), Direction::In)?;
        }
        Ok(())
    }

    /// The places of rows of one pool, as kernels take them.
    fn prepare(&mut self, cache: &Cache, at: &[RowsAt<'_>]) -> Result<Vec<u32>, DeviceError> {
        let Some(pool) = at.first().map(|at| at.pool) else { return Ok(Vec::new()) };
        let limit = cache.layers_of(pool).map(|layer| cache.blocks(layer)).min().unwrap_or(0);
        self.reserve(cache.row_bytes(pool))?;
        // No two are alike: they are enqueued as they come.
        self.driver.begin_step(StepKind::Others)?;
        let mut all = Vec::new();
        for at in at {
            let place = |(block, slot)| 16 * block + blocks(slot);
            all.extend(places(at, limit.into())?.into_iter().map(place));
        }
        Ok(all)
    }

    /// Between `rows` and all layers of the pool.
    fn launch(
        &self,
        cache: &Cache,
        (pool, places): (Pool, &[u32]),
        direction: Direction,
    ) -> Result<(), CudaError> {
        let Some(layers) = cache.addresses(pool) else { return Ok(()) };
        self.places.fill(0, bytemuck::cast_slice(places))?;
        let kernel = match (direction, cache.dtype()) {
            (Direction::Out, Dtype::F32) => "herd_kv_gather_f32",
            (Direction::Out, Dtype::Bf16) => "herd_kv_gather_bf16",
            (Direction::In, Dtype::F32) => "herd_kv_scatter_f32",
            (Direction::In, Dtype::Bf16) => "herd_kv_scatter_bf16",
        };
        let grid = [blocks(places.len()), blocks(cache.layers_of(pool).count()), 1];
        let launch = Launch { kernel, grid, block: THREADS, shared: 0 };
        let (kv_heads, head_dim) = (int(cache.kv_heads()), int(cache.head_dim()));
        let args = args![layers, &self.places, &self.rows, kv_heads, head_dim];
        // SAFETY: the kernel's five parameters. The places are in blocks that all layers of the pool have, whose
        // addresses are in `layers`; `rows` has so many positions of all of them.
        unsafe { self.driver.launch(launch, &args) }
    }
}

/// Seen from the cache.
#[derive(Debug, Clone, Copy)]
enum Direction {
    In,
    Out,
}
