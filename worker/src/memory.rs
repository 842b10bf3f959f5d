//! How the memory of a worker is shared out, before anything of it is taken.

use crate::platform::Ranks;
use crate::{KvBlocks, Model};
use kernels::DeviceError;
use std::fmt;

/// Places of a GPU that change: the experts of a view come before those of the last go, and a GPU has no memory but its own.
const KEPT_BACK: usize = 1;

/// What a worker's memory is for, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// What it may take in all.
    pub memory: u64,
    pub dense: u64,
    pub kv: u64,
    /// Copies of other workers' KV rows.
    pub backups: u64,
    /// Of steps, on a GPU: a CPU takes little, and as it goes.
    pub workspace: u64,
    /// One routed expert of every MoE layer.
    pub expert: u64,
    /// Copies of experts per MoE layer that the rest holds, and how many experts there are.
    pub places: usize,
    pub experts: usize,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Not even one expert of each layer fits.
    #[error(
        "{} for weights and KV cache are too few: the dense weights take {}, the KV cache {}{}{}, and one \
         expert of each MoE layer {}; give the worker more (--memory-mib) or its KV cache less (--kv-mib){}{}",
        Size(&.0.memory), Size(&.0.dense), Size(&.0.kv), IfAny(", copies of others' KV rows ", .0.backups),
        IfAny(", the workspace of steps ", .0.workspace), Size(&.0.expert), LessCopies(.0.backups), Remedy(.0.workspace)
    )]
    TooSmall(MemoryPlan),
    /// What steps take cannot be told.
    #[error(transparent)]
    Workspace(#[from] DeviceError),
}

/// What a worker has to share out, and among whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Bytes that it may take.
    pub memory: u64,
    /// Of it, for copies of other workers' KV rows.
    pub backups: u64,
    /// Workers of the cluster, whose rows may all come to this one.
    pub ranks: u16,
    /// Workers that take a KV cache and a workspace out of this memory, and share the weights.
    pub workers: u16,
}

impl MemoryPlan {
    /// Shares memory out; whatever dense weights, KV cache and workspace leave is for experts.
    ///
    /// # Errors
    ///
    /// [`MemoryError::TooSmall`] if that does not hold one expert of each layer.
    pub fn new(model: &Model, kv: KvBlocks, share: Share) -> Result<Self, MemoryError> {
        let Share { memory, backups, ranks, workers } = share;
        let ranks = Ranks { count: ranks, through_host: workers < ranks };
        let workspace = model.platform.workspace(model, kv, ranks)? * u64::from(workers);
        let footprint = model.footprint();
        let (dense, expert, experts) = (footprint.dense, footprint.expert, footprint.experts);
        let kv = kv.bytes(&model.config, model.dtype) * u64::from(workers);
        let others = [dense, kv, backups, workspace];
        let left = others.into_iter().fold(memory, u64::saturating_sub);
        let fit = usize::try_from(left / expert.max(1)).unwrap_or(usize::MAX);
        // Not the last one.
        let kept_back = model.platform.gpu().map_or(0, |_| KEPT_BACK);
        let fit = if fit < experts { fit.saturating_sub(kept_back).max(fit.min(1)) } else { fit };
        let places = fit.min(experts);
        let plan = Self { memory, dense, kv, backups, workspace, expert, places, experts };
        if plan.places == 0 && 0 < experts { Err(MemoryError::TooSmall(plan)) } else { Ok(plan) }
    }
}

/// `4.0 GiB of memory: dense weights 1.2 GiB, KV cache 0.5 GiB, up to 2.3 GiB of experts: 43 of 128 per MoE layer`.
impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { memory, dense, kv, backups, workspace, expert, places, experts } = self;
        let held = Size(&(expert * *places as u64)).to_string();
        write!(f, "{} of memory: dense weights {}, ", Size(memory), Size(dense))?;
        let workspace = IfAny(", workspace of steps ", *workspace);
        let backups = IfAny(", copies of others' KV rows ", *backups);
        write!(f, "KV cache {}{backups}{workspace}, up to {held} of experts: ", Size(kv))?;
        write!(f, "{places} of {experts} per MoE layer")
    }
}

/// What something takes, if it does.
struct IfAny(&'static str, u64);

impl fmt::Display for IfAny {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.1 == 0 { Ok(()) } else { write!(f, "{}{}", self.0, Size(&self.1)) }
    }
}

/// How to have more for the rest.
struct LessCopies(u64);

impl fmt::Display for LessCopies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0 == 0 { "" } else { ", or fewer copies (--backup-mib)" })
    }
}

/// How to make them smaller.
struct Remedy(u64);

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0 == 0 { "" } else { ", or make steps smaller (--step-tokens)" })
    }
}

/// Bytes as people read them.
struct Size<'a>(&'a u64);

