//! Logical names of the text model's tensors, without the packaging's prefix, and their shapes.
//!
//! The loader, the check of a checkpoint and the maker of random checkpoints share this table, so
//! a name is spelled once. Shapes follow `nn.Linear` (`[out, in]`), except fused experts, which
//! are published as `[experts, in, out]`.

use super::ExpertFormat;
use crate::config::Config;

/// `[vocab, hidden]`.
pub const EMBED: &str = "model.embed_tokens.weight";
/// `[hidden]`, before the output head.
pub const NORM: &str = "model.norm.weight";
/// `[vocab, hidden]`; absent if the embeddings are tied.
pub const LM_HEAD: &str = "lm_head.weight";

/// A projection of an attention block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    Query,
    Key,
    Value,
    Output,
}

/// A matrix of a gated MLP: dense layer, shared expert or one expert of the FP8 packaging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mlp {
    Gate,
    Up,
    Down,
}

/// A tensor with all experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fused {
    /// `[experts, hidden, 2 * expert_width]`, the gate's columns first.
    GateUp,
    /// `[experts, expert_width, hidden]`.
    Down,
}

impl Attention {
    pub const ALL: [Self; 4] = [Self::Query, Self::Key, Self::Value, Self::Output];

    fn part(self) -> &'static str {
        match self {
            Self::Query => "q_proj",
            Self::Key => "k_proj",
            Self::Value => "v_proj",
            Self::Output => "o_proj",
        }
    }
}

impl Mlp {
    pub const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];

    fn part(self) -> &'static str {
        match self {
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }
}

impl Fused {
    pub const ALL: [Self; 2] = [Self::GateUp, Self::Down];
}

/// `[hidden]`, before attention.
#[must_use]
pub fn input_norm(layer: usize) -> String {
    format!("model.layers.{layer}.input_layernorm.weight")
}

/// `[hidden]`, before the feed-forward part.
#[must_use]
pub fn post_attention_norm(layer: usize) -> String {
    format!("model.layers.{layer}.post_attention_layernorm.weight")
}

/// `[heads * head_dim, hidden]`, `[kv_heads * head_dim, hidden]` twice, `[hidden, heads * head_dim]`.
#[must_use]
pub fn attention(layer: usize, projection: Attention) -> String {
    format!("model.layers.{layer}.self_attn.{}.weight", projection.part())
}

/// `[dense_width, hidden]`, down `[hidden, dense_width]`; dense layers only.
#[must_use]
pub fn dense(layer: usize, matrix: Mlp) -> String {
    format!("model.layers.{layer}.feed_forward.{}.weight", matrix.part())
}

/// `[experts, hidden]`; this and what follows on MoE layers only.
#[must_use]
pub fn router(layer: usize) -> String {
    format!("model.layers.{layer}.feed_forward.router.weight")
}

/// `[expert_width, hidden]`, down `[hidden, expert_width]`.
#[must_use]
pub fn shared_expert(layer: usize, matrix: Mlp) -> String {
    format!("model.layers.{layer}.feed_forward.shared_expert.{}.weight", matrix.part())
}

/// All experts of a layer in one tensor (no `.weight` at the end).
#[must_use]
pub fn fused_experts(layer: usize, tensor: Fused) -> String {
    let part = match tensor {
        Fused::GateUp => "gate_up_proj",
        Fused::Down => "down_proj",
    };
    format!("model.layers.{layer}.feed_forward.experts.{part}")
}

/// One expert's matrix in the FP8 packaging: `[expert_width, hidden]`, down `[hidden, expert_width]`.
#[must_use]
pub fn expert(layer: usize, expert: usize, matrix: Mlp) -> String {
    format!("model.layers.{layer}.feed_forward.experts.{expert}.{}.weight", matrix.part())
}

/// The scales of [`expert`], one per output row: `[out, 1]` or `[out]`.
#[must_use]
pub fn expert_scale(layer: usize, expert: usize, matrix: Mlp) -> String {
    format!("model.layers.{layer}.feed_forward.experts.{expert}.{}.weight_scale", matrix.part())
}

