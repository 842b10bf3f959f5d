//! Tells the coordinator what the engine sees of a view. News may be lost: a fault that nobody heard
//! of makes the next step fail too, and that is reported again.

use super::link::{StepFailure, number};
use ids::Epoch;
use proto::pb;
use proto::pb::report_request::News;
use std::time::Duration;
use tokio::sync::mpsc;
use tonic::transport::Endpoint;

/// News that wait for the coordinator. More of them say nothing new.
const NEWS_MAX: usize = 16;
/// Longest wait for the coordinator's answer.
const CALL_MAX: Duration = Duration::from_secs(2);

/// The engine's end.
#[derive(Debug)]
pub(super) struct Reporter(mpsc::Sender<pb::ReportRequest>);

impl Reporter {
    pub(super) fn fault(&self, epoch: Epoch, failure: &StepFailure) {
        let silence = failure.silence();
        let silent =
            silence.map(|silence| silence.ranks.iter().map(|&rank| number(rank)).collect());
        let silent_ms = silence.map_or(0, |silence| silence.lasted.as_millis());
        self.send(
            epoch,
            News::Fault(pb::Fault {
                text: failure.to_string(),
                suspects: failure.suspects(),
                silent: silent.unwrap_or_default(),
                silent_ms: u32::try_from(silent_ms).unwrap_or(u32::MAX),
            }),
        );
    }

    pub(super) fn first_token(&self, epoch: Epoch) {
        self.send(epoch, News::FirstToken(pb::FirstToken {}));
    }

    fn send(&self, epoch: Epoch, news: News) {
        let report = pb::ReportRequest { epoch: epoch.0, news: Some(news) };
        if self.0.try_send(report).is_err() {
            tracing::debug!(%epoch, "news for the coordinator dropped: it is slow or away");
        }
    }
}

/// Starts the task that carries the news; it ends with the reporter.
pub(super) fn spawn(coordinators: &str) -> Reporter {
    let (sender, inbox) = mpsc::channel(NEWS_MAX);
    let coordinators: Vec<String> = coordinators.split(',').map(str::to_owned).collect();
    telemetry::spawn("router.report", carry(coordinators, inbox));
    Reporter(sender)
}

async fn carry(coordinators: Vec<String>, mut inbox: mpsc::Receiver<pb::ReportRequest>) {
    let endpoint = |url: &String| {
        let endpoint = Endpoint::from_shared(url.clone()).ok()?;
        Some(endpoint.connect_timeout(CALL_MAX).timeout(CALL_MAX).tcp_nodelay(true).connect_lazy())
    };
    let channels: Vec<_> = coordinators.iter().filter_map(endpoint).collect();
    while let Some(report) = inbox.recv().await {
        // Only the leader listens; the others refuse.
        for channel in &channels {
            let mut client = pb::coordinator_client::CoordinatorClient::new(channel.clone());
            match client.report(report.clone()).await {
                Ok(_) => break,
                Err(status) => tracing::debug!(%status, "the coordinator did not take the news"),
            }
        }
    }
}
