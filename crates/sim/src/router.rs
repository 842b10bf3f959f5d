//! The router's serving loop and its journal, after `router/src/engine`: open streams to the newest
//! view, plan, send, wait for every rank, commit or abort.
//!
//! ```text
//! Waiting ── a view ─▶ Opening ── opened ─▶ Idle ── planned ─▶ Stepping ── all answered ─▶ Idle
//!                         ▲                                       │
//!                         └──────────── Pausing ◀── failed ───────┘
//! ```

use crate::Bug;
use crate::net::{MS, Time};
use crate::worker::StepOrder;
use ids::{Epoch, Rank, SeqId, StepId};
use placement::View;
use scheduler::{Config, Held, KvPools, NewSequence, Plan, Scheduler};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// Longest wait for a step, and the router's grace beyond it.
pub(crate) const STEP_MAX: Time = 300 * MS;
const GRACE: Time = 100 * MS;
/// Longest that prefill holds up decodes: about as long as a step takes here.
const PREFILL_MAX: Duration = Duration::from_millis(3);
const RETRY_FIRST: Time = 10 * MS;
const RETRY_MAX: Time = 500 * MS;
/// Longest wait for a worker to accept its step stream.
pub(crate) const OPEN_MAX: Time = 2000 * MS;

/// What a client asks for.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) prompt: Vec<u32>,
    pub(crate) tokens_max: u32,
    pub(crate) stop: u32,
    pub(crate) seed: u64,
}

/// The journal of one live sequence.
#[derive(Debug)]
struct Record {
    request: Request,
    outputs: Vec<u32>,
}

impl Record {
    fn resume(&self, id: SeqId, bug: Option<Bug>) -> NewSequence {
        let done = u32::try_from(self.outputs.len()).expect("at most tokens_max");
        let mut prompt = self.request.prompt.clone();
        if bug != Some(Bug::OutputsForgotten) {
            prompt.extend_from_slice(&self.outputs);
        }
        NewSequence {
            id,
            prompt,
            tokens_max: self.request.tokens_max - done,
            group: None,
            has_begun: 0 < done,
        }
    }
}

/// A rank's answer to a step.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) session: u64,
    pub(crate) epoch: u64,
    pub(crate) step: u64,
    pub(crate) rank: Rank,
    pub(crate) result: Result<Done, Failed>,
}

/// A rank's part in a step.
#[derive(Debug, Clone)]
pub(crate) struct Done {
    pub(crate) sampled: Vec<(SeqId, u32)>,
    /// What it says of the copies that it keeps.
    pub(crate) held: Vec<Held>,
}

/// A rank's step that failed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Failed {
    pub(crate) suspects: Vec<Rank>,
    /// Sequences that were to go on from copies which it does not have.
    pub(crate) missing: Vec<SeqId>,
}

#[derive(Debug)]
pub(crate) enum Output {
    /// Open streams to all members; answer with `opened`.
    Open {
        session: u64,
        view: Arc<View>,
    },
    Send {
        rank: Rank,
        order: StepOrder,
    },
    /// A step failed.
    Report {
        epoch: Epoch,
        suspects: Vec<Rank>,
    },
    FirstToken {
        epoch: Epoch,
    },
    /// Call `timer` with this tag then.
    Wake {
        at: Time,
        tag: u64,
    },
    /// A step counts.
    Committed {
        view: Arc<View>,
        step: u64,
    },
    Token {
        sequence: SeqId,
        token: u32,
    },
    /// `stop`: the token that ended it, which the client does not get.
    End {
        sequence: SeqId,
        stop: Option<u32>,
    },
}

/// What to do about a failed step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Remedy {
    /// The streams stand: plan the step again, unless a newer view arrives.
    Retry,
    /// Open the streams again, to this view or the next.
    Reopen,
}

#[derive(Debug)]
enum Phase {
    Waiting,
    Opening,
    Idle,
    Stepping { since: Time, answers: BTreeMap<Rank, Done> },
    Pausing { remedy: Remedy },
}

#[derive(Debug)]
struct Session {
    id: u64,
    view: Arc<View>,
    scheduler: Scheduler,
    plan: Plan,
    committed: u64,
}

