//! An answer as server-sent events.

use super::answer::internal;
use super::choice::{Choice, Part};
use axum::body::Body;
use futures::{
    FutureExt, StreamExt,
    stream::{self, BoxStream, ReadyChunks, SelectAll, select_all},
};
use openai::{ApiError, Reply, Usage};
use std::{convert::Infallible, panic::AssertUnwindSafe, time::Duration};

/// Parts that are sent together if they are ready together. It bounds a frame for a client that
/// fell behind; one that keeps up gets every token at once.
const PARTS_MAX: usize = 64;

/// While a sequence waits for its first step or for a new view, proxies between here and the
/// client must not take the silence for death. Usual idle limits begin at 30 s.
const SILENCE_MAX: Duration = Duration::from_secs(15);

type Parts = ReadyChunks<SelectAll<BoxStream<'static, Result<Part, ApiError>>>>;

/// What a stream has still to say.
struct Events {
    reply: Reply,
    prompt_tokens: u64,
    tokens: u64,
    /// `None`: nothing. Dropping it cancels the sequences.
    parts: Option<Parts>,
}

/// The body of a streamed answer.
pub(super) fn body(reply: Reply, prompt_tokens: u64, choices: Vec<Choice>) -> Body {
    let parts = select_all(choices.into_iter().map(|choice| choice.parts().boxed()));
    let parts = Some(parts.ready_chunks(PARTS_MAX));
    let events = Events { reply, prompt_tokens, tokens: 0, parts };
    Body::from_stream(stream::unfold(events, |mut events| async {
        // A panic here would end the connection without a word.
        let frame = AssertUnwindSafe(events.next()).catch_unwind().await;
        let frame = frame.unwrap_or_else(|_| Some(events.fail(&internal("the answer broke off"))));
        frame.map(|frame| (Ok::<_, Infallible>(frame), events))
    }))
}

impl Events {
    async fn next(&mut self) -> Option<Vec<u8>> {
        let parts = self.parts.as_mut()?;
        let Ok(batch) = tokio::time::timeout(SILENCE_MAX, parts.next()).await else {
            return Some(b": waiting\n\n".to_vec());
        };
        let mut out = Vec::new();
        let Some(batch) = batch else {
            self.parts = None;
            self.reply.done_events(Usage::new(self.prompt_tokens, self.tokens), &mut out);
            return Some(out);
        };
        for part in batch {
            match part {
                Ok(Part { index, place, piece, tokens }) => {
                    self.tokens += u64::from(tokens);
                    self.reply.piece_events(index, place, &piece, &mut out);
                }
                Err(error) => {
                    out.extend(self.fail(&error));
                    break;
                }
            }
        }
        Some(out)
    }

    /// The last words of an answer that cannot go on.
    fn fail(&mut self, error: &ApiError) -> Vec<u8> {
        self.parts = None;
        let mut out = Vec::new();
        Reply::error_events(error, &mut out);
        out
    }
}
