//! The GPU behind the operations of a forward pass.

mod exchange;

use super::attention_f32::attention_f32;
use super::attention_plans::Attention;
use super::batch::{Batch, StepRules};
use super::cache::{Cache, row_bytes};
use super::driver::{CudaError, Driver, StepKind};
use super::elementwise::{add, pack, select, swiglu};
use super::embed::embed;
use super::finite::Notes;
use super::gate::gate;
use super::kv_rows::KvRows;
use super::linear_bf16::linear_bf16;
use super::linear_f32::linear_f32;
use super::positions::positions;
use super::rms_norm::rms_norm;
use super::routed::{Expected, ExpertsOnDevice, RoutedRows, StagedRows};
use super::sample::{Choices, is_plain, sample};
use super::tensor::Tensor;
use super::travel::{RouteOnDevice, WireOnDevice};
use super::weights::{EmbeddingTable, NormWeights, Stored, Weights};
use crate::cache::RowsAt;
use crate::cpu::check;
use crate::device::{
    AttentionLayer, Device, DeviceError, Pool, Room, RopeTable, StepBatch, StepLimits, StepRoom,
    StepShape, Temperature,
};
use crate::level::Dtype;
use crate::sample::{Sampled, sample_row};
use crate::staged::TensorOnHost;
use std::borrow::Cow;
use std::sync::{Arc, Mutex, PoisonError};

/// A step's buffers, which go back to the device when the step is over.
pub struct BatchOnDevice {
    batch: Option<Batch>,
    /// Counts the steps of the device.
    number: u64,
    home: Arc<Mutex<Option<Batch>>>,
}

impl BatchOnDevice {
    fn get(&self) -> &Batch {
        self.batch.as_ref().expect("there until it is dropped")
    }
}

impl Drop for BatchOnDevice {
    fn drop(&mut self) {
        *self.home.lock().unwrap_or_else(PoisonError::into_inner) = self.batch.take();
    }
}

/// The paged KV cache of one rank.
pub struct CacheOnDevice(Cache);

/// A GPU as the device of a rank.
pub struct Cuda {
    driver: Arc<Driver>,
    dtype: Dtype,
    temperature: Option<Temperature>,
    batch: Arc<Mutex<Option<Batch>>>,
    choices: Choices,
    notes: Notes,
    /// Experts of a MoE layer, wherever they are.
    experts: usize,
    attention: Attention,
    rows: KvRows,
    routed: RoutedRows,
    staged: StagedRows,
    /// What memory was taken for.
    room: Option<StepRoom>,
    /// Memory that was refused in the step: it has failed, and the device is well.
    refused: Option<CudaError>,
}

/// What a view brings to the experts of a rank.
#[derive(Debug, Clone, Copy)]
pub struct Arriving<'a> {
    /// How many experts the rank has, by MoE layer.
    pub slots: &'a [usize],
    pub hidden: usize,
    /// Of an expert.
    pub width: usize,
    /// Whose rows may all come to this one.
    pub ranks: usize,
    /// Some of these ranks are in other processes.
    pub through_host: bool,
}

impl Cuda {
    /// * `temperature`: what the model's layers without rotary embedding do to queries
    /// * `moe_layers`, `experts`: how many MoE layers there are, and experts of each
    ///
    /// # Errors
    ///
    /// [`CudaError`] if memory is refused.
    pub fn new(
        driver: &Arc<Driver>,
        dtype: Dtype,
        temperature: Option<Temperature>,
        (moe_layers, experts): (usize, usize),
    ) -> Result<Self, CudaError> {
        let cuda = Self {
            driver: Arc::clone(driver),
            dtype,
            temperature,
            batch: Arc::new(Mutex::new(Some(Batch::new(driver)?))),
            choices: Choices::new(driver)?,
            notes: Notes::new(driver, (exchange::flags(moe_layers), moe_layers * experts))?,
            experts,
            attention: Attention::new(driver)?,
            rows: KvRows::new(driver)?,
            routed: RoutedRows::new(driver, (moe_layers, experts))?,
            staged: StagedRows::new(driver)?,
            room: None,
            refused: None,
        };
        driver.enter();
        Ok(cuda)
    }

    /// The GPU it works on.
    #[must_use]
    pub fn driver(&self) -> &Arc<Driver> {
        &self.driver
    }

