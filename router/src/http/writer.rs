//! From a choice's tokens to its text: characters completed, stop strings cut, log-probabilities
//! named.
//!
//! Pure. A token's log-probability goes out with the token, even while its text is held back
//! because a character is incomplete or a stop string may have begun.

#[cfg(test)]
mod tests;

use super::served::ServedModel;
use crate::engine::{Finish, SampledToken};
use model::tokenizer::{Detokenizer, SkipSpecial};
use openai::{
    Alternative, FinishReason, Options, Piece, Scan, Stop, StopMatcher, StopText, TokenLogprob,
    TokenText,
};

/// The text of one choice in the making.
pub(super) struct Writer {
    detokenizer: Detokenizer,
    matcher: StopMatcher,
    stop: Stop,
    /// Stop strings are not looked for before this many tokens.
    tokens_min: u32,
    tokens: u32,
    /// Written so far, held back or not.
    characters: usize,
    logprobs: Logprobs,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Logprobs {
    Wanted,
    Unwanted,
}

impl Writer {
    /// An empty text.
    pub(super) fn new(options: &Options) -> Self {
        let skip = if options.skip_special_tokens { SkipSpecial::Yes } else { SkipSpecial::No };
        let included = options.stop.include_in_output;
        let stop_text = if included { StopText::Included } else { StopText::Hidden };
        let wanted = options.sampling.logprobs.is_some();
        Self {
            detokenizer: Detokenizer::new(skip),
            matcher: StopMatcher::new(&options.stop.strings, stop_text),
            stop: options.stop.clone(),
            tokens_min: options.sampling.tokens_min,
            tokens: 0,
            characters: 0,
            logprobs: if wanted { Logprobs::Wanted } else { Logprobs::Unwanted },
        }
    }

    /// Tokens of the choice so far; one that stopped it counts.
    pub(super) fn tokens(&self) -> u32 {
        self.tokens
    }

    /// What a token adds. If the piece has a finish reason, the choice is over.
    pub(super) fn token(&mut self, served: &ServedModel, sampled: &SampledToken) -> Piece {
        self.tokens = self.tokens.saturating_add(1);
        let offset = self.characters;
        let text = self.detokenizer.push(&served.tokenizer, sampled.token);
        let mut piece = self.scan(text);
        if let Some(logprobs) = &mut piece.logprobs {
            logprobs.push(token_logprob(served, sampled, offset));
        }
        piece
    }

    /// What the end of the choice brings.
    pub(super) fn end(&mut self, served: &ServedModel, finish: Finish) -> Piece {
        let (mut text, reason) = match finish {
            Finish::Length => (String::new(), FinishReason::Length),
            Finish::Stop { token } => {
                self.tokens = self.tokens.saturating_add(1);
                // Like a stop string; but the model's own end of text is never part of the text.
                let is_shown = self.stop.include_in_output && self.stop.tokens.contains(&token);
                let text = if is_shown {
                    self.detokenizer.push(&served.tokenizer, token)
                } else {
                    String::new()
                };
                (text, FinishReason::Stop)
            }
        };
        text.push_str(&self.detokenizer.flush());
        let mut piece = self.scan(text);
        if piece.finish.is_none() {
            piece.text.push_str(&self.matcher.finish());
            piece.finish = Some(reason);
        }
        piece
    }

    fn scan(&mut self, text: String) -> Piece {
        self.characters += text.chars().count();
        let scan =
            if self.tokens < self.tokens_min { Scan::Text(text) } else { self.matcher.push(&text) };
        let (text, finish) = match scan {
            Scan::Text(text) => (text, None),
            Scan::Stopped(text) => (text, Some(FinishReason::Stop)),
        };
        let logprobs = (self.logprobs == Logprobs::Wanted).then(Vec::new);
        Piece { text, logprobs, finish }
    }
}

fn token_logprob(served: &ServedModel, sampled: &SampledToken, offset: usize) -> TokenLogprob {
    let text = |id| TokenText { id, bytes: served.tokenizer.token_bytes(id) };
    let alternative = |&(id, logprob): &(u32, f32)| Alternative { token: text(id), logprob };
    TokenLogprob {
        token: text(sampled.token),
        // A worker that was asked for it always sends it.
        logprob: sampled.logprob.unwrap_or(f32::NEG_INFINITY),
        top: sampled.top.iter().map(alternative).collect(),
        offset,
    }
}
