//! What a worker computes on, and how its weights get there.
//!
//! On a CPU weights are packed for its vectors, on a GPU they are tiled in its own memory; either way a process holds
//! them once, for all of its ranks.

use crate::KvBlocks;
use crate::error::EngineError;
use crate::gpu::{Gpu, route_table};
use crate::weights::Model;
use all2all::Routes;
use kernels::cuda::nvml::Nvml;
use kernels::cuda::{
    Arriving, CacheOnDevice, Cuda, Driver, ExpertsOnDevice, RouteTable, WireOnDevice,
};
use kernels::{
    Cache, Cpu, Device, DeviceError, Dtype, Experts, Level, Pool, RowMemory, RowsAt, Staged,
    StepRoom, Temperature,
};
use model::forward::{Forward, pools, shape};
use model::weights::Dense;
use std::sync::Arc;

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
            Self::Cuda(gpu) => {
                let kernels = kernels::cuda::sources::fingerprint();
                format!("cuda/{dtype}/{}/{kernels:016x}", gpu.driver.identity().0)
            }
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

    /// Bytes per second that it reads from memory of the kind that weights lie in; on CPUs with so many threads.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] if memory or threads are refused, or the device fails.
    pub fn read_bandwidth(&self, threads: usize) -> Result<f64, DeviceError> {
        match self {
            Self::Cpu => kernels::read_bandwidth(threads),
            Self::Cuda(gpu) => Ok(kernels::cuda::read_bandwidth(&gpu.driver)?),
        }
    }

    /// The GPU, if it is one.
    #[must_use]
    pub fn gpu(&self) -> Option<&Gpu> {
        match self {
            Self::Cpu => None,
            Self::Cuda(gpu) => Some(gpu),
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

    /// What tells how its GPU is, if anything does.
    pub(crate) fn nvml(&self) -> Option<Arc<Nvml>> {
        match self {
            Self::Cpu => None,
            Self::Cuda(gpu) => gpu.nvml.clone(),
        }
    }

    /// Bytes of device memory that a worker's steps need besides weights and KV cache: 0 where no step can run out of
    /// it, because memory is not the device's own, or was not reserved.
    ///
    pub(crate) fn workspace(
        &self,
        model: &Model,
        kv: KvBlocks,
        ranks: Ranks,
    ) -> Result<u64, DeviceError> {
        match self {
            Self::Cpu => Ok(0),
            Self::Cuda(Gpu { room: None, .. }) => Ok(0),
            Self::Cuda(Gpu { room: Some(room), .. }) => workspace(model, kv, (*room, ranks)),
        }
    }
}

/// What a rank needs of a view, in the form of its platform: experts, `[moe layers]`, and where its rows go, if the device
/// has to know.
pub(crate) enum Placed {
    Cpu(Vec<Experts>),
    Cuda(Vec<ExpertsOnDevice>, Arc<RouteTable>),
}

/// The ranks of a view, to one of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Ranks {
    pub(crate) count: u16,
    /// Some of them are in other processes.
    pub(crate) through_host: bool,
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

    /// Appends rows of the KV cache to `out`.
    ///
    /// # Errors
    ///
    /// [`EngineError`] if they are not there.
    fn read_kv_rows(
        &mut self,
        cache: &Self::Cache,
        at: &[RowsAt<'_>],
        out: &mut Vec<u8>,
    ) -> Result<(), EngineError>;

    /// Puts rows into blocks of the KV cache.
    ///
    /// # Errors
    ///
    /// [`EngineError`] if there are no such blocks.
    fn write_kv_rows(
        &mut self,
        cache: &mut Self::Cache,
        at: &RowsAt<'_>,
        rows: &[u8],
    ) -> Result<(), EngineError>;

    /// Takes what was placed for it.
    fn take(placed: Placed) -> (Vec<Self::Experts>, Self::Routes);

    /// Where its rows go, in its form.
    fn routes(&self, routes: &Routes) -> Result<Self::Routes, EngineError>;

    /// Takes the memory that its steps will need, if it has memory of its own.
    fn reserve_for(&mut self, _: &Model, _: &mut Forward<Self>) -> Result<(), EngineError> {
        Ok(())
    }

    /// The same for rows of other ranks, which come with a view.
    fn expect_rows(
        &mut self,
        _: &[Self::Experts],
        _: Ranks,
        _results: &mut Self::Wire,
    ) -> Result<(), EngineError> {
        Ok(())
    }
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

    fn read_kv_rows(
        &mut self,
        cache: &Cache,
        at: &[RowsAt<'_>],
        out: &mut Vec<u8>,
    ) -> Result<(), EngineError> {
        Ok(cache.read_rows(at, out)?)
    }

    fn write_kv_rows(
        &mut self,
        cache: &mut Cache,
        at: &RowsAt<'_>,
        rows: &[u8],
    ) -> Result<(), EngineError> {
        Ok(cache.write_rows(at, rows)?)
    }

    fn take(placed: Placed) -> (Vec<Experts>, ()) {
        match placed {
            Placed::Cpu(experts) => (experts, ()),
            Placed::Cuda(..) => unreachable!("a process has one platform"),
        }
    }

    fn routes(&self, _: &Routes) -> Result<(), EngineError> {
        Ok(())
    }
}

impl Backend for Cuda {
    fn open(model: &Model, _: usize, _: Option<RowMemory>) -> Result<Self, EngineError> {
        fits(model).map_err(EngineError::Unsupported)?;
        Ok(device(model, &gpu(model).driver)?)
    }

    fn dense(model: &Model) -> Result<Arc<Dense<Self>>, EngineError> {
        Ok(gpu(model).dense(model)?)
    }

    fn new_cache(
        &self,
        model: &Model,
        blocks: &dyn Fn(Pool) -> u32,
    ) -> Result<CacheOnDevice, DeviceError> {
        Ok(self.cache(shape(&model.config), &pools(&model.config), blocks)?)
    }

    fn read_kv_rows(
        &mut self,
        cache: &CacheOnDevice,
        at: &[RowsAt<'_>],
        out: &mut Vec<u8>,
    ) -> Result<(), EngineError> {
        Ok(self.read_rows(cache, at, out)?)
    }

    fn write_kv_rows(
        &mut self,
        cache: &mut CacheOnDevice,
        at: &RowsAt<'_>,
        rows: &[u8],
    ) -> Result<(), EngineError> {
        Ok(self.write_rows(cache, at, rows)?)
    }

    fn take(placed: Placed) -> (Vec<ExpertsOnDevice>, Arc<RouteTable>) {
        match placed {
            Placed::Cuda(experts, routes) => (experts, routes),
            Placed::Cpu(_) => unreachable!("a process has one platform"),
        }
    }

    fn routes(&self, routes: &Routes) -> Result<Arc<RouteTable>, EngineError> {
        Ok(route_table(self.driver(), routes).map_err(DeviceError::Cuda)?)
    }

    fn reserve_for(
        &mut self,
        model: &Model,
        forward: &mut Forward<Self>,
    ) -> Result<(), EngineError> {
        let Some(room) = gpu(model).room else { return Ok(()) };
        Ok(forward.reserve(self, &model.config, room)?)
    }

    fn expect_rows(
        &mut self,
        experts: &[ExpertsOnDevice],
        Ranks { count, through_host }: Ranks,
        results: &mut WireOnDevice,
    ) -> Result<(), EngineError> {
        let slots: Vec<usize> = experts.iter().map(ExpertsOnDevice::slots).collect();
        let sizes = experts.iter().find_map(ExpertsOnDevice::sizes);
        let Some((hidden, width)) = sizes else { return Ok(()) };
        let ranks = count.into();
        let arriving = Arriving { slots: &slots, hidden, width, ranks, through_host };
        Ok(self.expect(arriving, results).map_err(DeviceError::Cuda)?)
    }
}

fn device(model: &Model, driver: &Arc<Driver>) -> Result<Cuda, DeviceError> {
    let temperature = model.config.temperature.as_ref();
    let temperature =
        temperature.map(|t| Temperature { floor_scale: t.floor_scale, attn_scale: t.attn_scale });
    let moe = (model.config.moe_layers().len(), model.config.experts);
    Ok(Cuda::new(driver, model.dtype, temperature, moe)?)
}

/// What a worker of this model takes at its start, besides weights and KV cache, and with a view of so many ranks: told
/// by doing it without a device.
fn workspace(
    model: &Model,
    kv: KvBlocks,
    (room, Ranks { count, through_host }): (StepRoom, Ranks),
) -> Result<u64, DeviceError> {
    let config = &model.config;
    let driver = Arc::new(Driver::plan());
    let mut device = device(model, &driver)?;
    let mut forward = Forward::new(&device, config, 0, (kv.full, kv.chunked));
    let mut results = device.wire();
    forward.reserve(&mut device, config, room)?;
    // It does not matter how many experts there are: a number per row does, and one per expert.
    let slots = vec![config.experts; config.moe_layers().len()];
    let (hidden, width) = (config.hidden, config.expert_width);
    let ranks = count.into();
    let arriving = Arriving { slots: &slots, hidden, width, ranks, through_host };
    device.expect(arriving, &mut results)?;
    Ok(driver.taken().bytes)
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
