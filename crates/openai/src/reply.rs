//! Answers: whole ones, and the server-sent events of a stream.
//!
//! The router hands over [`Piece`]s of text; what they look like on the wire, per endpoint, is
//! decided here. A stream is a first chat event with the role, events with text, one with the
//! finish reason per choice, the usage if it was asked for, and `[DONE]`.

use crate::{ApiError, Delivery, UsageEvent};
use serde::Serialize;
use serde_json::{Map, Value, json};

/// What minus infinity becomes, since JSON has no such number; the value vLLM gives.
const LOGPROB_MIN: f32 = -9999.0;

/// Which of the two interfaces an answer belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    Chat,
    Completions,
}

/// Why a choice is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// A stop token or a stop string.
    Stop,
    /// `max_tokens` or the context.
    Length,
}

/// How a token is named in log-probabilities.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenText {
    pub id: u32,
    /// May end inside a character. `None` for an id without an entry in the vocabulary.
    pub bytes: Option<Vec<u8>>,
}

impl TokenText {
    fn text(&self) -> String {
        String::from_utf8_lossy(self.bytes.as_deref().unwrap_or_default()).into_owned()
    }

    /// Completions have keys and no bytes, so two broken characters must not look alike.
    fn key(&self) -> String {
        let Some(bytes) = &self.bytes else { return format!("token_id:{}", self.id) };
        match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => {
                let escaped = bytes.iter().map(|byte| format!("\\x{byte:02x}"));
                format!("bytes:{}", escaped.collect::<String>())
            }
        }
    }
}

/// A token that could have been chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Alternative {
    pub token: TokenText,
    pub logprob: f32,
}

/// A chosen token with its log-probability.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    pub token: TokenText,
    pub logprob: f32,
    /// Likeliest first.
    pub top: Vec<Alternative>,
    /// Where the token's text begins in the choice's text, in characters.
    pub offset: usize,
}

/// A piece of a choice's text; all pieces joined are the choice.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Piece {
    pub text: String,
    /// `None` if the request did not ask for them.
    pub logprobs: Option<Vec<TokenLogprob>>,
    /// Set in the last piece.
    pub finish: Option<FinishReason>,
}

impl Piece {
    /// Whether a client has nothing to gain from it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.text.is_empty()
            && self.logprobs.as_ref().is_none_or(Vec::is_empty)
            && self.finish.is_none()
    }

    /// Joins the piece that follows.
    pub fn append(&mut self, next: Self) {
        let Self { text, logprobs, finish } = next;
        self.text.push_str(&text);
        if let Some(logprobs) = logprobs {
            self.logprobs.get_or_insert_default().extend(logprobs);
        }
        self.finish = finish;
    }
}

/// Where in its choice a piece stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    First,
    Later,
}

/// Tokens read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
}

impl Usage {
    /// Of one request: prompts once each, however many choices they have.
    #[must_use]
    pub fn new(prompt_tokens: u64, completion_tokens: u64) -> Self {
        Self { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens }
    }
}

/// The answer to one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub endpoint: Endpoint,
    pub id: String,
    /// Unix time in seconds.
    pub created: u64,
    pub model: String,
    pub delivery: Delivery,
}

impl Reply {
    /// The body of an answer that is given whole. Choices come by index.
    #[must_use]
    pub fn whole(&self, choices: Vec<Piece>, usage: Usage) -> Vec<u8> {
        let choices = choices.into_iter().enumerate().map(|(index, piece)| match self.endpoint {
            Endpoint::Chat => json!({
                "index": index,
                "message": { "role": "assistant", "content": piece.text, "refusal": null },
                "logprobs": piece.logprobs.as_deref().map(chat_logprobs),
                "finish_reason": piece.finish,
            }),
            Endpoint::Completions => json!({
                "index": index,
                "text": piece.text,
                "logprobs": piece.logprobs.as_deref().map(completion_logprobs),
                "finish_reason": piece.finish,
            }),
        });
        let object = match self.endpoint {
            Endpoint::Chat => "chat.completion",
            Endpoint::Completions => "text_completion",
        };
        let choices: Vec<Value> = choices.collect();
        encode(&self.envelope(object, &choices, Some(Some(usage))))
    }

    /// Appends the events of a piece to `out`.
    pub fn piece_events(&self, index: u32, place: Place, piece: &Piece, out: &mut Vec<u8>) {
        let logprobs = piece.logprobs.as_deref().filter(|tokens| !tokens.is_empty());
        match self.endpoint {
            Endpoint::Completions => {
                let logprobs = logprobs.map(completion_logprobs);
                let finish_reason = piece.finish;
                self.event(
                    &[TextChoice { index, text: &piece.text, logprobs, finish_reason }],
                    out,
                );
            }
            Endpoint::Chat => {
                if place == Place::First {
                    let delta = Delta { role: Some("assistant"), content: Some("") };
                    self.chat_event(index, delta, None, None, out);
                }
                if !piece.text.is_empty() || logprobs.is_some() {
                    let delta = Delta { role: None, content: Some(&piece.text) };
                    self.chat_event(index, delta, logprobs, None, out);
                }
                if piece.finish.is_some() {
                    let delta = Delta { role: None, content: None };
                    self.chat_event(index, delta, None, piece.finish, out);
                }
            }
        }
    }

