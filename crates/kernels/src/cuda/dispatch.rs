//! Which rows of which rank the local experts work on, found on the device.

use super::args::{Launch, args, blocks, int};
use super::buffer::Buffer;
use super::driver::{CudaError, Driver};
use std::sync::Arc;

/// As the kernel's block.
const THREADS: u32 = 1024;

/// As in the kernel.
const SOURCES_MAX: usize = 64;

/// Bytes of a [`Source`] in device memory.
const SOURCE_BYTES: usize = 32;

/// One rank's rows of a step, in memory that this device reads and writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Source {
    /// u16 per row: the expert it wants.
    pub(super) experts: u64,
    /// Rows as they travel.
    pub(super) rows: u64,
    /// Where the results belong, row by row.
    pub(super) results: u64,
    /// Number of rows.
    pub(super) count: u32,
}

impl Source {
    /// As the kernels see it.
    pub(super) fn to_bytes(self) -> [u8; SOURCE_BYTES] {
        let Self { experts, rows, results, count } = self;
        let mut bytes = [0; SOURCE_BYTES];
        for (to, word) in bytes.chunks_exact_mut(8).zip([experts, rows, results, u64::from(count)])
        {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// All ranks' rows of a step, in device memory.
pub(super) struct Sources {
    buffer: Buffer,
    len: usize,
}

impl Sources {
    /// By rank. Whatever writes the buffer later keeps their number.
    ///
    /// # Panics
    ///
    /// If there are more than 64.
    pub(super) fn new(driver: &Arc<Driver>, sources: &[Source]) -> Result<Self, CudaError> {
        assert!(sources.len() <= SOURCES_MAX, "at most {SOURCES_MAX} ranks");
        let bytes: Vec<u8> = sources.iter().flat_map(|source| source.to_bytes()).collect();
        Ok(Self { buffer: Buffer::of(driver, "sources", &bytes)?, len: sources.len() })
    }

    pub(super) fn buffer(&self) -> &Buffer {
        &self.buffer
    }
}

/// Where the rows for the experts of one layer go, in device memory.
pub(super) struct RouteTable {
    spans: Buffer,
    targets: Buffer,
    experts: u32,
    me: u32,
    slots: usize,
}

/// What a [`RouteTable`] is made of.
#[derive(Clone, Copy)]
pub(super) struct RouteTableParts<'a> {
    /// Per expert: where its targets begin, and how many there are.
    pub(super) spans: &'a [(u32, u32)],
    /// Rank and slot.
    pub(super) targets: &'a [(u16, u16)],
    pub(super) me: u16,
    /// Experts that rank `me` holds.
    pub(super) slots: usize,
}

impl RouteTable {
    /// # Panics
    ///
    /// If an expert has no target, or one that does not exist: `Routes` of the exchange has checked that.
    pub(super) fn new(driver: &Arc<Driver>, parts: RouteTableParts<'_>) -> Result<Self, CudaError> {
        let RouteTableParts { spans, targets, me, slots } = parts;
        let is_there = |&(first, count): &(u32, u32)| {
            count > 0 && first as usize + count as usize <= targets.len()
        };
        assert!(spans.iter().all(is_there), "every expert has targets");
        let is_held = |&(rank, slot): &(u16, u16)| rank != me || usize::from(slot) < slots;
        assert!(targets.iter().all(is_held), "every target holds its expert");
        let of_span = |&(first, count): &(u32, u32)| [first.to_le_bytes(), count.to_le_bytes()];
        let of_target = |&(rank, slot): &(u16, u16)| [rank.to_le_bytes(), slot.to_le_bytes()];
        Ok(Self {
            spans: Buffer::of(
                driver,
                "routes",
                spans.iter().map(of_span).collect::<Vec<_>>().as_flattened().as_flattened(),
            )?,
            targets: Buffer::of(
                driver,
                "routes",
                targets.iter().map(of_target).collect::<Vec<_>>().as_flattened().as_flattened(),
            )?,
            experts: blocks(spans.len()),
            me: me.into(),
            slots,
        })
    }
}

/// Rows grouped by the slot of their expert.
pub(super) struct Arrivals {
    /// `[slots + 1]` u32
    offsets: Buffer,
    /// `[rows_max]`: source and row, u32 each
    order: Buffer,
    slots: usize,
    rows_max: usize,
}

impl Arrivals {
    /// For layers of up to `slots` local experts and steps of up to `rows_max` rows of all ranks together.
    pub(super) fn new(
        driver: &Arc<Driver>,
        slots: usize,
        rows_max: usize,
    ) -> Result<Self, CudaError> {
        Ok(Self {
            offsets: Buffer::new(driver, "row offsets", (slots + 1) * 4)?,
            order: Buffer::new(driver, "row order", rows_max * 8)?,
            slots: 0,
            rows_max,
        })
    }

    pub(super) fn offsets(&self) -> &Buffer {
        &self.offsets
    }

    pub(super) fn order(&self) -> &Buffer {
        &self.order
    }

    /// Local experts of the layer that was dispatched last.
    pub(super) fn slots(&self) -> usize {
        self.slots
    }

    pub(super) fn rows_max(&self) -> usize {
        self.rows_max
    }
}

/// Groups the rows of all sources that rank `me` serves.
///
/// # Errors
///
/// [`CudaError`] if CUDA fails.
///
/// # Panics
///
/// If the layer has more slots than there is room for.
pub(super) fn dispatch(
    driver: &Driver,
    sources: &Sources,
    routes: &RouteTable,
    arrivals: &mut Arrivals,
) -> Result<(), CudaError> {
    assert!((routes.slots + 1) * 4 <= arrivals.offsets.bytes(), "room for the slots");
    arrivals.slots = routes.slots;
    let RouteTable { spans, targets, experts, me, slots } = routes;
    let kernel = "herd_dispatch";
    let launch = Launch { kernel, grid: [blocks(*slots), 1, 1], block: THREADS, shared: 0 };
    let args = args![
        &sources.buffer,
        int(sources.len),
        spans,
        targets,
        *experts,
        *me,
        &arrivals.offsets,
        &arrivals.order,
        blocks(arrivals.rows_max)
    ];
    // SAFETY: the kernel's nine parameters. The routes were checked when they were made, experts are checked by the
    // kernel, which goes no further than `rows_max`; the sources' addresses name memory of as many rows as they count.
    unsafe { driver.launch(launch, &args) }
}
