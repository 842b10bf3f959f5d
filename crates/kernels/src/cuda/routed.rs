//! The routed experts of a rank: rows that wait in device memory, whoever put them there.

use super::args::blocks;
use super::buffer::Buffer;
use super::dispatch::{Arrivals, RouteTable, RouteTableParts, Serving, Source, Sources, dispatch};
use super::driver::{CudaError, Driver};
use super::experts::{ExpertTable, SlotLoad, experts};
use super::experts_f32::{PlainTable, experts_f32};
use super::tables::Tables;
use super::tensor::Tensor;
use super::weights::{Expert, ExpertOnDevice};
use crate::level::Dtype;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

/// Rows per expert up to which the kernels for few rows are faster.
const FEW_ROWS: usize = 16;

/// The experts of one MoE layer that a rank holds, by slot.
pub struct ExpertsOnDevice {
    /// Counts MoE layers.
    layer: usize,
    /// `None` without experts.
    table: Option<Table>,
    /// Keeps the weights.
    experts: Vec<Arc<ExpertOnDevice>>,
}

enum Table {
    Plain(PlainTable),
    Tiled(ExpertTable),
}

impl ExpertsOnDevice {
    /// * `layer`: counts MoE layers
    ///
    /// # Panics
    ///
    /// If the experts are of several shapes or profiles.
    #[must_use]
    pub fn new(layer: usize, experts: Vec<Arc<ExpertOnDevice>>) -> Self {
        const ONE: &str = "experts of a rank are of one profile";
        let table = match experts.first().map(|first| &first.expert) {
            None => None,
            Some(Expert::Plain(_, shape)) => {
                let plain = |expert: &Arc<ExpertOnDevice>| match &expert.expert {
                    Expert::Plain(plain, _) => Arc::clone(plain),
                    Expert::Tiled(..) => unreachable!("{ONE}"),
                };
                let experts = experts.iter().map(plain).collect();
                Some(Table::Plain(PlainTable::new(*shape, experts)))
            }
            Some(Expert::Tiled(_, shape)) => {
                let tiled = |expert: &Arc<ExpertOnDevice>| match &expert.expert {
                    Expert::Tiled(tiled, _) => Arc::clone(tiled),
                    Expert::Plain(..) => unreachable!("{ONE}"),
                };
                let experts = experts.iter().map(tiled).collect();
                Some(Table::Tiled(ExpertTable::new(*shape, experts)))
            }
        };
        Self { layer, table, experts }
    }

    /// How many there are.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.experts.len()
    }

    /// Columns of a row and of an expert; `None` without experts.
    #[must_use]
    pub fn sizes(&self) -> Option<(usize, usize)> {
        self.table.as_ref().map(|table| match table {
            Table::Plain(table) => (table.sizes().0, table.sizes().1),
            Table::Tiled(table) => (table.sizes().0, table.sizes().1),
        })
    }

    /// Of rows; `None` without experts.
    pub(super) fn dtype(&self) -> Option<Dtype> {
        self.table.as_ref().map(|table| match table {
            Table::Plain(_) => Dtype::F32,
            Table::Tiled(_) => Dtype::Bf16,
        })
    }

    /// Columns of a row; 0 without experts.
    pub(super) fn hidden(&self) -> usize {
        self.sizes().map_or(0, |(hidden, _)| hidden)
    }

    /// Runs the experts over the rows that were dispatched.
    pub(super) fn run(
        &self,
        driver: &Driver,
        (sources, arrivals): (&Sources, &Arrivals),
        tables: &mut Tables,
        act: &mut Tensor,
    ) -> Result<(), CudaError> {
        match &self.table {
            None => Ok(()),
            Some(Table::Plain(table)) => {
                act.become_of(Dtype::F32, table.sizes().1);
                let at = tables.hold(self.layer, table.words())?;
                experts_f32(driver, (sources, arrivals), (table, at), act)
            }
            Some(Table::Tiled(table)) => {
                act.become_of(Dtype::Bf16, table.sizes().1);
                // Rows of all ranks spread over all experts, and these over the ranks.
                let few = sources.rows() <= FEW_ROWS * sources.experts();
                let load = if few { SlotLoad::Few } else { SlotLoad::Many };
                let at = tables.hold(self.layer, table.words())?;
                experts(driver, (sources, arrivals), (table, at), load, act)
            }
        }
    }
}

/// What comes to the experts of a rank.
#[derive(Clone, Copy)]
pub(super) struct Expected<'a> {
    /// Number of experts, by MoE layer.
    pub(super) slots: &'a [usize],
    pub(super) hidden: usize,
    /// Of an expert.
    pub(super) width: usize,
    pub(super) dtype: Dtype,
    /// Rows of other processes may come, too.
    pub(super) through_host: bool,
}

/// Where experts serve, and what is noted of it.
#[derive(Clone, Copy, Default)]
pub(super) struct Here {
    /// Counts MoE layers.
    pub(super) layer: usize,
    pub(super) me: u16,
    /// Where to note how many rows each expert has; or null.
    pub(super) served: u64,
    /// Where to note a row that nobody serves; or null.
    pub(super) unserved: u64,
}

/// The experts of a rank over rows in device memory, whoever has put them there.
pub(super) struct RoutedRows {
    driver: Arc<Driver>,
    sources: Sources,
    arrivals: Arrivals,
    tables: Tables,
    act: Tensor,
}

