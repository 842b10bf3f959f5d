//! What chat and text completions have in common: how to choose tokens, when to stop, how to
//! deliver.

use crate::fields::{Fields, as_f32, as_u32, unsupported, wrong};
use crate::{ApiError, ErrorKind};
use serde_json::Value;

/// Choices per prompt, as OpenAI.
const CHOICES_MAX: u32 = 128;
/// OpenAI allows 4, other servers any number; each costs time for every byte of output.
const STOP_STRINGS_MAX: usize = 16;
/// Together with the end-of-text tokens they travel with steps, so their number is bounded.
const STOP_TOKENS_MAX: usize = 256;
/// Biases travel to the workers with every step. OpenAI allows 300; this leaves room for
/// allow-lists over small vocabularies.
const BIASES_MAX: usize = 4096;
/// Alternatives per token, as OpenAI.
pub(crate) const TOP_LOGPROBS_MAX: u32 = 20;

/// What a request that is silent about sampling gets, and the model's vocabulary.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Defaults {
    /// 0 if the checkpoint recommends greedy decoding.
    pub temperature: f32,
    pub top_p: f32,
    /// 0: off.
    pub top_k: u32,
    pub min_p: f32,
    /// Token ids are below it: the number of logits, not of the tokenizer's entries.
    pub vocab: u32,
}

/// How tokens are chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0: greedy.
    pub temperature: f32,
    /// 1: off.
    pub top_p: f32,
    /// 0: off.
    pub top_k: u32,
    /// 0: off.
    pub min_p: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// By ascending token.
    pub bias: Vec<(u32, f32)>,
    pub seed: Option<u64>,
    /// Nothing ends a choice before this many tokens.
    pub tokens_min: u32,
    /// Alternatives to report with each token's log-probability; `None`: report nothing.
    pub logprobs: Option<u32>,
}

/// What ends a choice besides its length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop {
    /// Not empty, each.
    pub strings: Vec<String>,
    pub tokens: Vec<u32>,
    /// The matched string stays in the text.
    pub include_in_output: bool,
    /// The model's own end-of-text tokens do not end a choice.
    pub ignore_eos: bool,
}

/// Whole or piece by piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    Whole,
    Stream(UsageEvent),
}

/// Whether a stream ends with an event that holds the usage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UsageEvent {
    Yes,
    No,
}

/// The common part of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// `None`: whatever is served.
    pub model: Option<String>,
    pub sampling: Sampling,
    /// `None`: as many as the context has room for.
    pub tokens_max: Option<u32>,
    pub stop: Stop,
    /// Choices per prompt.
    pub choices: u32,
    pub delivery: Delivery,
    pub skip_special_tokens: bool,
}

impl Options {
    pub(crate) fn parse(
        fields: &Fields,
        defaults: &Defaults,
        tokens_max: Option<u32>,
        logprobs: Option<u32>,
    ) -> Result<Self, ApiError> {
        let sampling = sampling(fields, defaults, logprobs)?;
        if let Some(tokens_max) = tokens_max.filter(|&max| max < sampling.tokens_min) {
            let message = format!(
                "`min_tokens` is {}, but must be at most `max_tokens`, {tokens_max}; lower it",
                sampling.tokens_min
            );
            return Err(ApiError::of(ErrorKind::InvalidRequest, "min_tokens", message));
        }
        Ok(Self {
            model: fields.text("model")?.map(str::to_owned),
            sampling,
            tokens_max,
            stop: stop(fields, defaults)?,
            choices: fields.count("n", 1..=CHOICES_MAX)?.unwrap_or(1),
            delivery: delivery(fields)?,
            skip_special_tokens: fields.flag("skip_special_tokens")?.unwrap_or(true),
        })
    }
}

fn sampling(
    fields: &Fields,
    defaults: &Defaults,
    logprobs: Option<u32>,
) -> Result<Sampling, ApiError> {
    let top_k = fields.read("top_k", "0 or -1 (off) or a whole number above 0", |value| {
        if value.as_i64() == Some(-1) { Some(0) } else { as_u32(value) }
    })?;
    let seed = fields.read("seed", "a whole number that fits 64 bits with sign", Value::as_i64)?;
    Ok(Sampling {
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(defaults.temperature),
        top_p: fields.share("top_p")?.unwrap_or(defaults.top_p),
        top_k: top_k.unwrap_or(defaults.top_k),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(defaults.min_p),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        bias: bias(fields, defaults.vocab)?,
        seed: seed.map(i64::cast_unsigned),
        tokens_min: fields.count("min_tokens", 0..=u32::MAX)?.unwrap_or(0),
        logprobs,
    })
}

