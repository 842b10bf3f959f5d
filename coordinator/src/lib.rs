//! The coordinator: the shell around [`control::Control`].
//!
//! It turns calls, broken streams and answers into the machine's inputs and carries out its outputs.
//! It decides nothing, and it is not on the path of a token: a cluster serves without it, only its
//! membership stands still.

mod report;
mod service;
mod shell;
#[cfg(test)]
mod tests;
mod view_store;

use control::Settings;
use proto::pb;
use std::sync::Arc;
use store::Store;
use tokio::sync::{mpsc, oneshot, watch};

/// Events between the services and the machine. A sender waits when it is full: registrations and
/// evidence are few, and none may be lost.
const EVENTS_MAX: usize = 256;

/// Starts the coordinator's task on the current runtime; it ends with the last handle.
#[must_use]
pub fn start(settings: Settings, store: Arc<dyn Store>) -> Handle {
    let (events, inbox) = mpsc::channel(EVENTS_MAX);
    let (publish, views) = watch::channel(None);
    let shell = shell::Shell::new(events.downgrade(), inbox, publish, store);
    telemetry::spawn("coordinator", shell.run(settings));
    Handle { events, views }
}

/// The services' end of the coordinator.
#[derive(Debug, Clone)]
pub struct Handle {
    events: mpsc::Sender<shell::Event>,
    views: watch::Receiver<Option<Arc<pb::View>>>,
}

impl Handle {
    /// The gRPC service, to be added to a server.
    #[must_use]
    pub fn service(&self) -> pb::coordinator_server::CoordinatorServer<service::Service> {
        pb::coordinator_server::CoordinatorServer::new(service::Service::new(self.clone()))
            .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
    }

    /// The document of `herd status --json`, without the router's part. `None` if the coordinator has
    /// ended.
    pub async fn status(&self) -> Option<serde_json::Value> {
        let (reply, answer) = oneshot::channel();
        self.events.send(shell::Event::Status { reply }).await.ok()?;
        answer.await.ok()
    }

    /// The current view and every later one.
    #[must_use]
    pub fn views(&self) -> watch::Receiver<Option<Arc<pb::View>>> {
        self.views.clone()
    }
}
