//! What the engine asks of a device.
//!
//! The operations are shaped so that a GPU can run a whole step without the host waiting: the host
//! uploads the step once ([`Device::upload`]), enqueues operations whose operands are device buffers,
//! and reads back once ([`Device::finish`]). Routing, the number of rows that arrive from other ranks,
//! and block tables live in device memory; no operation returns a value that the host would need to
//! enqueue the next one. The CPU runs each operation at once, which is the same contract.

use crate::attention::AttentionShape;
use crate::rope::RopeSpec;
use crate::sample::{Sampled, Sampling};

/// Which blocks of the KV cache a layer uses.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Pool {
    /// The layer attends to every earlier position.
    Full,
    /// The layer attends within its chunk of so many positions.
    Chunked(u32),
}

/// One token of a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Row {
    pub token: u32,
    /// Absolute position in its sequence.
    pub position: u32,
    /// Index of its sequence in [`StepBatch::tables`].
    pub table: u32,
}

/// Block tables of one sequence.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Table {
    /// Entry `i` covers block number `i`.
    pub full: Vec<u32>,
    /// Entry `i` covers block number `chunked_first + i`.
    pub chunked: Vec<u32>,
    pub chunked_first: u32,
}

/// A row whose logits are wanted.
#[derive(Clone, PartialEq, Debug)]
pub struct SampleRow {
    /// Index into [`StepBatch::rows`].
    pub row: u32,
    pub sampling: Sampling,
}

/// One rank's share of a step, on the host.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct StepBatch {
    pub rows: Vec<Row>,
    pub tables: Vec<Table>,
    pub samples: Vec<SampleRow>,
}

/// Angles of the rotary embedding for a model.
#[derive(Clone, PartialEq, Debug)]
pub struct RopeTable {
    pub spec: RopeSpec,
    /// Radians per position, `[head_dim / 2]`.
    pub inv_freq: Vec<f64>,
}

/// What attention does to the queries and keys of a layer.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AttentionLayer {
    /// Index into the cache's layers.
    pub layer: usize,
    pub shape: AttentionShape,
    pub position: Positional,
}

/// How a layer knows positions.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Positional {
    /// Rotary, with the QK norm's eps if the model has one.
    Rope { qk_norm_eps: Option<f32> },
    /// None; queries are scaled by `1 + attn_scale * ln(1 + floor((p + 1) / floor_scale))` if set.
    None { temperature: Option<Temperature> },
}

/// Temperature tuning of layers without rotary embedding.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Temperature {
    pub floor_scale: f64,
    pub attn_scale: f64,
}

/// The largest step that a device shall have memory for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StepRoom {
    pub rows: usize,
    /// Rows whose logits are wanted.
    pub samples: usize,
}

/// What steps need memory for, besides the buffers that their owner has.
pub struct StepShape<'a> {
    pub room: StepRoom,
    pub limits: StepLimits,
    pub heads: AttentionShape,
    /// The pool of every layer.
    pub layers: &'a [Pool],
}

