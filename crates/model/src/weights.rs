//! The weights of one rank in a device's form, and which bytes of a checkpoint they come from.
//!
//! An attention rank holds the dense part ([`Dense`]); an expert rank holds some experts of every MoE
//! layer. Both kinds are reference-counted, so that ranks which are threads of one process share them.

use kernels::{Cpu, Device, ExpertWeights};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Everything but the routed experts.
pub struct Dense<D: Device> {
    pub embed: D::Embedding,
    pub layers: Vec<Layer<D>>,
    pub final_norm: D::Norm,
    pub lm_head: D::Matrix,
}

/// One decoder layer.
pub struct Layer<D: Device> {
    pub input_norm: D::Norm,
    /// `[q | k | v, hidden]`
    pub qkv: D::Matrix,
    /// `[hidden, q]`
    pub output: D::Matrix,
    pub post_attention_norm: D::Norm,
    pub feed_forward: FeedForward<D>,
}

/// A gated MLP: `down(silu(gate x) * up x)`.
pub struct Mlp<D: Device> {
    /// `[gate | up, hidden]`
    pub gate_up: D::Matrix,
    /// `[hidden, width]`
    pub down: D::Matrix,
}

/// What follows attention.
pub enum FeedForward<D: Device> {
    Dense(Mlp<D>),
    Moe {
        /// `[experts, hidden]`
        router: D::Matrix,
        shared: Mlp<D>,
    },
}

impl Dense<Cpu> {
    /// Bytes of weights that every step reads, however few its rows: all but the embedding, of which
    /// a step reads one row per token.
    #[must_use]
    pub fn step_bytes(&self) -> usize {
        let layers = self.layers.iter().map(|layer| {
            let feed_forward = match &layer.feed_forward {
                FeedForward::Dense(mlp) => mlp.gate_up.bytes() + mlp.down.bytes(),
                FeedForward::Moe { router, shared } => {
                    router.bytes() + shared.gate_up.bytes() + shared.down.bytes()
                }
            };
            layer.qkv.bytes() + layer.output.bytes() + feed_forward
        });
        layers.sum::<usize>() + self.lm_head.bytes()
    }
}

/// The routed experts of a process, by (MoE layer, expert). Loaded once, shared by its ranks.
pub type ExpertMap = BTreeMap<(usize, usize), Arc<ExpertWeights>>;
