//! The tokenizer files of a random checkpoint: copied, or one token per byte.

use super::{SynthError, io, write_json, write_text};
use crate::config::Config;
use crate::tokenizer::{Tokenizer, byte_character};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Where the tokenizer files came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenizerOrigin {
    /// From the folder in the options.
    Copied,
    /// 256 bytes and Llama 4's special tokens.
    Generated,
    /// None written: the vocabulary is too small for bytes and special tokens.
    None,
}

/// Llama 4's special tokens by distance from `<|begin_of_text|>`.
const SPECIAL: [(u32, &str); 10] = [
    (0, "<|begin_of_text|>"),
    (1, "<|end_of_text|>"),
    (5, "<|header_start|>"),
    (6, "<|header_end|>"),
    (7, "<|eom|>"),
    (8, "<|eot|>"),
    (9, "<|step|>"),
    (16, "<|python_start|>"),
    (17, "<|python_end|>"),
    (18, "<|finetune_right_pad|>"),
];

const TEMPLATE: &str = "{{- bos_token }}
{%- for message in messages %}
    {{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' + message['content'] + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}
{%- endif %}
";

pub(super) fn write(
    config: &Config,
    out: &Path,
    from: Option<&Path>,
) -> Result<TokenizerOrigin, SynthError> {
    if let Some(from) = from
        && Tokenizer::load(from).is_ok_and(|tokenizer| tokenizer.vocab() <= config.vocab)
    {
        copy(from, out)?;
        return Ok(TokenizerOrigin::Copied);
    }
    let Some(special) = special_tokens(config) else { return Ok(TokenizerOrigin::None) };
    let bytes = (0..=255_u8).map(|byte| (byte_character(byte).to_string(), json!(byte)));
    // Also in the model's vocabulary: `tokenizers` numbers added tokens that are not there from
    // the vocabulary's end, whatever their `id` says, and there is a gap behind the bytes.
    let special_ids = special.iter().map(|(&id, text)| (text.clone(), json!(id)));
    let flags = |id: u32, content: &str| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true })
    };
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false,
        "trim_offsets": true, "use_regex": true });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": special.iter().map(|(&id, text)| flags(id, text)).collect::<Vec<_>>(),
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null,
        "decoder": byte_level,
        "model": { "type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "vocab": bytes.chain(special_ids).collect::<Map<String, Value>>(), "merges": [] },
    });
    let name = |id: Option<u32>| id.and_then(|id| special.get(&id));
    let names = json!({ "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": name(config.bos),
        "eos_token": name(config.eos.last().copied()), "pad_token": name(config.pad) });
    write_json(&out.join("tokenizer.json"), &tokenizer)?;
    write_json(&out.join("tokenizer_config.json"), &names)?;
    write_text(&out.join("chat_template.jinja"), TEMPLATE)?;
    Ok(TokenizerOrigin::Generated)
}

fn copy(from: &Path, out: &Path) -> Result<(), SynthError> {
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
    ] {
        let source = from.join(name);
        if source.exists() {
            std::fs::copy(&source, out.join(name)).map_err(io(&source))?;
        }
    }
    Ok(())
}

/// Special tokens by id; `None` if they do not fit behind the bytes.
fn special_tokens(config: &Config) -> Option<BTreeMap<u32, String>> {
    let vocab = u32::try_from(config.vocab).ok()?;
    let last = SPECIAL[SPECIAL.len() - 1].0;
    let first = config.bos.or_else(|| vocab.checked_sub(last + 1))?;
    if first < 256 || vocab <= first + last {
        return None;
    }
    let mut special: BTreeMap<u32, String> =
        SPECIAL.iter().map(|&(at, text)| (first + at, text.to_owned())).collect();
    for &id in config.eos.iter().chain(&config.pad).filter(|&&id| 256 <= id) {
        special.entry(id).or_insert_with(|| format!("<|reserved_special_token_{id}|>"));
    }
    Some(special)
}
