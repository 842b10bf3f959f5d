//! Text to tokens and back, over the `tokenizers` crate that the reference itself uses.
//!
//! Two encoders share one vocabulary: one recognises special tokens, for text that this program
//! or the chat template wrote; the other does not, for text that a user wrote. Decoding works on
//! bytes, since a token may end inside a character. An id without an entry decodes to nothing:
//! Llama 4 has logits for hundreds of ids that its tokenizer does not name.

#[cfg(test)]
mod tests;

use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;
use tokenizers::DecoderWrapper;

/// What the text of a special token means when it is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// The special token.
    Parse,
    /// Ordinary text: nothing in it can become a special token.
    Text,
}

/// Whether decoding leaves special tokens out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SkipSpecial {
    Yes,
    No,
}

/// Why a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("cannot read {file}: {reason}; the checkpoint's folder must hold its tokenizer files")]
    File { file: String, reason: String },
    #[error("{file}: its decoder is not byte-level; use a Llama 4 checkpoint's tokenizer")]
    NotByteLevel { file: String },
    #[error("text cannot be encoded: {reason}; the tokenizer's files do not fit each other")]
    Encode { reason: String },
}

/// The tokenizer of one checkpoint.
#[derive(Debug)]
pub struct Tokenizer {
    parse: tokenizers::Tokenizer,
    text: tokenizers::Tokenizer,
    /// By id; `None` where the vocabulary has a gap.
    tokens: Vec<Option<Token>>,
    bos: Option<u32>,
}

#[derive(Clone, Debug)]
struct Token {
    bytes: Vec<u8>,
    special: bool,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and `tokenizer_config.json` for the first token's name.
    ///
    /// # Errors
    ///
    /// [`TokenizerError`] if a file is missing, broken or of another family.
    pub fn load(dir: &Path) -> Result<Self, TokenizerError> {
        let path = dir.join("tokenizer.json");
        let file = path.display().to_string();
        let parse = tokenizers::Tokenizer::from_file(&path).map_err(|error| {
            TokenizerError::File { file: file.clone(), reason: error.to_string() }
        })?;
        if !matches!(parse.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            return Err(TokenizerError::NotByteLevel { file });
        }
        let mut text = parse.clone();
        text.set_encode_special_tokens(true);
        let bos = named_token(dir, "bos_token").and_then(|name| parse.token_to_id(&name));
        let tokens = token_table(&parse);
        Ok(Self { parse, text, tokens, bos })
    }

