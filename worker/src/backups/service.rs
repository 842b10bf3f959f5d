//! Where rows arrive of which this worker keeps copies.

use super::Backups;
use pb::backups_server::BackupsServer;
use proto::pb;
use tokio::sync::watch;
use tonic::{Request, Response, Status, Streaming};

/// Implements `herd.v1.Backups`.
pub(crate) struct Service {
    backups: Backups,
    /// Closes when the worker is dropped.
    stopped: watch::Receiver<()>,
}

/// The service, for the worker's own port.
pub(crate) fn server(backups: Backups, stopped: watch::Receiver<()>) -> BackupsServer<Service> {
    BackupsServer::new(Service { backups, stopped })
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
}

#[tonic::async_trait]
impl pb::backups_server::Backups for Service {
    async fn keep(
        &self,
        request: Request<Streaming<pb::KeepRequest>>,
    ) -> Result<Response<pb::KeepResponse>, Status> {
        let (mut requests, mut stopped) = (request.into_inner(), self.stopped.clone());
        loop {
            let next = tokio::select! {
                next = requests.message() => next?,
                // Only ever an error: the worker was dropped.
                _ = stopped.changed() => return Err(Status::unavailable("the worker has ended")),
            };
            let Some(next) = next else { return Ok(Response::new(pb::KeepResponse {})) };
            if let Err(error) = self.backups.keep(&next) {
                tracing::warn!(%error, "KV rows of another worker are refused");
                return Err(Status::invalid_argument(error.to_string()));
            }
        }
    }
}
