//! The routed experts in the reference profile: f32 rows, row-major weights, the CPU's order of additions.

use super::args::{Launch, args, blocks, int};
use super::buffer::Buffer;
use super::dispatch::{Arrivals, Sources};
use super::driver::{CudaError, Driver};
use super::tables::WORDS;
use super::tensor::Tensor;
use crate::level::Dtype;
use std::sync::Arc;

/// Outputs of a block, one per thread.
const OUTPUTS: usize = 64;

/// Weights of one expert, row-major: `[2 * width, hidden]`, gates first, and `[hidden, width]`; scales are f32.
pub(super) struct PlainExpert {
    pub(super) gate_up: Buffer,
    pub(super) gate_up_scales: Option<Buffer>,
    pub(super) down: Buffer,
    pub(super) down_scales: Option<Buffer>,
}

/// Sizes of the experts of a layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct PlainShape {
    /// Of the weights.
    pub(super) dtype: Dtype,
    pub(super) hidden: usize,
    pub(super) width: usize,
}

/// The local experts of a layer, by slot.
pub(super) struct PlainTable {
    shape: PlainShape,
    words: Vec<u64>,
    /// Keeps the weights.
    experts: Vec<Arc<PlainExpert>>,
}

impl PlainTable {
    /// # Panics
    ///
    /// If an expert has another shape.
    pub(super) fn new(shape: PlainShape, experts: Vec<Arc<PlainExpert>>) -> Self {
        let PlainShape { dtype, hidden, width } = shape;
        let weights = hidden * width * dtype.bytes();
        let as_long = |scales: &Option<Buffer>, outputs: usize| {
            scales.as_ref().is_none_or(|scales| scales.bytes() == outputs * 4)
        };
        for expert in &experts {
            let sizes = (expert.gate_up.bytes(), expert.down.bytes());
            assert_eq!(sizes, (2 * weights, weights), "experts of one shape");
            assert!(as_long(&expert.gate_up_scales, 2 * width), "a scale per output");
            assert!(as_long(&expert.down_scales, hidden), "a scale per output");
        }
        let addresses = |expert: &Arc<PlainExpert>| -> [u64; WORDS] {
            let PlainExpert { gate_up, gate_up_scales, down, down_scales } = &**expert;
            args![gate_up, gate_up_scales.as_ref(), down, down_scales.as_ref()]
        };
        let words = experts.iter().flat_map(addresses).collect();
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
pub(super) fn experts_f32(
    driver: &Driver,
    (sources, arrivals): (&Sources, &Arrivals),
    (table, at): (&PlainTable, u64),
    act: &mut Tensor,
) -> Result<(), CudaError> {
    let PlainShape { dtype, hidden, width } = table.shape;
    assert_eq!(arrivals.slots(), table.experts.len(), "dispatched for this table");
    assert_eq!((act.dtype(), act.columns()), (Dtype::F32, width), "as the weights");
    act.resize(arrivals.rows_max())?;
    let [gate_up, down] = match dtype {
        Dtype::F32 => ["herd_experts_f32_gate_up_f32", "herd_experts_f32_down_f32"],
        Dtype::Bf16 => ["herd_experts_f32_gate_up_bf16", "herd_experts_f32_down_bf16"],
    };
    for (kernel, outputs) in [(gate_up, width), (down, hidden)] {
        let grid = [blocks(outputs.div_ceil(OUTPUTS)), blocks(arrivals.slots()), 1];
        let launch = Launch { kernel, grid, block: blocks(OUTPUTS), shared: 0 };
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
        // rows and results have `hidden` f32; the words at `at` are the table's, whose weights were checked, and `act` has room for all rows.
        unsafe { driver.launch(launch, &args)? };
    }
    Ok(())
}
