//! `/tokenize` and `/detokenize`, as vLLM answers them.

use super::prepare::{Beginning, chat_ids, check_model, text_ids};
use super::served::ServedModel;
use model::tokenizer::SkipSpecial;
use openai::{ApiError, ChatEnding, DetokenizeRequest, TokenizeInput, TokenizeRequest};
use serde_json::json;

/// Counts and lists the tokens of a text or a conversation.
pub(super) fn tokenize(
    served: &ServedModel,
    context_tokens: u32,
    body: &[u8],
) -> Result<String, ApiError> {
    let TokenizeRequest { model, input, return_token_strs } = TokenizeRequest::parse(body)?;
    check_model(served, model.as_deref())?;
    let ids = match input {
        TokenizeInput::Prompt { text, add_special_tokens } => {
            text_ids(served, &text, Beginning::asked(add_special_tokens))?
        }
        TokenizeInput::Messages { messages, add_generation_prompt } => {
            let ending =
                if add_generation_prompt { ChatEnding::Answer } else { ChatEnding::Nothing };
            chat_ids(served, &messages, ending)?
        }
    };
    let text = |&id: &u32| served.tokenizer.decode(&[id], SkipSpecial::No);
    let texts: Option<Vec<String>> = return_token_strs.then(|| ids.iter().map(text).collect());
    let answer = json!({
        "count": ids.len(), "max_model_len": context_tokens, "tokens": ids, "token_strs": texts,
    });
    Ok(answer.to_string())
}

/// The text of tokens.
pub(super) fn detokenize(served: &ServedModel, body: &[u8]) -> Result<String, ApiError> {
    let DetokenizeRequest { model, tokens } = DetokenizeRequest::parse(body, &served.defaults)?;
    check_model(served, model.as_deref())?;
    let prompt = served.tokenizer.decode(&tokens, SkipSpecial::No);
    Ok(json!({ "prompt": prompt }).to_string())
}