    /// Takes the memory that the rows of a view need in its experts, if [`Device::reserve`] has said how many rows a
    /// step has. `results`: what they go back in.
    ///
    /// # Errors
    ///
    /// [`CudaError::Memory`] if it is refused; a step then takes it, if it can.
    pub fn expect(
        &mut self,
        arriving: Arriving<'_>,
        results: &mut WireOnDevice,
    ) -> Result<(), CudaError> {
        let Some(room) = self.room else { return Ok(()) };
        let Arriving { slots, hidden, width, ranks, through_host } = arriving;
        let rows = room.rows * ranks;
        if through_host {
            results.reserve((rows, hidden))?;
        }
        let expected = Expected { slots, hidden, width, dtype: self.dtype, through_host };
        self.routed.reserve(&expected, rows)?;
        self.staged.reserve(&expected, rows)
    }

    /// A KV cache for this device; `blocks` are the capacities of the pools.
    ///
    /// # Errors
    ///
    /// [`CudaError`] if memory is refused.
    pub fn cache(
        &self,
        shape: crate::AttentionShape,
        layers: &[Pool],
        blocks: impl Fn(Pool) -> u32,
    ) -> Result<CacheOnDevice, CudaError> {
        Cache::new(&self.driver, self.dtype, shape, layers, blocks).map(CacheOnDevice)
    }

    /// Appends rows of the KV cache to `out`, as [`crate::Cache::read_rows`]. Between steps; waits for the device.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Step`] if there are no such places, [`DeviceError::Cuda`] if memory is refused or CUDA fails.
    pub fn read_rows(
        &mut self,
        cache: &CacheOnDevice,
        at: &[RowsAt<'_>],
        out: &mut Vec<u8>,
    ) -> Result<(), DeviceError> {
        let result = self.rows.read(&cache.0, at, out);
        result.map_err(|error| self.noted_error(error))
    }

    /// Puts rows into blocks of the KV cache, as [`crate::Cache::write_rows`]. Between steps.
    ///
    /// # Errors
    ///
    /// As for [`Cuda::read_rows`], and if there are not as many rows.
    pub fn write_rows(
        &mut self,
        cache: &mut CacheOnDevice,
        at: &RowsAt<'_>,
        rows: &[u8],
    ) -> Result<(), DeviceError> {
        let result = self.rows.write(&mut cache.0, at, rows);
        result.map_err(|error| self.noted_error(error))
    }

    fn noted_error(&self, error: DeviceError) -> DeviceError {
        match error {
            DeviceError::Cuda(error) => self.spoilt(error),
            other @ (DeviceError::Step { .. }
            | DeviceError::LargeStep { .. }
            | DeviceError::Memory { .. }
            | DeviceError::Matrix(_)
            | DeviceError::Threads { .. }) => other,
        }
    }

    /// Does what it can: nothing after a failure, which the step's end tells.
    fn attempt(&mut self, operation: impl FnOnce(&mut Self) -> Result<(), CudaError>) {
        if self.first_error().is_some() {
            return;
        }
        match operation(self) {
            Ok(()) => {}
            Err(error) if error.is_passing() => self.refused = Some(error),
            Err(error) => self.driver.fail(error),
        }
    }

    /// Notes an error after which the device is of no use any more.
    fn spoilt(&self, error: CudaError) -> DeviceError {
        if !error.is_passing() {
            self.driver.fail(error.clone());
        }
        DeviceError::Cuda(error)
    }

    /// What ended the step, or the device.
    fn first_error(&self) -> Option<&CudaError> {
        self.refused.as_ref().or_else(|| self.driver.failure())
    }

    fn failure(&self) -> Result<(), DeviceError> {
        self.first_error().map_or(Ok(()), |error| Err(DeviceError::Cuda(error.clone())))
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        self.driver.leave();
    }
}

impl Cuda {
    /// The dense products of either profile.
    fn product(&self, x: &Tensor, w: &Weights, out: &mut Tensor) -> Result<(), CudaError> {
        match &w.0 {
            Stored::Plain(plain) => linear_f32(&self.driver, x, plain, out),
            Stored::Tiled(tiled) => linear_bf16(&self.driver, x, tiled, out),
        }
    }
}

impl Device for Cuda {
    type Tensor = Tensor;
    type Matrix = Weights;
    type Norm = NormWeights;
    type Embedding = EmbeddingTable;
    type Cache = CacheOnDevice;
    type Batch = BatchOnDevice;
    type Route = RouteOnDevice;
    type Wire = WireOnDevice;
    type Experts = ExpertsOnDevice;
    type Arrived = [u8];
    type Offsets = [u32];

