//! Which rows of which rank the local experts work on, found on the device.

use super::args::{Launch, args, blocks, int};
use super::buffer::Buffer;
use super::driver::{CudaError, Driver};
use std::sync::Arc;

/// Threads of a block: a row each, as long as there are no more rows.
const THREADS_MAX: usize = 1024;

/// As in the kernel.
pub(super) const SOURCES_MAX: u16 = 64;

/// Bytes of a [`Source`] in device memory.
const SOURCE_BYTES: usize = 56;

/// One rank's rows of a step, in memory that this device reads and writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Source {
    /// u16 per row: the expert it wants.
    pub(super) wanted: u64,
    /// Rows as they travel.
    pub(super) rows: u64,
    /// Where the results belong, row by row.
    pub(super) results: u64,
    /// Number of rows.
    pub(super) count: u32,
    /// Who serves them.
    pub(super) routes: RouteAddresses,
}

/// All ranks' rows of a step, in device memory.
pub(super) struct Sources {
    driver: Arc<Driver>,
    buffer: Buffer,
    /// What it holds.
    held: Vec<Source>,
}

impl Sources {
    /// Of no ranks.
    pub(super) fn new(driver: &Arc<Driver>) -> Result<Self, CudaError> {
        let (bytes, held) = (usize::from(SOURCES_MAX) * SOURCE_BYTES, Vec::new());
        let buffer = Buffer::new(driver, "sources", bytes)?;
        Ok(Self { driver: Arc::clone(driver), buffer, held })
    }

    /// By rank; of a rank that has no rows, [`Source::default`]. Most layers of a step have those of the one before,
    /// which are there already.
    ///
    /// # Panics
    ///
    /// If there are more than 64.
    pub(super) fn set(&mut self, sources: impl Iterator<Item = Source>) -> Result<(), CudaError> {
        let mut len = 0;
        for source in sources {
            if self.held.get(len) != Some(&source) {
                self.put(len, source)?;
                self.held.resize(self.held.len().max(len + 1), Source::default());
                self.held[len] = source;
            }
            len += 1;
        }
        self.held.truncate(len);
        Ok(())
    }

    fn put(&self, index: usize, source: Source) -> Result<(), CudaError> {
        assert!(index < usize::from(SOURCES_MAX), "at most {SOURCES_MAX} ranks");
        let Source { wanted, rows, results, count, routes } = source;
        let RouteAddresses { spans, targets, experts, start } = routes;
        let to = self.buffer.address() + (index * SOURCE_BYTES) as u64;
        let kernel = "herd_put_source";
        let launch = Launch { kernel, grid: [1, 1, 1], block: 1, shared: 0 };
        let args = args![to, wanted, rows, results, spans, targets, count, experts, start];
        // SAFETY: the kernel's nine parameters; the buffer has room for a source at this index.
        unsafe { self.driver.launch(launch, &args) }
    }

    pub(super) fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Rows of all ranks.
    pub(super) fn rows(&self) -> usize {
        self.held.iter().map(|source| source.count as usize).sum()
    }

    /// Experts of a layer, wherever they are.
    pub(super) fn experts(&self) -> usize {
        self.held.iter().map(|source| source.routes.experts as usize).max().unwrap_or(0)
    }
}

/// Where the rows of one rank go, in device memory.
pub struct RouteTable {
    spans: Buffer,
    targets: Buffer,
    layers: usize,
    experts: u32,
    start: u32,
}

/// A [`RouteTable`] as the kernels see it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct RouteAddresses {
    spans: u64,
    targets: u64,
    experts: u32,
    start: u32,
}

/// What a [`RouteTable`] is made of.
#[derive(Clone, Copy)]
pub struct RouteTableParts<'a> {
    /// `[layers][experts]`: where an expert's targets begin, and how many there are.
    pub spans: &'a [Vec<(u32, u32)>],
    /// Rank and slot, and before which point a row must be: row `i` has the point `start + i * 0x9e3779b9` modulo 2^32, and
    /// an expert's last target serves whatever is left.
    pub targets: &'a [(u16, u16, u32)],
    pub start: u32,
}