fn bias(fields: &Fields, vocab: u32) -> Result<Vec<(u32, f32)>, ApiError> {
    const NAME: &str = "logit_bias";
    let Some(map) = fields.read(NAME, "an object of token ids and numbers", Value::as_object)?
    else {
        return Ok(Vec::new());
    };
    if BIASES_MAX < map.len() {
        let message =
            format!("`{NAME}` has {} tokens, but may have {BIASES_MAX}; name fewer", map.len());
        return Err(ApiError::of(ErrorKind::InvalidRequest, NAME, message));
    }
    let mut bias = Vec::with_capacity(map.len());
    for (key, value) in map {
        let Some(token) = key.parse().ok().filter(|&token: &u32| token < vocab) else {
            let allowed = format!("keyed by token ids from 0 to {}", vocab.saturating_sub(1));
            return Err(wrong(NAME, &Value::from(key.as_str()), &allowed));
        };
        let Some(number) = as_f32(value).filter(|number| (-100.0..=100.0).contains(number)) else {
            return Err(wrong(&format!("{NAME}.{key}"), value, "a number from -100 to 100"));
        };
        bias.push((token, number));
    }
    bias.sort_by_key(|&(token, _)| token);
    // "7" and "07" are the same token; the later one must not be added on top.
    bias.dedup_by_key(|&mut (token, _)| token);
    Ok(bias)
}

fn stop(fields: &Fields, defaults: &Defaults) -> Result<Stop, ApiError> {
    let strings = match fields.get("stop") {
        None => Vec::new(),
        Some(value) => stop_strings(value).ok_or_else(|| {
            let allowed =
                format!("a string that is not empty, or up to {STOP_STRINGS_MAX} of them");
            wrong("stop", value, &allowed)
        })?,
    };
    let allowed =
        format!("up to {STOP_TOKENS_MAX} token ids from 0 to {}", defaults.vocab.saturating_sub(1));
    let tokens = fields.read("stop_token_ids", &allowed, |value| {
        let ids = value.as_array().filter(|ids| ids.len() <= STOP_TOKENS_MAX)?;
        token_ids(ids, defaults.vocab)
    })?;
    Ok(Stop {
        strings,
        tokens: tokens.unwrap_or_default(),
        include_in_output: fields.flag("include_stop_str_in_output")?.unwrap_or(false),
        ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
    })
}

fn stop_strings(value: &Value) -> Option<Vec<String>> {
    let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    match value.as_array() {
        Some(items) if items.len() <= STOP_STRINGS_MAX => items.iter().map(text).collect(),
        Some(_) => None,
        None => text(value).map(|text| vec![text]),
    }
}

/// `None` if an item is no token of the vocabulary.
pub(crate) fn token_ids(items: &[Value], vocab: u32) -> Option<Vec<u32>> {
    items.iter().map(|item| as_u32(item).filter(|&id| id < vocab)).collect()
}

fn delivery(fields: &Fields) -> Result<Delivery, ApiError> {
    const NAME: &str = "stream_options";
    let options = fields.read(NAME, "an object", Value::as_object)?;
    if !fields.flag("stream")?.unwrap_or(false) {
        return match options {
            None => Ok(Delivery::Whole),
            Some(_) => Err(ApiError::of(
                ErrorKind::InvalidRequest,
                NAME,
                "`stream_options` is set, but `stream` is not true; leave one out or set the other",
            )),
        };
    }
    let usage = options.and_then(|options| options.get("include_usage"));
    match usage.filter(|value| !value.is_null()) {
        None | Some(Value::Bool(false)) => Ok(Delivery::Stream(UsageEvent::No)),
        Some(Value::Bool(true)) => Ok(Delivery::Stream(UsageEvent::Yes)),
        Some(other) => Err(wrong("stream_options.include_usage", other, "true or false")),
    }
}

/// Refuses fields that change an answer's meaning but that nothing here serves.
pub(crate) fn refuse_unserved(fields: &Fields) -> Result<(), ApiError> {
    if fields.asks_for("tools") || fields.asks_for("functions") {
        let name = if fields.asks_for("tools") { "tools" } else { "functions" };
        return Err(unsupported(name, "tool calls are"));
    }
    if fields.get("tool_choice").is_some_and(|choice| choice != "none" && choice != "auto") {
        return Err(unsupported("tool_choice", "tool calls are"));
    }
    match fields.get("response_format") {
        Some(format) if format["type"] != "text" => {
            Err(unsupported("response_format", "response formats other than text are"))
        }
        Some(_) | None => Ok(()),
    }
}