/// A buffer, and how many rows it shall have room for.
pub enum Room<'a, D: Device + ?Sized> {
    Tensor(&'a mut D::Tensor, usize),
    Route(&'a mut D::Route, usize),
    /// Rows, and columns of a row.
    Wire(&'a mut D::Wire, (usize, usize)),
}

/// Why a device cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The memory was refused.
    #[error("no memory for the {what}: {bytes} bytes")]
    Memory {
        what: &'static str,
        bytes: usize,
        #[source]
        source: std::io::Error,
    },
    /// A weight matrix could not be made.
    #[error(transparent)]
    Matrix(#[from] crate::matrix::MatrixError),
    /// The device's threads could not be started.
    #[error("cannot start {threads} threads: {reason}")]
    Threads { threads: usize, reason: String },
    /// A GPU cannot go on.
    #[error(transparent)]
    Cuda(#[from] crate::cuda::CudaError),
    /// A step names a token, block or row that does not exist.
    #[error("step: {what} is {value}, the limit is {limit}")]
    Step { what: &'static str, value: u64, limit: u64 },
    /// A step is larger than what memory was taken for.
    #[error(
        "a step has {value} {what}, this worker has memory for {limit}: give it the --step-tokens and --sequences of the \
         router"
    )]
    LargeStep { what: &'static str, value: usize, limit: usize },
}

/// The operations of a forward pass.
///
/// Shapes: `rows` is the number of rows of the step, `hidden` the width of the residual stream. A
/// result is overwritten whole. Every operation may be asynchronous; a failure on the device surfaces in
/// [`Device::finish`].
pub trait Device {
    /// Activations, `[rows, columns]`.
    type Tensor;
    /// A packed weight matrix `[outputs, inputs]`.
    type Matrix;
    /// Norm weights, `[hidden]`.
    type Norm;
    /// Token embeddings, `[vocab, hidden]`.
    type Embedding;
    /// The paged KV cache of all layers.
    type Cache;
    /// A step's rows, positions and block tables in device memory.
    type Batch;
    /// Chosen expert and score per row.
    type Route;
    /// Rows as they travel between ranks, and the result of an exchange.
    type Wire;
    /// The experts of one MoE layer that this rank holds.
    type Experts;
    /// Rows that arrived from other ranks.
    type Arrived: ?Sized;
    /// Row offsets per local expert, `[local experts + 1]`, as the exchange found them.
    type Offsets: ?Sized;

    /// A buffer for up to `rows` rows.
    fn tensor(&self, rows: usize, columns: usize) -> Self::Tensor;

    /// A buffer for rows that travel.
    fn wire(&self) -> Self::Wire;

    /// A buffer for the choice of experts.
    fn route(&self) -> Self::Route;

    /// Takes the memory that steps of this shape need, so that none of them takes any; refuses larger ones from then
    /// on. A device without memory of its own need not.
    ///
    /// # Errors
    ///
    /// If the memory is refused.
    fn reserve(&mut self, _shape: &StepShape<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    /// The same for a buffer.
    ///
    /// # Errors
    ///
    /// As for [`Device::reserve`].
    fn make_room(&self, _room: Room<'_, Self>) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Starts a step: checks it against the cache and the vocabulary, and uploads it.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Step`] for the first index that points outside, [`DeviceError::LargeStep`] for more rows than were
    /// reserved; nothing has happened then.
    fn upload(
        &mut self,
        step: &StepBatch,
        rope: &RopeTable,
        limits: StepLimits,
    ) -> Result<Self::Batch, DeviceError>;

    /// `x = table[token of each row]`.
    fn embed(&mut self, batch: &Self::Batch, table: &Self::Embedding, x: &mut Self::Tensor);

    /// `out = x / rms(x) * weight`, rounded as the operand of a product.
    fn rms_norm(&mut self, x: &Self::Tensor, weight: &Self::Norm, eps: f32, out: &mut Self::Tensor);

    /// `x += y`, then `out = x / rms(x) * weight`, rounded as the operand of a product.
    fn add_rms_norm(
        &mut self,
        (x, y): (&mut Self::Tensor, &Self::Tensor),
        weight: &Self::Norm,
        eps: f32,
        out: &mut Self::Tensor,
    ) {
        self.add(x, y);
        self.rms_norm(x, weight, eps, out);
    }

    /// `out = x * w^T`.
    fn linear(&mut self, x: &Self::Tensor, w: &Self::Matrix, out: &mut Self::Tensor);

    /// Positions into `qkv` (`[rows, q | k | v]`), keys and values into the cache, attention into `out`.
    fn attention(
        &mut self,
        batch: &Self::Batch,
        layer: &AttentionLayer,
        qkv: &mut Self::Tensor,
        cache: &mut Self::Cache,
        out: &mut Self::Tensor,
    );

    /// `out = silu(gate) * up` for rows `[gate | up]`, rounded as the operand of a product.
    fn swiglu(&mut self, gate_up: &Self::Tensor, out: &mut Self::Tensor);

    /// `x += y`.
    fn add(&mut self, x: &mut Self::Tensor, y: &Self::Tensor);

    /// Chooses an expert per row: `logits` are `h * router^T`.
    fn gate(&mut self, logits: &Self::Tensor, route: &mut Self::Route);

    /// `wire = h * score`: the experts' input, in the form that travels.
    fn pack(&mut self, h: &Self::Tensor, route: &Self::Route, wire: &mut Self::Wire);

    /// Runs the local experts over the rows that arrived, grouped by expert.
    fn experts(
        &mut self,
        arrived: &Self::Arrived,
        offsets: &Self::Offsets,
        experts: &Self::Experts,
        results: &mut Self::Wire,
    );

    /// `x += wire`, row by row.
    fn add_wire(&mut self, wire: &Self::Wire, x: &mut Self::Tensor);

    /// `out` = the rows of `x` whose logits are wanted, in order.
    fn select(&mut self, batch: &Self::Batch, x: &Self::Tensor, out: &mut Self::Tensor);

    /// Chooses a token per row of `logits` (`[samples, vocab]`) and waits for it: the one
    /// synchronisation of a step.
    ///
    /// # Errors
    ///
    /// What went wrong on the device during the step.
    fn finish(
        &mut self,
        batch: &Self::Batch,
        step: &StepBatch,
        logits: &Self::Tensor,
    ) -> Result<Vec<Sampled>, DeviceError>;
}

/// What a step is checked against.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StepLimits {
    pub vocab: u32,
    pub full_blocks: u32,
    pub chunked_blocks: u32,
    pub chunk_tokens: Option<u32>,
}