/// Whether a tensor belongs to routed experts.
#[must_use]
pub fn is_routed(name: &str) -> bool {
    name.contains(".feed_forward.experts.")
}

/// What a tensor's elements are, which decides the types it may be stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Matrices and embeddings: F32, BF16 or F16.
    Weight,
    /// The weight of an RMS norm; the same types.
    Norm,
    /// F8_E4M3 with a scale beside it.
    Fp8,
    /// F32 or BF16, one per output row.
    Scale,
}

/// One tensor that a checkpoint must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Required {
    pub name: String,
    pub shape: Vec<usize>,
    pub kind: Kind,
}

/// Every tensor of the text model, in the order of the forward pass.
///
/// * `format`: how the experts of an MoE layer are stored.
pub fn required(config: &Config, format: impl Fn(usize) -> ExpertFormat) -> Vec<Required> {
    let mut all = Vec::new();
    let mut push = |kind, name, shape: &[usize]| {
        all.push(Required { name, shape: shape.to_vec(), kind });
    };
    let hidden = config.hidden;
    push(Kind::Weight, EMBED.to_owned(), &[config.vocab, hidden]);
    for layer in 0..config.layers {
        push(Kind::Norm, input_norm(layer), &[hidden]);
        for projection in Attention::ALL {
            let shape = attention_shape(config, projection);
            push(Kind::Weight, attention(layer, projection), &shape);
        }
        push(Kind::Norm, post_attention_norm(layer), &[hidden]);
        if !config.moe[layer] {
            for matrix in Mlp::ALL {
                let shape = mlp_shape(hidden, config.dense_width, matrix);
                push(Kind::Weight, dense(layer, matrix), &shape);
            }
            continue;
        }
        push(Kind::Weight, router(layer), &[config.experts, hidden]);
        for matrix in Mlp::ALL {
            let shape = mlp_shape(hidden, config.expert_width, matrix);
            push(Kind::Weight, shared_expert(layer, matrix), &shape);
        }
        push_experts(config, layer, format(layer), &mut push);
    }
    push(Kind::Norm, NORM.to_owned(), &[hidden]);
    if !config.tied_embeddings {
        push(Kind::Weight, LM_HEAD.to_owned(), &[config.vocab, hidden]);
    }
    all
}

fn push_experts(
    config: &Config,
    layer: usize,
    format: ExpertFormat,
    push: &mut impl FnMut(Kind, String, &[usize]),
) {
    let (experts, hidden, width) = (config.experts, config.hidden, config.expert_width);
    match format {
        ExpertFormat::Fused => {
            let gate_up = fused_experts(layer, Fused::GateUp);
            push(Kind::Weight, gate_up, &[experts, hidden, 2 * width]);
            push(Kind::Weight, fused_experts(layer, Fused::Down), &[experts, width, hidden]);
        }
        ExpertFormat::PerExpertFp8 => {
            for index in 0..experts {
                for matrix in Mlp::ALL {
                    let shape = mlp_shape(hidden, width, matrix);
                    push(Kind::Fp8, expert(layer, index, matrix), &shape);
                    push(Kind::Scale, expert_scale(layer, index, matrix), &[shape[0], 1]);
                }
            }
        }
    }
}

fn attention_shape(config: &Config, projection: Attention) -> [usize; 2] {
    match projection {
        Attention::Query => [config.heads * config.head_dim, config.hidden],
        Attention::Key | Attention::Value => [config.kv_heads * config.head_dim, config.hidden],
        Attention::Output => [config.hidden, config.heads * config.head_dim],
    }
}

fn mlp_shape(hidden: usize, width: usize, matrix: Mlp) -> [usize; 2] {
    match matrix {
        Mlp::Gate | Mlp::Up => [width, hidden],
        Mlp::Down => [hidden, width],
    }
}
