//! A worker: its shard of the checkpoint, its device, and its end of the exchange.
//!
//! It executes steps and decides nothing.

mod engine;
mod exchange;
mod weights;

pub use engine::{Engine, EngineError, KvBlocks, Shard};
pub use weights::{Model, ModelError};
