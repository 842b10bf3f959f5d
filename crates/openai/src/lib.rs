//! The OpenAI HTTP interface as values: requests parsed and checked, answers and errors formatted,
//! stop strings found.
//!
//! A request that [`ChatRequest::parse`] or [`CompletionRequest::parse`] returns needs no further
//! check but for what only the cluster knows: the model's name and the room in its context.
//! Fields that nobody here knows are ignored, as other servers do; fields that are known but not
//! served are refused, because a client that asked for them would misread the answer.

mod chat;
mod completion;
mod error;
mod fields;
mod options;
mod reply;
mod stop;
#[cfg(test)]
mod tests;
mod tokenize;

pub use chat::{ChatEnding, ChatRequest, Message, Role};
pub use completion::{CompletionRequest, Prompt};
pub use error::{ApiError, ErrorKind};
pub use options::{Defaults, Delivery, Options, Sampling, Stop, UsageEvent};
pub use reply::{
    Alternative, Endpoint, FinishReason, Piece, Place, Reply, TokenLogprob, TokenText, Usage,
    models_json,
};
pub use stop::{Scan, StopMatcher, StopText};
pub use tokenize::{DetokenizeRequest, TokenizeInput, TokenizeRequest};