impl RoutedRows {
    /// For so many MoE layers of so many experts.
    pub(super) fn new(driver: &Arc<Driver>, moe: (usize, usize)) -> Result<Self, CudaError> {
        Ok(Self {
            driver: Arc::clone(driver),
            sources: Sources::new(driver)?,
            arrivals: Arrivals::new(driver)?,
            tables: Tables::new(driver, moe)?,
            act: Tensor::new(driver, Dtype::F32, (0, 0))?,
        })
    }

    /// Has room for so many rows, of all sources together.
    pub(super) fn reserve(
        &mut self,
        expected: &Expected<'_>,
        rows: usize,
    ) -> Result<(), CudaError> {
        let Expected { slots, width, dtype, .. } = *expected;
        self.act.reserve_bytes(rows * width * dtype.bytes())?;
        let slots = slots.iter().copied().max().unwrap_or(0);
        self.arrivals.reserve(slots, rows)
    }

    /// Runs the experts over their rows of all sources, and leaves the results with these.
    pub(super) fn serve(
        &mut self,
        sources: impl Iterator<Item = Source>,
        Here { layer, me, served, unserved }: Here,
        experts: &ExpertsOnDevice,
    ) -> Result<(), CudaError> {
        let Self { driver, sources: known, arrivals, tables, act } = self;
        known.set(sources)?;
        // Where nothing was reserved it grows, and not in every step.
        let rows = known.rows();
        let rows = if rows <= arrivals.rows_max() { rows } else { rows.next_power_of_two() };
        arrivals.reserve(experts.slots(), rows)?;
        let serving = Serving { layer, me, slots: experts.slots(), served, unserved };
        dispatch(driver, known, serving, arrivals)?;
        experts.run(driver, (known, arrivals), tables, act)
    }
}

/// Rows that came through the host, grouped by the slot of their expert, on their way to the experts.
pub(super) struct StagedRows {
    driver: Arc<Driver>,
    /// Slot of every row, u16.
    slots: Buffer,
    rows: Buffer,
    /// By number of local experts, which layers may differ in: every one is served here, in the slot of its number.
    identities: BTreeMap<usize, RouteTable>,
}

impl StagedRows {
    pub(super) fn new(driver: &Arc<Driver>) -> Result<Self, CudaError> {
        Ok(Self {
            driver: Arc::clone(driver),
            slots: Buffer::new(driver, "slots of rows", 0)?,
            rows: Buffer::new(driver, "arrived rows", 0)?,
            identities: BTreeMap::new(),
        })
    }

    /// Has room for so many rows, in layers of these numbers of experts; forgets what others needed.
    pub(super) fn reserve(
        &mut self,
        expected: &Expected<'_>,
        rows: usize,
    ) -> Result<(), CudaError> {
        let Expected { slots, hidden, dtype, through_host, .. } = *expected;
        if !through_host {
            return Ok(());
        }
        self.slots.reserve("slots of rows", rows * size_of::<u16>())?;
        self.rows.reserve("arrived rows", rows * hidden * dtype.bytes())?;
        self.identities.retain(|known, _| slots.contains(known));
        for &slots in slots {
            if let Entry::Vacant(entry) = self.identities.entry(slots) {
                entry.insert(identity(&self.driver, slots)?);
            }
        }
        Ok(())
    }

    /// Runs the experts over `arrived`, grouped by slot as `offsets` say; `results` has their shape afterwards.
    pub(super) fn run(
        &mut self,
        routed: &mut RoutedRows,
        (arrived, offsets): (&[u8], &[u32]),
        experts: &ExpertsOnDevice,
        results: &mut Tensor,
    ) -> Result<(), CudaError> {
        let count = offsets.last().copied().unwrap_or_default();
        let row_bytes = experts.hidden() * results.dtype().bytes();
        assert_eq!(count as usize * row_bytes, arrived.len(), "as many rows as the offsets say");
        assert!(experts.dtype().is_none_or(|dtype| dtype == results.dtype()), "of one profile");
        let of_slot =
            |(ends, slot): (&[u32], u16)| std::iter::repeat_n(slot, (ends[1] - ends[0]) as usize);
        let slots: Vec<u16> = offsets.windows(2).zip(0..).flat_map(of_slot).collect();
        results.resize(slots.len())?;
        self.slots.put("slots of rows", bytemuck::cast_slice(&slots))?;
        self.rows.put("arrived rows", arrived)?;
        let (wanted, rows) = (self.slots.address(), self.rows.address());
        let results = results.buffer().address();
        let routes = match self.identities.entry(experts.slots()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(entry) => entry.insert(identity(&self.driver, experts.slots())?),
        };
        let source = Source { wanted, rows, results, count, routes: routes.addresses() };
        routed.serve(std::iter::once(source), Here::default(), experts)
    }
}

fn identity(driver: &Arc<Driver>, slots: usize) -> Result<RouteTable, CudaError> {
    let spans = (0..blocks(slots)).map(|slot| (slot, 1)).collect();
    let targets: Vec<_> = (0..).take(slots).map(|slot| (0, slot, u32::MAX)).collect();
    RouteTable::new(driver, RouteTableParts { spans: &[spans], targets: &targets, start: 0 })
}
