//! Random checkpoints of any Llama 4 shape, in the published layout.
//!
//! They stand in for weights that are not at hand: memory, traffic and speed are those of the real
//! model, the text is nonsense. Every value is a function of the seed, the tensor's name and the
//! element's index, so the same seed gives the same bytes whatever the threads and shards are.

mod numbers;
#[cfg(test)]
mod tests;
mod tokenizer;

pub use tokenizer::TokenizerOrigin;

use crate::checkpoint::names::{self, Required};
use crate::checkpoint::{Checkpoint, ExpertFormat, TensorInfo};
use crate::config::{Config, ConfigError};
use numbers::{Filler, Stored};
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Elements that one thread makes and writes at a time: 2 to 4 MiB of F32 or BF16.
const PIECE_ELEMENTS: u64 = 1 << 20;

/// Element type of everything but FP8 experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightType {
    F32,
    Bf16,
}

/// How routed experts are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SynthExperts {
    /// Two fused tensors per layer in the [`WeightType`].
    Fused,
    /// The FP8 packaging: one matrix per expert, scales in BF16.
    Fp8,
}

/// What to write.
#[derive(Clone, Debug)]
pub struct SynthOptions {
    pub seed: u64,
    pub dtype: WeightType,
    pub experts: SynthExperts,
    /// A file is closed before it exceeds this; a larger tensor has a file of its own.
    pub shard_bytes_max: u64,
    /// A folder whose tokenizer is copied if its ids fit the vocabulary.
    pub tokenizer_from: Option<PathBuf>,
}

impl Default for SynthOptions {
    /// bf16, in files of the published size.
    fn default() -> Self {
        Self {
            seed: 0,
            dtype: WeightType::Bf16,
            experts: SynthExperts::Fused,
            shard_bytes_max: 5_000_000_000,
            tokenizer_from: None,
        }
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    pub tensors: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Names of the weight files.
    pub files: Vec<String>,
    pub tokenizer: TokenizerOrigin,
}

/// Why a checkpoint could not be written.
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{} is not empty; name a new folder, old files would mix with the new ones", dir.display())]
    NotEmpty { dir: PathBuf },
}