    /// Token ids of `text`; no id is added in front (the chat template writes the first token).
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Encode`] if the tokenizer's vocabulary lacks a byte.
    pub fn encode(&self, text: &str, special: Special) -> Result<Vec<u32>, TokenizerError> {
        let encoder = match special {
            Special::Parse => &self.parse,
            Special::Text => &self.text,
        };
        let encoding = encoder.encode_fast(text, false).map_err(encode_error)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Special tokens that [`Special::Parse`] finds in `text`, with their byte ranges, in order.
    ///
    /// # Errors
    ///
    /// As [`Self::encode`].
    pub fn find_special(
        &self,
        text: &str,
    ) -> Result<Vec<(u32, std::ops::Range<usize>)>, TokenizerError> {
        let encoding = self.parse.encode(text, false).map_err(encode_error)?;
        let offsets = encoding.get_offsets().iter();
        let found = encoding.get_ids().iter().zip(offsets).filter(|&(&id, _)| self.is_special(id));
        Ok(found.map(|(&id, &(start, end))| (id, start..end)).collect())
    }

    /// The token that begins every text, if the files name one.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The text of `ids`, as the reference decodes it: what is not UTF-8 becomes U+FFFD, ids
    /// without an entry become nothing.
    #[must_use]
    pub fn decode(&self, ids: &[u32], skip: SkipSpecial) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            bytes.extend_from_slice(self.visible_bytes(id, skip));
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes that a token stands for; `None` for an id without an entry.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        self.token(id).map(|token| token.bytes.clone())
    }

    /// Whether the id is a special token (an id without an entry is not).
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.token(id).is_some_and(|token| token.special)
    }

    /// One more than the largest id with an entry.
    #[must_use]
    pub fn vocab(&self) -> usize {
        self.tokens.len()
    }

    /// Texts of all special tokens.
    pub fn special_texts(&self) -> impl Iterator<Item = &[u8]> {
        let special = |token: &'_ &Token| token.special;
        self.tokens.iter().flatten().filter(special).map(|token| token.bytes.as_slice())
    }

    fn token(&self, id: u32) -> Option<&Token> {
        self.tokens.get(id as usize)?.as_ref()
    }

    fn visible_bytes(&self, id: u32, skip: SkipSpecial) -> &[u8] {
        match self.token(id) {
            Some(token) if token.special && skip == SkipSpecial::Yes => &[],
            Some(token) => &token.bytes,
            None => &[],
        }
    }
}

/// Decodes token by token; the pieces joined are [`Tokenizer::decode`] of all ids.
///
/// A character is given out when its last byte has arrived, so that a stream of pieces never
/// shows half a character.
#[derive(Debug)]
pub struct Detokenizer {
    skip: SkipSpecial,
    /// The beginning of a character, at most 3 bytes.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// An empty text.
    #[must_use]
    pub fn new(skip: SkipSpecial) -> Self {
        Self { skip, pending: Vec::new() }
    }

    /// The characters that `id` completes; often empty.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        self.pending.extend_from_slice(tokenizer.visible_bytes(id, self.skip));
        let mut out = String::new();
        let mut begun = 0;
        let mut chunks = self.pending.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            out.push_str(chunk.valid());
            let invalid = chunk.invalid();
            let unfinished = std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
            // Only the last chunk can be completed: the others are followed by a byte that
            // proves them wrong.
            if unfinished && chunks.peek().is_none() {
                begun = invalid.len();
            } else if !invalid.is_empty() {
                out.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..self.pending.len() - begun);
        out
    }

    /// What is left at the end: U+FFFD if the text stops inside a character.
    pub fn flush(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        rest
    }
}

fn encode_error(error: tokenizers::Error) -> TokenizerError {
    TokenizerError::Encode { reason: error.to_string() }
}

fn token_table(tokenizer: &tokenizers::Tokenizer) -> Vec<Option<Token>> {
    let added = tokenizer.get_added_tokens_decoder();
    let mut table: Vec<Option<Token>> = Vec::new();
    let bytes_of = byte_alphabet();
    for (text, id) in tokenizer.get_vocab(true) {
        let index = id as usize;
        if table.len() <= index {
            table.resize(index + 1, None);
        }
        // As the reference's ByteLevel decoder: a token with a character outside the alphabet
        // stands for its own UTF-8.
        let bytes: Option<Vec<u8>> = text.chars().map(|c| bytes_of.get(&c).copied()).collect();
        let special = added.get(&id).is_some_and(|token| token.special);
        table[index] = Some(Token { bytes: bytes.unwrap_or_else(|| text.into_bytes()), special });
    }
    table
}

/// The character that stands for a byte in byte-level vocabularies: printable Latin-1 stands for
/// itself, the other 68 bytes for U+0100 onwards (GPT-2's `bytes_to_unicode`).
#[must_use]
pub(crate) fn byte_character(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&byte| !printable(byte)).count();
    let code = 256 + u32::try_from(rank).expect("fewer than 256 bytes");
    char::from_u32(code).expect("U+0100 to U+0143 are characters")
}

fn byte_alphabet() -> BTreeMap<char, u8> {
    (0..=255).map(|byte| (byte_character(byte), byte)).collect()
}

/// A special token's text by its role (`bos_token`), from `tokenizer_config.json` or
/// `special_tokens_map.json`. Both are optional.
pub(crate) fn named_token(dir: &Path, role: &str) -> Option<String> {
    ["tokenizer_config.json", "special_tokens_map.json"].iter().find_map(|file| {
        let json = std::fs::read_to_string(dir.join(file)).ok()?;
        let map: Map<String, Value> = serde_json::from_str(&json).ok()?;
        let value = map.get(role)?;
        // Either the text or an `AddedToken` object.
        value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
    })
}
