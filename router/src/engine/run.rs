//! The engine's task: inputs, plan, step, commit, deliver, and again.

mod accept;
mod poisoned;
mod standby;

use super::{
    EngineConfig, Event, Finish, RankLoad, SampledToken, Shared, Submission,
    journal::Record,
    link::{Links, Remedy, StepFailure, Stepped},
    report::{self, Reporter},
    suspicion::Suspicion,
    watch::{Peer, Target},
};
use crate::lead::{Lead, LeadHandle};
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
    /// The leadership under which the scheduler's knowledge of KV memory holds.
    since: u64,
    scheduler: Scheduler,
    plan: Plan,
    /// Preemptions that the metric already counts.
    preemptions: u64,
    /// Steps that committed in it.
    committed: u64,
}

/// What a session leaves to the next one.
struct Left {
    target: Target,
    since: u64,
    scheduler: Scheduler,
}

/// The state of the engine's task.
pub(super) struct Engine {
    config: EngineConfig,
    inbox: mpsc::Receiver<Submission>,
    /// All handles are gone; the engine ends with its last sequence.
    inbox_closed: bool,
    views: watch::Receiver<Option<Target>>,
    lead: LeadHandle,
    reporter: Reporter,
    shared: Arc<Shared>,
    /// Of the live sequences: no other router's, or this one's before it was started again, has this number.
    journal: u64,
    live: BTreeMap<SeqId, Live>,
    /// What the last session left behind: whose KV memory holds what.
    left: Option<Left>,
    next_sequence: SeqId,
    next_step: StepId,
    retry_pause: Duration,
    suspicion: Suspicion,
}

