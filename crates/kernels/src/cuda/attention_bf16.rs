//! Paged attention on tensor cores: how the rows of a step are dealt to blocks, and the launches.
//!
//! Rows of one sequence share keys and values: as many as fit the 16 rows of a product take one warp. A sequence of few
//! rows is cut into splits of 256 positions, which a second kernel joins; one of many rows keeps the device busy as it
//! is. Both give the same bits.

use super::args::{Launch, args, blocks, int};
use super::buffer::Buffer;
use super::driver::{CudaError, Driver};
use super::tensor::Tensor;
use crate::attention::{AttentionShape, BLOCK_TOKENS};
use crate::device::Row;
use crate::level::Dtype;
use std::sync::Arc;

/// Rows of the left operand of a product.
const VECTORS: usize = 16;

/// Positions of a split.
pub(super) const SPLIT: u32 = 256;

/// Rows of one sequence from which on it is not split: with eight kv heads they fill the SMs by themselves.
const WHOLE_ROWS_MIN: usize = 256;

/// Warps of a block that does not split.
const WHOLE_WARPS: usize = 4;

/// An item without rows.
const NOTHING: [u32; 4] = [0; 4];

/// What its memory is for.
const WHAT: &str = "attention plan";

/// The largest head of the kernels.
const DIM_MAX: usize = 128;

/// What rows of a layer see, and what there is to work with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Sight {
    /// Positions of a chunk; 0: all earlier ones are seen.
    pub(super) chunk: u32,
    /// Query heads of a kv head.
    pub(super) group: usize,
    /// Room for so many partial results.
    pub(super) partials_max: usize,
}

impl Sight {
    /// First and last position that a row sees.
    fn of(self, row: Row) -> (u32, u32) {
        let first = row.position.checked_div(self.chunk).map_or(0, |chunk| chunk * self.chunk);
        (first, row.position)
    }

    /// First and last split that a row sees.
    fn splits(self, row: Row) -> (u32, u32) {
        let (first, last) = self.of(row);
        (first / SPLIT, last / SPLIT)
    }

    /// First and last position that any of these rows sees.
    fn of_all(self, rows: &[Row]) -> (u32, u32) {
        let each = || rows.iter().map(|&row| self.of(row));
        let first = each().map(|(first, _)| first).min().unwrap_or(0);
        (first, each().map(|(_, last)| last).max().unwrap_or(0))
    }
}

/// How the rows of a step are dealt to blocks.
#[derive(Default, PartialEq, Eq, Debug)]
pub(super) struct Plan {
    /// First row, rows, first and last block of the cache: one split of some rows. Behind them so many without rows that
    /// their number is a power of two: then it is the same for most steps of as many sequences.
    split: Vec<[u32; 4]>,
    /// The same, all that the rows see.
    whole: Vec<[u32; 4]>,
    /// Row, first partial, number of partials.
    joined: Vec<[u32; 3]>,
    /// By row: its first partial, if it was split.
    partials_start: Vec<u32>,
    partials: u32,
}

/// A number of rows or blocks of a step.
fn small(size: usize) -> u32 {
    blocks(size)
}

impl Plan {
    /// # Panics
    ///
    /// If a kv head has more query heads than a product has rows.
    pub(super) fn new(rows: &[Row], sight: Sight) -> Self {
        assert!((1..=VECTORS).contains(&sight.group), "1 to {VECTORS} query heads per kv head");
        let mut plan = Self { partials_start: vec![0; rows.len()], ..Self::default() };
        let mut first = 0;
        for run in rows.chunk_by(|a, b| a.table == b.table) {
            let count = |&row: &Row| {
                let (first, last) = sight.splits(row);
                (last - first + 1) as usize
            };
            let partials = plan.partials as usize + run.iter().map(count).sum::<usize>();
            if run.len() < WHOLE_ROWS_MIN && partials <= sight.partials_max {
                plan.split(first, run, sight);
            } else {
                plan.whole(first, run, sight);
            }
            first += run.len();
        }
        if !plan.split.is_empty() {
            plan.split.resize(plan.split.len().next_power_of_two(), NOTHING);
        }
        plan
    }

