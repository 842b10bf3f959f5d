//! The routed experts of a rank: rows that wait in device memory, whoever put them there.

use super::args::blocks;
use super::buffer::Buffer;
use super::dispatch::{Arrivals, RouteTable, RouteTableParts, Source, Sources, dispatch};
use super::driver::{CudaError, Driver};
use super::experts::{ExpertTable, SlotLoad, experts};
use super::experts_f32::{PlainTable, experts_f32};
use super::gate::Route;
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
    /// # Errors
    ///
    /// [`CudaError`] if memory is refused or CUDA fails.
    ///
    /// # Panics
    ///
    /// If the experts are of several shapes or profiles.
    pub fn new(driver: &Arc<Driver>, experts: Vec<Arc<ExpertOnDevice>>) -> Result<Self, CudaError> {
        const ONE: &str = "experts of a rank are of one profile";
        let table = match experts.first().map(|first| &first.expert) {
            None => None,
            Some(Expert::Plain(_, shape)) => {
                let plain = |expert: &Arc<ExpertOnDevice>| match &expert.expert {
                    Expert::Plain(plain, _) => Arc::clone(plain),
                    Expert::Tiled(..) => unreachable!("{ONE}"),
                };
                let experts = experts.iter().map(plain).collect();
                Some(Table::Plain(PlainTable::new(driver, *shape, experts)?))
            }
            Some(Expert::Tiled(_, shape)) => {
                let tiled = |expert: &Arc<ExpertOnDevice>| match &expert.expert {
                    Expert::Tiled(tiled, _) => Arc::clone(tiled),
                    Expert::Plain(..) => unreachable!("{ONE}"),
                };
                let experts = experts.iter().map(tiled).collect();
                Some(Table::Tiled(ExpertTable::new(driver, *shape, experts)?))
            }
        };
        Ok(Self { table, experts })
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
        rows: usize,
        act: &mut Tensor,
    ) -> Result<(), CudaError> {
        match &self.table {
            None => Ok(()),
            Some(Table::Plain(table)) => {
                act.become_of(Dtype::F32, table.sizes().1);
                experts_f32(driver, (sources, arrivals), table, act)
            }
            Some(Table::Tiled(table)) => {
                let (_, width, slots) = table.sizes();
                act.become_of(Dtype::Bf16, width);
                let load = if rows <= FEW_ROWS * slots { SlotLoad::Few } else { SlotLoad::Many };
                experts(driver, (sources, arrivals), table, load, act)
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
    /// Rows of other ranks come, too.
    pub(super) through_host: bool,
}

/// The experts of a rank over rows of one source: those that came through the host, whose experts are slots, or its own
/// where it has all experts.
pub(super) struct StagedRows {
    driver: Arc<Driver>,
    sources: Sources,
    /// Slot of every row, u16.
    slots: Buffer,
    rows: Buffer,
    /// By number of experts, which layers may differ in.
    served: BTreeMap<usize, Served>,
    /// What `sources` holds.
    source: Option<Source>,
    act: Tensor,
}

impl StagedRows {
    pub(super) fn new(driver: &Arc<Driver>) -> Result<Self, CudaError> {
        let nothing = Source { experts: 0, rows: 0, results: 0, count: 0 };
        Ok(Self {
            driver: Arc::clone(driver),
            sources: Sources::new(driver, &[nothing])?,
            slots: Buffer::new(driver, "slots of rows", 0)?,
            rows: Buffer::new(driver, "arrived rows", 0)?,
            served: BTreeMap::new(),
            source: None,
            act: Tensor::new(driver, Dtype::F32, (0, 0))?,
        })
    }

    /// Has room for so many rows, in layers of these numbers of experts; forgets what others needed.
    pub(super) fn reserve(
        &mut self,
        expected: &Expected<'_>,
        rows: usize,
    ) -> Result<(), CudaError> {
        let Expected { slots, hidden, width, dtype, through_host } = *expected;
        self.act.reserve_bytes(rows * width * dtype.bytes())?;
        if through_host {
            self.slots.reserve("slots of rows", rows * size_of::<u16>())?;
            self.rows.reserve("arrived rows", rows * hidden * dtype.bytes())?;
        }
        self.served.retain(|known, _| slots.contains(known));
        for &slots in slots {
            self.served(slots, rows)?;
        }
        Ok(())
    }

    /// How rows find so many slots, with room for so many rows.
    fn served(&mut self, slots: usize, rows: usize) -> Result<&mut Served, CudaError> {
        Ok(match self.served.entry(slots) {
            Entry::Occupied(known) if rows <= known.get().arrivals.rows_max() => known.into_mut(),
            entry @ (Entry::Vacant(_) | Entry::Occupied(_)) => {
                let routes = identity(&self.driver, slots)?;
                let arrivals = Arrivals::new(&self.driver, slots, rows)?;
                entry.insert_entry(Served { routes, arrivals }).into_mut()
            }
        })
    }

    /// Runs the experts over `arrived`, grouped by slot as `offsets` say; `results` has their shape afterwards.
    pub(super) fn run(
        &mut self,
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
        let (experts_at, rows) = (self.slots.address(), self.rows.address());
        let results = results.buffer().address();
        self.serve(Source { experts: experts_at, rows, results, count }, experts)
    }

    /// Runs the experts over rows of this rank that wait in device memory. It has all experts; results take the
    /// rows' place, which nobody reads any more when they are written.
    ///
    /// # Panics
    ///
    /// If rows, choices and experts do not belong together.
    pub(super) fn run_alone(
        &mut self,
        (rows, route): (&mut Tensor, &Route),
        experts: &ExpertsOnDevice,
    ) -> Result<(), CudaError> {
        assert_eq!(
            (rows.rows(), rows.columns()),
            (route.rows(), experts.hidden()),
            "rows and choices"
        );
        assert_eq!(Some(rows.dtype()), experts.dtype(), "of one profile");
        let (wanted, count) = (route.experts().address(), blocks(rows.rows()));
        let rows = rows.buffer().address();
        self.serve(Source { experts: wanted, rows, results: rows, count }, experts)
    }

    fn serve(&mut self, source: Source, experts: &ExpertsOnDevice) -> Result<(), CudaError> {
        let (slots, rows) = (experts.slots(), source.count as usize);
        if self.source != Some(source) {
            self.sources.buffer().fill(0, &source.to_bytes())?;
            self.source = Some(source);
        }
        let known = self.served.get(&slots).map_or(0, |known| known.arrivals.rows_max());
        // Where nothing was reserved it grows, and not in every step.
        self.served(slots, if rows <= known { rows } else { rows.next_power_of_two() })?;
        let Served { routes, arrivals } = self.served.get_mut(&slots).expect("just made");
        dispatch(&self.driver, &self.sources, routes, arrivals)?;
        experts.run(&self.driver, (&self.sources, arrivals), rows, &mut self.act)
    }
}

/// How rows find the slots of a layer.
struct Served {
    routes: RouteTable,
    arrivals: Arrivals,
}

/// Every expert is served here, in the slot of its number.
fn identity(driver: &Arc<Driver>, slots: usize) -> Result<RouteTable, CudaError> {
    let spans: Vec<(u32, u32)> = (0..blocks(slots)).map(|slot| (slot, 1)).collect();
    let targets: Vec<(u16, u16)> = (0..).take(slots).map(|slot| (0, slot)).collect();
    RouteTable::new(driver, RouteTableParts { spans: &spans, targets: &targets, me: 0, slots })
}
