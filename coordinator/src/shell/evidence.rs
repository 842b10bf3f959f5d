//! What to do with the news that a member may be gone.
//!
//! A new view counts only once the store holds it, and until then every stream waits. So while the store
//! does not answer nobody is given up, and no step is ended: a worker that was only late, or whose connection
//! broke and comes back, goes on as if nothing had been.

use super::{Event, Shell};
use control::Input;
use std::sync::Arc;
use std::time::Duration;

/// Longest wait for an answer. A store that is well takes a millisecond or two.
const ANSWER_MAX: Duration = Duration::from_millis(500);
/// Between attempts.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Evidence against a member.
#[derive(Debug)]
pub(crate) enum Evidence {
    /// A router's step fails, or would for want of a member. The router says so again while that lasts.
    Fault(Input),
    /// Its registration stream ended.
    Ended { worker: ids::WorkerId, connection: u64 },
}

impl Shell {
    /// Takes evidence in as soon as the store answers: then it comes back as an event.
    pub(super) fn weigh(&self, evidence: Evidence) {
        // Weak: the shell must not live on for a store that never answers.
        let events = self.events.clone();
        let (store, key) = (Arc::clone(&self.context.store), self.context.guard.key.clone());
        telemetry::spawn("coordinator.evidence", async move {
            loop {
                let answer = tokio::time::timeout(ANSWER_MAX, store.get(&key)).await;
                if matches!(answer, Ok(Ok(_))) {
                    let Some(events) = events.upgrade() else { return };
                    // Nobody listens: the coordinator ends.
                    let _ended = events.send(Event::Evidence(evidence)).await;
                    return;
                }
                tracing::warn!(?evidence, "not acted on: the store does not answer");
                if matches!(evidence, Evidence::Fault(_)) || events.strong_count() == 0 {
                    return;
                }
                tokio::time::sleep(ASK_AGAIN).await;
            }
        });
    }
}