pub(crate) struct Router {
    bug: Option<Bug>,
    phase: Phase,
    newest: Option<Arc<View>>,
    opening: Option<(u64, Arc<View>)>,
    session: Option<Session>,
    /// The last session's view and scheduler: what its ranks hold need not be computed again.
    left: Option<(Arc<View>, Scheduler)>,
    live: BTreeMap<SeqId, Record>,
    sessions: u64,
    next_step: u64,
    tag: u64,
    pause: Time,
    /// Positions that came out of copies.
    pub(crate) restored: u64,
    pub(crate) outputs: Vec<Output>,
}

impl Router {
    pub(crate) fn new(bug: Option<Bug>) -> Self {
        Self {
            bug,
            phase: Phase::Waiting,
            newest: None,
            opening: None,
            session: None,
            left: None,
            live: BTreeMap::new(),
            sessions: 0,
            next_step: 1,
            tag: 0,
            pause: RETRY_FIRST,
            restored: 0,
            outputs: Vec::new(),
        }
    }

    /// It serves the newest view, and nobody waits for anything.
    pub(crate) fn is_idle(&self) -> bool {
        let epoch = |view: Option<&Arc<View>>| view.map(|view| view.epoch);
        let serves = epoch(self.session.as_ref().map(|session| &session.view));
        let is_newest = serves == epoch(self.newest.as_ref());
        self.live.is_empty() && is_newest && matches!(self.phase, Phase::Idle)
    }

    /// Whether any block of any rank is taken.
    pub(crate) fn holds_blocks(&self) -> bool {
        let Some(session) = &self.session else { return false };
        let free = session.scheduler.stats().ranks.into_iter().map(|rank| rank.full_free_blocks);
        let all = session.view.members.iter().map(|member| member.kv.full_blocks);
        !free.eq(all)
    }

    /// The view to whose members streams are open.
    pub(crate) fn view(&self) -> Option<Arc<View>> {
        self.session.as_ref().map(|session| Arc::clone(&session.view))
    }

    pub(crate) fn submit(&mut self, now: Time, id: SeqId, request: Request) {
        let record = Record { request, outputs: Vec::new() };
        if let Some(session) = &mut self.session {
            let new = record.resume(id, self.bug);
            session.scheduler.submit(new).expect("requests of this world fit");
        }
        self.live.insert(id, record);
        if let Phase::Idle = self.phase {
            self.go(now);
        }
    }

    /// The client has left.
    pub(crate) fn cancel(&mut self, id: SeqId) {
        if self.live.remove(&id).is_some()
            && let Some(session) = &mut self.session
        {
            session.scheduler.cancel(id);
        }
    }

    /// A coordinator publishes a view. An older one does not know yet that it was replaced.
    pub(crate) fn news(&mut self, now: Time, view: Arc<View>) {
        if self.newest.as_ref().is_some_and(|newest| view.epoch <= newest.epoch) {
            return;
        }
        let comes = |member: &placement::Member| {
            view.members.iter().any(|new| new.incarnation == member.incarnation)
        };
        let stays = |session: &Session| session.view.members.iter().all(comes);
        let all_stay = self.session.as_ref().is_none_or(stays);
        self.newest = Some(view);
        self.pause = RETRY_FIRST;
        match self.phase {
            Phase::Waiting | Phase::Idle | Phase::Pausing { .. } => self.go(now),
            // A planned change keeps all ranks, and lets the step end.
            Phase::Stepping { .. } if all_stay => {}
            Phase::Stepping { .. } => {
                // Nobody waits for the answer of a rank that is gone.
                let session = self.session.as_mut().expect("a step needs a session");
                session.scheduler.abort();
                self.go(now);
            }
            Phase::Opening => {}
        }
    }

    /// A member cannot be reached.
    pub(crate) fn refused(&mut self, now: Time, session: u64) {
        if self.opening.take_if(|(id, _)| *id == session).is_some() {
            self.pause(now, Remedy::Reopen);
        }
    }

    pub(crate) fn opened(&mut self, now: Time, session: u64) {
        let Some((id, view)) = self.opening.take_if(|(id, _)| *id == session) else { return };
        let scheduler = self.scheduler(&view);
        let mut session = Session { id, view, scheduler, plan: Plan::new(), committed: 0 };
        for (&id, record) in &self.live {
            if !session.scheduler.has(id) {
                let new = record.resume(id, self.bug);
                session.scheduler.submit(new).expect("requests of this world fit");
            }
        }
        self.session = Some(session);
        self.phase = Phase::Idle;
        self.go(now);
    }