    fn tensor(&self, rows: usize, columns: usize) -> Tensor {
        self.made(Tensor::new(&self.driver, Dtype::F32, (rows, columns)))
    }

    fn wire(&self) -> WireOnDevice {
        self.made(WireOnDevice::new(&self.driver, self.dtype))
    }

    fn route(&self) -> RouteOnDevice {
        self.made(RouteOnDevice::new(&self.driver))
    }

    fn reserve(&mut self, shape: &StepShape<'_>) -> Result<(), DeviceError> {
        let StepShape { room, limits, heads, layers } = *shape;
        let mut waiting = self.batch.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(batch) = &mut *waiting {
            batch.reserve(room, limits, heads.head_dim)?;
        }
        drop(waiting);
        self.choices.reserve(room.samples)?;
        let heads_of = (heads.kv_heads, heads.head_dim);
        let full = layers.iter().filter(|layer| **layer == Pool::Full).count();
        self.rows.reserve(row_bytes(self.dtype, heads_of, full.max(layers.len() - full)))?;
        match self.dtype {
            Dtype::F32 => {}
            Dtype::Bf16 => {
                self.attention.reserve(heads, layers, (room.rows, limits.full_blocks))?
            }
        }
        self.room = Some(room);
        Ok(())
    }

    fn make_room(&self, room: Room<'_, Self>) -> Result<(), DeviceError> {
        Ok(match room {
            Room::Tensor(tensor, rows) => tensor.reserve(rows),
            Room::Route(route, rows) => route.overwritten().reserve(rows),
            Room::Wire(wire, size) => wire.reserve(size),
        }?)
    }

    fn upload(
        &mut self,
        step: &StepBatch,
        rope: &RopeTable,
        limits: StepLimits,
    ) -> Result<BatchOnDevice, DeviceError> {
        check::step(step, limits)?;
        if let Some(StepRoom { rows, samples }) = self.room {
            within("rows", step.rows.len(), rows)?;
            within("rows to sample", step.samples.len(), samples)?;
        }
        self.refused = None;
        self.failure()?;
        let decodes = step.rows.len() == step.tables.len();
        let kind = if decodes { StepKind::Decoding } else { StepKind::Others };
        let waiting = self.batch.lock().unwrap_or_else(PoisonError::into_inner).take();
        let rules = StepRules { rope, temperature: self.temperature, limits };
        let uploaded =
            waiting.map_or_else(|| Batch::new(&self.driver), Ok).and_then(|mut batch| {
                self.driver.begin_step(kind)?;
                batch.upload(step, &rules)?;
                let number = self.attention.begin(&step.rows)?;
                self.notes.reset(&self.driver)?;
                Ok((batch, number))
            });
        let (batch, number) = uploaded.map_err(|error| self.spoilt(error))?;
        Ok(BatchOnDevice { batch: Some(batch), number, home: Arc::clone(&self.batch) })
    }

    fn embed(&mut self, batch: &BatchOnDevice, table: &EmbeddingTable, x: &mut Tensor) {
        self.attempt(|this| embed(&this.driver, batch.get(), &table.0, x));
    }

    fn rms_norm(&mut self, x: &Tensor, weight: &NormWeights, eps: f32, out: &mut Tensor) {
        out.become_of(self.dtype, x.columns());
        self.attempt(|this| rms_norm(&this.driver, (x, None), (weight.buffer(), eps), out));
    }

    fn add_rms_norm(
        &mut self,
        (x, y): (&mut Tensor, &Tensor),
        weight: &NormWeights,
        eps: f32,
        out: &mut Tensor,
    ) {
        out.become_of(self.dtype, x.columns());
        self.attempt(|this| rms_norm(&this.driver, (x, Some(y)), (weight.buffer(), eps), out));
    }

    fn linear(&mut self, x: &Tensor, w: &Weights, out: &mut Tensor) {
        self.attempt(|this| this.product(x, w, out));
    }

