//! What a worker computes on, and how its weights get there.
//!
//! Experts are read and kept in the CPU's form: that is also what other workers take out of this one's memory. A GPU
//! gets its form made of them before it takes a seat.

use crate::engine::EngineError;
use crate::weights::Model;
use all2all::{RouteTables, Routes};
use kernels::cuda::weights::{ExpertOnDevice, Loader};
use kernels::cuda::{
    CacheOnDevice, Cuda, CudaError, Driver, ExpertsOnDevice, RouteTable, RouteTableParts,
};
use kernels::{
    Cache, Cpu, DeviceError, Dtype, ExpertWeights, Experts, Level, Pool, RowMemory, Staged,
    Temperature,
};
use model::forward::{pools, shape};
use model::weights::{Dense, FeedForward, Layer, Mlp};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// The kind of device that all workers of a process have.
#[derive(Clone, Default)]
pub enum Platform {
    /// Threads of this machine.
    #[default]
    Cpu,
    /// A GPU, which the ranks of this process share.
    Cuda(Gpu),
}

impl Platform {
    /// Ranks of one view must agree on this text: equal profiles give equal bits.
    #[must_use]
    pub fn profile(&self, dtype: Dtype) -> String {
        match self {
            Self::Cpu => Level::detect().profile(dtype),
            Self::Cuda(gpu) => format!("cuda/{dtype}/{}", gpu.driver.identity().0),
        }
    }

    /// What `herd status` shows.
    #[must_use]
    pub fn describe(&self, threads: usize) -> String {
        match self {
            Self::Cpu => format!("cpu:{} x{threads}", Level::detect()),
            Self::Cuda(gpu) => {
                let (arch, name) = gpu.driver.identity();
                format!("cuda:{arch} {name}")
            }
        }
    }

    /// What spoilt it, for all workers of the process.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        match self {
            Self::Cpu => None,
            Self::Cuda(gpu) => gpu.driver.failure().map(ToString::to_string),
        }
    }

    /// Experts and routes of a view in this platform's form.
    pub(crate) fn place(
        &self,
        experts: Vec<Experts>,
        dtype: Dtype,
        routes: &Routes,
    ) -> Result<Placed, DeviceError> {
        match self {
            Self::Cpu => Ok(Placed::Cpu(experts)),
            Self::Cuda(gpu) => Ok(Placed::Cuda(gpu.place(experts, dtype)?, gpu.routes(routes)?)),
        }
    }
}

/// What a rank needs of a view, in the form of its platform: experts, `[moe layers]`, and where its rows go, if the device
/// has to know.
pub(crate) enum Placed {
    Cpu(Vec<Experts>),
    Cuda(Vec<ExpertsOnDevice>, Arc<RouteTable>),
}

/// A GPU and the weights on it.
#[derive(Clone)]
pub struct Gpu {
    driver: Arc<Driver>,
    weights: Arc<OnGpu>,
}

#[derive(Default)]
struct OnGpu {
    dense: Mutex<Option<Arc<Dense<Cuda>>>>,
    /// What a rank uses, by the address of what it was made of, which lives as long.
    experts: Mutex<BTreeMap<usize, Weak<ExpertOnDevice>>>,
}

impl Gpu {
    /// Ranks on this device.
    #[must_use]
    pub fn new(driver: impl Into<Arc<Driver>>) -> Self {
        Self { driver: driver.into(), weights: Arc::default() }
    }

    fn routes(&self, routes: &Routes) -> Result<Arc<RouteTable>, CudaError> {
        let RouteTables { targets, spans } = routes.tables();
        let targets: Vec<_> = targets.iter().map(|(rank, slot)| (rank.0, *slot)).collect();
        let parts = RouteTableParts { spans, targets: &targets };
        RouteTable::new(&self.driver, parts).map(Arc::new)
    }

