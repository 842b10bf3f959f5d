//! The engine's task: inputs, plan, step, commit, deliver, and again.

mod poisoned;

use super::{
    EngineConfig, Event, Finish, RETRY_AFTER_S, SampledToken, Shared, Submission, SubmitError,
    TokenStream,
    journal::Record,
    link::{Links, Remedy, StepFailure},
    report::{self, Reporter},
    suspicion::Suspicion,
    watch::{Peer, Target},
};
use ids::{Epoch, SeqId, StepId};
use metrics::{counter, gauge, histogram};
use proto::pb;
use scheduler::{Config, Plan, Scheduler};
use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, watch};

/// Pause before a failed step is planned again. A view change usually takes longer than the first
/// retries; the cap keeps a cluster that cannot work from spinning.
const RETRY_FIRST: Duration = Duration::from_millis(10);
const RETRY_MAX: Duration = Duration::from_millis(500);

/// A sequence that a client waits for.
struct Live {
    record: Record,
    events: mpsc::Sender<Event>,
    /// Steps since its last token that failed because its values were not finite.
    not_finite: u32,
}

/// Everything that lives as long as one set of step streams.
struct Session {
    target: Target,
    links: Links,
    scheduler: Scheduler,
    plan: Plan,
    /// Preemptions that the metric already counts.
    preemptions: u64,
    /// Steps that committed in it.
    committed: u64,
}

/// The state of the engine's task.
pub(super) struct Engine {
    config: EngineConfig,
    inbox: mpsc::Receiver<Submission>,
    /// All handles are gone; the engine ends with its last sequence.
    inbox_closed: bool,
    views: watch::Receiver<Option<Target>>,
    reporter: Reporter,
    shared: Arc<Shared>,
    live: BTreeMap<SeqId, Live>,
    /// What the last session left behind: whose KV memory holds what.
    left: Option<(Target, Scheduler)>,
    next_sequence: SeqId,
    next_step: StepId,
    retry_pause: Duration,
    suspicion: Suspicion,
}

