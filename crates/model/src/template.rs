//! The checkpoint's chat template: messages to the text, and to the tokens, of a prompt.
//!
//! Templates are Jinja, rendered as transformers renders them (`trim_blocks`, `lstrip_blocks`,
//! Python's string methods, its `tojson`).
//!
//! **Injection.** The reference renders one text and encodes it with special tokens recognised,
//! so a user who writes `<|eot|>` ends the message. Here only the template can write special
//! tokens. The first and last characters of special tokens (`<` and `>`) are replaced in all texts
//! of the request by private-use characters before rendering; a special token in the result
//! then begins and ends with characters of the template. The result is cut at those tokens, the
//! characters are put back, and the pieces are encoded as plain text. Cutting at special tokens is
//! what the encoder itself does first, so for texts that contain none the ids are exactly those of
//! the reference, also across the border between template and message. If a template's output
//! depends on the replaced characters, the plain rendering is used, provided that it has
//! the same special tokens; otherwise the request is refused.

mod environment;
mod guard;
#[cfg(test)]
mod tests;

use crate::tokenizer::{Special, Tokenizer, TokenizerError, named_token};
use guard::Guard;
use minijinja::Environment;
use minijinja::value::Serde;
use serde_json::{Map, Value, json};
use std::path::Path;

/// What follows the last message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The header of the answer that the model shall write.
    GenerationPrompt,
    Nothing,
}

/// What a template renders.
#[derive(Clone, Debug)]
pub struct Conversation {
    /// Objects with `role`, `content` and whatever else the template reads.
    pub messages: Vec<Value>,
    /// `None` where the request has no tools.
    pub tools: Option<Value>,
    pub ending: Ending,
    /// Further variables of the template (`chat_template_kwargs` of other servers).
    pub variables: Map<String, Value>,
}

impl Conversation {
    /// Messages without tools, to be answered.
    #[must_use]
    pub fn new(messages: Vec<Value>) -> Self {
        let ending = Ending::GenerationPrompt;
        Self { messages, tools: None, ending, variables: Map::new() }
    }
}

/// Why a template cannot be loaded or a conversation not be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    #[error(
        "{dir} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); add one or use completions"
    )]
    Missing { dir: String },
    #[error("{file}: {reason}; correct the template")]
    Broken { file: String, reason: String },
    /// The template raised an exception or read what the messages lack; the request is at fault.
    #[error("the chat template refuses the messages: {reason}")]
    Refused { reason: String },
    #[error(
        "the messages contain the text of special tokens in a place where the chat template would obey it; remove it"
    )]
    Injection,
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// A compiled template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    /// `bos_token`, `eos_token` and so on, where the files name them.
    tokens: Map<String, Value>,
}

impl ChatTemplate {
    /// Finds and compiles the template of a checkpoint's folder.
    ///
    /// # Errors
    ///
    /// [`TemplateError::Missing`] or [`TemplateError::Broken`].
    pub fn load(dir: &Path) -> Result<Self, TemplateError> {
        let (file, source) = find(dir)?;
        let tokens = ["bos_token", "eos_token", "pad_token"]
            .into_iter()
            .filter_map(|role| Some((role.to_owned(), Value::String(named_token(dir, role)?))))
            .collect();
        Self::compile(source, tokens).map_err(|reason| TemplateError::Broken { file, reason })
    }

    fn compile(source: String, tokens: Map<String, Value>) -> Result<Self, String> {
        let environment = environment::compile(&source).map_err(|error| error.to_string())?;
        Ok(Self { environment, source, tokens })
    }

    /// The text of the prompt, as transformers' `apply_chat_template(tokenize=False)` gives it.
    ///
    /// Not for encoding: what a user wrote cannot be told from the template's text any more.
    ///
    /// # Errors
    ///
    /// [`TemplateError::Refused`] with the template's reason.
    pub fn render(&self, conversation: &Conversation) -> Result<String, TemplateError> {
        let mut context = self.tokens.clone();
        context.extend(conversation.variables.clone());
        let generate = conversation.ending == Ending::GenerationPrompt;
        context.insert("messages".to_owned(), Value::Array(conversation.messages.clone()));
        context.insert("tools".to_owned(), conversation.tools.clone().unwrap_or(Value::Null));
        context.insert("add_generation_prompt".to_owned(), json!(generate));
        let template = self.environment.get_template(environment::NAME);
        let rendered = template.and_then(|template| template.render(Serde(&context)));
        rendered.map_err(|error| TemplateError::Refused { reason: environment::reason(&error) })
    }

    /// The tokens of the prompt; texts of the request cannot become special tokens.
    ///
    /// # Errors
    ///
    /// [`TemplateError::Refused`] and [`TemplateError::Injection`] are the request's fault.
    pub fn render_ids(
        &self,
        tokenizer: &Tokenizer,
        conversation: &Conversation,
    ) -> Result<Vec<u32>, TemplateError> {
        let rendered = self.render(conversation)?;
        let Some(guard) = Guard::new(tokenizer, &self.source, conversation) else {
            // No text of the request has a character that begins or ends a special token.
            return Ok(tokenizer.encode(&rendered, Special::Parse)?);
        };
        let guarded = self.render(&guard.conceal(conversation))?;
        let special = tokenizer.find_special(&guarded)?;
        if guard.reveal(&guarded) != rendered {
            let ids = |found: &[(u32, _)]| found.iter().map(|(id, _)| *id).collect::<Vec<_>>();
            if ids(&tokenizer.find_special(&rendered)?) != ids(&special) {
                return Err(TemplateError::Injection);
            }
            return Ok(tokenizer.encode(&rendered, Special::Parse)?);
        }
        let mut out = Vec::new();
        let mut from = 0;
        for (id, range) in special {
            let text = guard.reveal(&guarded[from..range.start]);
            out.extend(tokenizer.encode(&text, Special::Text)?);
            out.push(id);
            from = range.end;
        }
        out.extend(tokenizer.encode(&guard.reveal(&guarded[from..]), Special::Text)?);
        Ok(out)
    }
}

/// File and text of the template; a file of its own wins, as in transformers.
fn find(dir: &Path) -> Result<(String, String), TemplateError> {
    let path = dir.join("chat_template.jinja");
    if let Ok(source) = std::fs::read_to_string(&path) {
        return Ok((path.display().to_string(), source));
    }
    for name in ["chat_template.json", "tokenizer_config.json"] {
        let path = dir.join(name);
        let Ok(json) = std::fs::read_to_string(&path) else { continue };
        let file = path.display().to_string();
        let config: Value = serde_json::from_str(&json).map_err(|error| TemplateError::Broken {
            file: file.clone(),
            reason: error.to_string(),
        })?;
        // Either one template or a list of named ones.
        let template = &config["chat_template"];
        let named = template.as_array().and_then(|list| {
            list.iter().find(|item| item["name"] == "default")?["template"].as_str()
        });
        if let Some(source) = template.as_str().or(named) {
            return Ok((file, source.to_owned()));
        }
    }
    Err(TemplateError::Missing { dir: dir.display().to_string() })
}
