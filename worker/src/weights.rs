//! The weights of this process: opened once, loaded once, shared by the workers that live in it.

use kernels::{Cpu, Dtype, ExpertWeights, Experts};
use model::checkpoint::{Checkpoint, CheckpointError};
use model::config::{Config, ConfigError};
use model::load::{LoadError, Loader};
use model::weights::{Dense, ExpertMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
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
}

/// A checkpoint and what has been loaded of it.
pub struct Model {
    pub config: Config,
    pub dtype: Dtype,
    checkpoint: Checkpoint,
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    dense: Option<Arc<Dense<Cpu>>>,
    experts: ExpertMap,
}

impl Model {
    /// Reads the configuration and the headers of the weight files in `dir`.
    ///
    /// # Errors
    ///
    /// [`ModelError`] with everything that is wrong with the files.
    pub fn open(dir: &Path, dtype: Dtype) -> Result<Self, ModelError> {
        let config = Config::load(dir)?;
        let checkpoint = Checkpoint::open(dir, &config)
            .map_err(|source| ModelError::Checkpoint { dir: dir.to_owned(), source })?;
        Ok(Self { config, dtype, checkpoint, loaded: Mutex::default() })
    }

    /// The open files.
    #[must_use]
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The dense part; the first caller loads it.
    ///
    /// # Errors
    ///
    /// [`ModelError::Load`].
    pub fn dense(&self) -> Result<Arc<Dense<Cpu>>, ModelError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(dense) = &loaded.dense {
            return Ok(Arc::clone(dense));
        }
        let dense = self.with_progress("dense weights", || Ok(Arc::new(self.loader().dense()?)))?;
        loaded.dense = Some(Arc::clone(&dense));
        Ok(dense)
    }

    /// The experts of every MoE layer in `wanted` (`[moe layers][slots]`, expert ids); what this process
    /// does not have yet is loaded, several experts at a time.
    ///
    /// # Errors
    ///
    /// [`ModelError::Load`].
    pub fn experts(&self, wanted: &[Vec<usize>]) -> Result<Vec<Experts>, ModelError> {
        use rayon::prelude::*;
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let layers = self.config.moe_layers();
        let missing: Vec<(usize, usize)> = wanted
            .iter()
            .enumerate()
            .flat_map(|(layer, experts)| experts.iter().map(move |&expert| (layer, expert)))
            .filter(|key| !loaded.experts.contains_key(key))
            .collect();
        let load = |&(layer, expert): &(usize, usize)| {
            Ok(((layer, expert), self.loader().expert(layers[layer], expert)?))
        };
        let new: Vec<((usize, usize), Arc<ExpertWeights>)> =
            self.with_progress("experts", || missing.par_iter().map(load).collect())?;
        loaded.experts.extend(new);
        let layer_of = |(layer, experts): (usize, &Vec<usize>)| Experts {
            slots: experts.iter().map(|&e| Arc::clone(&loaded.experts[&(layer, e)])).collect(),
        };
        Ok(wanted.iter().enumerate().map(layer_of).collect())
    }

    /// Drops the experts that no worker of this process uses any more.
    pub fn forget_unused(&self) {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.experts.retain(|_, weights| Arc::strong_count(weights) > 1);
    }

    fn loader(&self) -> Loader<'_> {
        Loader { checkpoint: &self.checkpoint, config: &self.config, dtype: self.dtype }
    }

    /// Runs `load` and logs what it read, each second while it takes longer than that.
    fn with_progress<T: Send>(
        &self,
        what: &'static str,
        load: impl FnOnce() -> Result<T, LoadError> + Send,
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
            let result = load();
            drop(done);
            result
        })?;
        if self.checkpoint.bytes_read() > before {
            report("loaded");
        }
        Ok(result)
    }
}