    fn scheduler(&mut self, view: &View) -> Scheduler {
        let pools = |member: &placement::Member| KvPools {
            block_tokens: member.kv.block_tokens,
            full_blocks: member.kv.full_blocks,
            chunked_blocks: member.kv.chunked_blocks,
            chunk_tokens: member.kv.chunk_tokens,
        };
        let config = Config {
            pools: view.members.iter().map(pools).collect(),
            step_tokens: 64,
            prefill_max: PREFILL_MAX,
            sequences_max: 6,
            queue_max: u32::MAX,
            context_tokens: view.members.iter().map(|m| m.context_tokens).min().unwrap_or(0),
            backup_tokens: view.members.iter().map(|member| member.kv.backup_tokens).collect(),
        };
        let Some((before, scheduler)) = self.left.take() else {
            return Scheduler::new(config).expect("pools of this world hold a token");
        };
        let assumed = self.bug == Some(Bug::MemoryAssumed);
        let kept = |member: &placement::Member| {
            let same = |old: &placement::Member| {
                old.incarnation == member.incarnation || (assumed && old.rank == member.rank)
            };
            before.members.iter().position(same)
        };
        let kept: Vec<Option<usize>> = view.members.iter().map(kept).collect();
        let moved = scheduler.reconfigure(config, &kept);
        let mut scheduler = moved.expect("pools of this world hold a token");
        scheduler.retain(|id| self.live.contains_key(&id));
        scheduler
    }

    /// Plans and sends the next step, or moves to a newer view.
    fn go(&mut self, now: Time) {
        let newest = self.newest.clone();
        let is_old =
            |session: &Session| newest.as_ref().is_some_and(|v| session.view.epoch < v.epoch);
        let must_open = self.session.as_ref().is_none_or(is_old);
        let Some(view) = newest else { return };
        self.tag += 1;
        if must_open {
            self.leave();
            self.sessions += 1;
            self.opening = Some((self.sessions, Arc::clone(&view)));
            self.phase = Phase::Opening;
            self.outputs.push(Output::Open { session: self.sessions, view });
            return;
        }
        let session = self.session.as_mut().expect("there is one, or it had to be opened");
        let step = self.next_step;
        if !session.scheduler.plan(StepId(step), &mut session.plan) {
            self.phase = Phase::Idle;
            return;
        }
        self.next_step += 1;
        let released = session.plan.released.iter();
        for ((rank, slices), released) in (0..).map(Rank).zip(&session.plan.ranks).zip(released) {
            let seed = |slice: &scheduler::Slice| {
                self.live.get(&slice.sequence).map_or(0, |record| record.request.seed)
            };
            let order = StepOrder {
                session: session.id,
                epoch: session.view.epoch.0,
                step,
                slices: slices.clone(),
                seeds: slices.iter().map(seed).collect(),
                released: released.clone(),
            };
            self.restored += slices.iter().map(|slice| u64::from(slice.restored)).sum::<u64>();
            self.outputs.push(Output::Send { rank, order });
        }
        self.phase = Phase::Stepping { since: now, answers: BTreeMap::new() };
        self.outputs.push(Output::Wake { at: now + STEP_MAX + GRACE, tag: self.tag });
    }

    fn leave(&mut self) {
        if let Some(session) = self.session.take() {
            self.left = Some((session.view, session.scheduler));
        }
    }

    pub(crate) fn answer(&mut self, now: Time, answer: Answer) {
        let (Phase::Stepping { since, answers }, Some(session)) =
            (&mut self.phase, &mut self.session)
        else {
            return;
        };
        let is_mine = answer.session == session.id
            && (answer.epoch, answer.step) == (session.view.epoch.0, session.plan.step.0);
        if !is_mine && self.bug != Some(Bug::StaleAnswersCount) {
            return;
        }
        match answer.result {
            Ok(done) => {
                answers.insert(answer.rank, done);
                let ranks = session.view.members.len();
                let needed =
                    if self.bug == Some(Bug::MajorityCommits) { ranks / 2 + 1 } else { ranks };
                if needed <= answers.len() {
                    let mut sampled = Vec::new();
                    for (rank, done) in std::mem::take(answers) {
                        session.scheduler.held(done.held.into_iter().map(|held| (rank, held)));
                        sampled.extend(done.sampled);
                    }
                    session.scheduler.time(Duration::from_micros(now - *since));
                    self.commit(now, sampled);
                }
            }
            Err(failed) => self.fail(now, (Some(answer.rank), failed), Remedy::Retry),
        }
    }

