//! The front door: the OpenAI interface over HTTP.
//!
//! It translates between clients and the engine and decides nothing about scheduling. What bodies
//! look like is decided by `openai`, what text means by `model`; here is what happens between
//! them. Two things hold for every request:
//!
//! * It owns its sequences. They live in the future or the body that the connection polls, so a
//!   client that leaves cancels them, and no task outlives its connection.
//! * It cannot harm others. A panic becomes an answer of status 500, bodies have a limit, and long
//!   ones are read on another thread.

mod answer;
mod choice;
mod generate;
mod prepare;
mod routes;
mod served;
mod stream;
#[cfg(test)]
mod tests;
mod tokens;
mod writer;

use crate::engine::EngineHandle;
use answer::{Refusal, internal};
use axum::{
    Router,
    extract::{DefaultBodyLimit, Request},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
    serve::ListenerExt,
};
use futures::{FutureExt, future::BoxFuture};
use openai::models_json;
use serde_json::Value;
use std::{future::Future, io, panic::AssertUnwindSafe, sync::Arc};
use tokio::net::TcpListener;

pub use served::{FrontError, ServedModel};

/// Longest request body. A prompt of a million tokens is about 5 MB of text; escapes and lists of
/// token ids take a few times as much.
const BODY_BYTES_MAX: usize = 32 << 20;

/// Renders `/metrics`.
pub type MetricsText = Box<dyn Fn() -> String + Send + Sync>;

/// Asks for the cluster's part of `/status`, an object. The router's part joins it.
pub type ClusterStatus = Box<dyn Fn() -> BoxFuture<'static, Value> + Send + Sync>;

/// What the front door needs beside the engine.
pub struct Front {
    pub model: Arc<ServedModel>,
    pub metrics: MetricsText,
    pub status: ClusterStatus,
}

/// What every request sees.
struct App {
    front: Front,
    engine: EngineHandle,
}

impl App {
    fn models_json(&self) -> (String, String) {
        let model = &self.front.model;
        models_json(&model.id, model.created, self.engine.context_tokens())
    }
}

/// Serves HTTP until `shutdown` and the end of the requests that run then. New connections are
/// refused from `shutdown` on; whoever cannot wait for the running requests drops the future.
///
/// # Errors
///
/// Those of the listener.
pub async fn serve(
    listener: TcpListener,
    front: Front,
    engine: EngineHandle,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let listener = listener.tap_io(|connection| {
        // Tokens are small packets; waiting to join them would delay each by a round trip.
        if let Err(error) = connection.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY cannot be set");
        }
    });
    let router = router(Arc::new(App { front, engine }));
    axum::serve(listener, router).with_graceful_shutdown(shutdown).await
}

fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(routes::chat))
        .route("/v1/completions", post(routes::completions))
        .route("/v1/models", get(routes::models))
        // Names of models may contain slashes.
        .route("/v1/models/{*id}", get(routes::model))
        .route("/tokenize", post(routes::tokenize))
        .route("/detokenize", post(routes::detokenize))
        .route("/health", get(routes::health))
        .route("/metrics", get(routes::metrics))
        .route("/status", get(routes::status))
        .fallback(routes::unknown_path)
        .method_not_allowed_fallback(routes::wrong_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn(guard))
        .with_state(app)
}

/// Turns a panic of one request into its answer. Nothing that the handlers share can be left half
/// changed: they only read it.
async fn guard(request: Request, next: Next) -> Response {
    let answer = AssertUnwindSafe(next.run(request)).catch_unwind().await;
    answer.unwrap_or_else(|_panic| Refusal(internal("the request panicked")).into_response())
}
