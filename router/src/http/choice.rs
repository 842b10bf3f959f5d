//! One choice of an answer: the engine's events in, pieces of text out.

use super::answer::{internal, stands_by};
use super::served::ServedModel;
use super::writer::Writer;
use crate::engine::{Event, TokenStream};
use futures::stream::{self, Stream};
use openai::{ApiError, Piece, Place};
use std::sync::Arc;

/// A choice that is being written. Dropping it cancels its sequence.
pub(super) struct Choice {
    index: u32,
    place: Place,
    served: Arc<ServedModel>,
    writer: Writer,
    /// Text in front of the first token's; empty from the first piece on.
    echo: String,
    /// `None` once the choice is over, so that the engine frees its memory at once.
    tokens: Option<TokenStream>,
}

/// A piece of a choice and where it belongs.
#[derive(Debug, PartialEq)]
pub(super) struct Part {
    pub(super) index: u32,
    pub(super) place: Place,
    pub(super) piece: Piece,
    /// Tokens generated since the choice's last part.
    pub(super) tokens: u32,
}

impl Choice {
    pub(super) fn new(
        index: u32,
        served: Arc<ServedModel>,
        writer: Writer,
        echo: String,
        tokens: TokenStream,
    ) -> Self {
        Self { index, place: Place::First, served, writer, echo, tokens: Some(tokens) }
    }

    /// The next part that is worth sending; `None` after the last one.
    async fn next(&mut self) -> Option<Result<Part, ApiError>> {
        let before = self.writer.tokens();
        loop {
            let event = self.tokens.as_mut()?.next().await;
            let mut piece = match event {
                Some(Event::Token(sampled)) => self.writer.token(&self.served, &sampled),
                Some(Event::End(finish)) => self.writer.end(&self.served, finish),
                Some(Event::Failed(why)) => return Some(Err(self.fail(&why))),
                Some(Event::Deposed(why)) => {
                    self.tokens = None;
                    return Some(Err(stands_by(&why)));
                }
                None => return Some(Err(self.fail("the engine ended within the answer"))),
            };
            if piece.finish.is_some() {
                self.tokens = None;
            }
            if !self.echo.is_empty() {
                piece.text.insert_str(0, &std::mem::take(&mut self.echo));
            }
            if !piece.is_empty() {
                let place = std::mem::replace(&mut self.place, Place::Later);
                let tokens = self.writer.tokens() - before;
                return Some(Ok(Part { index: self.index, place, piece, tokens }));
            }
        }
    }

    fn fail(&mut self, why: &str) -> ApiError {
        self.tokens = None;
        internal(why)
    }

    /// All parts, one after the other.
    pub(super) fn parts(self) -> impl Stream<Item = Result<Part, ApiError>> {
        stream::unfold(self, |mut choice| async {
            let part = choice.next().await?;
            Some((part, choice))
        })
    }

    /// All parts in one, and the number of tokens.
    pub(super) async fn whole(mut self) -> Result<(Piece, u32), ApiError> {
        let mut whole = Piece::default();
        while let Some(part) = self.next().await {
            whole.append(part?.piece);
        }
        Ok((whole, self.writer.tokens()))
    }
}
