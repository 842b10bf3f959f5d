//! The published weight files: which tensors there are, where their bytes lie, whether they are
//! sound.
//!
//! Opening reads headers only and reports everything that is wrong at once, because a download of
//! hundreds of gigabytes should be repaired in one round. Weights are read by positioned reads
//! into the caller's memory: a fused expert tensor has 21 GB, so no tensor is ever read whole
//! here, and nothing is mapped (a page fault on a slow disk has no error and no progress).

mod error;
mod files;
pub mod names;
#[cfg(test)]
mod tests;
mod verify;

pub use error::{CheckpointError, NonFinite, Problem};

use crate::config::Config;
use files::{Entry, Shard};
use names::{Kind, Required};
use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Element type of a stored tensor, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F32,
    Bf16,
    F16,
    /// 1-4-3 bits, bias 7, largest value 448, no infinities ("e4m3fn").
    F8E4M3,
}

impl Dtype {
    /// Bytes per element.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::F8E4M3 => 1,
        }
    }

    /// The name in a safetensors header.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::F8E4M3 => "F8_E4M3",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [Self::F32, Self::Bf16, Self::F16, Self::F8E4M3].into_iter().find(|d| d.name() == name)
    }
}

/// How one MoE layer's experts are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertFormat {
    /// Two tensors with all experts.
    Fused,
    /// Three FP8 matrices with scales for every expert.
    PerExpertFp8,
}

/// One tensor of the text model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Logical name, without the packaging's prefix.
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Index of the file within the checkpoint.
    pub file: usize,
    /// Where the tensor's first byte lies in its file.
    pub offset: u64,
    pub bytes: u64,
}

/// A checkpoint whose headers have been checked against the configuration.
#[derive(Debug)]
pub struct Checkpoint {
    source: Source,
    tensors: BTreeMap<String, TensorInfo>,
    /// `[layers]`; `None` on dense layers.
    experts: Vec<Option<ExpertFormat>>,
    bytes_read: AtomicU64,
}

/// Where the bytes come from.
enum Source {
    Files(Vec<Shard>),
    /// They are made when somebody wants them.
    Made(Make),
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Files(shards) => f.debug_tuple("Files").field(shards).finish(),
            Self::Made(_) => f.write_str("Made"),
        }
    }
}

/// Makes the bytes of a tensor from an offset on.
pub(crate) type Make = Box<dyn Fn(&TensorInfo, u64, &mut [u8]) + Send + Sync>;

impl Checkpoint {
    /// Opens `model.safetensors`, or `model.safetensors.index.json` with its shards.
    ///
    /// Tensors that the text model does not need (the vision tower) are ignored.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Problems`] with everything that is missing, truncated or of the wrong
    /// shape or type; the other variants if the folder itself cannot be read.
    pub fn open(dir: &Path, config: &Config) -> Result<Self, CheckpointError> {
        let files::Listing { shards, entries, mut problems, unreadable } =
            files::list(dir, config.packaging.prefix())?;
        let format = |layer: usize| expert_format(&entries, layer);
        let experts = (0..config.layers).map(|layer| config.moe[layer].then(|| format(layer)));
        let experts = experts.collect();
        let mut tensors = BTreeMap::new();
        for required in names::required(config, format) {
            match entries.get(&required.name) {
                Some(entry) => match check(&required, entry, &shards) {
                    Ok(info) => drop(tensors.insert(required.name, info)),
                    Err(problem) => problems.push(problem),
                },
                // The file that should hold it has been reported already.
                None if unreadable.holds(&required.name) => {}
                None => {
                    let tensor = format!("{}{}", config.packaging.prefix(), required.name);
                    problems.push(Problem::MissingTensor { tensor, expected: required.shape });
                }
            }
        }
        if !problems.is_empty() {
            return Err(CheckpointError::Problems(problems));
        }
        Ok(Self { source: Source::Files(shards), tensors, experts, bytes_read: AtomicU64::new(0) })
    }

