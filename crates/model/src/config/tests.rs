//! Every published spelling, and a message for everything that is refused.

use super::*;
use serde_json::json;

fn golden(name: &str) -> Config {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    Config::load(&root.join(name)).unwrap()
}

/// The smallest configuration that says nothing about what may be missing.
fn minimal() -> Value {
    json!({
        "model_type": "llama4_text", "hidden_size": 64, "num_hidden_layers": 8,
        "num_attention_heads": 4, "vocab_size": 512,
    })
}

fn with(changes: &Value) -> Result<Config, ConfigError> {
    let mut config = minimal();
    for (name, value) in changes.as_object().unwrap() {
        config[name] = value.clone();
    }
    Config::parse(&config.to_string())
}

#[track_caller]
fn check_refused(changes: &Value, message: &str) {
    assert_eq!(with(changes).unwrap_err().to_string(), message);
}

fn pattern(layers: &[bool]) -> String {
    layers.iter().map(|&on| if on { '1' } else { '0' }).collect()
}

#[test]
fn missing_fields_mean_what_transformers_means() {
    let config = with(&json!({})).unwrap();
    assert_eq!(config.kv_heads, 4);
    assert_eq!(config.head_dim, 16);
    assert_eq!((config.expert_width, config.dense_width, config.experts), (8192, 16384, 16));
    assert_eq!(pattern(&config.moe), "11111111");
    assert_eq!(pattern(&config.rope), "11101110");
    assert_eq!(pattern(&config.chunked), "11101110");
    assert_eq!(config.chunk_tokens, Some(8192));
    assert!(config.qk_norm && !config.tied_embeddings);
    assert_eq!((config.rope_theta, config.rope_scaling), (500_000.0, None));
    let tuning = TemperatureTuning { floor_scale: 8192.0, attn_scale: 0.1 };
    assert_eq!(config.temperature, Some(tuning));
    assert_eq!((config.norm_eps, config.context_tokens), (1e-5, 131_072));
    assert_eq!((config.bos, config.eos.len(), config.pad), (None, 0, None));
    assert_eq!(config.packaging, Packaging::Causal);
}

#[test]
fn golden_maverick_reads_from_both_spellings() {
    let flat = golden("maverick-tiny");
    assert_eq!((flat.packaging, flat.experts, flat.dense_width), (Packaging::Causal, 8, 160));
    assert_eq!(pattern(&flat.moe), "010101");
    assert_eq!(pattern(&flat.rope), "111011");
    assert_eq!((flat.eos.as_slice(), flat.pad), (&[401, 407, 408][..], Some(418)));

    let nested = golden("maverick-tiny-128e");
    assert_eq!((nested.packaging.prefix(), nested.experts), ("language_model.", 128));
    assert_eq!(nested.moe_layers(), [1, 3]);
    assert_eq!(pattern(&nested.chunked), "1110");
    assert_eq!((nested.chunk(0), nested.chunk(3)), (Some(24), None));
    assert_eq!(nested.rope_theta, 500_000.0);
}

#[test]
fn golden_scout_has_scaling_and_an_empty_list_of_layers() {
    let config = golden("scout-tiny");
    assert_eq!(pattern(&config.rope), "11101");
    assert_eq!(pattern(&config.moe), "11111");
    let scaling = Llama3Scaling {
        factor: 16.0,
        low_freq_factor: 1.0,
        high_freq_factor: 1.0,
        original_positions: 64.0,
    };
    assert_eq!(config.rope_scaling, Some(scaling));
    // The switch is missing in this file, which means "on".
    let tuning = TemperatureTuning { floor_scale: 4.0, attn_scale: 0.2 };
    assert_eq!(config.temperature, Some(tuning));
    assert_eq!(config.context_tokens, 10_485_760);
}

#[test]
fn temperature_switch_has_many_spellings() {
    for (value, on) in [
        (json!(true), true),
        (json!(4), true),
        (json!(1.0), true),
        (json!(false), false),
        (json!(0), false),
        (json!(null), false),
    ] {
        let config = with(&json!({ "attn_temperature_tuning": value })).unwrap();
        assert_eq!(config.temperature.is_some(), on, "{value}");
    }
}

#[test]
fn layer_lists_win_over_intervals() {
    let listed = with(&json!({ "no_rope_layers": [1, 0, 1, 0, 1, 0, 1, 0], "moe_layers": [0, 7] }));
    let listed = listed.unwrap();
    assert_eq!(pattern(&listed.rope), "10101010");
    assert_eq!(pattern(&listed.chunked), "10101010");
    assert_eq!(listed.moe_layers(), [0, 7]);

    let interval = with(&json!({ "no_rope_layer_interval": 3, "interleave_moe_layer_step": 3 }));
    let interval = interval.unwrap();
    assert_eq!(pattern(&interval.rope), "11011011");
    assert_eq!(pattern(&interval.moe), "00100100");

    let types = with(&json!({ "layer_types": ["full_attention", "chunked_attention",
        "full_attention", "full_attention", "full_attention", "full_attention",
        "full_attention", "chunked_attention"] }));
    assert_eq!(pattern(&types.unwrap().chunked), "01000001");
}