    fn attention(
        &mut self,
        batch: &BatchOnDevice,
        layer: &AttentionLayer,
        qkv: &mut Tensor,
        cache: &mut CacheOnDevice,
        out: &mut Tensor,
    ) {
        assert_eq!(batch.number, self.attention.step(), "the step that was uploaded last");
        let (batch, cache) = (batch.get(), &mut cache.0);
        out.become_of(self.dtype, layer.shape.q());
        self.attempt(|this| {
            positions(&this.driver, batch, layer, qkv, cache)?;
            match this.dtype {
                Dtype::F32 => attention_f32(&this.driver, (batch, layer), qkv, cache, out),
                Dtype::Bf16 => this.attention.run((batch, layer), qkv, cache, out),
            }
        });
    }

    fn swiglu(&mut self, gate_up: &Tensor, out: &mut Tensor) {
        out.become_of(self.dtype, gate_up.columns() / 2);
        self.attempt(|this| swiglu(&this.driver, gate_up, out));
    }

    fn add(&mut self, x: &mut Tensor, y: &Tensor) {
        self.attempt(|this| add(&this.driver, x, y));
    }

    fn gate(&mut self, logits: &Tensor, route: &mut RouteOnDevice) {
        self.attempt(|this| gate(&this.driver, logits, route.overwritten()));
    }

    fn pack(&mut self, h: &Tensor, route: &RouteOnDevice, wire: &mut WireOnDevice) {
        let rows = wire.overwritten(h.columns());
        self.attempt(|this| pack(&this.driver, h, &route.route, rows));
    }

    fn experts(
        &mut self,
        arrived: &[u8],
        offsets: &[u32],
        experts: &ExpertsOnDevice,
        results: &mut WireOnDevice,
    ) {
        assert_eq!(offsets.len(), experts.slots() + 1, "one offset per local expert and the end");
        let results = results.overwritten(experts.hidden());
        self.attempt(|this| {
            this.staged.run(&mut this.routed, (arrived, offsets), experts, results)
        });
    }

    fn add_wire(&mut self, wire: &WireOnDevice, x: &mut Tensor) {
        self.attempt(|this| wire.on_device().and_then(|rows| add(&this.driver, x, rows)));
    }

    fn select(&mut self, batch: &BatchOnDevice, x: &Tensor, out: &mut Tensor) {
        self.attempt(|this| select(&this.driver, batch.get(), x, out));
    }

    fn finish(
        &mut self,
        batch: &BatchOnDevice,
        step: &StepBatch,
        logits: &Tensor,
    ) -> Result<Vec<Sampled>, DeviceError> {
        self.failure()?;
        // A failed kernel shows here.
        self.sampled(batch.get(), step, logits).map_err(|error| self.spoilt(error))
    }
}

impl Cuda {
    /// Tokens of the plain rows from the device, those of the others from their logits.
    fn sampled(
        &mut self,
        batch: &Batch,
        step: &StepBatch,
        logits: &Tensor,
    ) -> Result<Vec<Sampled>, CudaError> {
        sample(&self.driver, batch, logits, &mut self.choices)?;
        let tokens = self.choices.to_host()?;
        let mut row = vec![0.0_f32; logits.columns()];
        let row_bytes = row.len() * size_of::<f32>();
        let mut all = Vec::with_capacity(tokens.len());
        for (index, (sample, token)) in step.samples.iter().zip(tokens).enumerate() {
            if is_plain(&sample.sampling) {
                all.push(Sampled { token, logprob: None, top: Vec::new() });
                continue;
            }
            logits.buffer().read_at(index * row_bytes, bytemuck::cast_slice_mut(&mut row))?;
            let position = step.rows[sample.row as usize].position + 1;
            all.push(sample_row(&row, position, &sample.sampling));
        }
        Ok(all)
    }

    /// A buffer that was just made, empty; a failure shows when the next step begins.
    fn made<T>(&self, result: Result<T, CudaError>) -> T {
        result.unwrap_or_else(|error| panic!("an empty buffer needs no memory: {error}"))
    }
}

/// Whether a step has no more of something than memory was taken for.
fn within(what: &'static str, value: usize, limit: usize) -> Result<(), DeviceError> {
    if value <= limit { Ok(()) } else { Err(DeviceError::LargeStep { what, value, limit }) }
}

impl TensorOnHost for Tensor {
    fn values(&self) -> Cow<'_, [f32]> {
        Cow::Owned(self.to_host().unwrap_or_else(|error| {
            self.driver().fail(error);
            vec![0.0; self.rows() * self.columns()]
        }))
    }
}
