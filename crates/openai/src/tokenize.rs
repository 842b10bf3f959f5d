//! Requests to `/tokenize` and `/detokenize`, in the form that vLLM gave them.

use crate::chat::{self, Message};
use crate::fields::Fields;
use crate::options::{Defaults, token_ids};
use crate::{ApiError, ErrorKind};
use serde_json::Value;

/// What to count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenizeInput {
    /// With the token that begins every text, or without.
    Prompt { text: String, add_special_tokens: bool },
    /// With the header of an answer, or without.
    Messages { messages: Vec<Message>, add_generation_prompt: bool },
}

/// A checked request for token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizeRequest {
    pub model: Option<String>,
    pub input: TokenizeInput,
    /// The answer holds each token's text too.
    pub return_token_strs: bool,
}

impl TokenizeRequest {
    /// Reads the body of a request.
    ///
    /// # Errors
    ///
    /// The answer to a client whose request cannot be served.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let fields = Fields::parse(body)?;
        let input = match (fields.text("prompt")?, fields.get("messages")) {
            (Some(text), None) => TokenizeInput::Prompt {
                text: text.to_owned(),
                add_special_tokens: fields.flag("add_special_tokens")?.unwrap_or(true),
            },
            (None, Some(_)) => TokenizeInput::Messages {
                messages: chat::messages(&fields)?,
                add_generation_prompt: fields.flag("add_generation_prompt")?.unwrap_or(true),
            },
            (Some(_), Some(_)) | (None, None) => {
                let message = "the request must have either `prompt` or `messages`; send one";
                return Err(ApiError::of(ErrorKind::InvalidRequest, "prompt", message));
            }
        };
        Ok(Self {
            model: fields.text("model")?.map(str::to_owned),
            input,
            return_token_strs: fields.flag("return_token_strs")?.unwrap_or(false),
        })
    }
}

/// A checked request for the text of tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DetokenizeRequest {
    pub model: Option<String>,
    pub tokens: Vec<u32>,
}

impl DetokenizeRequest {
    /// Reads the body of a request.
    ///
    /// # Errors
    ///
    /// The answer to a client whose request cannot be served.
    pub fn parse(body: &[u8], defaults: &Defaults) -> Result<Self, ApiError> {
        let fields = Fields::parse(body)?;
        fields.required("tokens")?;
        let last = defaults.vocab.saturating_sub(1);
        let tokens = fields.read("tokens", &format!("token ids from 0 to {last}"), |value| {
            value
                .as_array()
                .map(Vec::as_slice)
                .and_then(|ids: &[Value]| token_ids(ids, defaults.vocab))
        })?;
        let model = fields.text("model")?.map(str::to_owned);
        Ok(Self { model, tokens: tokens.unwrap_or_default() })
    }
}
