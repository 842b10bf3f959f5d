//! What a cluster agrees on.

use crate::Placement;
use ids::{Epoch, Rank, WorkerId};

/// Capacity of a rank's two KV pools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvPools {
    /// Positions of one block.
    pub block_tokens: u32,
    /// Blocks for the layers that attend to every earlier position.
    pub full_blocks: u32,
    /// Blocks for the layers that attend within a chunk.
    pub chunked_blocks: u32,
    /// Positions of a chunk; `None` if no layer is chunked.
    pub chunk_tokens: Option<u32>,
    /// Positions of other ranks' sequences of which it can keep copies.
    pub backup_tokens: u32,
}

/// A worker in a view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub worker: WorkerId,
    pub rank: Rank,
    /// `host:port` of its service.
    pub address: String,
    /// Random per process start: a restarted worker is another one.
    pub incarnation: String,
    pub pid: u32,
    pub device: String,
    pub kv: KvPools,
    /// Longest sequence it can hold.
    pub context_tokens: u32,
    /// `host:port` of its exchange between processes; empty if it exchanges within one only.
    pub exchange: String,
}

/// Epoch, ranks, placement and numeric profile; immutable, replaced whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    pub epoch: Epoch,
    /// By rank.
    pub members: Vec<Member>,
    pub placement: Placement,
    /// Equal on all ranks: equal profiles give equal bits.
    pub profile: String,
    /// Fingerprint of the model's configuration.
    pub model: String,
}
