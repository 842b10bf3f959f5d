//! The engine of a router that does not lead: it steps nothing and holds no stream.

use super::super::{Event, link::StepFailure};
use super::Engine;
use crate::lead::Lead;
use ids::SeqId;

impl Engine {
    pub(super) fn leads_since(&self, session: u64) -> bool {
        matches!(self.lead.now(), Lead::Leads { since, .. } if since == session)
    }

    /// The session ends because of its epoch or its leadership.
    pub(super) async fn give_way(&mut self, failure: &StepFailure) {
        tracing::info!(%failure, "the step is void");
        if let StepFailure::Outranked { term, .. } = failure
            && let Lead::Leads { term: own, since } = self.lead.now()
            && own < *term
        {
            *self.shared.last_failure() = Some(failure.to_string());
            self.lead.refused(*term);
            tokio::select! {
                () = self.lead.ended(since) => {}
                // Without an election nothing will change; the operator reads of it in the log.
                () = tokio::time::sleep(super::RETRY_MAX) => {}
            }
        }
    }

    /// Ends every stream, refuses new ones, and returns after a while or when something has changed.
    pub(super) async fn stand_by(&mut self, leader: Option<String>) {
        self.left = None;
        let leader = self.leader(leader).await;
        if let Lead::Leads { .. } = self.lead.now() {
            return;
        }
        let at = leader.map_or_else(|| "later".into(), |url| format!("at {url}"));
        let text = format!("this router does not lead any more; retry {at}");
        let live: Vec<SeqId> = self.live.keys().copied().collect();
        for id in live {
            self.end(id, Event::Deposed(text.clone()), "deposed");
        }
        let mut lead = self.lead.clone();
        tokio::select! {
            () = lead.begun() => {}
            submission = self.inbox.recv(), if !self.inbox_closed => match submission {
                Some(submission) => self.answer(submission, None),
                None => self.inbox_closed = true,
            },
        }
    }

    /// Who leads instead. A router that a worker has refused learns it a moment later, or that it is
    /// the one after all; its streams wait for that, but not for a store that is away.
    async fn leader(&mut self, known: Option<String>) -> Option<String> {
        if known.is_some() || self.live.is_empty() {
            return known;
        }
        let mut lead = self.lead.clone();
        let is_known = |lead: &Lead| !matches!(lead, Lead::StandsBy { leader: None });
        let known = tokio::time::timeout(LEADER_KNOWN_MAX, lead.lead.wait_for(is_known)).await;
        match known {
            Ok(Ok(lead)) => match &*lead {
                Lead::StandsBy { leader } => leader.clone(),
                Lead::Leads { .. } => None,
            },
            Ok(Err(_)) | Err(_) => None,
        }
    }
}

/// Longest that streams wait for the news of who leads. The store answers within milliseconds, or is
/// away and may stay so.
const LEADER_KNOWN_MAX: std::time::Duration = std::time::Duration::from_secs(10);
