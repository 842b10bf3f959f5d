//! The text model's configuration, read from `config.json`.
//!
//! Decides which of the published spellings means what (nested or flat, `rope_scaling` or
//! `rope_parameters`, interval or list), so that the forward pass sees one value per layer and no
//! `Option` that only history explains. A missing key means what it means to transformers'
//! `Llama4TextConfig`. What this program cannot compute is refused here, before any weight is read.

mod fields;
#[cfg(test)]
mod tests;

use fields::Fields;
use serde_json::{Map, Value};
use std::path::Path;

/// Far above any published model; keeps a broken number from becoming a vector of that length.
const LAYERS_MAX: usize = 4096;

/// Shape and arithmetic of one Llama 4 text model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Width of the residual stream.
    pub hidden: usize,
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    pub kv_heads: usize,
    /// Elements per head; `heads * head_dim` need not be `hidden`.
    pub head_dim: usize,
    /// Inner width of a routed expert and of the shared expert (`intermediate_size`).
    pub expert_width: usize,
    /// Inner width of a dense layer (`intermediate_size_mlp`).
    pub dense_width: usize,
    /// Routed experts per MoE layer; 0 if no layer is MoE.
    pub experts: usize,
    /// `[layers]`: MoE (true) or dense.
    pub moe: Vec<bool>,
    /// `[layers]`: rotary positions; false is a NoPE layer.
    pub rope: Vec<bool>,
    /// `[layers]`: attention stays within the chunk of [`Self::chunk_tokens`].
    pub chunked: Vec<bool>,
    /// Tokens per attention chunk. `None` exactly if no layer is chunked.
    pub chunk_tokens: Option<u32>,
    /// Queries and keys of RoPE layers are normalised per head.
    pub qk_norm: bool,
    pub rope_theta: f64,
    pub rope_scaling: Option<Llama3Scaling>,
    /// Scaling of queries on NoPE layers by position.
    pub temperature: Option<TemperatureTuning>,
    pub norm_eps: f32,
    /// Advertised length (`max_position_embeddings`): 10M for Scout, so never a table size.
    pub context_tokens: u32,
    pub vocab: usize,
    /// The embedding table is also the output head; there is no `lm_head.weight`.
    pub tied_embeddings: bool,
    pub bos: Option<u32>,
    pub eos: Vec<u32>,
    pub pad: Option<u32>,
    pub packaging: Packaging,
}

/// RoPE frequencies stretched as in Llama 3.1. `low_freq_factor` may equal `high_freq_factor`
/// (Scout does), and then there is no smoothing band to interpolate in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Llama3Scaling {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_positions: f64,
}

/// Queries at position `p` of a NoPE layer are multiplied by
/// `1 + attn_scale * ln(1 + floor((p + 1) / floor_scale))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TemperatureTuning {
    pub floor_scale: f64,
    pub attn_scale: f64,
}

/// How the text model's tensors are named in the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packaging {
    /// `Llama4ForConditionalGeneration`: nested configuration, vision tower beside the text model.
    Conditional,
    /// `Llama4ForCausalLM`: text only, flat configuration.
    Causal,
}

impl Packaging {
    /// What stands before the logical name of every text tensor.
    #[must_use]
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Conditional => "language_model.",
            Self::Causal => "",
        }
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {file}: {source}; --model must name the folder with config.json")]
    Io { file: String, source: std::io::Error },
    #[error("{file} is not JSON: {source}; download the file again")]
    Json { file: String, source: serde_json::Error },
    #[error("{file}: `{field}` is {value}: {problem}; {remedy}")]
    Field { file: String, field: String, value: String, problem: String, remedy: String },
}

impl Config {
    /// Reads `config.json` in the checkpoint's folder.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] names the file, the field, its value and what to do.
    pub fn load(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join("config.json");
        let file = path.display().to_string();
        match std::fs::read_to_string(&path) {
            Ok(json) => Self::parse_named(&json, &file),
            Err(source) => Err(ConfigError::Io { file, source }),
        }
    }

    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    ///
    /// As [`Self::load`].
    pub fn parse(json: &str) -> Result<Self, ConfigError> {
        Self::parse_named(json, "config.json")
    }

    fn parse_named(json: &str, file: &str) -> Result<Self, ConfigError> {
        let map: Map<String, Value> = serde_json::from_str(json)
            .map_err(|source| ConfigError::Json { file: file.to_owned(), source })?;
        let top = Fields::new(file, "", &map);
        let (text, packaging) = match top.object("text_config")? {
            Some(text) => (text, Packaging::Conditional),
            None => (top.clone(), Packaging::Causal),
        };
        refuse_unsupported(&top, &text)?;
        Self::from_text(&top, &text, packaging)
    }