impl Engine {
    pub(super) fn new(
        config: EngineConfig,
        inbox: mpsc::Receiver<Submission>,
        views: watch::Receiver<Option<Target>>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            reporter: report::spawn(&config.coordinator),
            config,
            inbox,
            inbox_closed: false,
            views,
            shared,
            live: BTreeMap::new(),
            left: None,
            next_sequence: SeqId(0),
            next_step: StepId(1),
            retry_pause: RETRY_FIRST,
            suspicion: Suspicion::new(),
        }
    }

    pub(super) async fn run(mut self) {
        while !self.is_over() {
            if let Some(mut session) = self.open().await {
                self.shared.ready.store(true, Ordering::SeqCst);
                self.serve(&mut session).await;
                self.shared.ready.store(false, Ordering::SeqCst);
                self.left = Some((session.target, session.scheduler));
            }
        }
    }

    fn is_over(&self) -> bool {
        self.inbox_closed && self.live.is_empty()
    }

    /// Opens a session on the newest view, or waits a while and returns `None`.
    async fn open(&mut self) -> Option<Session> {
        let target = self.views.borrow_and_update().clone();
        let Some(target) = target else {
            self.wait(None, None).await;
            return None;
        };
        let epoch = target.epoch;
        let opened = match Links::open(&target).await {
            Ok(links) => self.session(target, links),
            Err(failure) => {
                self.reporter.fault(epoch, &failure);
                Err(failure.to_string())
            }
        };
        match opened {
            Ok(session) => Some(session),
            Err(text) => {
                self.pause_after(&text, None).await;
                None
            }
        }
    }

    /// A session with every live sequence of the journal. Those whose rank still holds their KV
    /// memory go on, the others are prefilled again.
    fn session(&mut self, target: Target, links: Links) -> Result<Session, String> {
        let scheduler = self
            .scheduler(&target)
            .map_err(|error| format!("the view {} cannot be served: {error}", target.epoch))?;
        self.shared.context_tokens.store(scheduler.context_tokens(), Ordering::SeqCst);
        self.shared.epoch.store(target.epoch.0, Ordering::SeqCst);
        *self.shared.served() = Some(target.clone());
        let preemptions = scheduler.stats().preemptions;
        let kept = scheduler.stats().running;
        let plan = Plan::new();
        let mut session = Session { target, links, scheduler, plan, preemptions, committed: 0 };
        self.resubmit(&mut session.scheduler);
        let epoch = session.target.epoch;
        tracing::info!(%epoch, sequences = self.live.len(), kept, "serving");
        Ok(session)
    }

    fn scheduler(&mut self, target: &Target) -> Result<Scheduler, scheduler::ConfigError> {
        let config = Config {
            pools: target.peers.iter().map(|peer| peer.kv).collect(),
            step_tokens: self.config.step_tokens,
            sequences_max: self.config.sequences_max.min(self.config.step_tokens),
            // Live sequences are never refused, however many they are; `accept` bounds new ones.
            queue_max: u32::MAX,
            context_tokens: target.context_tokens,
        };
        let Some((before, scheduler)) = self.left.take() else { return Scheduler::new(config) };
        let old_rank = |peer: &Peer| before.peers.iter().position(|old| old.is_same_process(peer));
        let kept: Vec<Option<usize>> = target.peers.iter().map(old_rank).collect();
        let mut scheduler = scheduler.reconfigure(config, &kept)?;
        // Clients may have left while no view was served.
        scheduler.retain(|id| self.live.contains_key(&id));
        Ok(scheduler)
    }

    fn resubmit(&mut self, scheduler: &mut Scheduler) {
        let mut lost = Vec::new();
        for (&id, live) in &self.live {
            if scheduler.has(id) {
                continue;
            }
            if let Err(error) = scheduler.submit(live.record.resume(id)) {
                lost.push((id, error.to_string()));
            }
        }
        for (id, text) in lost {
            self.end(id, Event::Failed(text), "failed");
        }
    }

    /// Steps until the streams break, a newer view arrives or everything is over.
    async fn serve(&mut self, session: &mut Session) {
        loop {
            self.drain_inbox(session);
            self.sweep(Some(&mut session.scheduler));
            if self.has_newer_view(session) || self.is_over() {
                return;
            }
            if !session.scheduler.plan(self.next_step, &mut session.plan) {
                self.report(session);
                self.wait(Some(session), None).await;
                continue;
            }
            self.next_step = self.next_step.next();
            match self.step(session).await {
                Ok(sampled) => {
                    self.commit(session, sampled);
                    self.report(session);
                    self.retry_pause = RETRY_FIRST;
                }
                Err(failure) => {
                    session.scheduler.abort();
                    self.shared.failed_steps.fetch_add(1, Ordering::SeqCst);
                    let remedy = failure.remedy();
                    self.give_up_on_poisoned(session, &failure);
                    if let StepFailure::Superseded { epoch } = &failure {
                        tracing::info!(%epoch, "a rank is gone; its step is void");
                        return;
                    }
                    self.reporter.fault(session.target.epoch, &failure);
                    self.pause_after(&failure.to_string(), Some(session)).await;
                    match remedy {
                        Remedy::Retry => {}
                        Remedy::Reopen => return,
                    }
                }
            }
        }
    }

    async fn step(&mut self, session: &mut Session) -> Result<Vec<pb::Sampled>, StepFailure> {
        let live = &self.live;
        let sample = |id| live.get(&id).expect("only live sequences are planned").record.sample();
        let Session { links, plan, target, .. } = session;
        let started = Instant::now();
        let step = links.step(plan, self.config.step_deadline, &mut self.suspicion, sample);
        let sampled = tokio::select! {
            sampled = step => sampled?,
            // Nobody waits for the answer of a rank that is gone. A planned change keeps all ranks, and
            // lets the step end.
            epoch = without_a_rank_of(&mut self.views, target) => {
                return Err(StepFailure::Superseded { epoch });
            }
        };
        histogram!("herd_step_seconds").record(started.elapsed().as_secs_f64());
        Ok(sampled)
    }

    /// Every rank took part: the step counts.
    fn commit(&mut self, session: &mut Session, sampled: Vec<pb::Sampled>) {
        let tokens: Vec<(SeqId, u32)> =
            sampled.iter().map(|s| (SeqId(s.sequence), s.token)).collect();
        session.scheduler.commit(&tokens);
        let slices = session.plan.ranks.iter().flatten();
        let computed: usize = slices.map(|slice| slice.tokens.len()).sum();
        counter!("herd_steps_total").increment(1);
        counter!("herd_tokens_generated_total").increment(tokens.len() as u64);
        counter!("herd_tokens_prefilled_total").increment((computed - tokens.len()) as u64);
        self.shared.steps.fetch_add(1, Ordering::SeqCst);

        if session.committed == 0 {
            self.reporter.first_token(session.target.epoch);
        }
        session.committed += 1;

        let context_tokens = session.scheduler.context_tokens();
        for sampled in sampled {
            let id = SeqId(sampled.sequence);
            let Some(live) = self.live.get_mut(&id) else { continue };
            live.not_finite = 0;
            let finish = live.record.append(sampled.token, context_tokens);
            if !matches!(finish, Some(Finish::Stop { .. })) {
                deliver(&live.events, Event::Token(token_from_wire(sampled)));
            }
            if let Some(finish) = finish {
                session.scheduler.cancel(id);
                let outcome = match finish {
                    Finish::Stop { .. } => "stop",
                    Finish::Length => "length",
                };
                self.end(id, Event::End(finish), outcome);
            }
        }
    }

    fn drain_inbox(&mut self, session: &mut Session) {
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

    fn answer(&mut self, submission: Submission, session: Option<&mut Session>) {
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
        generate: super::Generate,
        session: Option<&mut Session>,
    ) -> Result<TokenStream, SubmitError> {
        if self.shared.draining.load(Ordering::SeqCst) {
            return Err(SubmitError::Draining);
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

    /// Ends the sequences whose streams were dropped.
    fn sweep(&mut self, mut scheduler: Option<&mut Scheduler>) {
        let closed = self.live.iter().filter(|(_, live)| live.events.is_closed());
        let closed: Vec<SeqId> = closed.map(|(&id, _)| id).collect();
        for id in closed {
            if let Some(scheduler) = scheduler.as_deref_mut() {
                scheduler.cancel(id);
            }
            self.live.remove(&id);
            counter!("herd_requests_total", "outcome" => "cancelled").increment(1);
            self.count_streams();
        }
    }

    fn end(&mut self, id: SeqId, last: Event, outcome: &'static str) {
        if let Some(live) = self.live.remove(&id) {
            deliver(&live.events, last);
            counter!("herd_requests_total", "outcome" => outcome).increment(1);
            self.count_streams();
        }
    }

    fn count_streams(&self) {
        let streams = u32::try_from(self.live.len()).expect("live sequences are bounded");
        self.shared.streams.store(streams, Ordering::SeqCst);
        gauge!("herd_streams").set(f64::from(streams));
        if !self.shared.ready.load(Ordering::SeqCst) {
            self.shared.queued.store(streams, Ordering::SeqCst);
        }
        if streams == 0 {
            self.shared.stream_ended.notify_waiters();
        }
    }

    fn report(&self, session: &mut Session) {
        let stats = session.scheduler.stats();
        self.shared.queued.store(stats.queued, Ordering::SeqCst);
        gauge!("herd_queue").set(f64::from(stats.queued));
        counter!("herd_preemptions_total").increment(stats.preemptions - session.preemptions);
        session.preemptions = stats.preemptions;
        let mut sequences = self.shared.sequences();
        sequences.clear();
        sequences.extend(stats.ranks.iter().map(|load| load.running));
        drop(sequences);
        for (rank, load) in stats.ranks.iter().enumerate() {
            let free = |pool: &'static str, blocks: u32| {
                gauge!("herd_kv_blocks_free", "rank" => rank.to_string(), "pool" => pool)
                    .set(f64::from(blocks));
            };
            free("full", load.full_free_blocks);
            free("chunked", load.chunked_free_blocks);
        }
    }

    fn has_newer_view(&self, session: &Session) -> bool {
        let views = self.views.borrow();
        views.as_ref().is_some_and(|newest| session.target.epoch < newest.epoch)
    }

    /// Says what failed and waits for the pause to pass or a newer view to come.
    async fn pause_after(&mut self, text: &str, mut session: Option<&mut Session>) {
        if session.as_deref().is_some_and(|session| self.has_newer_view(session)) {
            return;
        }
        tracing::warn!(text, pause = ?self.retry_pause, "a step failed or could not start");
        *self.shared.last_failure() = Some(text.to_owned());
        let until = tokio::time::Instant::now() + self.retry_pause;
        self.retry_pause = RETRY_MAX.min(self.retry_pause * 2);
        while let Wake::Input = self.wait(session.as_deref_mut(), Some(until)).await {}
    }

    /// Sleeps until something happens; answers submissions meanwhile.
    async fn wait(
        &mut self,
        session: Option<&mut Session>,
        until: Option<tokio::time::Instant>,
    ) -> Wake {
        let shared = self.shared.clone();
        let forever = Duration::from_secs(3600);
        let until = until.unwrap_or_else(|| tokio::time::Instant::now() + forever);
        tokio::select! {
            biased; // A newer view comes first: the longest pause of a stream depends on it.
            changed = self.views.changed() => {
                changed.expect("the task that follows views outlives its receiver");
                self.retry_pause = RETRY_FIRST;
                Wake::View
            }
            submission = self.inbox.recv(), if !self.inbox_closed => {
                match submission {
                    Some(submission) => self.answer(submission, session),
                    None => self.inbox_closed = true,
                }
                Wake::Input
            }
            () = shared.wake.notified() => {
                self.sweep(session.map(|session| &mut session.scheduler));
                Wake::Input
            }
            () = tokio::time::sleep_until(until) => Wake::Pause,
        }
    }
}

/// Waits for a newer view that lacks a rank of `target`.
async fn without_a_rank_of(views: &mut watch::Receiver<Option<Target>>, target: &Target) -> Epoch {
    loop {
        {
            let newest = views.borrow();
            let newer = newest.as_ref().filter(|newest| target.epoch < newest.epoch);
            let is_here = |newer: &Target, peer: &Peer| {
                newer.peers.iter().any(|other| other.is_same_process(peer))
            };
            let lacks = |newer: &&Target| !target.peers.iter().all(|peer| is_here(newer, peer));
            if let Some(newer) = newer.filter(lacks) {
                return newer.epoch;
            }
        }
        views.changed().await.expect("the task that follows views outlives its receiver");
    }
}

/// What ended a sleep.
enum Wake {
    Input,
    View,
    Pause,
}

/// A stream's channel has a place for every event it can get, so this never waits. It fails if the
/// client has left, and then the next sweep ends the sequence.
fn deliver(events: &mpsc::Sender<Event>, event: Event) {
    if let Err(mpsc::error::TrySendError::Full(event)) = events.try_send(event) {
        unreachable!("a stream has room for all its events, not for {event:?}");
    }
}

fn token_from_wire(sampled: pb::Sampled) -> SampledToken {
    SampledToken {
        token: sampled.token,
        logprob: sampled.logprob,
        top: sampled.top.into_iter().map(|top| (top.token, top.logprob)).collect(),
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
