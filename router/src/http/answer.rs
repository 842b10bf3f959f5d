//! Answers as HTTP responses: bodies with their headers, and refusals with their status.

use crate::engine::SubmitError;
use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use model::{template::TemplateError, tokenizer::TokenizerError};
use openai::{ApiError, ErrorKind};

/// What clients are told to wait while no cluster serves, in seconds: about as long as a view
/// change takes, so that most find a cluster at their second attempt.
const NOT_READY_RETRY_S: u32 = 2;

/// What clients of a standby are told to wait, in seconds: it may lead by then.
const STANDS_BY_RETRY_S: u32 = 1;

/// An [`ApiError`] on its way out.
#[derive(Debug)]
pub(super) struct Refusal(pub(super) ApiError);

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let Self(error) = self;
        let status = StatusCode::from_u16(error.kind.status());
        let status = status.expect("an error's status is a number that HTTP knows");
        let mut response = (status, json(error.json())).into_response();
        if let Some(retry_after_s) = error.kind.retry_after_s() {
            let headers: &mut HeaderMap = response.headers_mut();
            headers.insert(header::RETRY_AFTER, HeaderValue::from(retry_after_s));
        }
        response
    }
}

/// A JSON body.
pub(super) fn json(body: impl Into<Body>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], body.into()).into_response()
}

/// A body of server-sent events. Proxies must not collect them.
pub(super) fn events(body: Body) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, body).into_response()
}

/// The error while no cluster serves.
pub(super) fn not_ready(why: &str) -> ApiError {
    let kind = ErrorKind::NotReady { retry_after_s: NOT_READY_RETRY_S };
    ApiError::new(kind, format!("{why}; try again in {NOT_READY_RETRY_S} s"))
}

/// The error of a router that does not lead; the text says which one does.
pub(super) fn stands_by(text: &str) -> ApiError {
    ApiError::new(ErrorKind::NotReady { retry_after_s: STANDS_BY_RETRY_S }, text)
}

/// The error of a prompt that leaves no room for an answer.
pub(super) fn too_long(param: &str, prompt_tokens: u32, context_tokens: u32) -> ApiError {
    let message = format!(
        "the prompt has {prompt_tokens} tokens, but prompt and answer together may have \
         {context_tokens}; shorten `{param}`"
    );
    ApiError::of(ErrorKind::ContextLength, param, message)
}

/// Why the engine did not take a sequence, as its client reads it.
pub(super) fn submit_error(param: &str, error: SubmitError) -> ApiError {
    match error {
        SubmitError::QueueFull { retry_after_s } => {
            ApiError::new(ErrorKind::QueueFull { retry_after_s }, error.to_string())
        }
        SubmitError::TooLong { prompt_tokens, context_tokens } => {
            too_long(param, prompt_tokens, context_tokens)
        }
        SubmitError::StandsBy { .. } => stands_by(&error.to_string()),
        SubmitError::NotReady(_) | SubmitError::Draining => not_ready(&error.to_string()),
    }
}

/// Why messages did not become a prompt. What the request is not to blame for is internal.
pub(super) fn template_error(error: &TemplateError) -> ApiError {
    match error {
        TemplateError::Refused { .. } | TemplateError::Injection => {
            let message = format!("{error}; correct `messages`");
            ApiError::of(ErrorKind::InvalidRequest, "messages", message)
        }
        TemplateError::Missing { .. } | TemplateError::Broken { .. } => internal(error),
        TemplateError::Tokenizer(error) => tokenizer_error(error),
    }
}

/// Loading has checked the tokenizer, so this is nobody's fault but ours.
pub(super) fn tokenizer_error(error: &TokenizerError) -> ApiError {
    internal(error)
}

/// An error that the client can do nothing about.
pub(super) fn internal(error: impl std::fmt::Display) -> ApiError {
    tracing::error!(%error, "a request failed");
    ApiError::new(ErrorKind::Internal, format!("{error}; the server's log says more"))
}
