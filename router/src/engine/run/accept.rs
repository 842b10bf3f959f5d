//! Submissions: which sequences the engine takes, and what the others are told.

use super::super::{
    Event, Finish, Generate, RETRY_AFTER_S, Submission, SubmitError, TokenStream, journal::Record,
};
use super::{Engine, Live, Session, deliver};
use crate::lead::Lead;
use metrics::counter;
use scheduler::Scheduler;
use std::sync::atomic::Ordering;
use tokio::sync::mpsc;

impl Engine {
    pub(super) fn drain_inbox(&mut self, session: &mut Session) {
        loop {
            match self.inbox.try_recv() {
                Ok(submission) => self.answer(submission, Some(session)),
                Err(mpsc::error::TryRecvError::Empty) => return,
                Err(mpsc::error::TryRecvError::Disconnected) => {
                    self.inbox_closed = true;
                    return;
                }
            }
        }
    }

    pub(super) fn answer(&mut self, submission: Submission, session: Option<&mut Session>) {
        let Submission { generate, reply } = submission;
        let result = self.accept(generate, session);
        if result.is_err() {
            counter!("herd_requests_total", "outcome" => "refused").increment(1);
        }
        // A client that left meanwhile drops its stream here, which cancels the sequence.
        drop(reply.send(result));
    }

    fn accept(
        &mut self,
        generate: Generate,
        session: Option<&mut Session>,
    ) -> Result<TokenStream, SubmitError> {
        if self.shared.draining.load(Ordering::SeqCst) {
            return Err(SubmitError::Draining);
        }
        if let Lead::StandsBy { leader } = self.lead.now() {
            return Err(SubmitError::StandsBy { leader });
        }
        let (events, receiver) = mpsc::channel(generate.tokens_max as usize + 2);
        let stream = TokenStream { events: receiver, shared: self.shared.clone() };
        if generate.tokens_max == 0 {
            deliver(&events, Event::End(Finish::Length));
            return Ok(stream);
        }
        let id = self.next_sequence;
        let record = Record::new(generate);
        match session {
            Some(session) => self.enqueue(&mut session.scheduler, record.resume(id))?,
            None if self.config.queue_max as usize <= self.live.len() => {
                return Err(SubmitError::NotReady("no view of the cluster is served".into()));
            }
            None => {}
        }
        self.next_sequence = id.next();
        self.live.insert(id, Live { record, events, not_finite: 0 });
        self.count_streams();
        Ok(stream)
    }

    fn enqueue(
        &self,
        scheduler: &mut Scheduler,
        new: scheduler::NewSequence,
    ) -> Result<(), SubmitError> {
        let stats = scheduler.stats();
        // Sequences that the next plan can start do not wait, so they do not count.
        let slots = self.config.sequences_max.min(self.config.step_tokens);
        let free: u32 = stats.ranks.iter().map(|rank| slots.saturating_sub(rank.running)).sum();
        if self.config.queue_max.saturating_add(free) <= stats.queued {
            return Err(SubmitError::QueueFull { retry_after_s: RETRY_AFTER_S });
        }
        scheduler.submit(new).map_err(submit_error)
    }
}

fn submit_error(error: scheduler::SubmitError) -> SubmitError {
    use scheduler::SubmitError as Core;
    match error {
        Core::QueueFull { .. } => SubmitError::QueueFull { retry_after_s: RETRY_AFTER_S },
        Core::TooLong { prompt_tokens, context_tokens } => SubmitError::TooLong {
            prompt_tokens: u32::try_from(prompt_tokens).unwrap_or(u32::MAX),
            context_tokens,
        },
        // The front door renders every prompt to at least one token, and `accept` answers 0.
        Core::EmptyPrompt | Core::NoTokens => SubmitError::NotReady(error.to_string()),
    }
}