#[test]
fn dense_relatives_have_no_experts_and_no_chunks() {
    let by_list = with(&json!({ "moe_layers": [], "num_experts_per_tok": 0 }));
    // A count of 0 is refused as a size, but only where experts exist.
    let by_step = with(&json!({ "interleave_moe_layer_step": 0, "attention_chunk_size": null }));
    assert_eq!(by_list.unwrap().experts, 0);
    let by_step = by_step.unwrap();
    assert_eq!((by_step.moe_layers().len(), by_step.chunk_tokens), (0, None));
    assert_eq!(pattern(&by_step.chunked), "00000000");
}

#[test]
fn both_spellings_of_rope_agree() {
    let numbers = json!({ "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192 });
    let mut old = numbers.clone();
    old["type"] = json!("llama3");
    let mut new = numbers;
    new["rope_type"] = json!("llama3");
    new["rope_theta"] = json!(10_000.0);
    let old = with(&json!({ "rope_scaling": old, "rope_theta": 10_000 })).unwrap();
    let new = with(&json!({ "rope_parameters": new, "rope_theta": 5.0 })).unwrap();
    assert!(old.rope_scaling.is_some());
    assert_eq!(old, new);
    assert_eq!(old.fingerprint(), new.fingerprint());
}

#[test]
fn fingerprint_changes_with_every_number() {
    let base = with(&json!({})).unwrap().fingerprint();
    for change in [
        json!({ "rms_norm_eps": 1e-6 }),
        json!({ "use_qk_norm": false }),
        json!({ "attn_scale": 0.2 }),
        json!({ "eos_token_id": 7 }),
        json!({ "no_rope_layer_interval": 5 }),
    ] {
        assert_ne!(with(&change).unwrap().fingerprint(), base, "{change}");
    }
}

#[test]
fn what_cannot_be_served_is_refused_with_field_and_remedy() {
    check_refused(
        &json!({ "num_experts_per_tok": 2 }),
        "config.json: `num_experts_per_tok` is 2: herd serves top-1 routing; use a Llama 4 \
         checkpoint: all published ones route to one expert",
    );
    check_refused(
        &json!({ "hidden_act": "gelu" }),
        "config.json: `hidden_act` is \"gelu\": herd computes silu or swish only; use a Llama 4 \
         checkpoint",
    );
    check_refused(
        &json!({ "model_type": "llama" }),
        "config.json: `model_type` is \"llama\": herd computes llama4 or llama4_text only; use a \
         Llama 4 checkpoint",
    );
    check_refused(
        &json!({ "attention_bias": true }),
        "config.json: `attention_bias` is true: Llama 4's attention has no biases and neither has \
         herd's; use a checkpoint without biases",
    );
    check_refused(
        &json!({ "rope_scaling": { "rope_type": "yarn", "factor": 2 } }),
        "config.json: `rope_scaling.rope_type` is \"yarn\": herd computes \"default\" and \
         \"llama3\" only; use a Llama 4 checkpoint",
    );
    check_refused(
        &json!({ "quantization_config": { "quant_method": "fbgemm_fp8" } }),
        "config.json: `quantization_config.quant_method` is \"fbgemm_fp8\": herd reads \
         \"compressed-tensors\" (FP8 experts) or plain weights; use the bf16 checkpoint or the \
         published FP8 one",
    );
}

#[test]
fn contradictions_are_refused() {
    for (change, part) in [
        (json!({ "hidden_size": null }), "`hidden_size` is null: the model's shape depends on it"),
        (json!({ "hidden_size": "64" }), "`hidden_size` is \"64\": it must be a positive whole"),
        (json!({ "num_key_value_heads": 3 }), "4 query heads cannot share it evenly"),
        (json!({ "head_dim": 15 }), "`head_dim` is 15: 15 cannot be split into rotary pairs"),
        (json!({ "no_rope_layers": [1, 0] }), "it lists 2 layers of 8"),
        (json!({ "no_rope_layers": [1, 1, 1, 2, 1, 1, 1, 0] }), "2 is neither 0 nor 1"),
        (json!({ "moe_layers": [8] }), "8 is not one of the 8 layers"),
        (json!({ "layer_types": ["full_attention"] }), "it lists 1 layers of 8"),
        (json!({ "eos_token_id": [1, 512] }), "512 is outside the vocabulary of 512"),
        (json!({ "attention_chunk_size": 0 }), "it must be a positive whole number or null"),
        (json!({ "num_hidden_layers": 4_000_000_000_u32 }), "not a layer count"),
        (json!({ "rope_scaling": { "rope_type": "llama3" } }), "`rope_scaling.factor` is missing"),
    ] {
        let message = with(&change).unwrap_err().to_string();
        assert!(message.contains(part), "{change}: {message}");
    }
    let text = json!({ "model_type": "llama4", "text_config": { "hidden_size": 0 } });
    let message = Config::parse(&text.to_string()).unwrap_err().to_string();
    assert!(message.contains("`text_config.hidden_size` is 0"), "{message}");
    assert!(Config::parse("{").unwrap_err().to_string().contains("is not JSON"));
    let missing = Config::load(Path::new("/nowhere")).unwrap_err().to_string();
    assert!(missing.starts_with("cannot read /nowhere/config.json: "), "{missing}");
}