    /// Appends the end of a stream to `out`.
    pub fn done_events(&self, usage: Usage, out: &mut Vec<u8>) {
        if self.delivery == Delivery::Stream(UsageEvent::Yes) {
            let choices: [Value; 0] = [];
            write_event(&self.envelope(self.chunk_object(), &choices, Some(Some(usage))), out);
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    /// Appends the end of a stream that cannot go on.
    pub fn error_events(error: &ApiError, out: &mut Vec<u8>) {
        out.extend_from_slice(b"data: ");
        out.extend_from_slice(error.json().as_bytes());
        out.extend_from_slice(b"\n\ndata: [DONE]\n\n");
    }

    fn chat_event(
        &self,
        index: u32,
        delta: Delta<'_>,
        logprobs: Option<&[TokenLogprob]>,
        finish_reason: Option<FinishReason>,
        out: &mut Vec<u8>,
    ) {
        let logprobs = logprobs.map(chat_logprobs);
        self.event(&[DeltaChoice { index, delta, logprobs, finish_reason }], out);
    }

    fn event<C: Serialize>(&self, choices: &[C], out: &mut Vec<u8>) {
        // A stream with a usage event says `null` before it.
        let usage = (self.delivery == Delivery::Stream(UsageEvent::Yes)).then_some(None);
        write_event(&self.envelope(self.chunk_object(), choices, usage), out);
    }

    fn chunk_object(&self) -> &'static str {
        match self.endpoint {
            Endpoint::Chat => "chat.completion.chunk",
            Endpoint::Completions => "text_completion",
        }
    }

    fn envelope<'a, C>(
        &'a self,
        object: &'static str,
        choices: &'a [C],
        usage: Option<Option<Usage>>,
    ) -> Envelope<'a, C> {
        let Self { endpoint: _, id, created, model, delivery: _ } = self;
        Envelope { id, object, created: *created, model, choices, usage }
    }
}

#[derive(Serialize)]
struct Envelope<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [C],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct DeltaChoice<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Option<Value>,
    finish_reason: Option<FinishReason>,
}

#[derive(Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

#[derive(Serialize)]
struct TextChoice<'a> {
    index: u32,
    text: &'a str,
    logprobs: Option<Value>,
    finish_reason: Option<FinishReason>,
}

fn encode(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("keys are strings and writing to memory succeeds")
}

fn write_event(value: &impl Serialize, out: &mut Vec<u8>) {
    out.extend_from_slice(b"data: ");
    let written = serde_json::to_writer(&mut *out, value);
    written.expect("keys are strings and writing to memory succeeds");
    out.extend_from_slice(b"\n\n");
}

fn finite(logprob: f32) -> f32 {
    logprob.max(LOGPROB_MIN)
}

fn chat_logprobs(tokens: &[TokenLogprob]) -> Value {
    let entry = |token: &TokenText, logprob: f32| json!({ "token": token.text(), "logprob": finite(logprob), "bytes": token.bytes });
    let content = tokens.iter().map(|token| {
        let top = token.top.iter().map(|other| entry(&other.token, other.logprob));
        let mut value = entry(&token.token, token.logprob);
        value["top_logprobs"] = top.collect();
        value
    });
    json!({ "content": content.collect::<Value>(), "refusal": null })
}

fn completion_logprobs(tokens: &[TokenLogprob]) -> Value {
    let top = tokens.iter().map(|token| {
        let mut top = Map::new();
        for other in &token.top {
            top.insert(other.token.key(), json!(finite(other.logprob)));
        }
        // The chosen token is always there, likely or not.
        top.insert(token.token.key(), json!(finite(token.logprob)));
        Value::Object(top)
    });
    json!({
        "tokens": tokens.iter().map(|token| token.token.key()).collect::<Value>(),
        "token_logprobs": tokens.iter().map(|token| finite(token.logprob)).collect::<Value>(),
        "top_logprobs": top.collect::<Value>(),
        "text_offset": tokens.iter().map(|token| token.offset).collect::<Value>(),
    })
}

/// The object of one model in `/v1/models`.
fn model_value(name: &str, created: u64, context_tokens: u32) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "herd",
        "max_model_len": context_tokens,
    })
}

/// The answers to `/v1/models` and `/v1/models/{id}`, in this order.
#[must_use]
pub fn models_json(name: &str, created: u64, context_tokens: u32) -> (String, String) {
    let model = model_value(name, created, context_tokens);
    (json!({ "object": "list", "data": [model] }).to_string(), model.to_string())
}
