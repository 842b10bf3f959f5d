//! From the body of a request to prompts of token ids. CPU work only; nothing here waits.

use super::answer::{template_error, tokenizer_error};
use super::served::ServedModel;
use model::{
    template::{Conversation, Ending},
    tokenizer::{SkipSpecial, Special},
};
use openai::{
    ApiError, ChatEnding, ChatRequest, CompletionRequest, Endpoint, ErrorKind, Message, Options,
    Prompt,
};
use serde_json::json;

/// A request that needs only the engine.
#[derive(Debug, PartialEq)]
pub(super) struct Prepared {
    pub(super) endpoint: Endpoint,
    pub(super) prompts: Vec<PromptIds>,
    pub(super) options: Options,
}

/// One prompt.
#[derive(Debug, PartialEq)]
pub(super) struct PromptIds {
    /// Not empty.
    pub(super) ids: Vec<u32>,
    /// What the answer's text begins with.
    pub(super) echo: String,
}

impl Prepared {
    /// The field that holds the prompt.
    pub(super) fn param(&self) -> &'static str {
        match self.endpoint {
            Endpoint::Chat => "messages",
            Endpoint::Completions => "prompt",
        }
    }
}

/// Reads a chat request.
pub(super) fn chat(served: &ServedModel, body: &[u8]) -> Result<Prepared, ApiError> {
    let request = ChatRequest::parse(body, &served.defaults)?;
    check_model(served, request.options.model.as_deref())?;
    let ids = chat_ids(served, &request.messages, request.ending)?;
    let prompts = vec![PromptIds { ids: not_empty("messages", ids)?, echo: String::new() }];
    Ok(Prepared { endpoint: Endpoint::Chat, prompts, options: request.options })
}

/// Reads a completion request.
pub(super) fn completion(served: &ServedModel, body: &[u8]) -> Result<Prepared, ApiError> {
    let request = CompletionRequest::parse(body, &served.defaults)?;
    let CompletionRequest { prompts, echo, add_special_tokens, options } = request;
    check_model(served, options.model.as_deref())?;
    let skip = if options.skip_special_tokens { SkipSpecial::Yes } else { SkipSpecial::No };
    let beginning = Beginning::asked(add_special_tokens);
    let prompts = prompts.into_iter().map(|prompt| {
        let (ids, text) = match prompt {
            Prompt::Text(text) => (text_ids(served, &text, beginning)?, Some(text)),
            Prompt::Tokens(ids) => (ids, None),
        };
        let ids = not_empty("prompt", ids)?;
        let text = || text.unwrap_or_else(|| served.tokenizer.decode(&ids, skip));
        let echo = if echo { text() } else { String::new() };
        Ok(PromptIds { ids, echo })
    });
    let prompts = prompts.collect::<Result<_, ApiError>>()?;
    Ok(Prepared { endpoint: Endpoint::Completions, prompts, options })
}

/// Refuses a model that is not the served one.
pub(super) fn check_model(served: &ServedModel, asked: Option<&str>) -> Result<(), ApiError> {
    match asked.filter(|&asked| asked != served.id) {
        Some(asked) => Err(unknown_model(served, asked)),
        None => Ok(()),
    }
}

/// The error of a model that is not the served one.
pub(super) fn unknown_model(served: &ServedModel, asked: &str) -> ApiError {
    let message = format!("the model `{asked}` does not exist here; use `{}`", served.id);
    ApiError::of(ErrorKind::ModelNotFound, "model", message)
}

/// What comes before the tokens of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Beginning {
    /// The token that begins every text, if the model has one.
    Special,
    Bare,
}

impl Beginning {
    /// What a request's `add_special_tokens` means.
    #[expect(clippy::fn_params_excessive_bools, reason = "it translates the flag of the wire")]
    pub(super) fn asked(add_special_tokens: bool) -> Self {
        if add_special_tokens { Self::Special } else { Self::Bare }
    }
}

/// The tokens of a text that may spell special tokens, behind those of its beginning.
pub(super) fn text_ids(
    served: &ServedModel,
    text: &str,
    beginning: Beginning,
) -> Result<Vec<u32>, ApiError> {
    let encoded = served.tokenizer.encode(text, Special::Parse);
    let encoded = encoded.map_err(|error| tokenizer_error(&error))?;
    let first = match beginning {
        Beginning::Special => served.tokenizer.bos(),
        Beginning::Bare => None,
    };
    Ok(first.into_iter().chain(encoded).collect())
}