    fn split(&mut self, first: usize, run: &[Row], sight: Sight) {
        let block = small(BLOCK_TOKENS);
        for (row, &at) in (first..).zip(run) {
            let (first_split, last_split) = sight.splits(at);
            let count = last_split - first_split + 1;
            self.partials_start[row] = self.partials;
            self.joined.push([small(row), self.partials, count]);
            self.partials += count;
        }
        let rows = VECTORS / sight.group;
        for (index, tile) in run.chunks(rows).enumerate() {
            let (seen_first, seen_last) = sight.of_all(tile);
            for split in seen_first / SPLIT..=seen_last / SPLIT {
                let from = seen_first.max(split * SPLIT) / block;
                let to = seen_last.min(split * SPLIT + (SPLIT - 1)) / block;
                self.split.push([small(first + index * rows), small(tile.len()), from, to]);
            }
        }
    }

    fn whole(&mut self, first: usize, run: &[Row], sight: Sight) {
        let block = small(BLOCK_TOKENS);
        let rows = VECTORS / sight.group * WHOLE_WARPS;
        // The longest first, so that none of them is the last to start.
        for (index, tile) in run.chunks(rows).enumerate().rev() {
            let (from, to) = sight.of_all(tile);
            let item = [small(first + index * rows), small(tile.len()), from / block, to / block];
            self.whole.push(item);
        }
    }
}

/// A plan in device memory.
pub(super) struct AttentionWork {
    plan: Plan,
    split: Buffer,
    whole: Buffer,
    joined: Buffer,
    partials_start: Buffer,
}

impl AttentionWork {
    pub(super) fn new(driver: &Arc<Driver>, plan: Plan) -> Result<Self, CudaError> {
        let empty = || Buffer::new(driver, WHAT, 0);
        let (split, whole) = (empty()?, empty()?);
        let (joined, partials_start) = (empty()?, empty()?);
        let mut work = Self { plan: Plan::default(), split, whole, joined, partials_start };
        work.renew(plan)?;
        Ok(work)
    }

    /// Has room for the plans of so many rows that need up to `partials` partial results. A row is in one item of its
    /// kind; a split of some rows is a split of one of them, which has a partial result for it.
    pub(super) fn reserve(&mut self, rows: usize, partials: usize) -> Result<(), CudaError> {
        self.split.reserve(WHAT, partials.next_power_of_two() * size_of::<[u32; 4]>())?;
        self.whole.reserve(WHAT, rows * size_of::<[u32; 4]>())?;
        self.joined.reserve(WHAT, rows * size_of::<[u32; 3]>())?;
        self.partials_start.reserve(WHAT, rows * size_of::<u32>())
    }

    /// Puts another plan in place of the last one. Memory grows only beyond the largest so far.
    pub(super) fn renew(&mut self, plan: Plan) -> Result<(), CudaError> {
        self.split.put(WHAT, bytemuck::cast_slice(plan.split.as_flattened()))?;
        self.whole.put(WHAT, bytemuck::cast_slice(plan.whole.as_flattened()))?;
        self.joined.put(WHAT, bytemuck::cast_slice(plan.joined.as_flattened()))?;
        self.partials_start.put(WHAT, bytemuck::cast_slice(&plan.partials_start))?;
        self.plan = plan;
        Ok(())
    }
}

/// Addresses of the positions and block tables of a step; u32 each.
pub(super) struct Tables {
    /// By row.
    pub(super) position: u64,
    /// By row.
    pub(super) table: u64,
    pub(super) blocks: u64,
    /// By table: its first entry of `blocks`.
    pub(super) blocks_start: u64,
    /// By table: the number of the block that its first entry stands for; null: 0 for all.
    pub(super) blocks_first: u64,
}

