//! What a worker computes on, and how its weights get there.
//!
//! Weights are read and kept in the CPU's form: that is also what other workers take out of this one's memory. A
//! device with memory of its own gets its form made of them before it takes a seat.

use crate::engine::EngineError;
use crate::weights::Model;
use kernels::{Cache, Cpu, DeviceError, Dtype, Experts, Level, Pool, RowMemory, Staged};
use model::forward::{pools, shape};
use model::weights::Dense;
use std::sync::Arc;

/// The kind of device that all workers of a process have.
#[derive(Clone, Default)]
pub enum Platform {
    /// Threads of this machine.
    #[default]
    Cpu,
}

impl Platform {
    /// Ranks of one view must agree on this text: equal profiles give equal bits.
    #[must_use]
    pub fn profile(&self, dtype: Dtype) -> String {
        match self {
            Self::Cpu => Level::detect().profile(dtype),
        }
    }

    /// What `herd status` shows.
    #[must_use]
    pub fn describe(&self, threads: usize) -> String {
        match self {
            Self::Cpu => format!("cpu:{} x{threads}", Level::detect()),
        }
    }

    /// Experts in this platform's form.
    pub(crate) fn place(&self, experts: Vec<Experts>) -> Result<Placed, DeviceError> {
        match self {
            Self::Cpu => Ok(Placed::Cpu(experts)),
        }
    }
}

/// Experts in the form of their platform, `[moe layers]`.
pub(crate) enum Placed {
    Cpu(Vec<Experts>),
}

/// A device that can be a rank.
pub(crate) trait Backend: Staged + Sized {
    /// Opens one for this thread. `memory`: where rows that it sends should lie.
    fn open(model: &Model, threads: usize, memory: Option<RowMemory>) -> Result<Self, EngineError>;

    /// The dense weights in its form; shared by the ranks of a process.
    fn dense(&self, model: &Model) -> Result<Arc<Dense<Self>>, EngineError>;

    /// A KV cache; `blocks` are the capacities of the pools.
    fn cache(
        &self,
        model: &Model,
        blocks: &dyn Fn(Pool) -> u32,
    ) -> Result<Self::Cache, DeviceError>;

    /// Takes what was placed for it.
    fn take(placed: Placed) -> Vec<Self::Experts>;
}

impl Backend for Cpu {
    fn open(model: &Model, threads: usize, memory: Option<RowMemory>) -> Result<Self, EngineError> {
        let cpu = Self::new(Level::detect(), model.dtype, threads)?;
        Ok(match memory {
            Some(memory) => cpu.with_row_memory(memory),
            None => cpu,
        })
    }

    fn dense(&self, model: &Model) -> Result<Arc<Dense<Self>>, EngineError> {
        Ok(model.dense()?)
    }

    fn cache(&self, model: &Model, blocks: &dyn Fn(Pool) -> u32) -> Result<Cache, DeviceError> {
        let (heads, layers) = (shape(&model.config), pools(&model.config));
        Cache::new(model.dtype, heads.kv_heads, heads.head_dim, &layers, blocks)
    }

    fn take(placed: Placed) -> Vec<Experts> {
        match placed {
            Placed::Cpu(experts) => experts,
        }
    }
}
