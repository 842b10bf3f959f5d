//! What weights take in memory.

use crate::checkpoint::ExpertFormat;
use crate::checkpoint::names::{self, Kind};
use crate::load::Loader;
use kernels::Storage;

/// Bytes of a model's weights once they are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    /// All that every rank holds: everything but the routed experts.
    pub dense: u64,
    /// Of these, the matrices that a step reads however few its rows: all but the embedding.
    pub read: u64,
    /// One routed expert of every MoE layer.
    pub expert: u64,
    /// Routed experts of a layer.
    pub experts: usize,
}

/// What a device makes of FP8 weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fp8 {
    /// Numbers of the profile's width.
    Widened,
    /// A byte each, as they are stored.
    Kept,
}

impl Loader<'_> {
    /// The bytes of the weights, without what alignment adds.
    #[must_use]
    pub fn footprint(&self, fp8: Fp8) -> Footprint {
        // It is only asked for MoE layers.
        let format = |layer| self.checkpoint.expert_format(layer).unwrap_or(ExpertFormat::Fused);
        let (mut dense, mut read, mut routed) = (0, 0, 0);
        for tensor in names::required(self.config, format) {
            let elements: u64 = tensor.shape.iter().map(|&size| size as u64).product();
            let width = match tensor.kind {
                Kind::Fp8 if fp8 == Fp8::Kept => 1,
                Kind::Weight | Kind::Fp8 => match self.storage(self.tensor(&tensor.name).dtype) {
                    Storage::F32 => 4,
                    Storage::Bf16 => 2,
                },
                Kind::Norm | Kind::Scale => 4,
            };
            if names::is_routed(&tensor.name) {
                routed += elements * width;
            } else {
                dense += elements * width;
                let is_table = tensor.name == names::EMBED && !self.config.tied_embeddings;
                if tensor.kind == Kind::Weight && !is_table {
                    read += elements * width;
                }
            }
        }
        let experts = self.config.experts;
        Footprint { dense, read, expert: routed / (experts as u64).max(1), experts }
    }
}
