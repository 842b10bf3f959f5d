//! Tells the workers how the copies of an expert share its rows.

use super::Shell;
use control::{Control, Input};
use placement::{Shares, View};
use proto::pb;
use std::sync::Arc;
use std::time::Duration;

/// How often shares may change: as often as the workers report their load.
pub(super) const MOMENT: Duration = Duration::from_secs(1);
/// A worker that takes no shares within this time is told again later.
const SHARE_MAX: Duration = Duration::from_secs(1);

impl Shell {
    /// Hands what was counted in the last moment to the machine.
    pub(super) fn close_moment(&mut self, control: &mut Control) {
        if let Some(window) = self.meter.moment() {
            self.feed(control, Input::Moment { window });
        }
    }

    /// Nobody waits for it: a worker that does not hear of it shares as before, until the machine tells again.
    pub(super) fn share(&self, view: &View, shares: &Shares) {
        let layers = proto::shares_to_wire(shares, view.placement.shape());
        let request = Arc::new(pb::ShareRequest { epoch: view.epoch.0, layers });
        for member in &view.members {
            let peer = self.peers.get(&member.worker);
            let Some(channel) = peer.and_then(|peer| peer.channel.clone()) else { continue };
            let (worker, request) = (member.worker, Arc::clone(&request));
            telemetry::spawn("coordinator.share", async move {
                let mut client = pb::worker_client::WorkerClient::new(channel)
                    .max_encoding_message_size(proto::MESSAGE_BYTES_MAX);
                match tokio::time::timeout(SHARE_MAX, client.share((*request).clone())).await {
                    Ok(Ok(_)) => {}
                    Ok(Err(status)) => tracing::debug!(%worker, %status, "shares were not taken"),
                    Err(_elapsed) => tracing::debug!(%worker, "shares were not answered"),
                }
            });
        }
    }
}