    fn place(
        &self,
        experts: Vec<Experts>,
        dtype: Dtype,
    ) -> Result<Vec<ExpertsOnDevice>, CudaError> {
        let loader = Loader::new(&self.driver, dtype);
        let of_layer = |layer: Experts| {
            let placed = layer.slots.into_iter().map(|expert| self.place_expert(&loader, expert));
            ExpertsOnDevice::new(&self.driver, placed.collect::<Result<_, CudaError>>()?)
        };
        experts.into_iter().map(of_layer).collect()
    }

    fn place_expert(
        &self,
        loader: &Loader,
        original: Arc<ExpertWeights>,
    ) -> Result<Arc<ExpertOnDevice>, CudaError> {
        let key = Arc::as_ptr(&original).addr();
        let mut known = lock(&self.weights.experts);
        known.retain(|_, placed| 0 < placed.strong_count());
        if let Some(placed) = known.get(&key).and_then(Weak::upgrade) {
            return Ok(placed);
        }
        let placed = Arc::new(loader.expert(original)?);
        known.insert(key, Arc::downgrade(&placed));
        Ok(placed)
    }

    /// The dense weights; the first caller brings them there. Nobody needs the originals afterwards.
    fn dense(&self, model: &Model) -> Result<Arc<Dense<Cuda>>, EngineError> {
        let mut known = lock(&self.weights.dense);
        if let Some(dense) = &*known {
            return Ok(Arc::clone(dense));
        }
        let loader = Loader::new(&self.driver, model.dtype);
        let placed = Arc::new(place_dense(&loader, &*model.dense()?).map_err(DeviceError::Cuda)?);
        model.forget_dense();
        *known = Some(Arc::clone(&placed));
        Ok(placed)
    }
}

