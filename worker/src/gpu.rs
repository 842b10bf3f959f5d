//! The weights of a process on its GPU: read from the checkpoint piece by piece, tiled, and copied there. Nothing of
//! them stays in the host's memory.

use crate::weights::{Model, ModelError};
use all2all::{RouteTables, Routes, Target};
use kernels::cuda::nvml::Nvml;
use kernels::cuda::weights::{
    EmbeddingTable, ExpertOnDevice, ExpertPart, ExpertSizes, ExpertStorage, Loader, NormWeights,
    Weights,
};
use kernels::cuda::{Cuda, CudaError, Driver, ExpertsOnDevice, RouteTable, RouteTableParts};
use kernels::{Dtype, StepRoom, Storage};
use model::checkpoint::names::{self, Fused, Mlp};
use model::checkpoint::{ExpertFormat, TensorInfo};
use model::load::{self, Make};
use model::weights::Dense;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// A GPU and the dense weights on it.
#[derive(Clone)]
pub struct Gpu {
    pub(crate) driver: Arc<Driver>,
    dense: Arc<Mutex<Option<Arc<Dense<Cuda>>>>>,
    /// What tells how it is.
    pub(crate) nvml: Option<Arc<Nvml>>,
    /// Steps that every rank takes the memory for when it starts. `None`: it takes it as steps come.
    pub(crate) room: Option<StepRoom>,
}

impl Gpu {
    /// Ranks on this device, which take memory as their steps come.
    #[must_use]
    pub fn new(driver: Arc<Driver>) -> Self {
        Self { driver, dense: Arc::default(), nvml: None, room: None }
    }

    /// The same, and `herd status` shows how the GPU is.
    #[must_use]
    pub fn watched(self, nvml: Nvml) -> Self {
        Self { nvml: Some(Arc::new(nvml)), ..self }
    }

    /// The same, but each takes at its start what steps of this size need.
    #[must_use]
    pub fn with_room(self, room: StepRoom) -> Self {
        Self { room: Some(room), ..self }
    }

    /// What measures its kernels.
    #[must_use]
    pub fn driver(&self) -> &Driver {
        &self.driver
    }

    /// The dense weights; the first caller brings them there.
    pub(crate) fn dense(&self, model: &Model) -> Result<Arc<Dense<Cuda>>, ModelError> {
        let mut known = self.dense.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(dense) = &*known {
            return Ok(Arc::clone(dense));
        }
        let dense = model.loading("dense weights", |from| {
            Ok(Arc::new(from.dense_by(&OnGpu { from, to: self.loader(from) })?))
        })?;
        *known = Some(Arc::clone(&dense));
        Ok(dense)
    }

    /// Routed expert `expert` of layer `layer` (an index into all layers).
    pub(crate) fn expert(
        &self,
        from: &load::Loader<'_>,
        (layer, expert): (usize, usize),
    ) -> Result<ExpertOnDevice, ModelError> {
        let to = self.loader(from);
        let sizes = sizes(from, layer);
        match (from.dtype, from.checkpoint.expert_format(layer)) {
            (Dtype::F32, _) => Ok(to.plain_expert(&*from.expert(layer, expert)?)?),
            (Dtype::Bf16, Some(ExpertFormat::PerExpertFp8)) => {
                let which = |part| match part {
                    ExpertPart::Gate => names::expert(layer, expert, Mlp::Gate),
                    ExpertPart::Up => names::expert(layer, expert, Mlp::Up),
                    ExpertPart::Down => names::expert(layer, expert, Mlp::Down),
                };
                let scale =
                    |part| from.values(from.tensor(&names::expert_scale(layer, expert, part)));
                let scales = [scale(Mlp::Gate)?, scale(Mlp::Up)?, scale(Mlp::Down)?];
                let scales = scales.each_ref().map(Vec::as_slice);
                to.tiled_expert(sizes, Some(scales), &|part, rows: Range<usize>, out| {
                    let tensor = from.tensor(&which(part));
                    let at = rows.start * tensor.shape[1];
                    Ok(from
                        .checkpoint
                        .read_at(tensor, at as u64, out)
                        .map_err(load::LoadError::from)?)
                })
            }
            (Dtype::Bf16, Some(ExpertFormat::Fused) | None) => {
                // Stored by inputs: transposed in the host's memory on the way.
                let weights = from.expert(layer, expert)?;
                to.tiled_expert(sizes, None, &|part, rows: Range<usize>, out| {
                    let (matrix, rows) = match part {
                        ExpertPart::Gate => (&weights.gate_up, rows),
                        ExpertPart::Up => {
                            let above = sizes.width;
                            (&weights.gate_up, rows.start + above..rows.end + above)
                        }
                        ExpertPart::Down => (&weights.down, rows),
                    };
                    out.copy_from_slice(&matrix.rows(rows));
                    Ok(())
                })
            }
        }
    }

