//! The weights of this process: opened once, loaded once, shared by the workers that live in it.

use crate::background::loaders;
use crate::gpu::Gpu;
use crate::held::{Blank, Held};
use crate::platform::{Placed, Platform};
use all2all::Routes;
use kernels::cuda::CudaError;
use kernels::{Cpu, DeviceError, Dtype, Experts};
use model::checkpoint::{Checkpoint, CheckpointError};
use model::config::{Config, ConfigError};
use model::footprint::{Footprint, Fp8};
use model::load::{LoadError, Loader};
use model::synth::{self, SynthOptions};
use model::weights::Dense;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often the progress of loading is logged.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// Why a model cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{}: {source}", dir.display())]
    Checkpoint { dir: PathBuf, source: CheckpointError },
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("a later view is being prepared")]
    Superseded,
}

impl From<CudaError> for ModelError {
    fn from(error: CudaError) -> Self {
        Self::Device(DeviceError::Cuda(error))
    }
}

/// A routed expert: its MoE layer, and its number in it.
pub(crate) type Key = (usize, usize);

/// A checkpoint and what has been loaded of it.
pub struct Model {
    pub config: Config,
    pub dtype: Dtype,
    /// What its workers compute on.
    pub platform: Platform,
    checkpoint: Checkpoint,
    /// On a CPU.
    dense: Mutex<Option<Arc<Dense<Cpu>>>>,
    /// Never locked while something is loaded: who needs nothing does not wait.
    experts: Mutex<BTreeMap<Key, Held>>,
    /// Threads that load; they give way to the steps. `None` if there are none to be had.
    loaders: Option<rayon::ThreadPool>,
    /// Held by whoever reads experts, lest two workers of a process read the same.
    reading: Mutex<()>,
}

impl Model {
    /// Reads the configuration and the headers of the weight files in `dir`.
    ///
    /// # Errors
    ///
    /// [`ModelError`] with everything that is wrong with the files.
    pub fn open(dir: &Path, dtype: Dtype) -> Result<Self, ModelError> {
        Self::open_for(dir, dtype, Platform::Cpu)
    }

    /// The same, for workers on another platform.
    ///
    /// # Errors
    ///
    /// As for [`Model::open`].
    pub fn open_for(dir: &Path, dtype: Dtype, platform: Platform) -> Result<Self, ModelError> {
        let config = Config::load(dir)?;
        let checkpoint = Checkpoint::open(dir, &config)
            .map_err(|source| ModelError::Checkpoint { dir: dir.to_owned(), source })?;
        Ok(Self::new(config, checkpoint, dtype, platform))
    }

    /// One with random weights that no file holds: for measurements.
    #[must_use]
    pub fn random(
        config: Config,
        options: &SynthOptions,
        dtype: Dtype,
        platform: Platform,
    ) -> Self {
        let checkpoint = synth::checkpoint(&config, options);
        Self::new(config, checkpoint, dtype, platform)
    }

    fn new(config: Config, checkpoint: Checkpoint, dtype: Dtype, platform: Platform) -> Self {
        Self {
            config,
            dtype,
            platform,
            checkpoint,
            dense: Mutex::default(),
            experts: Mutex::default(),
            loaders: loaders(),
            reading: Mutex::default(),
        }
    }

    /// The open files.
    #[must_use]
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// What its weights take in the memory of its device.
    #[must_use]
    pub fn footprint(&self) -> Footprint {
        let fp8 = match (&self.platform, self.dtype) {
            (Platform::Cuda(_), Dtype::Bf16) => Fp8::Kept,
            (Platform::Cuda(_), Dtype::F32) | (Platform::Cpu, _) => Fp8::Widened,
        };
        self.loader().footprint(fp8)
    }

    /// The dense part for a CPU; the first caller loads it.
    ///
    /// # Errors
    ///
    /// [`ModelError::Load`].
    pub fn dense(&self) -> Result<Arc<Dense<Cpu>>, ModelError> {
        let mut loaded = lock(&self.dense);
        if let Some(dense) = &*loaded {
            return Ok(Arc::clone(dense));
        }
        let dense = self.loading("dense weights", |loader| Ok(Arc::new(loader.dense()?)))?;
        *loaded = Some(Arc::clone(&dense));
        Ok(dense)
    }

    /// The experts of every MoE layer in `wanted` (`[moe layers][slots]`, expert ids); what this process
    /// does not have yet is read, several experts at a time, as long as they are `still_wanted`.
    ///
    /// # Errors
    ///
    /// [`ModelError::Load`] or [`ModelError::Device`]; [`ModelError::Superseded`] if they are wanted no more.
    pub(crate) fn experts(
        &self,
        wanted: &[Vec<usize>],
        routes: &Routes,
        still_wanted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Placed, ModelError> {
        use rayon::prelude::*;
        let layers = self.config.moe_layers();
        let load = |loader: &Loader<'_>, &(layer, expert): &Key| {
            if !still_wanted() {
                return Err(ModelError::Superseded);
            }
            let held = match &self.platform {
                Platform::Cpu => Held::Cpu(loader.expert(layers[layer], expert)?),
                Platform::Cuda(gpu) => {
                    Held::Cuda(Arc::new(gpu.expert(loader, (layers[layer], expert))?))
                }
            };
            self.keep((layer, expert), held);
            Ok(())
        };
        loop {
            // Another worker of this process may have forgotten what was just read for this one.
            if let Some(found) = self.find(wanted) {
                return self.placed(found, routes);
            }
            let _reading = lock(&self.reading);
            let missing = self.missing(wanted);
            self.loading("experts", |loader| {
                missing.par_iter().try_for_each(|key| load(loader, key))
            })?;
        }
    }