impl Engine {
    pub(super) fn new(
        (config, lead): (EngineConfig, LeadHandle),
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
            lead,
            shared,
            journal: uuid::Uuid::new_v4().as_u64_pair().0,
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
                let Session { target, since, scheduler, .. } = session;
                self.left = Some(Left { target, since, scheduler });
            }
        }
    }

    fn is_over(&self) -> bool {
        self.inbox_closed && self.live.is_empty()
    }

    /// Opens a session on the newest view, or waits a while and returns `None`.
    async fn open(&mut self) -> Option<Session> {
        let since = match self.lead.now() {
            Lead::Leads { since, .. } => since,
            Lead::StandsBy { leader } => {
                self.stand_by(leader).await;
                return None;
            }
        };
        let target = self.views.borrow_and_update().clone();
        let Some(target) = target else {
            self.wait(None, None).await;
            return None;
        };
        let epoch = target.epoch;
        let opened = match Links::open(&target).await {
            Ok(links) => self.session(target, links, since),
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
    fn session(&mut self, target: Target, links: Links, since: u64) -> Result<Session, String> {
        let scheduler = self
            .scheduler(&target, since)
            .map_err(|error| format!("the view {} cannot be served: {error}", target.epoch))?;
        self.shared.context_tokens.store(scheduler.context_tokens(), Ordering::SeqCst);
        self.shared.epoch.store(target.epoch.0, Ordering::SeqCst);
        *self.shared.served() = Some(target.clone());
        let preemptions = scheduler.stats().preemptions;
        let kept = scheduler.stats().running;
        let plan = Plan::new();
        let mut session =
            Session { target, links, since, scheduler, plan, preemptions, committed: 0 };
        self.resubmit(&mut session.scheduler);
        let epoch = session.target.epoch;
        tracing::info!(%epoch, sequences = self.live.len(), kept, "serving");
        Ok(session)
    }

    fn scheduler(
        &mut self,
        target: &Target,
        since: u64,
    ) -> Result<Scheduler, scheduler::ConfigError> {
        let config = Config {
            pools: target.peers.iter().map(|peer| peer.kv).collect(),
            step_tokens: self.config.step_tokens,
            prefill_max: self.config.prefill_max,
            sequences_max: self.config.sequences_max.min(self.config.step_tokens),
            // Live sequences are never refused, however many they are; `accept` bounds new ones.
            queue_max: u32::MAX,
            context_tokens: target.context_tokens,
            backup_tokens: target.peers.iter().map(|peer| peer.backup_tokens).collect(),
        };
        // Another router's steps may have written over what an earlier leadership left.
        let Some(Left { target: before, scheduler, .. }) =
            self.left.take().filter(|left| left.since == since)
        else {
            return Scheduler::new(config);
        };
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
            if self.has_newer_view(session) || self.is_over() || !self.leads_since(session.since) {
                return;
            }
            if !session.scheduler.plan(self.next_step, &mut session.plan) {
                self.report(session);
                self.wait(Some(session), None).await;
                continue;
            }
            self.next_step = self.next_step.next();
            match self.step(session).await {
                Ok(Stepped { sampled, held }) => {
                    session.scheduler.held(held);
                    self.commit(session, sampled);
                    self.report(session);
                    self.retry_pause = RETRY_FIRST;
                }
                Err(failure) => {
                    session.scheduler.abort();
                    if let Some((rank, sequences)) = failure.unrestorable() {
                        session.scheduler.unrestore(rank, &sequences);
                    }
                    self.shared.failed_steps.fetch_add(1, Ordering::SeqCst);
                    let remedy = failure.remedy();
                    self.give_up_on_poisoned(session, &failure);
                    if let Remedy::Yield = remedy {
                        self.give_way(&failure).await;
                        return;
                    }
                    self.reporter.fault(session.target.epoch, &failure);
                    self.pause_after(&failure.to_string(), Some(session)).await;
                    match remedy {
                        Remedy::Retry => {}
                        Remedy::Reopen | Remedy::Yield => return,
                    }
                }
            }
        }
    }

    async fn step(&mut self, session: &mut Session) -> Result<Stepped, StepFailure> {
        let live = &self.live;
        let sample = |id| live.get(&id).expect("only live sequences are planned").record.sample();
        let Session { links, plan, target, since, .. } = session;
        let Lead::Leads { term, .. } = self.lead.now() else { return Err(StepFailure::Deposed) };
        let started = Instant::now();
        let (epoch, reporter) = (target.epoch, &self.reporter);
        let tell = |news: StepFailure| {
            tracing::warn!(%epoch, text = %news, "the step may never end");
            reporter.fault(epoch, &news);
        };
        let watch = (&mut self.suspicion, tell);
        let plan = (&*plan, self.journal, term);
        let step = links.step(plan, self.config.step_deadline, watch, sample);
        let stepped = tokio::select! {
            stepped = step => stepped?,
            // Nobody waits for the answer of a rank that is gone. A planned change keeps all ranks, and
            // lets the step end.
            epoch = without_a_rank_of(&mut self.views, target) => {
                return Err(StepFailure::Superseded { epoch });
            }
            () = self.lead.ended(*since) => return Err(StepFailure::Deposed),
        };
        let took = started.elapsed();
        histogram!("herd_step_seconds").record(took.as_secs_f64());
        session.scheduler.time(took);
        Ok(stepped)
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
        let slices = session.plan.ranks.iter().flatten();
        let restored: u64 = slices.map(|slice| u64::from(slice.restored)).sum();
        counter!("herd_tokens_restored_total").increment(restored);
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
        gauge!("herd_prompt_tokens_limit").set(f64::from(stats.prompt_tokens));
        counter!("herd_preemptions_total").increment(stats.preemptions - session.preemptions);
        session.preemptions = stats.preemptions;
        let mut load = self.shared.load();
        load.clear();
        load.extend(
            stats.ranks.iter().map(|rank| RankLoad {
                sequences: rank.running,
                backup_tokens: rank.backup_tokens,
            }),
        );
        drop(load);
        for (rank, load) in stats.ranks.iter().enumerate() {
            let free = |pool: &'static str, blocks: u32| {
                gauge!("herd_kv_blocks_free", "rank" => rank.to_string(), "pool" => pool)
                    .set(f64::from(blocks));
            };
            free("full", load.full_free_blocks);
            free("chunked", load.chunked_free_blocks);
            gauge!("herd_kv_backup_tokens", "rank" => rank.to_string())
                .set(load.backup_tokens as f64);
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
        let since = match (&session, self.lead.now()) {
            (Some(session), _) => session.since,
            (None, Lead::Leads { since, .. }) => since,
            (None, Lead::StandsBy { .. }) => return Wake::View,
        };
        let forever = Duration::from_secs(3600);
        let until = until.unwrap_or_else(|| tokio::time::Instant::now() + forever);
        tokio::select! {
            biased; // A newer view comes first: the longest pause of a stream depends on it.
            changed = self.views.changed() => {
                changed.expect("the task that follows views outlives its receiver");
                self.retry_pause = RETRY_FIRST;
                Wake::View
            }
            () = self.lead.ended(since) => Wake::View,
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
