//! What each path does.

use super::answer::{self, Refusal, internal, not_ready, stands_by};
use super::prepare::{self, Prepared, unknown_model};
use super::served::ServedModel;
use super::{App, BODY_BYTES_MAX, generate, tokens};
use axum::{
    body::Bytes,
    extract::{Path, State, rejection::BytesRejection},
    http::{Method, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use openai::{ApiError, ErrorKind};
use std::sync::Arc;

/// Bodies up to this size are read on the spot. 4 KiB of chat took 4 to 10 ms in a development
/// build, and as long must no thread be kept from delivering tokens; for a short request the way
/// to another thread and back is not worth it.
const QUICK_BYTES_MAX: usize = 2 * 1024;

type Answer = Result<Response, Refusal>;
type Body = Result<Bytes, BytesRejection>;

pub(super) async fn chat(State(app): State<Arc<App>>, body: Body) -> Answer {
    generate(&app, body, prepare::chat).await
}

pub(super) async fn completions(State(app): State<Arc<App>>, body: Body) -> Answer {
    generate(&app, body, prepare::completion).await
}

async fn generate(
    app: &App,
    body: Body,
    prepare: impl FnOnce(&ServedModel, &[u8]) -> Result<Prepared, ApiError> + Send + 'static,
) -> Answer {
    let body = read(body)?;
    check_lead(app)?;
    let served = app.front.model.clone();
    let prepared = offload(body.len(), move || prepare(&served, &body)).await?;
    if app.engine.context_tokens() == 0 {
        return Err(not_ready("the cluster has not served yet").into());
    }
    Ok(generate::run(app.front.model.clone(), &app.engine, prepared).await?)
}

/// Only the router that leads serves.
fn check_lead(app: &App) -> Result<(), ApiError> {
    app.engine.check_lead().map_err(|error| stands_by(&error.to_string()))
}

pub(super) async fn tokenize(State(app): State<Arc<App>>, body: Body) -> Answer {
    let body = read(body)?;
    let (served, context_tokens) = (app.front.model.clone(), app.engine.context_tokens());
    let bytes = body.len();
    Ok(answer::json(
        offload(bytes, move || tokens::tokenize(&served, context_tokens, &body)).await?,
    ))
}

pub(super) async fn detokenize(State(app): State<Arc<App>>, body: Body) -> Answer {
    let body = read(body)?;
    let served = app.front.model.clone();
    let bytes = body.len();
    Ok(answer::json(offload(bytes, move || tokens::detokenize(&served, &body)).await?))
}

pub(super) async fn models(State(app): State<Arc<App>>) -> Response {
    answer::json(app.models_json().0)
}

pub(super) async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Answer {
    if id != app.front.model.id {
        return Err(unknown_model(&app.front.model, &id).into());
    }
    Ok(answer::json(app.models_json().1))
}

pub(super) async fn health(State(app): State<Arc<App>>) -> Answer {
    check_lead(&app)?;
    if !app.engine.is_ready() {
        return Err(not_ready("no cluster serves, or the router drains").into());
    }
    Ok(answer::json(r#"{"status":"ok"}"#))
}

pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (kind, (app.front.metrics)()).into_response()
}

pub(super) async fn status(State(app): State<Arc<App>>) -> Response {
    let cluster = (app.front.status)().await;
    let mut status = crate::status::join(cluster, &app.engine);
    status["routers"] = app.engine.routers_json();
    answer::json(status.to_string())
}

pub(super) async fn unknown_path(method: Method, uri: Uri) -> Refusal {
    let path = uri.path();
    let message =
        format!("`{method} {path}` does not exist here; correct the base URL or the path");
    Refusal(ApiError::new(ErrorKind::PathNotFound, message))
}

pub(super) async fn wrong_method(method: Method, uri: Uri) -> Refusal {
    let path = uri.path();
    let message = format!("`{path}` exists, but not for {method}; use the method in `Allow`");
    Refusal(ApiError::new(ErrorKind::MethodNotAllowed, message))
}

fn read(body: Body) -> Result<Bytes, ApiError> {
    body.map_err(|rejection| {
        if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
            let message = format!("the body has more than {BODY_BYTES_MAX} bytes; send less");
            return ApiError::new(ErrorKind::BodyTooLarge, message);
        }
        let message = format!("the body did not arrive: {}; send it again", rejection.body_text());
        ApiError::new(ErrorKind::InvalidRequest, message)
    })
}

/// Does CPU work for a body of this many bytes where it keeps nobody from being served.
async fn offload<T: Send + 'static>(
    body_bytes: usize,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if body_bytes <= QUICK_BYTES_MAX {
        return work();
    }
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_panic| Err(internal("reading the request failed")))
}
