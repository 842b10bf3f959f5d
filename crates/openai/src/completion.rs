//! Requests to `/v1/completions`.

use crate::fields::{Fields, unsupported, wrong};
use crate::options::{TOP_LOGPROBS_MAX, refuse_unserved, token_ids};
use crate::{ApiError, Defaults, ErrorKind, Options};
use serde_json::Value;

/// Choices of one request, over all its prompts. Each is a sequence of its own.
const CHOICES_MAX: usize = 1024;

/// What to complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    Text(String),
    /// Not empty, all within the vocabulary.
    Tokens(Vec<u32>),
}

/// A checked completion request.
#[derive(Debug, Clone, PartialEq)]
pub struct CompletionRequest {
    /// At least one. Choice `c` of prompt `p` has index `p * n + c`.
    pub prompts: Vec<Prompt>,
    /// The answer's text begins with the prompt.
    pub echo: bool,
    /// Texts get the token that begins every text.
    pub add_special_tokens: bool,
    pub options: Options,
}

impl CompletionRequest {
    /// Reads the body of a request.
    ///
    /// # Errors
    ///
    /// The answer to a client whose request cannot be served.
    pub fn parse(body: &[u8], defaults: &Defaults) -> Result<Self, ApiError> {
        let fields = Fields::parse(body)?;
        refuse_unserved(&fields)?;
        if fields.asks_for("suffix") {
            return Err(unsupported("suffix", "text after the completion is"));
        }
        let value = fields.required("prompt")?;
        let prompts = prompts(value, defaults.vocab).ok_or_else(|| {
            let allowed = format!(
                "a string, an array of strings, an array of token ids from 0 to {} or an array of \
                 such arrays, none of them empty",
                defaults.vocab.saturating_sub(1)
            );
            wrong("prompt", value, &allowed)
        })?;
        let echo = fields.flag("echo")?.unwrap_or(false);
        // An echo alone is an answer; nothing at all is none.
        let tokens_max = fields.count("max_tokens", u32::from(!echo)..=u32::MAX)?;
        let logprobs = fields.count("logprobs", 0..=TOP_LOGPROBS_MAX)?;
        if echo && logprobs.is_some() {
            return Err(unsupported("logprobs", "log-probabilities of an echoed prompt are"));
        }
        let options = Options::parse(&fields, defaults, tokens_max, logprobs)?;
        let best_of = fields.count("best_of", 1..=u32::MAX)?;
        if best_of.is_some_and(|best_of| best_of != options.choices) {
            return Err(unsupported("best_of", "a `best_of` that differs from `n` is"));
        }
        check_choices(prompts.len(), options.choices)?;
        let add_special_tokens = fields.flag("add_special_tokens")?.unwrap_or(true);
        Ok(Self { prompts, echo, add_special_tokens, options })
    }
}

fn check_choices(prompts: usize, choices: u32) -> Result<(), ApiError> {
    if prompts.saturating_mul(choices as usize) <= CHOICES_MAX {
        return Ok(());
    }
    let message = format!(
        "`prompt` has {prompts} prompts with {choices} choices each, but a request may ask for \
         {CHOICES_MAX} choices; split it"
    );
    Err(ApiError::of(ErrorKind::InvalidRequest, "prompt", message))
}

fn prompts(value: &Value, vocab: u32) -> Option<Vec<Prompt>> {
    let text = |value: &Value| value.as_str().map(|text| Prompt::Text(text.to_owned()));
    let tokens = |items: &[Value]| {
        let ids = token_ids(items, vocab).filter(|ids| !ids.is_empty())?;
        Some(Prompt::Tokens(ids))
    };
    let Some(items) = value.as_array() else {
        return text(value).map(|prompt| vec![prompt]);
    };
    match items.first()? {
        Value::Number(_) => tokens(items).map(|prompt| vec![prompt]),
        Value::String(_) => items.iter().map(text).collect(),
        Value::Array(_) => items.iter().map(|item| tokens(item.as_array()?)).collect(),
        Value::Null | Value::Bool(_) | Value::Object(_) => None,
    }
}