    /// A connection to a worker broke.
    pub(crate) fn broken(&mut self, now: Time, incarnation: &str) {
        let (Phase::Stepping { .. }, Some(session)) = (&self.phase, &self.session) else { return };
        let gone = session.view.members.iter().find(|member| member.incarnation == incarnation);
        if let Some(member) = gone {
            let failed = Failed { suspects: vec![member.rank], missing: Vec::new() };
            self.fail(now, (None, failed), Remedy::Reopen);
        }
    }

    pub(crate) fn timer(&mut self, now: Time, tag: u64) {
        if tag != self.tag {
            return;
        }
        match self.phase {
            Phase::Stepping { .. } => self.fail(now, (None, Failed::default()), Remedy::Retry),
            Phase::Pausing { remedy } => {
                match remedy {
                    Remedy::Retry => {}
                    Remedy::Reopen => self.leave(),
                }
                self.go(now);
            }
            Phase::Waiting | Phase::Opening | Phase::Idle => {}
        }
    }

    fn fail(&mut self, now: Time, (rank, failed): (Option<Rank>, Failed), remedy: Remedy) {
        let session = self.session.as_mut().expect("a step needs a session");
        session.scheduler.abort();
        let Failed { suspects, missing } = failed;
        if let Some(rank) = rank {
            session.scheduler.unrestore(rank, &missing);
        }
        self.outputs.push(Output::Report { epoch: session.view.epoch, suspects });
        self.pause(now, remedy);
    }

    fn pause(&mut self, now: Time, remedy: Remedy) {
        self.phase = Phase::Pausing { remedy };
        self.tag += 1;
        self.outputs.push(Output::Wake { at: now + self.pause, tag: self.tag });
        self.pause = RETRY_MAX.min(self.pause * 2);
        let newest = self.newest.as_ref().map(|view| view.epoch);
        if self.session.as_ref().is_some_and(|session| Some(session.view.epoch) < newest) {
            self.go(now);
        }
    }

    fn commit(&mut self, now: Time, mut sampled: Vec<(SeqId, u32)>) {
        let session = self.session.as_mut().expect("a step needs a session");
        let asked = session.plan.ranks.iter().flatten().filter(|slice| slice.samples);
        if self.bug.is_some() {
            // A bug lets answers through that the scheduler would refuse with a panic.
            for slice in asked {
                if !sampled.iter().any(|(id, _)| *id == slice.sequence) {
                    sampled.push((slice.sequence, 77));
                }
            }
        }
        session.scheduler.commit(&sampled);
        let (view, step) = (Arc::clone(&session.view), session.plan.step.0);
        if session.committed == 0 {
            self.outputs.push(Output::FirstToken { epoch: view.epoch });
        }
        session.committed += 1;
        self.pause = RETRY_FIRST;
        self.outputs.push(Output::Committed { view, step });
        for (id, token) in sampled {
            let Some(record) = self.live.get_mut(&id) else { continue };
            record.outputs.push(token);
            let stop = (token == record.request.stop).then_some(token);
            if stop.is_none() {
                self.outputs.push(Output::Token { sequence: id, token });
            }
            let is_long = record.request.tokens_max as usize <= record.outputs.len();
            if stop.is_some() || is_long {
                self.live.remove(&id);
                session.scheduler.cancel(id);
                self.outputs.push(Output::End { sequence: id, stop });
            }
        }
        self.go(now);
    }
}

impl fmt::Debug for Router {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let epoch = |view: &Option<Arc<View>>| view.as_ref().map(|view| view.epoch);
        write!(f, "{:?} at {:?}, newest {:?}", self.phase, epoch(&self.view()), epoch(&self.newest))
    }
}
