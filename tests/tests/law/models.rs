//! Small models of random Llama 4 shapes.

use herd_tests::rng::Rng;
use kernels::Dtype;
use model::synth::{self, SynthExperts, SynthOptions, WeightType};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use worker::Model;

/// A checkpoint that is removed when dropped.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _removed = std::fs::remove_dir_all(&self.0);
    }
}

/// Writes the checkpoint of a seed and opens it.
pub(crate) fn random(rng: &mut Rng, dtype: Dtype) -> (Folder, Model) {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("herd-law-{}-{number}", std::process::id());
    let folder = Folder(std::env::temp_dir().join(name));
    let weights = match dtype {
        Dtype::F32 => rng.pick(&[WeightType::F32, WeightType::F32, WeightType::Bf16]),
        Dtype::Bf16 => rng.pick(&[WeightType::F32, WeightType::Bf16, WeightType::Bf16]),
    };
    let experts = match rng.one_in(4) {
        true => SynthExperts::Fp8,
        false => SynthExperts::Fused,
    };
    // Products of bf16 numbers work on pairs.
    let widths = match (dtype, weights, experts) {
        (Dtype::F32, WeightType::F32, SynthExperts::Fused) => Widths::Any,
        _ => Widths::Even,
    };
    let config = config(rng, widths);
    let options = SynthOptions {
        seed: rng.bits(),
        dtype: weights,
        experts,
        shard_bytes_max: 1 << 20,
        tokenizer_from: None,
    };
    synth::write(&config.to_string(), &folder.0, &options, &|_, _| ()).unwrap();
    let model = Model::open(&folder.0, dtype).unwrap();
    (folder, model)
}

#[derive(Clone, Copy)]
enum Widths {
    Any,
    Even,
}

fn config(rng: &mut Rng, widths: Widths) -> Value {
    let width = |rng: &mut Rng, most| match widths {
        Widths::Any => rng.between(1, most),
        Widths::Even => 2 * rng.between(1, most / 2),
    };
    let layers = rng.between(1, 4);
    let kv_heads = rng.between(1, 3);
    let heads = kv_heads * rng.pick(&[1, 2, 3, 5, 7]);
    let (hidden, expert_width) = (width(rng, 70), width(rng, 50));
    let dense_width = width(rng, 90);
    let switches = |rng: &mut Rng| (0..layers).map(|_| rng.below(2)).collect::<Vec<_>>();
    let mut config = json!({
        "model_type": "llama4_text", "hidden_act": "silu",
        "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": 2 * rng.between(1, 9),
        "intermediate_size": expert_width, "intermediate_size_mlp": dense_width,
        "num_local_experts": rng.between(1, 16), "num_experts_per_tok": 1,
        "interleave_moe_layer_step": rng.pick(&[1, 1, 2]),
        "no_rope_layers": switches(rng),
        "attention_chunk_size": rng.pick(&[None, Some(5), Some(16), Some(20), Some(33)]),
        "use_qk_norm": rng.one_in(2),
        "attn_temperature_tuning": rng.one_in(2),
        "floor_scale": rng.between(2, 20), "attn_scale": 0.1,
        "rope_theta": rng.pick(&[10_000.0, 500_000.0]),
        "rope_scaling": null,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
        "vocab_size": rng.between(20, 90), "tie_word_embeddings": rng.one_in(2),
        "bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0,
    });
    if rng.one_in(3) {
        let kind = |chunked: u32| match chunked {
            0 => "full_attention",
            _ => "chunked_attention",
        };
        let kinds = switches(rng).into_iter().map(kind).collect::<Vec<_>>();
        config["layer_types"] = json!(kinds);
    }
    if rng.one_in(3) {
        config["rope_scaling"] = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": rng.pick(&[1.0, 4.0]), "original_max_position_embeddings": 16,
        });
    }
    config
}
