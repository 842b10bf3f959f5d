//! Runs a prepared request on the engine and answers, whole or as a stream.
//!
//! The request's sequences live in the future and the body that the connection polls, and nowhere
//! else: a client that leaves drops them, which cancels them.

use super::answer::{self, submit_error, too_long};
use super::choice::Choice;
use super::prepare::{Prepared, PromptIds};
use super::served::{ServedModel, unix_time_s};
use super::stream;
use super::writer::Writer;
use crate::engine::{EngineHandle, Generate, Sampling};
use axum::response::Response;
use futures::future::try_join_all;
use openai::{ApiError, Delivery, Endpoint, Options, Reply, Usage};
use std::sync::Arc;
use uuid::Uuid;

/// Seeds of a request's choices lie this far apart: an odd number near 2^64 / φ, so that all differ
/// and neighbouring seeds of requests share no choice.
const SEED_STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Answers a request.
pub(super) async fn run(
    served: Arc<ServedModel>,
    engine: &EngineHandle,
    prepared: Prepared,
) -> Result<Response, ApiError> {
    let param = prepared.param();
    let prompt_tokens = prepared.prompts.iter().map(|prompt| prompt.ids.len() as u64).sum();
    let reply = reply(&served, &prepared);
    let sequences = sequences(&served, prepared, engine.context_tokens())?;
    // All at once: one after the other, each would wait for the end of a step.
    let choices = try_join_all(sequences.into_iter().map(|sequence| {
        let Sequence { index, generate, echo, writer } = sequence;
        let served = served.clone();
        async move {
            let tokens = engine.submit(generate).await;
            let tokens = tokens.map_err(|error| submit_error(param, error))?;
            Ok::<_, ApiError>(Choice::new(index, served, writer, echo, tokens))
        }
    }))
    .await?;
    match reply.delivery {
        Delivery::Stream(_) => Ok(answer::events(stream::body(reply, prompt_tokens, choices))),
        Delivery::Whole => {
            let wholes = try_join_all(choices.into_iter().map(Choice::whole)).await?;
            let tokens = wholes.iter().map(|&(_, tokens)| u64::from(tokens)).sum();
            let pieces = wholes.into_iter().map(|(piece, _)| piece).collect();
            Ok(answer::json(reply.whole(pieces, Usage::new(prompt_tokens, tokens))))
        }
    }
}

fn reply(served: &ServedModel, prepared: &Prepared) -> Reply {
    let prefix = match prepared.endpoint {
        Endpoint::Chat => "chatcmpl",
        Endpoint::Completions => "cmpl",
    };
    Reply {
        endpoint: prepared.endpoint,
        id: format!("{prefix}-{}", Uuid::new_v4().simple()),
        created: unix_time_s(),
        model: served.id.clone(),
        delivery: prepared.options.delivery,
    }
}

/// A choice before the engine knows it.
struct Sequence {
    index: u32,
    generate: Generate,
    echo: String,
    writer: Writer,
}

/// Every choice of every prompt, by index.
fn sequences(
    served: &ServedModel,
    prepared: Prepared,
    context_tokens: u32,
) -> Result<Vec<Sequence>, ApiError> {
    let param = prepared.param();
    let Prepared { endpoint: _, prompts, options } = prepared;
    let group = random();
    let seed = options.sampling.seed.unwrap_or_else(random);
    let mut stop_tokens = options.stop.tokens.clone();
    if !options.stop.ignore_eos {
        stop_tokens.extend(&served.eos);
    }
    let mut sequences = Vec::new();
    for PromptIds { ids, echo } in prompts {
        let tokens_max = room(param, ids.len(), options.tokens_max, context_tokens)?;
        for choice in 0..options.choices {
            let generate = Generate {
                prompt: ids.clone(),
                tokens_max,
                sampling: sampling(&options, choice_seed(seed, choice)),
                stop_tokens: stop_tokens.clone(),
                group,
            };
            let index = u32::try_from(sequences.len()).expect("choices are bounded");
            let writer = Writer::new(&options);
            sequences.push(Sequence { index, generate, echo: echo.clone(), writer });
        }
    }
    Ok(sequences)
}

/// New tokens at most. What the context has no room for is cut off, and such an answer ends with
/// `length`; only a prompt that leaves no room at all is refused.
fn room(
    param: &str,
    prompt_tokens: usize,
    asked: Option<u32>,
    context_tokens: u32,
) -> Result<u32, ApiError> {
    let prompt_tokens = u32::try_from(prompt_tokens).unwrap_or(u32::MAX);
    match (context_tokens.saturating_sub(prompt_tokens), asked) {
        // An echo alone needs no context.
        (_, Some(0)) => Ok(0),
        (0, _) => Err(too_long(param, prompt_tokens, context_tokens)),
        (room, asked) => Ok(asked.map_or(room, |asked| asked.min(room))),
    }
}

/// The first choice has the request's own seed, so it is the same however many follow.
fn choice_seed(seed: u64, choice: u32) -> u64 {
    seed.wrapping_add(u64::from(choice).wrapping_mul(SEED_STEP))
}

fn random() -> u64 {
    // Each half has bits that say which kind of id it is, but not the same ones.
    let (high, low) = Uuid::new_v4().as_u64_pair();
    high ^ low
}

fn sampling(options: &Options, seed: u64) -> Sampling {
    let openai::Sampling {
        temperature,
        top_p,
        top_k,
        min_p,
        presence_penalty,
        frequency_penalty,
        ref bias,
        seed: _,
        tokens_min,
        logprobs,
    } = options.sampling;
    let bias = bias.clone();
    Sampling {
        seed,
        temperature,
        top_p,
        top_k,
        min_p,
        presence_penalty,
        frequency_penalty,
        bias,
        tokens_min,
        logprobs,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use openai::ErrorKind;

    #[test]
    fn answer_gets_what_the_context_leaves() {
        assert_eq!(room("prompt", 60, None, 100), Ok(40));
        assert_eq!(room("prompt", 60, Some(10), 100), Ok(10));
        assert_eq!(room("prompt", 60, Some(50), 100), Ok(40));
        assert_eq!(room("prompt", 200, Some(0), 100), Ok(0));
        let error = room("prompt", 100, Some(1), 100).unwrap_err();
        assert_eq!(
            (error.kind, error.param.as_deref()),
            (ErrorKind::ContextLength, Some("prompt"))
        );
    }

    #[test]
    fn choices_of_one_seed_differ_and_the_first_is_its_own() {
        let seeds: Vec<u64> = (0..128).map(|choice| choice_seed(7, choice)).collect();
        assert_eq!(seeds[0], 7);
        let distinct: std::collections::BTreeSet<u64> = seeds.iter().copied().collect();
        assert_eq!(distinct.len(), seeds.len());
    }
}