/// Writes a checkpoint with the shape of `config_json` into the new folder `out`.
///
/// * `progress`: called from any thread with the bytes written and in all.
///
/// # Errors
///
/// [`SynthError`] names the file. What was written until then stays.
pub fn write(
    config_json: &str,
    out: &Path,
    options: &SynthOptions,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Summary, SynthError> {
    let config = Config::parse(config_json)?;
    std::fs::create_dir_all(out).map_err(io(out))?;
    if std::fs::read_dir(out).map_err(io(out))?.next().is_some() {
        return Err(SynthError::NotEmpty { dir: out.to_owned() });
    }
    let shards = plan(&config, options);
    let bytes = shards.iter().flat_map(|shard| &shard.tensors).map(|tensor| tensor.bytes).sum();
    let done = AtomicU64::new(0);
    for shard in &shards {
        shard.write(out, options.seed, &|written| {
            progress(done.fetch_add(written, Ordering::Relaxed) + written, bytes);
        })?;
    }
    if 1 < shards.len() {
        write_json(&out.join("model.safetensors.index.json"), &index(&shards, bytes))?;
    }
    write_text(&out.join("config.json"), &published_config(config_json, options.experts))?;
    let generation = json!({
        "bos_token_id": config.bos, "do_sample": true, "eos_token_id": config.eos,
        "pad_token_id": config.pad, "temperature": 0.6, "top_p": 0.9,
    });
    write_json(&out.join("generation_config.json"), &generation)?;
    Ok(Summary {
        tensors: shards.iter().map(|shard| shard.tensors.len()).sum(),
        bytes,
        files: shards.into_iter().map(|shard| shard.name).collect(),
        tokenizer: tokenizer::write(&config, out, options.tokenizer_from.as_deref())?,
    })
}

/// The checkpoint that [`write`] would write, without its files: weights are made when they are read.
///
/// * `options`: what concerns files and the tokenizer has no effect
#[must_use]
pub fn checkpoint(config: &Config, options: &SynthOptions) -> Checkpoint {
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    for shard in plan(config, options) {
        tensors.extend(shard.tensors.into_iter().map(|t| (t.required.name.clone(), t)));
    }
    let info = |tensor: &Tensor| TensorInfo {
        name: tensor.required.name.clone(),
        dtype: tensor.stored.dtype(),
        shape: tensor.required.shape.clone(),
        file: 0,
        offset: 0,
        bytes: tensor.bytes,
    };
    let infos: Vec<TensorInfo> = tensors.values().map(info).collect();
    let format = format(options.experts);
    let experts = config.moe.iter().map(|is_moe| is_moe.then_some(format)).collect();
    let filler = Filler::new(options.seed);
    let make = move |info: &TensorInfo, at: u64, out: &mut [u8]| {
        tensors[&info.name].make(&filler, at, out);
    };
    Checkpoint::made(infos.into_iter(), experts, Box::new(make))
}

struct Shard {
    name: String,
    tensors: Vec<Tensor>,
}

struct Tensor {
    required: Required,
    stored_name: String,
    stored: Stored,
    bytes: u64,
}

fn format(experts: SynthExperts) -> ExpertFormat {
    match experts {
        SynthExperts::Fused => ExpertFormat::Fused,
        SynthExperts::Fp8 => ExpertFormat::PerExpertFp8,
    }
}

impl Tensor {
    /// Makes its bytes from `at` on.
    fn make(&self, filler: &Filler, at: u64, out: &mut [u8]) {
        assert!(at.is_multiple_of(self.stored.bytes()), "nobody reads parts of elements");
        filler.fill(&self.required, self.stored, at / self.stored.bytes(), out);
    }
}

/// Deals the tensors out to files in the order of the forward pass, as the published files have it.
fn plan(config: &Config, options: &SynthOptions) -> Vec<Shard> {
    let format = format(options.experts);
    let mut files: Vec<Vec<Tensor>> = vec![Vec::new()];
    let mut filled = 0;
    for required in names::required(config, |_| format) {
        let stored = Stored::of(required.kind, options.dtype);
        let elements: u64 = required.shape.iter().map(|&size| size as u64).product();
        let bytes = elements * stored.bytes();
        if filled != 0 && options.shard_bytes_max < filled + bytes {
            files.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        let stored_name = format!("{}{}", config.packaging.prefix(), required.name);
        let tensor = Tensor { required, stored_name, stored, bytes };
        files.last_mut().expect("there is always a file").push(tensor);
    }
    let count = files.len();
    let name = |number: usize| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
    };
    files.into_iter().enumerate().map(|(i, tensors)| Shard::new(name(i), tensors)).collect()
}

impl Shard {
    fn new(name: String, mut tensors: Vec<Tensor>) -> Self {
        // Wide elements first, as the reference's writer: every tensor is aligned to its type.
        tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.stored.bytes()));
        Self { name, tensors }
    }

    fn write(
        &self,
        out: &Path,
        seed: u64,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(), SynthError> {
        let path = out.join(&self.name);
        let file = File::create(&path).map_err(io(&path))?;
        let header = self.header();
        file.write_all_at(&header, 0).map_err(io(&path))?;
        let mut offset = header.len() as u64;
        let mut pieces = Vec::new();
        for tensor in &self.tensors {
            let elements = tensor.bytes / tensor.stored.bytes();
            let starts = (0..elements.div_ceil(PIECE_ELEMENTS)).map(|piece| piece * PIECE_ELEMENTS);
            pieces.extend(starts.map(|start| {
                let length = PIECE_ELEMENTS.min(elements - start);
                (tensor, start..start + length, offset + start * tensor.stored.bytes())
            }));
            offset += tensor.bytes;
        }
        let filler = Filler::new(seed);
        pieces.par_iter().try_for_each_init(Vec::new, |buffer, (tensor, range, at)| {
            let bytes = (range.end - range.start) * tensor.stored.bytes();
            buffer.resize(usize::try_from(bytes).expect("a piece fits in memory"), 0);
            filler.fill(&tensor.required, tensor.stored, range.start, buffer);
            file.write_all_at(buffer, *at).map_err(io(&path))?;
            progress(buffer.len() as u64);
            Ok(())
        })
    }

    fn header(&self) -> Vec<u8> {
        let mut map = Map::new();
        map.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
        let mut offset = 0;
        for tensor in &self.tensors {
            let end = offset + tensor.bytes;
            let entry = json!({
                "dtype": tensor.stored.dtype().name(), "shape": tensor.required.shape,
                "data_offsets": [offset, end],
            });
            map.insert(tensor.stored_name.clone(), entry);
            offset = end;
        }
        let mut json = Value::Object(map).to_string().into_bytes();
        json.resize(json.len().next_multiple_of(8), b' ');
        [&(json.len() as u64).to_le_bytes()[..], &json].concat()
    }
}

fn index(shards: &[Shard], bytes: u64) -> Value {
    let files = shards.iter().flat_map(|shard| {
        shard.tensors.iter().map(|tensor| (tensor.stored_name.clone(), json!(shard.name)))
    });
    let map: Map<String, Value> = files.collect();
    json!({ "metadata": { "total_size": bytes }, "weight_map": map })
}

/// The text as given, with a note about FP8 experts for other programs (this one looks at names).
fn published_config(config_json: &str, experts: SynthExperts) -> String {
    let mut config: Value = serde_json::from_str(config_json).expect("it has been parsed before");
    if experts == SynthExperts::Fused || config.get("quantization_config").is_some() {
        return config_json.to_owned();
    }
    config["quantization_config"] =
        json!({ "quant_method": "compressed-tensors", "format": "float-quantized" });
    format!("{config:#}\n")
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> SynthError + '_ {
    |source| SynthError::Io { path: path.to_owned(), source }
}

fn write_json(path: &Path, value: &Value) -> Result<(), SynthError> {
    write_text(path, &format!("{value:#}\n"))
}

fn write_text(path: &Path, text: &str) -> Result<(), SynthError> {
    std::fs::write(path, text).map_err(io(path))
}