    fn from_text(top: &Fields, text: &Fields, packaging: Packaging) -> Result<Self, ConfigError> {
        let hidden = text.size("hidden_size")?;
        let layers = text.size("num_hidden_layers")?;
        if LAYERS_MAX < layers {
            let remedy = "use the config.json that belongs to the checkpoint";
            return Err(text.error("num_hidden_layers", "not a layer count", remedy));
        }
        let heads = text.size("num_attention_heads")?;
        let moe = moe_layers(text, layers)?;
        let rope = rope_layers(text, layers)?;
        let chunk_tokens = text.chunk_tokens()?;
        let chunked = chunked_layers(text, &rope, chunk_tokens)?;
        let (rope_theta, rope_scaling) = rope_parameters(text)?;
        let tied = match text.present("tie_word_embeddings") {
            Some(_) => text.flag("tie_word_embeddings", Missing::False)?,
            None => top.flag("tie_word_embeddings", Missing::False)?,
        };
        let config = Self {
            hidden,
            layers,
            heads,
            kv_heads: text.size_or("num_key_value_heads", heads)?,
            head_dim: text.size_or("head_dim", hidden / heads)?,
            expert_width: text.size_or("intermediate_size", 8192)?,
            dense_width: text.size_or("intermediate_size_mlp", 16384)?,
            experts: experts(text, &moe)?,
            chunk_tokens: chunk_tokens.filter(|_| chunked.contains(&true)),
            moe,
            rope,
            chunked,
            qk_norm: text.flag("use_qk_norm", Missing::True)?,
            rope_theta,
            rope_scaling,
            temperature: temperature(text)?,
            norm_eps: text.epsilon("rms_norm_eps", 1e-5)?,
            context_tokens: text.token("max_position_embeddings")?.unwrap_or(131_072),
            vocab: text.size("vocab_size")?,
            tied_embeddings: tied,
            bos: text.token("bos_token_id")?,
            eos: text.tokens("eos_token_id")?,
            pad: text.token("pad_token_id")?,
            packaging,
        };
        config.check_shape(text)?;
        Ok(config)
    }

    fn check_shape(&self, text: &Fields) -> Result<(), ConfigError> {
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(text.error(
                "num_key_value_heads",
                &format!("{} query heads cannot share it evenly", self.heads),
                "correct num_attention_heads or num_key_value_heads",
            ));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            let problem = format!("{} cannot be split into rotary pairs", self.head_dim);
            return Err(text.error("head_dim", &problem, "give an even head_dim"));
        }
        for (field, ids) in [
            ("bos_token_id", Vec::from_iter(self.bos)),
            ("eos_token_id", self.eos.clone()),
            ("pad_token_id", Vec::from_iter(self.pad)),
        ] {
            if let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocab) {
                return Err(text.error(
                    field,
                    &format!("{id} is outside the vocabulary of {}", self.vocab),
                    "correct the id or vocab_size",
                ));
            }
        }
        Ok(())
    }

    /// Indices of the MoE layers, ascending: position in this list is the "MoE layer" of the
    /// placement.
    #[must_use]
    pub fn moe_layers(&self) -> Vec<usize> {
        (0..self.layers).filter(|&layer| self.moe[layer]).collect()
    }

    /// Tokens per chunk of a layer's attention; `None` is plain causal attention.
    #[must_use]
    pub fn chunk(&self, layer: usize) -> Option<u32> {
        self.chunk_tokens.filter(|_| self.chunked[layer])
    }

    /// A text that differs if anything differs that changes the model's numbers or its stop ids.
    ///
    /// Members of one cluster compare it. It is stable for one version of this program, and for as
    /// long as [`Config`] has the same fields.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        // FNV-1a: equality of honest configurations, no defence against crafted ones.
        let text = format!("{self:?}");
        let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        format!("llama4-{hash:016x}")
    }
}

/// What a missing flag means.
#[derive(Clone, Copy)]
enum Missing {
    True,
    False,
}

fn refuse_unsupported(top: &Fields, text: &Fields) -> Result<(), ConfigError> {
    for (fields, name, expected) in
        [(top, "model_type", ["llama4", "llama4_text"]), (text, "hidden_act", ["silu", "swish"])]
    {
        if let Some(value) = fields.text(name)?
            && !expected.contains(&value)
        {
            let problem = format!("herd computes {} only", expected.join(" or "));
            return Err(fields.error(name, &problem, "use a Llama 4 checkpoint"));
        }
    }
    if text.flag("attention_bias", Missing::False)? {
        let problem = "Llama 4's attention has no biases and neither has herd's";
        return Err(text.error("attention_bias", problem, "use a checkpoint without biases"));
    }
    for fields in [top, text] {
        let Some(quantization) = fields.object("quantization_config")? else { continue };
        for (name, expected) in
            [("quant_method", "compressed-tensors"), ("format", "float-quantized")]
        {
            if quantization.text(name)?.is_some_and(|value| value != expected) {
                let problem = format!("herd reads {expected:?} (FP8 experts) or plain weights");
                let remedy = "use the bf16 checkpoint or the published FP8 one";
                return Err(quantization.error(name, &problem, remedy));
            }
        }
    }
    Ok(())
}

