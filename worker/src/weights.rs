//! The weights of this process: opened once, loaded once, shared by the workers that live in it.

use crate::platform::Platform;
use kernels::{Cpu, Dtype, ExpertWeights, Experts};
use model::checkpoint::{Checkpoint, CheckpointError};
use model::config::{Config, ConfigError};
use model::footprint::{Footprint, Fp8};
use model::load::{LoadError, Loader};
use model::weights::{Dense, ExpertMap};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often the progress of loading is logged.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// How far the threads that load give way: a tenth of the time that a step's thread gets.
const NICE: i32 = 10;

/// Why a model cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{}: {source}", dir.display())]
    Checkpoint { dir: PathBuf, source: CheckpointError },
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("a later view is being prepared")]
    Superseded,
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
    dense: Mutex<Option<Arc<Dense<Cpu>>>>,
    /// Never locked while something is loaded: who needs nothing does not wait.
    experts: Mutex<ExpertMap>,
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
        Ok(Self {
            config,
            dtype,
            platform,
            checkpoint,
            dense: Mutex::default(),
            experts: Mutex::default(),
            loaders: loaders(),
            reading: Mutex::default(),
        })
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

    /// The dense part; the first caller loads it.
    ///
    /// # Errors
    ///
    /// [`ModelError::Load`].
    pub fn dense(&self) -> Result<Arc<Dense<Cpu>>, ModelError> {
        let mut loaded = lock(&self.dense);
        if let Some(dense) = &*loaded {
            return Ok(Arc::clone(dense));
        }
        let load = || Ok(Arc::new(self.loader().dense()?));
        let dense = self.with_progress("dense weights", load)?;
        *loaded = Some(Arc::clone(&dense));
        Ok(dense)
    }

    /// The experts of every MoE layer in `wanted` (`[moe layers][slots]`, expert ids); what this process
    /// does not have yet is read, several experts at a time, as long as they are `still_wanted`.
    ///
    /// # Errors
    ///
    /// [`ModelError::Load`]; [`ModelError::Superseded`] if they are wanted no more.
    pub fn experts(
        &self,
        wanted: &[Vec<usize>],
        still_wanted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<Experts>, ModelError> {
        use rayon::prelude::*;
        let layers = self.config.moe_layers();
        let load = |&(layer, expert): &Key| {
            if !still_wanted() {
                return Err(ModelError::Superseded);
            }
            self.keep((layer, expert), self.loader().expert(layers[layer], expert)?);
            Ok(())
        };
        loop {
            // Another worker of this process may have forgotten what was just read for this one.
            if let Some(found) = self.find(wanted) {
                return Ok(found);
            }
            let _reading = lock(&self.reading);
            let missing = self.missing(wanted);
            self.with_progress("experts", || missing.par_iter().try_for_each(load))?;
        }
    }

    /// The experts, if this process has them all.
    fn find(&self, wanted: &[Vec<usize>]) -> Option<Vec<Experts>> {
        let loaded = lock(&self.experts);
        let layer_of = |(layer, experts): (usize, &Vec<usize>)| {
            let slots = experts.iter().map(|&expert| loaded.get(&(layer, expert)).cloned());
            Some(Experts { slots: slots.collect::<Option<_>>()? })
        };
        wanted.iter().enumerate().map(layer_of).collect()
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
    pub(crate) fn expert(&self, key: Key) -> Option<Arc<ExpertWeights>> {
        lock(&self.experts).get(&key).cloned()
    }

    /// One in the shape of the layer's, to be filled.
    pub(crate) fn empty_expert(&self, layer: usize) -> Result<ExpertWeights, ModelError> {
        Ok(self.loader().empty_expert(self.config.moe_layers()[layer])?)
    }

    /// Takes one in.
    pub(crate) fn keep(&self, key: Key, weights: Arc<ExpertWeights>) {
        lock(&self.experts).insert(key, weights);
    }

    /// Drops the experts that no worker of this process uses any more, but those that are wanted.
    pub fn forget_unused(&self, wanted: &[Vec<usize>]) {
        let wanted: BTreeSet<Key> = keys(wanted).collect();
        lock(&self.experts)
            .retain(|key, weights| Arc::strong_count(weights) > 1 || wanted.contains(key));
    }

    /// Drops the dense weights, once their users have others.
    pub(crate) fn forget_dense(&self) {
        *lock(&self.dense) = None;
    }

    fn loader(&self) -> Loader<'_> {
        Loader { checkpoint: &self.checkpoint, config: &self.config, dtype: self.dtype }
    }

    /// Runs `load` and logs what it read, each second while it takes longer than that.
    fn with_progress<T: Send>(
        &self,
        what: &'static str,
        load: impl FnOnce() -> Result<T, ModelError> + Send,
    ) -> Result<T, ModelError> {
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

fn loaders() -> Option<rayon::ThreadPool> {
    let give_way = |_| {
        // On Linux a thread's own priority. If it is refused, steps wait a little longer while experts are loaded.
        let _refused = rustix::process::nice(NICE);
    };
    rayon::ThreadPoolBuilder::new()
        .thread_name(|index| format!("load-{index}"))
        .start_handler(give_way)
        .build()
        .ok()
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
