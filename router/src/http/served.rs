//! The served model as the front door sees it: its name, its text and its makers' advice.

use model::{
    config::{Config, ConfigError},
    generation::{GenerationConfig, GenerationError},
    template::{ChatTemplate, TemplateError},
    tokenizer::{Tokenizer, TokenizerError},
};
use openai::Defaults;
use std::{
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

/// Everything of a checkpoint but its weights.
#[derive(Debug)]
pub struct ServedModel {
    /// What clients call it.
    pub id: String,
    /// Unix time in seconds, for `/v1/models`.
    pub created: u64,
    pub tokenizer: Tokenizer,
    /// `None`: the checkpoint has none, so only completions are served.
    pub template: Option<ChatTemplate>,
    /// For what requests leave open.
    pub defaults: Defaults,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
}

/// Why a checkpoint's text files cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum FrontError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error(transparent)]
    Generation(#[from] GenerationError),
    #[error(
        "the tokenizer names {tokens} tokens, but config.json's vocab_size is {vocab}; use the tokenizer files of this checkpoint"
    )]
    Vocab { tokens: usize, vocab: usize },
    #[error(
        "generation_config.json: eos_token_id {token} is outside the vocabulary of {vocab}; correct it"
    )]
    Eos { token: u32, vocab: u32 },
}

impl ServedModel {
    /// Reads tokenizer, chat template and recommendations from a checkpoint's folder.
    ///
    /// # Errors
    ///
    /// [`FrontError`] if a file is missing or broken, or if two do not fit each other.
    pub fn load(dir: &Path, id: String) -> Result<Self, FrontError> {
        let config = Config::load(dir)?;
        let tokenizer = Tokenizer::load(dir)?;
        let vocab_error = FrontError::Vocab { tokens: tokenizer.vocab(), vocab: config.vocab };
        let vocab = match u32::try_from(config.vocab) {
            Ok(vocab) if tokenizer.vocab() <= config.vocab => vocab,
            Ok(_) | Err(_) => return Err(vocab_error),
        };
        let template = match ChatTemplate::load(dir) {
            Ok(template) => Some(template),
            Err(TemplateError::Missing { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        let generation = GenerationConfig::load(dir)?;
        let eos = if generation.eos.is_empty() { config.eos } else { generation.eos.clone() };
        if let Some(&token) = eos.iter().find(|&&token| vocab <= token) {
            return Err(FrontError::Eos { token, vocab });
        }
        let defaults = defaults(&generation, vocab);
        Ok(Self { id, created: unix_time_s(), tokenizer, template, defaults, eos })
    }
}

/// As transformers reads the file: without `do_sample` decoding is greedy, and what is not
/// recommended is off. The other fields still hold for a request that sets a temperature.
fn defaults(generation: &GenerationConfig, vocab: u32) -> Defaults {
    let temperature =
        if generation.do_sample { generation.temperature.unwrap_or(1.0) } else { 0.0 };
    Defaults {
        temperature,
        top_p: generation.top_p.unwrap_or(1.0),
        top_k: generation.top_k.unwrap_or(0),
        min_p: generation.min_p.unwrap_or(0.0),
        vocab,
    }
}

/// Seconds since 1970; only ever shown to clients.
pub(super) fn unix_time_s() -> u64 {
    // A clock before 1970 is wrong by so much that 0 says it as well.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn toy() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/toy-maverick")
    }

    #[test]
    fn checkpoint_is_read() {
        let served = ServedModel::load(&toy(), "toy".into()).unwrap();
        assert_eq!(served.eos, [2001, 2007, 2008]);
        assert!(served.template.is_some());
        let want = Defaults { temperature: 0.0, top_p: 1.0, top_k: 0, min_p: 0.0, vocab: 2048 };
        assert_eq!(served.defaults, want);
    }

    #[test]
    fn folder_without_files_is_an_error() {
        let error = ServedModel::load(Path::new("/nowhere"), "x".into()).unwrap_err();
        assert!(matches!(error, FrontError::Config(_)), "{error}");
    }

    #[test]
    fn sampling_is_recommended_or_greedy() {
        let sampled = GenerationConfig { do_sample: true, ..GenerationConfig::default() };
        assert_eq!(defaults(&sampled, 9).temperature, 1.0);
        let greedy = GenerationConfig { temperature: Some(0.6), ..GenerationConfig::default() };
        assert_eq!(defaults(&greedy, 9).temperature, 0.0);
    }
}