    /// An expert of this layer whose content comes from elsewhere.
    pub(crate) fn blank_expert(
        &self,
        from: &load::Loader<'_>,
        layer: usize,
    ) -> Result<ExpertOnDevice, ModelError> {
        Ok(self.loader(from).empty_expert(sizes(from, layer))?)
    }

    /// Experts as ranks use them, `[moe layers][slots]`.
    pub(crate) fn layers(layers: Vec<Vec<Arc<ExpertOnDevice>>>) -> Vec<ExpertsOnDevice> {
        let of_layer = |(layer, experts)| ExpertsOnDevice::new(layer, experts);
        layers.into_iter().enumerate().map(of_layer).collect()
    }

    /// Where a rank's rows go, on the device.
    pub(crate) fn routes(&self, routes: &Routes) -> Result<Arc<RouteTable>, CudaError> {
        route_table(&self.driver, routes)
    }

    fn loader(&self, from: &load::Loader<'_>) -> Loader {
        Loader::new(&self.driver, from.dtype)
    }
}

/// Where a rank's rows go, on the device.
pub(crate) fn route_table(
    driver: &Arc<Driver>,
    routes: &Routes,
) -> Result<Arc<RouteTable>, CudaError> {
    let RouteTables { targets, spans, start } = routes.tables();
    let of = |target: &Target| (target.rank.0, target.slot, target.until);
    let targets: Vec<_> = targets.iter().map(of).collect();
    let parts = RouteTableParts { spans, targets: &targets, start };
    RouteTable::new(driver, parts).map(Arc::new)
}

/// Of an expert of this layer, and how its profile stores it.
fn sizes(from: &load::Loader<'_>, layer: usize) -> ExpertSizes {
    let storage = match (from.dtype, from.checkpoint.expert_format(layer)) {
        (Dtype::Bf16, Some(ExpertFormat::PerExpertFp8)) => ExpertStorage::Fp8,
        (Dtype::Bf16, Some(ExpertFormat::Fused) | None) => ExpertStorage::Bf16,
        (Dtype::F32, Some(ExpertFormat::PerExpertFp8)) => ExpertStorage::Widened,
        (Dtype::F32, Some(ExpertFormat::Fused) | None) => {
            let stored = from.tensor(&names::fused_experts(layer, Fused::GateUp)).dtype;
            match from.storage(stored) {
                Storage::F32 => ExpertStorage::F32,
                Storage::Bf16 => ExpertStorage::Bf16,
            }
        }
    };
    ExpertSizes { hidden: from.config.hidden, width: from.config.expert_width, storage }
}

/// Brings dense weights to the GPU.
struct OnGpu<'a> {
    from: &'a load::Loader<'a>,
    to: Loader,
}

impl Make<Cuda> for OnGpu<'_> {
    type Error = ModelError;

    fn matrix(&self, tensors: &[&TensorInfo]) -> Result<Weights, ModelError> {
        match self.from.dtype {
            Dtype::F32 => Ok(self.to.matrix(&self.from.matrix(tensors)?)?),
            Dtype::Bf16 => {
                let outputs = tensors.iter().map(|tensor| tensor.shape[0]).sum();
                self.to.bf16_matrix((outputs, tensors[0].shape[1]), &|rows: Range<usize>, out| {
                    Ok(self.from.bf16_rows(tensors, rows, out)?)
                })
            }
        }
    }

    fn norm(&self, tensor: &TensorInfo) -> Result<NormWeights, ModelError> {
        Ok(self.to.norm(&self.from.values(tensor)?)?)
    }

    fn embedding(&self, tensor: &TensorInfo) -> Result<EmbeddingTable, ModelError> {
        Ok(self.to.embedding(&self.from.embedding(tensor)?)?)
    }
}
