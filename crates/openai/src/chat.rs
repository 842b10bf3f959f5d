//! Requests to `/v1/chat/completions`.

use crate::fields::{Fields, unsupported, wrong};
use crate::options::{self, TOP_LOGPROBS_MAX};
use crate::{ApiError, Defaults, ErrorKind, Options};
use serde_json::Value;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Also what OpenAI calls `developer`.
    System,
    User,
    Assistant,
}

impl Role {
    /// The name that chat templates know.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub role: Role,
    pub content: String,
}

/// What follows the last message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChatEnding {
    /// The header of an answer.
    Answer,
    /// Nothing; the model may write whatever comes next.
    Nothing,
    /// The model goes on writing the last message, which is the assistant's.
    Continue,
}

/// A checked chat request.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatRequest {
    /// At least one.
    pub messages: Vec<Message>,
    pub ending: ChatEnding,
    pub options: Options,
}

impl ChatRequest {
    /// Reads the body of a request.
    ///
    /// # Errors
    ///
    /// The answer to a client whose request cannot be served.
    pub fn parse(body: &[u8], defaults: &Defaults) -> Result<Self, ApiError> {
        let fields = Fields::parse(body)?;
        options::refuse_unserved(&fields)?;
        let messages = messages(&fields)?;
        let ending = ending(&fields, &messages)?;
        // The older name; OpenAI lets the newer one win.
        let older = fields.count("max_tokens", 1..=u32::MAX)?;
        let tokens_max = fields.count("max_completion_tokens", 1..=u32::MAX)?.or(older);
        let logprobs = logprobs(&fields)?;
        let options = Options::parse(&fields, defaults, tokens_max, logprobs)?;
        Ok(Self { messages, ending, options })
    }
}

pub(crate) fn messages(fields: &Fields) -> Result<Vec<Message>, ApiError> {
    let value = fields.required("messages")?;
    match value.as_array().filter(|items| !items.is_empty()) {
        Some(items) => items.iter().enumerate().map(|(i, item)| message(i, item)).collect(),
        None => Err(wrong("messages", value, "an array of at least one message")),
    }
}

fn message(index: usize, item: &Value) -> Result<Message, ApiError> {
    let at = |field: &str| format!("messages[{index}].{field}");
    let role = match item["role"].as_str() {
        Some("system" | "developer") => Role::System,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        Some("tool" | "function") => return Err(unsupported(&at("role"), "tool results are")),
        Some(_) | None => {
            return Err(wrong(&at("role"), &item["role"], "system, developer, user or assistant"));
        }
    };
    let calls = item["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty());
    if calls || item["function_call"].is_object() {
        return Err(unsupported(&at("tool_calls"), "tool calls are"));
    }
    let content = match &item["content"] {
        Value::String(text) => text.clone(),
        Value::Array(parts) => joined(&at("content"), parts)?,
        // An answer of ours that was empty may come back like this.
        Value::Null if role == Role::Assistant => String::new(),
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_)) => {
            return Err(wrong(&at("content"), other, "a string or an array of parts"));
        }
    };
    Ok(Message { role, content })
}

fn joined(at: &str, parts: &[Value]) -> Result<String, ApiError> {
    let mut text = String::new();
    for (index, part) in parts.iter().enumerate() {
        let at = format!("{at}[{index}]");
        match part["type"].as_str() {
            Some("text") => match part["text"].as_str() {
                Some(part) => text.push_str(part),
                None => return Err(wrong(&format!("{at}.text"), &part["text"], "a string")),
            },
            Some(kind @ ("image_url" | "image" | "input_audio" | "video_url" | "file")) => {
                return Err(unsupported(&at, &format!("content parts of type `{kind}` are")));
            }
            Some(_) | None => {
                return Err(wrong(&format!("{at}.type"), &part["type"], "\"text\""));
            }
        }
    }
    Ok(text)
}

fn ending(fields: &Fields, messages: &[Message]) -> Result<ChatEnding, ApiError> {
    const CONTINUE: &str = "continue_final_message";
    let refuse = |why: &str| Err(ApiError::of(ErrorKind::InvalidRequest, CONTINUE, why));
    let answers = fields.flag("add_generation_prompt")?;
    if !fields.flag(CONTINUE)?.unwrap_or(false) {
        let answers = answers.unwrap_or(true);
        return Ok(if answers { ChatEnding::Answer } else { ChatEnding::Nothing });
    }
    if answers == Some(true) {
        return refuse(
            "`continue_final_message` and `add_generation_prompt` are both true, but exclude each \
             other; set one of them to false",
        );
    }
    if messages.last().map(|message| message.role) != Some(Role::Assistant) {
        return refuse(
            "`continue_final_message` is true, but the last message is not the assistant's; end \
             `messages` with one of role assistant",
        );
    }
    Ok(ChatEnding::Continue)
}

fn logprobs(fields: &Fields) -> Result<Option<u32>, ApiError> {
    let top = fields.count("top_logprobs", 0..=TOP_LOGPROBS_MAX)?;
    if fields.flag("logprobs")?.unwrap_or(false) {
        return Ok(Some(top.unwrap_or(0)));
    }
    match top {
        // vLLM's clients send the 0 that is its default.
        None | Some(0) => Ok(None),
        Some(top) => Err(ApiError::of(
            ErrorKind::InvalidRequest,
            "top_logprobs",
            format!("`top_logprobs` is {top}, but `logprobs` is not true; set it or leave both"),
        )),
    }
}