/// The tokens of a conversation.
pub(super) fn chat_ids(
    served: &ServedModel,
    messages: &[Message],
    ending: ChatEnding,
) -> Result<Vec<u32>, ApiError> {
    let Some(template) = &served.template else {
        let message = format!(
            "the model `{}` has no chat template; use /v1/completions, or serve a checkpoint with \
             chat_template.jinja",
            served.id
        );
        return Err(ApiError::of(ErrorKind::InvalidRequest, "messages", message));
    };
    let value =
        |message: &Message| json!({ "role": message.role.name(), "content": message.content });
    let conversation = Conversation {
        ending: match ending {
            ChatEnding::Answer => Ending::GenerationPrompt,
            ChatEnding::Nothing | ChatEnding::Continue => Ending::Nothing,
        },
        ..Conversation::new(messages.iter().map(value).collect())
    };
    let ids = template.render_ids(&served.tokenizer, &conversation);
    let mut ids = ids.map_err(|error| template_error(&error))?;
    if ending == ChatEnding::Continue {
        // The text of a message cannot become special tokens, so those at the end are the
        // template's: they end the message that shall go on.
        while ids.last().is_some_and(|&id| served.tokenizer.is_special(id)) {
            ids.pop();
        }
    }
    Ok(ids)
}

fn not_empty(param: &str, ids: Vec<u32>) -> Result<Vec<u32>, ApiError> {
    if ids.is_empty() {
        let message = format!("`{param}` has no tokens; the model needs at least one");
        return Err(ApiError::of(ErrorKind::InvalidRequest, param, message));
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::path::Path;

    fn toy() -> ServedModel {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/toy-maverick");
        ServedModel::load(&dir, "toy".into()).unwrap()
    }

    /// The prompt's text, special tokens included.
    fn prompt(served: &ServedModel, prepared: Prepared) -> String {
        served.tokenizer.decode(&prepared.prompts[0].ids, SkipSpecial::No)
    }

    #[track_caller]
    fn check_chat(messages: Value, mut more: Value, want: &str) {
        let served = toy();
        more["messages"] = messages;
        let prepared = chat(&served, more.to_string().as_bytes()).unwrap();
        assert_eq!(prompt(&served, prepared), want);
    }

    fn user(content: &str) -> Value {
        json!({ "role": "user", "content": content })
    }

    const USER: &str = "<|begin_of_text|><|header_start|>user<|header_end|>\n\nHi<|eot|>";
    const HEADER: &str = "<|header_start|>assistant<|header_end|>\n\n";

    #[test]
    fn chat_ends_with_the_header_of_an_answer_or_as_asked() {
        check_chat(json!([user("Hi")]), json!({}), &format!("{USER}{HEADER}"));
        check_chat(json!([user("Hi")]), json!({ "add_generation_prompt": false }), USER);
        let begun = |content| json!([user("Hi"), { "role": "assistant", "content": content }]);
        let on = json!({ "continue_final_message": true });
        check_chat(begun("So"), on.clone(), &format!("{USER}{HEADER}So"));
        check_chat(begun(""), on, &format!("{USER}{HEADER}"));
    }

    #[test]
    fn message_cannot_end_itself() {
        let served = toy();
        let body = json!({ "messages": [user("a<|eot|>b")] }).to_string();
        let ids = chat(&served, body.as_bytes()).unwrap().prompts.remove(0).ids;
        assert_eq!(ids.iter().filter(|&&id| id == 2008).count(), 1);
    }

    #[test]
    fn text_begins_with_the_first_token_unless_asked_not_to() {
        let served = toy();
        let first = |more: Value| {
            let body = json!({ "prompt": "Hi", "add_special_tokens": more }).to_string();
            completion(&served, body.as_bytes()).unwrap().prompts.remove(0).ids[0]
        };
        assert_eq!(first(json!(null)), 2000);
        assert_ne!(first(json!(false)), 2000);
    }

    #[test]
    fn echo_is_the_prompt_as_it_was_written() {
        let served = toy();
        let echo = |value: Value| {
            let body = json!({ "prompt": value, "echo": true }).to_string();
            completion(&served, body.as_bytes()).unwrap().prompts.remove(0).echo
        };
        assert_eq!(echo(json!("a<|eot|>b")), "a<|eot|>b");
        assert_eq!(echo(json!([15, 2008, 16])), "01");
    }
}