    /// The experts, `[moe layers][slots]`, if this process has them all.
    fn find(&self, wanted: &[Vec<usize>]) -> Option<Vec<Vec<Held>>> {
        let loaded = lock(&self.experts);
        let layer_of = |(layer, experts): (usize, &Vec<usize>)| {
            experts.iter().map(|&expert| loaded.get(&(layer, expert)).cloned()).collect()
        };
        wanted.iter().enumerate().map(layer_of).collect()
    }

    /// Experts and routes as the ranks of this platform use them.
    fn placed(&self, layers: Vec<Vec<Held>>, routes: &Routes) -> Result<Placed, ModelError> {
        const ONE: &str = "a process has one platform";
        match &self.platform {
            Platform::Cpu => {
                let cpu = |held: Held| match held {
                    Held::Cpu(weights) => weights,
                    Held::Cuda(_) => unreachable!("{ONE}"),
                };
                let slots = |layer: Vec<Held>| layer.into_iter().map(cpu).collect();
                Ok(Placed::Cpu(layers.into_iter().map(|l| Experts { slots: slots(l) }).collect()))
            }
            Platform::Cuda(gpu) => {
                let on_device = |held: Held| match held {
                    Held::Cuda(expert) => expert,
                    Held::Cpu(_) => unreachable!("{ONE}"),
                };
                let slots = |layer: Vec<Held>| layer.into_iter().map(on_device).collect();
                let experts = Gpu::layers(layers.into_iter().map(slots).collect());
                Ok(Placed::Cuda(experts, gpu.routes(routes)?))
            }
        }
    }

    /// Which of the experts this process does not have.
    pub(crate) fn missing(&self, wanted: &[Vec<usize>]) -> Vec<Key> {
        let loaded = lock(&self.experts);
        keys(wanted).filter(|key| !loaded.contains_key(key)).collect()
    }

    /// All experts that this process has.
    pub(crate) fn held(&self) -> Vec<Key> {
        let mut held: Vec<Key> = lock(&self.experts).keys().copied().collect();
        held.sort_unstable();
        held
    }

    /// One of them.
    pub(crate) fn expert(&self, key: Key) -> Option<Held> {
        lock(&self.experts).get(&key).cloned()
    }

    /// One in the shape of the layer's, to be filled.
    pub(crate) fn blank_expert(&self, layer: usize) -> Result<Blank, ModelError> {
        let layer = self.config.moe_layers()[layer];
        Ok(match &self.platform {
            Platform::Cpu => Blank::Cpu(self.loader().empty_expert(layer)?),
            Platform::Cuda(gpu) => Blank::Cuda(gpu.blank_expert(&self.loader(), layer)?),
        })
    }

    /// Takes one in.
    pub(crate) fn keep(&self, key: Key, expert: Held) {
        // What it replaces, if anything, goes after the lock: a GPU takes its time to free memory.
        let _replaced = lock(&self.experts).insert(key, expert);
    }

    /// Drops the experts that no worker of this process uses any more, but those that are wanted.
    pub fn forget_unused(&self, wanted: &[Vec<usize>]) {
        let wanted: BTreeSet<Key> = keys(wanted).collect();
        let is_kept = |key: &Key, held: &mut Held| held.is_used() || wanted.contains(key);
        // Freed after the lock.
        let _unused: Vec<(Key, Held)> = {
            let mut experts = lock(&self.experts);
            experts.extract_if(.., |key, held| !is_kept(key, held)).collect()
        };
    }

    fn loader(&self) -> Loader<'_> {
        Loader { checkpoint: &self.checkpoint, config: &self.config, dtype: self.dtype }
    }

    /// Runs `load` on the threads that load, and logs what it read, each second while it takes longer than that.
    pub(crate) fn loading<T: Send>(
        &self,
        what: &'static str,
        load: impl FnOnce(&Loader<'_>) -> Result<T, ModelError> + Send,
    ) -> Result<T, ModelError> {
        let load = || load(&self.loader());
        let (before, start) = (self.checkpoint.bytes_read(), Instant::now());
        let report = |event: &'static str| {
            let read = self.checkpoint.bytes_read() - before;
            let gigabytes = read as f64 / 1e9;
            let seconds = start.elapsed().as_secs_f64();
            let rate = gigabytes / seconds.max(1e-9);
            tracing::info!("{event} {what}: {gigabytes:.2} GB in {seconds:.1} s, {rate:.2} GB/s");
        };
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let result = std::thread::scope(|scope| {
            scope.spawn(|| {
                // Ends when `done` is dropped.
                let wait = wait;
                while wait.recv_timeout(PROGRESS_EVERY)
                    == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
                {
                    report("loading");
                }
            });
            let result = match &self.loaders {
                Some(loaders) => loaders.install(load),
                None => load(),
            };
            drop(done);
            result
        })?;
        if self.checkpoint.bytes_read() > before {
            report("loaded");
        }
        Ok(result)
    }
}

fn keys(wanted: &[Vec<usize>]) -> impl Iterator<Item = Key> {
    let of_layer = |(layer, experts): (usize, &Vec<usize>)| -> Vec<Key> {
        experts.iter().map(|&expert| (layer, expert)).collect()
    };
    wanted.iter().enumerate().flat_map(of_layer)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What they guard is put and taken whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
