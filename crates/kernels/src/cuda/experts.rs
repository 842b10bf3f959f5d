//! The routed experts of one layer, over rows that wait in the memory of their sources.

use super::args::{Launch, args, blocks, int};
use super::dispatch::{Arrivals, Sources};
use super::driver::{CudaError, Driver};
use super::tables::WORDS;
use super::tensor::Tensor;
use super::tiles::{THREADS, TILE_OUTPUTS, TileShape, TileStorage, TiledMatrix, wide_shared};
use crate::level::Dtype;
use std::sync::Arc;

/// Sizes of the experts of a layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct ExpertShape {
    pub(super) storage: TileStorage,
    pub(super) hidden: usize,
    pub(super) width: usize,
}

impl ExpertShape {
    /// Gates and ups, 16 of each in turn.
    pub(super) fn gate_up(self) -> TileShape {
        let Self { storage, hidden, width } = self;
        TileShape { storage, outputs: 2 * width.next_multiple_of(TILE_OUTPUTS), inputs: hidden }
    }

    pub(super) fn down(self) -> TileShape {
        let Self { storage, hidden, width } = self;
        TileShape { storage, outputs: hidden, inputs: width }
    }

    /// An expert as the kernels see it.
    fn addresses(self, expert: &TiledExpert) -> [u64; WORDS] {
        let shapes = (expert.gate_up.shape(), expert.down.shape());
        assert_eq!(shapes, (self.gate_up(), self.down()), "experts of one shape");
        let ([gate_up, gate_up_scales], [down, down_scales]) =
            (expert.gate_up.addresses(), expert.down.addresses());
        [gate_up, gate_up_scales, down, down_scales]
    }
}

/// Weights of one expert, of the shapes of an [`ExpertShape`].
pub(super) struct TiledExpert {
    pub(super) gate_up: TiledMatrix,
    pub(super) down: TiledMatrix,
}

/// The local experts of a layer, by slot.
pub(super) struct ExpertTable {
    shape: ExpertShape,
    words: Vec<u64>,
    /// Keeps the weights.
    experts: Vec<Arc<TiledExpert>>,
}

impl ExpertTable {
    /// # Panics
    ///
    /// If an expert has another shape, or rows are not whole 16 bytes.
    pub(super) fn new(shape: ExpertShape, experts: Vec<Arc<TiledExpert>>) -> Self {
        assert!((shape.hidden | shape.width).is_multiple_of(8), "rows of whole 16 bytes");
        let words = experts.iter().flat_map(|expert| shape.addresses(expert)).collect();
        Self { shape, words, experts }
    }

    /// Where their weights lie, as the kernels' table has it.
    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }

    /// Columns of a row and of an expert, and the number of experts.
    pub(super) fn sizes(&self) -> (usize, usize, usize) {
        (self.shape.hidden, self.shape.width, self.experts.len())
    }
}

/// How many rows a slot is expected to have. It changes the time, not the bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum SlotLoad {
    /// Mostly up to 16.
    Few,
    Many,
}

impl SlotLoad {
    /// Tiles of outputs of a block, as in the kernels.
    fn tiles(self) -> usize {
        match self {
            Self::Few => 4,
            Self::Many => 8,
        }
    }

    /// Bytes of shared memory of a block: a ring per warp, or one for all.
    fn shared(self, storage: TileStorage) -> u32 {
        match self {
            Self::Few => 8 * (14 << 10),
            Self::Many => wide_shared(storage),
        }
    }
}

/// One of the two kernels.
#[derive(Clone, Copy)]
enum Half {
    GateUp,
    Down,
}

fn kernel(half: Half, storage: TileStorage, load: SlotLoad) -> &'static str {
    match (half, storage, load) {
        (Half::GateUp, TileStorage::Bf16, SlotLoad::Few) => "herd_experts_gate_up_bf16_few",
        (Half::GateUp, TileStorage::Bf16, SlotLoad::Many) => "herd_experts_gate_up_bf16_many",
        (Half::GateUp, TileStorage::Fp8, SlotLoad::Few) => "herd_experts_gate_up_fp8_few",
        (Half::GateUp, TileStorage::Fp8, SlotLoad::Many) => "herd_experts_gate_up_fp8_many",
        (Half::Down, TileStorage::Bf16, SlotLoad::Few) => "herd_experts_down_bf16_few",
        (Half::Down, TileStorage::Bf16, SlotLoad::Many) => "herd_experts_down_bf16_many",
        (Half::Down, TileStorage::Fp8, SlotLoad::Few) => "herd_experts_down_fp8_few",
        (Half::Down, TileStorage::Fp8, SlotLoad::Many) => "herd_experts_down_fp8_many",
    }
}

/// Runs the experts over the rows in `arrivals` and leaves the results with their sources. `act` is scratch.
///
/// * `at`: where the table's words lie in device memory
///
/// # Errors
///
/// [`CudaError`] if memory is refused or CUDA fails.
///
/// # Panics
///
/// If the arrivals are those of another table.
pub(super) fn experts(
    driver: &Driver,
    (sources, arrivals): (&Sources, &Arrivals),
    (table, at): (&ExpertTable, u64),
    load: SlotLoad,
    act: &mut Tensor,
) -> Result<(), CudaError> {
    let ExpertShape { storage, hidden, width } = table.shape;
    assert_eq!(arrivals.slots(), table.experts.len(), "dispatched for this table");
    assert_eq!((act.dtype(), act.columns()), (Dtype::Bf16, width), "as the weights");
    act.resize(arrivals.rows_max())?;
    for (half, shape) in [(Half::GateUp, table.shape.gate_up()), (Half::Down, table.shape.down())] {
        let launch = Launch {
            kernel: kernel(half, storage, load),
            grid: [blocks(shape.down().div_ceil(load.tiles())), blocks(arrivals.slots()), 1],
            block: THREADS,
            shared: load.shared(storage),
        };
        let args = args![
            sources.buffer(),
            arrivals.offsets(),
            arrivals.order(),
            at,
            act.buffer(),
            int(hidden),
            int(width)
        ];
        // SAFETY: the kernels' seven parameters. Offsets and order were written by `dispatch` for these sources, whose
        // rows and results have `hidden` bf16; the words at `at` are the table's, whose weights have the shapes of `ExpertShape`, and `act` has room
        // for all rows.
        unsafe { driver.launch(launch, &args)? };
    }
    Ok(())
}