fn place_dense(loader: &Loader, dense: &Dense<Cpu>) -> Result<Dense<Cuda>, CudaError> {
    let mlp = |mlp: &Mlp<Cpu>| -> Result<Mlp<Cuda>, CudaError> {
        Ok(Mlp { gate_up: loader.matrix(&mlp.gate_up)?, down: loader.matrix(&mlp.down)? })
    };
    let layer = |layer: &Layer<Cpu>| -> Result<Layer<Cuda>, CudaError> {
        Ok(Layer {
            input_norm: loader.norm(&layer.input_norm)?,
            qkv: loader.matrix(&layer.qkv)?,
            output: loader.matrix(&layer.output)?,
            post_attention_norm: loader.norm(&layer.post_attention_norm)?,
            feed_forward: match &layer.feed_forward {
                FeedForward::Dense(dense) => FeedForward::Dense(mlp(dense)?),
                FeedForward::Moe { router, shared } => {
                    FeedForward::Moe { router: loader.matrix(router)?, shared: mlp(shared)? }
                }
            },
        })
    };
    Ok(Dense {
        embed: loader.embedding(&dense.embed)?,
        layers: dense.layers.iter().map(layer).collect::<Result<_, _>>()?,
        final_norm: loader.norm(&dense.final_norm)?,
        lm_head: loader.matrix(&dense.lm_head)?,
    })
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What they guard is put and taken whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device that can be a rank.
pub(crate) trait Backend: Staged + Sized {
    /// Opens one for this thread. `memory`: where rows that it sends should lie, if it sends from the host's.
    fn open(model: &Model, threads: usize, memory: Option<RowMemory>) -> Result<Self, EngineError>;

    /// The dense weights in its form; shared by the ranks of a process.
    fn dense(model: &Model) -> Result<Arc<Dense<Self>>, EngineError>;

    /// A KV cache; `blocks` are the capacities of the pools.
    fn new_cache(
        &self,
        model: &Model,
        blocks: &dyn Fn(Pool) -> u32,
    ) -> Result<Self::Cache, DeviceError>;

    /// Takes what was placed for it.
    fn take(placed: Placed) -> (Vec<Self::Experts>, Self::Routes);
}

impl Backend for Cpu {
    fn open(model: &Model, threads: usize, memory: Option<RowMemory>) -> Result<Self, EngineError> {
        let cpu = Self::new(Level::detect(), model.dtype, threads)?;
        Ok(match memory {
            Some(memory) => cpu.with_row_memory(memory),
            None => cpu,
        })
    }

    fn dense(model: &Model) -> Result<Arc<Dense<Self>>, EngineError> {
        Ok(model.dense()?)
    }

    fn new_cache(&self, model: &Model, blocks: &dyn Fn(Pool) -> u32) -> Result<Cache, DeviceError> {
        let (heads, layers) = (shape(&model.config), pools(&model.config));
        Cache::new(model.dtype, heads.kv_heads, heads.head_dim, &layers, blocks)
    }

    fn take(placed: Placed) -> (Vec<Experts>, ()) {
        match placed {
            Placed::Cpu(experts) => (experts, ()),
            Placed::Cuda(..) => unreachable!("a process has one platform"),
        }
    }
}

impl Backend for Cuda {
    fn open(model: &Model, _: usize, _: Option<RowMemory>) -> Result<Self, EngineError> {
        let temperature = model.config.temperature.as_ref();
        let temperature = temperature
            .map(|t| Temperature { floor_scale: t.floor_scale, attn_scale: t.attn_scale });
        fits(model).map_err(EngineError::Unsupported)?;
        let moe = (model.config.moe_layers().len(), model.config.experts);
        let cuda = Self::new(&gpu(model).driver, model.dtype, temperature, moe);
        Ok(cuda.map_err(DeviceError::Cuda)?)
    }

    fn dense(model: &Model) -> Result<Arc<Dense<Self>>, EngineError> {
        gpu(model).dense(model)
    }

    fn new_cache(
        &self,
        model: &Model,
        blocks: &dyn Fn(Pool) -> u32,
    ) -> Result<CacheOnDevice, DeviceError> {
        Ok(self.cache(shape(&model.config), &pools(&model.config), blocks)?)
    }

    fn take(placed: Placed) -> (Vec<ExpertsOnDevice>, Arc<RouteTable>) {
        match placed {
            Placed::Cuda(experts, routes) => (experts, routes),
            Placed::Cpu(_) => unreachable!("a process has one platform"),
        }
    }
}

/// Whether the kernels have this model's shapes; what they lack.
fn fits(model: &Model) -> Result<(), String> {
    let (config, heads) = (&model.config, shape(&model.config));
    let group = heads.heads / heads.kv_heads.max(1);
    match model.dtype {
        Dtype::F32 if heads.head_dim <= 256 => Ok(()),
        Dtype::F32 => Err(format!("head_dim is {}, in f32 at most 256 will do", heads.head_dim)),
        Dtype::Bf16 if !heads.head_dim.is_multiple_of(16) || 128 < heads.head_dim => Err(format!(
            "head_dim is {}, in bf16 it must be a multiple of 16, and 128 at most; try --dtype f32",
            heads.head_dim
        )),
        Dtype::Bf16 if 16 < group => Err(format!(
            "{group} query heads share a key head, in bf16 at most 16; try --dtype f32"
        )),
        Dtype::Bf16 => {
            let widths = [
                ("hidden_size", config.hidden),
                ("intermediate_size", config.expert_width),
                ("intermediate_size_mlp", config.dense_width),
            ];
            let odd = widths.into_iter().find(|(_, width)| !width.is_multiple_of(8));
            odd.map_or(Ok(()), |(name, width)| {
                Err(format!(
                    "{name} is {width}, in bf16 it must be a multiple of 8; try --dtype f32"
                ))
            })
        }
    }
}

fn gpu(model: &Model) -> &Gpu {
    match &model.platform {
        Platform::Cuda(gpu) => gpu,
        Platform::Cpu => unreachable!("a process has one platform"),
    }
}