impl fmt::Display for Size<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = *self.0 as f64 / f64::from(1 << 20);
        if mib < 1024.0 { write!(f, "{mib:.1} MiB") } else { write!(f, "{:.1} GiB", mib / 1024.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::{Cpu, Dtype};
    use model::footprint::Footprint;
    use model::weights::{FeedForward, Layer, Mlp};
    use std::path::Path;

    fn toy() -> (Model, KvBlocks) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let model = Model::open(&root.join("models/toy-maverick"), Dtype::Bf16).unwrap();
        let kv = KvBlocks::plan(&model.config, model.dtype, 1 << 24, 4).unwrap();
        (model, kv)
    }

    fn alone(memory: u64) -> Share {
        Share { memory, backups: 0, ranks: 1, workers: 1 }
    }

    #[test]
    fn what_is_planned_is_what_loading_takes() {
        let (model, _) = toy();
        let footprint = model.footprint();
        let expert: usize = (0..model.config.moe_layers().len())
            .map(|layer| model.blank_expert(layer).unwrap())
            .map(|expert| expert.part_bytes().iter().sum::<usize>())
            .sum();
        assert_eq!(footprint.expert, expert as u64);
        let dense = model.dense().unwrap();
        let mlp = |mlp: &Mlp<Cpu>| mlp.gate_up.bytes() + mlp.down.bytes();
        let layer = |layer: &Layer<Cpu>| {
            let feed_forward = match &layer.feed_forward {
                FeedForward::Dense(dense) => mlp(dense),
                FeedForward::Moe { router, shared } => router.bytes() + mlp(shared),
            };
            layer.qkv.bytes() + layer.output.bytes() + feed_forward
        };
        let read = dense.layers.iter().map(layer).sum::<usize>() + dense.lm_head.bytes();
        assert_eq!(footprint.read, read as u64);
        let embedding = 2 * (model.config.vocab * model.config.hidden) as u64;
        let others = footprint.dense - footprint.read - embedding;
        assert!(others < footprint.dense / 50, "norms: {others} of {}", footprint.dense);
    }

    #[test]
    fn experts_get_what_the_others_leave() {
        let (model, kv) = toy();
        let Footprint { dense, expert, .. } = model.footprint();
        let kv_bytes = kv.bytes(&model.config, model.dtype);
        let fixed = dense + kv_bytes;
        let places = |memory| MemoryPlan::new(&model, kv, alone(memory)).unwrap().places;
        assert_eq!(places(fixed + 3 * expert), 3);
        assert_eq!(places(fixed + 4 * expert - 1), 3);
        assert_eq!(places(1 << 40), 16, "no more than there are");
        let share = Share { backups: expert, ..alone(fixed + 4 * expert) };
        assert_eq!(MemoryPlan::new(&model, kv, share).unwrap().places, 3, "less the copies");
        let two = Share { ranks: 2, workers: 2, ..alone(fixed + 3 * expert) };
        let two = MemoryPlan::new(&model, kv, Share { memory: two.memory + kv_bytes, ..two });
        assert_eq!(two.unwrap().places, 3, "a KV cache each");
    }

    #[test]
    fn gpu_that_does_not_hold_all_keeps_a_place_for_changes() {
        let driver = std::sync::Arc::new(kernels::cuda::Driver::plan());
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let platform = crate::Platform::Cuda(crate::Gpu::new(driver));
        let dir = root.join("models/toy-maverick");
        let model = Model::open_for(&dir, Dtype::Bf16, platform).unwrap();
        let kv = KvBlocks::plan(&model.config, model.dtype, 1 << 24, 4).unwrap();
        let Footprint { dense, expert, .. } = model.footprint();
        let fixed = dense + kv.bytes(&model.config, model.dtype);
        let places = |experts: u64| {
            MemoryPlan::new(&model, kv, alone(fixed + experts * expert)).unwrap().places
        };
        assert_eq!([1, 2, 4, 15, 16].map(places), [1, 1, 3, 14, 16]);
    }

    #[test]
    fn too_little_is_refused_with_the_numbers_and_the_remedy() {
        let (model, kv) = toy();
        let text = MemoryPlan::new(&model, kv, alone(1 << 20)).unwrap_err().to_string();
        assert!(text.starts_with("1.0 MiB for weights and KV cache are too few"), "{text}");
        assert!(text.contains("KV cache ") && text.contains("--memory-mib"), "{text}");
        assert!(!text.contains("--backup-mib"), "{text}");
        let share = Share { backups: 1 << 20, ..alone(1 << 20) };
        let text = MemoryPlan::new(&model, kv, share).unwrap_err().to_string();
        assert!(text.contains("rows 1.0 MiB") && text.contains("--backup-mib"), "{text}");
    }
}