/// `[layers]`; an explicit list wins over the step, and an empty list means "none".
fn moe_layers(text: &Fields, layers: usize) -> Result<Vec<bool>, ConfigError> {
    if let Some(listed) = text.list("moe_layers")? {
        let mut moe = vec![false; layers];
        for value in listed {
            let layer = value.as_u64().and_then(|layer| usize::try_from(layer).ok());
            match layer.and_then(|layer| moe.get_mut(layer)) {
                Some(slot) => *slot = true,
                None => {
                    let problem = format!("{value} is not one of the {layers} layers");
                    return Err(text.error("moe_layers", &problem, "list layers from 0"));
                }
            }
        }
        return Ok(moe);
    }
    let step = text.count("interleave_moe_layer_step")?.unwrap_or(1);
    Ok((0..layers).map(|layer| step != 0 && (layer + 1) % step == 0).collect())
}

/// `[layers]`. In `no_rope_layers` 1 means "with RoPE"; an empty list means the interval.
fn rope_layers(text: &Fields, layers: usize) -> Result<Vec<bool>, ConfigError> {
    let name = "no_rope_layers";
    let listed = text.list(name)?.unwrap_or_default();
    if listed.is_empty() {
        let interval = text.size_or("no_rope_layer_interval", 4)?;
        return Ok((0..layers).map(|layer| (layer + 1) % interval != 0).collect());
    }
    if listed.len() != layers {
        let problem = format!("it lists {} layers of {layers}", listed.len());
        return Err(text.error(name, &problem, "give 0 or 1 for every layer, or an empty list"));
    }
    let switch = |value: &Value| match value.as_u64() {
        Some(0) => Ok(false),
        Some(1) => Ok(true),
        _ => Err(text.error(name, &format!("{value} is neither 0 nor 1"), "give 0 or 1")),
    };
    listed.iter().map(switch).collect()
}

/// `[layers]`; without `layer_types` the RoPE layers are the chunked ones.
fn chunked_layers(
    text: &Fields,
    rope: &[bool],
    chunk_tokens: Option<u32>,
) -> Result<Vec<bool>, ConfigError> {
    let name = "layer_types";
    let chunked = match text.list(name)? {
        None => rope.to_vec(),
        Some(types) if types.len() != rope.len() => {
            let problem = format!("it lists {} layers of {}", types.len(), rope.len());
            return Err(text.error(name, &problem, "give one type for every layer"));
        }
        Some(types) => {
            let kind = |value: &Value| match value.as_str() {
                Some("chunked_attention") => Ok(true),
                Some("full_attention") => Ok(false),
                _ => {
                    let remedy = "give chunked_attention or full_attention";
                    Err(text.error(name, &format!("{value} is unknown"), remedy))
                }
            };
            types.iter().map(kind).collect::<Result<_, _>>()?
        }
    };
    Ok(chunked.into_iter().map(|chunked| chunked && chunk_tokens.is_some()).collect())
}

fn rope_parameters(text: &Fields) -> Result<(f64, Option<Llama3Scaling>), ConfigError> {
    let theta = text.positive("rope_theta")?;
    let (theta, scaling) = match text.object("rope_parameters")? {
        Some(parameters) => (parameters.positive("rope_theta")?.or(theta), Some(parameters)),
        None => (theta, text.object("rope_scaling")?),
    };
    let theta = theta.unwrap_or(500_000.0);
    let Some(scaling) = scaling else { return Ok((theta, None)) };
    // `type` is the older spelling.
    let name = if scaling.present("rope_type").is_some() { "rope_type" } else { "type" };
    match scaling.text(name)? {
        None | Some("default") => Ok((theta, None)),
        Some("llama3") => {
            let scaling = Llama3Scaling {
                factor: scaling.required("factor")?,
                low_freq_factor: scaling.required("low_freq_factor")?,
                high_freq_factor: scaling.required("high_freq_factor")?,
                original_positions: scaling.required("original_max_position_embeddings")?,
            };
            Ok((theta, Some(scaling)))
        }
        Some(_) => {
            let problem = "herd computes \"default\" and \"llama3\" only";
            Err(scaling.error(name, problem, "use a Llama 4 checkpoint"))
        }
    }
}

fn experts(text: &Fields, moe: &[bool]) -> Result<usize, ConfigError> {
    if !moe.contains(&true) {
        return Ok(0);
    }
    if text.size_or("num_experts_per_tok", 1)? != 1 {
        let remedy = "use a Llama 4 checkpoint: all published ones route to one expert";
        return Err(text.error("num_experts_per_tok", "herd serves top-1 routing", remedy));
    }
    let experts = text.size_or("num_local_experts", 16)?;
    if u16::try_from(experts).is_err() {
        let problem = "more experts than herd can name (65535)";
        return Err(text.error("num_local_experts", problem, "use a Llama 4 checkpoint"));
    }
    Ok(experts)
}

/// The switch is published as absent (on), as a flag and as the number 4.
fn temperature(text: &Fields) -> Result<Option<TemperatureTuning>, ConfigError> {
    if !text.loose_flag("attn_temperature_tuning", Missing::True)? {
        return Ok(None);
    }
    let floor_scale = text.positive("floor_scale")?.unwrap_or(8192.0);
    let attn_scale = text.number("attn_scale")?.unwrap_or(0.1);
    Ok(Some(TemperatureTuning { floor_scale, attn_scale }))
}