    /// One without files. `experts` is how those of each layer are stored.
    pub(crate) fn made(
        tensors: impl Iterator<Item = TensorInfo>,
        experts: Vec<Option<ExpertFormat>>,
        make: Make,
    ) -> Self {
        let tensors = tensors.map(|info| (info.name.clone(), info)).collect();
        Self { source: Source::Made(make), tensors, experts, bytes_read: AtomicU64::new(0) }
    }

    /// The tensor with this logical name (see [`names`]).
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// All tensors of the text model, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values()
    }

    /// How the experts of a layer are stored; `None` for a dense layer.
    #[must_use]
    pub fn expert_format(&self, layer: usize) -> Option<ExpertFormat> {
        self.experts[layer]
    }

    /// Name of the file that holds a tensor, for messages.
    fn file_name(&self, tensor: &TensorInfo) -> String {
        match &self.source {
            Source::Files(shards) => shards[tensor.file].name.clone(),
            Source::Made(_) => "no file".to_owned(),
        }
    }

    /// Bytes of the text model's tensors.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|tensor| tensor.bytes).sum()
    }

    /// Bytes read so far, by any thread; for progress.
    #[must_use]
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Fills `out` with the bytes of `tensor` from `byte_offset` on. Any thread may call it.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Io`] with the file's path.
    ///
    /// # Panics
    ///
    /// If the range leaves the tensor.
    pub fn read_at(
        &self,
        tensor: &TensorInfo,
        byte_offset: u64,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let length = out.len() as u64;
        let end = byte_offset.checked_add(length).expect("a tensor is shorter than 2^64 bytes");
        assert!(end <= tensor.bytes, "{}: read to {end} of {} bytes", tensor.name, tensor.bytes);
        match &self.source {
            Source::Files(shards) => {
                let shard = &shards[tensor.file];
                let read = shard.file.read_exact_at(out, tensor.offset + byte_offset);
                read.map_err(|source| CheckpointError::Io { path: shard.path.clone(), source })?;
            }
            Source::Made(make) => make(tensor, byte_offset, out),
        }
        self.bytes_read.fetch_add(length, Ordering::Relaxed);
        Ok(())
    }
}

/// Decided by presence: an index entry below `experts.` that starts with a digit is one expert's.
fn expert_format(entries: &BTreeMap<String, Entry>, layer: usize) -> ExpertFormat {
    let prefix = format!("model.layers.{layer}.feed_forward.experts.");
    // ':' follows '9' in ASCII.
    let mut numbered = entries.range(format!("{prefix}0")..format!("{prefix}:"));
    match numbered.next() {
        Some(_) => ExpertFormat::PerExpertFp8,
        None => ExpertFormat::Fused,
    }
}

fn check(required: &Required, entry: &Entry, shards: &[Shard]) -> Result<TensorInfo, Problem> {
    let file = || shards[entry.file].name.clone();
    let allowed: &[Dtype] = match required.kind {
        Kind::Weight | Kind::Norm => &[Dtype::F32, Dtype::Bf16, Dtype::F16],
        Kind::Fp8 => &[Dtype::F8E4M3],
        Kind::Scale => &[Dtype::F32, Dtype::Bf16],
    };
    let scale_of_rank_one = required.kind == Kind::Scale && entry.shape == required.shape[..1];
    if entry.shape != required.shape && !scale_of_rank_one {
        return Err(Problem::Shape {
            file: file(),
            tensor: entry.stored_name.clone(),
            expected: required.shape.clone(),
            found: entry.shape.clone(),
        });
    }
    let dtype = Dtype::from_name(&entry.dtype).filter(|dtype| allowed.contains(dtype));
    let Some(dtype) = dtype else {
        return Err(Problem::Dtype {
            file: file(),
            tensor: entry.stored_name.clone(),
            expected: allowed.iter().map(|dtype| dtype.name()).collect(),
            found: entry.dtype.clone(),
        });
    };
    Ok(TensorInfo {
        name: required.name.clone(),
        dtype,
        shape: entry.shape.clone(),
        file: entry.file,
        offset: entry.offset,
        bytes: entry.bytes,
    })
}