/// One layer's attention.
pub(super) struct AttentionTask<'a> {
    pub(super) shape: AttentionShape,
    /// Positions of a chunk, or 0; as the plan was made for.
    pub(super) chunk: u32,
    pub(super) tables: Tables,
    pub(super) work: &'a AttentionWork,
    /// The layer's memory.
    pub(super) cache: &'a Buffer,
    /// Scratch for partial results; see [`partial_bytes`].
    pub(super) partials: &'a Buffer,
}

/// Bytes of one partial result.
pub(super) fn partial_bytes(shape: AttentionShape) -> usize {
    shape.heads * (2 + shape.head_dim) * 4
}

/// Attention of the queries in `qkv`.
///
/// # Errors
///
/// [`CudaError`] if memory is refused or CUDA fails.
///
/// # Panics
///
/// If the shapes disagree, or the kernels have no head of this size.
pub(super) fn attention_bf16(
    driver: &Driver,
    task: &AttentionTask<'_>,
    qkv: &Tensor,
    out: &mut Tensor,
) -> Result<(), CudaError> {
    let AttentionTask { shape, chunk, tables, work, cache, partials } = task;
    let (rows, dim) = (qkv.rows(), shape.head_dim);
    assert_eq!((qkv.columns(), out.columns()), (shape.qkv(), shape.q()), "as the heads");
    assert_eq!((qkv.dtype(), out.dtype()), (Dtype::F32, Dtype::Bf16), "f32 in, bf16 out");
    assert!(dim.is_multiple_of(16) && dim <= DIM_MAX, "heads of up to {DIM_MAX} in steps of 16");
    assert_eq!(work.plan.partials_start.len(), rows, "planned for these rows");
    assert!(work.plan.partials as usize * partial_bytes(*shape) <= partials.bytes(), "room");
    out.resize(rows)?;
    let heads = [shape.heads / shape.kv_heads, shape.kv_heads, dim].map(int);
    let common = args![
        qkv.buffer(),
        *cache,
        tables.position,
        tables.table,
        tables.blocks,
        tables.blocks_start,
        tables.blocks_first,
        *chunk
    ];
    let [split, whole] = kernels(dim);
    let grid = |items: usize| [blocks(items), blocks(shape.kv_heads), 1];
    if !work.plan.whole.is_empty() {
        let grid = grid(work.plan.whole.len());
        let launch = Launch { kernel: whole, grid, block: 32 * blocks(WHOLE_WARPS), shared: 0 };
        let args = args![&work.whole, heads[0], heads[1], heads[2], out.buffer()];
        // SAFETY: the kernel's thirteen parameters. The plan names rows of this step only, and blocks that their tables
        // have, which `upload` has checked against the cache.
        unsafe { driver.launch(launch, &[&common[..], &args].concat())? };
    }
    if work.plan.split.is_empty() {
        return Ok(());
    }
    let launch = Launch { kernel: split, grid: grid(work.plan.split.len()), block: 32, shared: 0 };
    let args = args![&work.split, heads[0], heads[1], heads[2], &work.partials_start, *partials];
    // SAFETY: the kernel's fourteen parameters, as above; there is room for the plan's partials.
    unsafe { driver.launch(launch, &[&common[..], &args].concat())? };
    let launch = Launch {
        kernel: "herd_attention_combine",
        grid: [blocks(work.plan.joined.len()), blocks(shape.heads), 1],
        block: blocks(dim.next_multiple_of(32)),
        shared: 0,
    };
    let args = args![*partials, &work.joined, heads[2], out.buffer()];
    // SAFETY: the kernel's four parameters; the partials of these rows were written by the kernel before.
    unsafe { driver.launch(launch, &args) }
}

/// For heads of `dim`, padded: rows that are split, and rows that are not.
fn kernels(dim: usize) -> [&'static str; 2] {
    match dim {
        ..=32 => ["herd_attention_split_32", "herd_attention_whole_32"],
        33..=64 => ["herd_attention_split_64", "herd_attention_whole_64"],
        _ => ["herd_attention_split_128", "herd_attention_whole_128"],
    }
}