impl RouteTable {
    /// # Errors
    ///
    /// [`CudaError`] if memory is refused or CUDA fails.
    ///
    /// # Panics
    ///
    /// If an expert has no target, or one that does not exist: `Routes` of the exchange has checked that.
    pub fn new(driver: &Arc<Driver>, parts: RouteTableParts<'_>) -> Result<Self, CudaError> {
        let RouteTableParts { spans, targets, start } = parts;
        let experts = spans.first().map_or(0, Vec::len);
        assert!(spans.iter().all(|layer| layer.len() == experts), "layers of as many experts");
        let is_there = |&(first, count): &(u32, u32)| {
            count > 0 && first as usize + count as usize <= targets.len()
        };
        assert!(spans.iter().flatten().all(is_there), "every expert has targets");
        let of_span = |&(first, count): &(u32, u32)| [first.to_le_bytes(), count.to_le_bytes()];
        let of_target = |&(rank, slot, until): &(u16, u16, u32)| {
            [(u32::from(slot) << 16 | u32::from(rank)).to_le_bytes(), until.to_le_bytes()]
        };
        let layers = spans.len();
        let spans: Vec<_> = spans.iter().flatten().map(of_span).collect();
        let targets: Vec<_> = targets.iter().map(of_target).collect();
        Ok(Self {
            spans: Buffer::of(driver, "routes", spans.as_flattened().as_flattened())?,
            targets: Buffer::of(driver, "routes", targets.as_flattened().as_flattened())?,
            layers,
            experts: blocks(experts),
            start,
        })
    }

    pub(super) fn addresses(&self) -> RouteAddresses {
        let (spans, targets) = (self.spans.address(), self.targets.address());
        RouteAddresses { spans, targets, experts: self.experts, start: self.start }
    }

    pub(super) fn layers(&self) -> usize {
        self.layers
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
    /// Without room.
    pub(super) fn new(driver: &Arc<Driver>) -> Result<Self, CudaError> {
        Ok(Self {
            offsets: Buffer::new(driver, "row offsets", 0)?,
            order: Buffer::new(driver, "row order", 0)?,
            slots: 0,
            rows_max: 0,
        })
    }

    /// Has room for so many local experts, and for `rows` rows of all ranks together.
    pub(super) fn reserve(&mut self, slots: usize, rows: usize) -> Result<(), CudaError> {
        self.offsets.reserve("row offsets", (slots + 1) * 4)?;
        self.order.reserve("row order", rows * 8)?;
        self.rows_max = self.rows_max.max(rows);
        Ok(())
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

/// A rank and its experts of a layer, in search of their rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Serving {
    pub(super) layer: usize,
    pub(super) me: u16,
    /// Experts that it holds.
    pub(super) slots: usize,
    /// Where to note how many rows each of them has, `[slots]` u32; or null.
    pub(super) served: u64,
    /// Where to note the first row that no rank serves, u32, or that this one has no such expert for; or null.
    pub(super) unserved: u64,
}

/// Groups the rows of all sources that a rank serves.
///
/// # Errors
///
/// [`CudaError`] if memory is refused or CUDA fails.
pub(super) fn dispatch(
    driver: &Driver,
    sources: &Sources,
    serving: Serving,
    arrivals: &mut Arrivals,
) -> Result<(), CudaError> {
    let Serving { layer, me, slots, served, unserved } = serving;
    assert!((slots + 1) * 4 <= arrivals.offsets.bytes(), "room for the slots");
    arrivals.slots = slots;
    let kernel = "herd_dispatch";
    let block = blocks(sources.rows().clamp(1, THREADS_MAX).next_multiple_of(32));
    let launch = Launch { kernel, grid: [blocks(slots), 1, 1], block, shared: 0 };
    let args = args![
        &sources.buffer,
        int(sources.held.len()),
        blocks(layer),
        u32::from(me),
        &arrivals.offsets,
        &arrivals.order,
        blocks(arrivals.rows_max),
        served,
        unserved
    ];
    // SAFETY: the kernel's nine parameters. The sources' routes were checked when they were made and have such a layer,
    // experts are checked by the kernel, which goes no further than `rows_max`; the sources' addresses name memory of as
    // many rows as they count; whoever gives a place for the counts has room for all slots, and a flag for the other.
    unsafe { driver.launch(launch, &args) }
}
