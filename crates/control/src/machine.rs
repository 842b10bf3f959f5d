//! The machine itself; `lib.rs` draws it.

use crate::reach::{self, Gaps};
use crate::silence::{Distrust, Failures};
use crate::{Cause, Change, Hello, Input, Lack, Output, Settings, Silence};
use ids::{Epoch, Rank, WorkerId};
use placement::{Aim, Follower, Load, Member, View, Window};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Ranks of a view. A placement stores a rank per replica, and nobody has tried more.
pub(crate) const MEMBERS_MAX: usize = 1024;
/// Between attempts to write to a store that does not answer.
const STORE_RETRY: Duration = Duration::from_millis(500);

/// Where the machine stands.
#[derive(Debug)]
pub(crate) enum Phase {
    /// A view stands in the store from before: its members are waited for until then.
    /// Those who are `missed` by a step that failed are not.
    Adopting {
        view: Arc<View>,
        until: Duration,
        missed: BTreeSet<WorkerId>,
    },
    /// Waits for workers; `since` the first one came.
    Assembling {
        since: Option<Duration>,
    },
    Preparing {
        view: Arc<View>,
        waiting: BTreeSet<WorkerId>,
        /// Pairs that do not reach each other, as far as they have answered.
        gaps: Gaps,
        aim: Aim,
    },
    /// `retry`: the store did not answer, and is asked again then.
    Committing {
        view: Arc<View>,
        retry: Option<Duration>,
    },
    Serving,
}

/// The coordinator's state.
#[derive(Debug)]
pub struct Control {
    pub(crate) settings: Settings,
    /// The last epoch that was tried.
    pub(crate) epoch: Epoch,
    next_worker: u32,
    pub(crate) members: BTreeMap<WorkerId, Hello>,
    pub(crate) phase: Phase,
    /// The last view that counted.
    pub(crate) committed: Option<Arc<View>>,
    /// Something happened while a view was on its way: the next one follows at once.
    pub(crate) overtaken: Option<Cause>,
    /// Members that are to leave; never all of them.
    pub(crate) draining: BTreeSet<WorkerId>,
    /// What the experts had to do; `None` before anybody told.
    pub(crate) load: Option<Load>,
    /// The load of the last moments, and what the members know of it.
    pub(crate) follower: Follower,
    /// How often the members were told other shares, in all views.
    pub(crate) shared: u64,
    /// Moments since they were last told any.
    pub(crate) untold: u32,
    /// When levelling was last thought about.
    pub(crate) levelled: Duration,
    /// How many workers an operator wants; `None`: as many as come.
    pub(crate) wanted: Option<u16>,
    /// Why no view can be planned.
    pub(crate) lack: Option<Lack>,
    /// When the copies that the serving view lacks shall be made.
    pub(crate) repair: Option<Duration>,
    pub(crate) history: VecDeque<Change>,
    /// Workers that were silent, by incarnation.
    pub(crate) distrusted: BTreeMap<String, Distrust>,
    pub(crate) failures: Failures,
}

impl Control {
    /// `stands` is the view that the store holds. If its members register again in time it goes on as
    /// it is: a new leader changes nothing that works.
    #[must_use]
    pub fn new(settings: Settings, now: Duration, stands: Option<View>) -> Self {
        let (epoch, phase, next_worker) = match stands {
            Some(view) => {
                let ids = view.members.iter().map(|member| member.worker.0 + 1);
                let next_worker = ids.max().unwrap_or(0);
                let until = now + settings.adopt_max;
                (
                    view.epoch,
                    Phase::Adopting { view: Arc::new(view), until, missed: BTreeSet::new() },
                    next_worker,
                )
            }
            None => (Epoch(0), Phase::Assembling { since: None }, 0),
        };
        Self {
            settings,
            epoch,
            next_worker,
            members: BTreeMap::new(),
            phase,
            committed: None,
            overtaken: None,
            draining: BTreeSet::new(),
            load: None,
            follower: Follower::default(),
            shared: 0,
            untold: 0,
            levelled: now,
            wanted: None,
            lack: None,
            repair: None,
            history: VecDeque::new(),
            distrusted: BTreeMap::new(),
            failures: Failures::default(),
        }
    }

    /// When the machine wants a [`Input::Tick`], if nothing else happens before.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        match &self.phase {
            Phase::Adopting { until, .. } => Some(*until),
            Phase::Assembling { since } => since.map(|since| since + self.settings.assemble_max),
            Phase::Committing { retry, .. } => *retry,
            Phase::Preparing { .. } => None,
            Phase::Serving => self.repair,
        }
    }

    /// Takes one event in; runs to the end without waiting.
    pub fn step(&mut self, now: Duration, input: Input) -> Vec<Output> {
        match input {
            Input::Hello(hello) => self.hello(now, hello),
            Input::Lost { worker, evidence } => self.lost(now, worker, evidence),
            Input::Prepared { epoch, worker, unreached } => {
                self.prepared(now, epoch, worker, &unreached)
            }
            Input::PrepareFailed { epoch, worker, text } => {
                self.prepare_failed(now, epoch, worker, text)
            }
            Input::Stored { epoch } => self.stored(now, epoch),
            Input::StoreFailed { epoch, .. } => {
                if let Phase::Committing { view, retry } = &mut self.phase
                    && view.epoch == epoch
                {
                    *retry = Some(now + STORE_RETRY);
                }
                Vec::new()
            }
            Input::Superseded { found } => self.superseded(now, found),
            Input::Fault { epoch, text, suspects, silence } => {
                if let Some(outputs) = self.silent(now, epoch, &silence) {
                    return outputs;
                }
                if let Phase::Adopting { view, missed, .. } = &mut self.phase
                    && view.epoch == epoch
                {
                    let of = |rank: &Rank| Some(view.members.get(rank.index())?.worker);
                    missed.extend(suspects.iter().chain(&silence.ranks).filter_map(of));
                    return self.adopt(now);
                }
                let is_current = self.committed.as_ref().is_some_and(|view| view.epoch == epoch)
                    && self.is_served();
                match &self.phase {
                    // What was planned can wait, the streams cannot.
                    Phase::Serving | Phase::Preparing { aim: Aim::Level, .. } if is_current => {
                        let ranks = self.blamed(&suspects).into_iter().collect();
                        let silence = Silence { ranks, lasted: Duration::ZERO };
                        match self.silent(now, epoch, &silence) {
                            Some(outputs) => outputs,
                            None => self.plan(now, Cause::Fault { text, suspects }),
                        }
                    }
                    // A newer view is on its way already, or the news is old.
                    Phase::Serving
                    | Phase::Adopting { .. }
                    | Phase::Assembling { .. }
                    | Phase::Preparing { .. }
                    | Phase::Committing { .. } => Vec::new(),
                }
            }
            Input::FirstToken { epoch } => {
                self.absolve();
                self.note(epoch, |change| {
                    change.first_token.get_or_insert(now.saturating_sub(change.at));
                });
                Vec::new()
            }
            Input::Drain { worker } => self.drain(now, worker),
            Input::Load { window } => self.observe(now, &window),
            Input::Scale { workers } => self.scale(now, workers),
            Input::Moment { window } => self.moment(&window),
            Input::Rebalance => self.rebalance(now),
            Input::Tick => self.tick(now),
        }
    }

    /// Records how long the shell's last `step` took to plan, which only a clock can tell.
    pub fn note_plan(&mut self, took: Duration) {
        let epoch = self.epoch;
        self.note(epoch, |change| {
            change.plan.get_or_insert(took);
        });
    }

    fn hello(&mut self, now: Duration, hello: Hello) -> Vec<Output> {
        let known = self.members.iter().find(|(_, known)| known.incarnation == hello.incarnation);
        if let Some((&worker, _)) = known {
            return vec![Output::Welcome { incarnation: hello.incarnation, worker }];
        }
        if let Some(reason) = self.refusal(&hello).or_else(|| self.distrust(now, &hello)) {
            return vec![Output::Refuse { incarnation: hello.incarnation, reason }];
        }
        self.epoch = self.epoch.max(hello.epoch);
        let worker = self.id_of(&hello);
        let mut outputs = vec![Output::Welcome { incarnation: hello.incarnation.clone(), worker }];
        self.members.insert(worker, hello);
        match &mut self.phase {
            Phase::Adopting { .. } => outputs.extend(self.adopt(now)),
            Phase::Assembling { since } => {
                since.get_or_insert(now);
                outputs.extend(self.assemble(now));
            }
            Phase::Serving => outputs.extend(self.plan(now, Cause::Joined(worker))),
            Phase::Preparing { .. } | Phase::Committing { .. } => {
                self.overtaken.get_or_insert(Cause::Joined(worker));
            }
        }
        outputs
    }

    /// A member of the view that is being adopted keeps its id.
    fn id_of(&mut self, hello: &Hello) -> WorkerId {
        if let Phase::Adopting { view, .. } = &self.phase {
            let known = view.members.iter().find(|m| m.incarnation == hello.incarnation);
            if let Some(member) = known {
                return member.worker;
            }
        }
        let worker = WorkerId(self.next_worker);
        self.next_worker += 1;
        worker
    }

    /// Goes on with the view that stands as soon as all its members are here; with those that are when the
    /// time is over, or when the streams wait for all others and those are the smaller part.
    fn adopt(&mut self, now: Duration) -> Vec<Output> {
        let Phase::Adopting { view, until, missed } = &self.phase else { return Vec::new() };
        let all = view.members.iter().map(|member| member.worker);
        let missing: Vec<WorkerId> =
            all.filter(|worker| !self.members.contains_key(worker)).collect();
        // A step may miss more than have died; those may yet come.
        let lost = 2 * missing.len() <= view.members.len()
            && missing.iter().all(|worker| missed.contains(worker));
        let in_time = now < *until;
        if !lost && in_time {
            return Vec::new();
        }
        let view = Arc::clone(view);
        self.committed = Some(Arc::clone(&view));
        if let Some(&worker) = missing.first() {
            let evidence = if lost { "a step misses it" } else { "it did not register in time" };
            return self.plan(now, Cause::Lost { worker, evidence: evidence.into() });
        }
        self.phase = Phase::Serving;
        let mut outputs = vec![Output::Publish { view: Arc::clone(&view) }];
        outputs.extend(self.follow_up(now));
        outputs
    }

    fn refusal(&self, hello: &Hello) -> Option<String> {
        if MEMBERS_MAX <= self.members.len() {
            return Some(format!("the cluster has {MEMBERS_MAX} workers and takes no more"));
        }
        if usize::from(u16::MAX) < hello.shape.experts {
            return Some(format!("{} experts are more than ids can number", hello.shape.experts));
        }
        if let Phase::Adopting { view, .. } = &self.phase {
            // A stranger must not come first and keep the members out.
            let differs = |what: &str, ours: &str, theirs: &str| {
                (ours != theirs).then(|| differs(what, ours, theirs))
            };
            return differs("model", &view.model, &hello.model)
                .or_else(|| differs("numeric profile", &view.profile, &hello.profile));
        }
        self.members.values().next().and_then(|first| misfit(first, hello))
    }

    /// Starts the first view if everybody is here or has been waited for.
    fn assemble(&mut self, now: Duration) -> Vec<Output> {
        let is_full = usize::from(self.settings.workers_expected) <= self.members.len();
        let is_late = self.deadline().is_some_and(|deadline| deadline <= now);
        // It has been waited for already.
        let is_due = is_full || is_late || self.lack.is_some();
        if self.members.is_empty() || !is_due {
            return Vec::new();
        }
        self.plan(now, Cause::Start)
    }

    pub(crate) fn lost(
        &mut self,
        now: Duration,
        worker: WorkerId,
        evidence: String,
    ) -> Vec<Output> {
        if self.members.remove(&worker).is_none() {
            return Vec::new();
        }
        self.draining.remove(&worker);
        let matters = match &self.phase {
            Phase::Assembling { .. } => {
                if self.members.is_empty() {
                    self.phase = Phase::Assembling { since: None };
                }
                return Vec::new();
            }
            // It may come back in time, under the same id.
            Phase::Adopting { .. } => return Vec::new(),
            Phase::Preparing { view, aim: Aim::Level, .. }
                if has(view, worker) && !self.serves(worker) && self.is_served() =>
            {
                return self.newcomer_lost(now, format!("{worker} lost: {evidence}"));
            }
            Phase::Preparing { view, .. } => has(view, worker) || self.serves(worker),
            Phase::Committing { view, .. } => {
                // The write is on its way; the next view follows its answer.
                if has(view, worker) {
                    self.overtaken = Some(Cause::Lost { worker, evidence });
                }
                return Vec::new();
            }
            Phase::Serving => self.serves(worker),
        };
        if matters { self.plan(now, Cause::Lost { worker, evidence }) } else { Vec::new() }
    }

    /// Whether the view that counts has the worker.
    fn serves(&self, worker: WorkerId) -> bool {
        self.committed.as_ref().is_some_and(|view| has(view, worker))
    }

    /// Whether the view that counts goes on while another one is prepared: all its members are here.
    pub(crate) fn is_served(&self) -> bool {
        let is_here = |member: &Member| self.members.contains_key(&member.worker);
        self.committed.as_ref().is_some_and(|view| view.members.iter().all(is_here))
    }

    fn prepared(
        &mut self,
        now: Duration,
        epoch: Epoch,
        worker: WorkerId,
        unreached: &[Rank],
    ) -> Vec<Output> {
        let Phase::Preparing { view, waiting, gaps, .. } = &mut self.phase else {
            return Vec::new();
        };
        if view.epoch != epoch || !waiting.remove(&worker) {
            return Vec::new();
        }
        if let Some(member) = view.members.iter().find(|member| member.worker == worker) {
            reach::tell(gaps, view, member.rank, unreached);
        }
        if !waiting.is_empty() {
            return Vec::new();
        }
        if !gaps.is_empty() {
            return self.part(now);
        }
        let view = Arc::clone(view);
        self.note(epoch, |change| change.prepare = Some(now.saturating_sub(change.at)));
        self.phase = Phase::Committing { view: Arc::clone(&view), retry: None };
        vec![Output::Store { view }]
    }

    fn prepare_failed(
        &mut self,
        now: Duration,
        epoch: Epoch,
        worker: WorkerId,
        text: String,
    ) -> Vec<Output> {
        let Phase::Preparing { view, aim, .. } = &self.phase else { return Vec::new() };
        let is_planned = *aim == Aim::Level;
        if view.epoch != epoch || !self.members.contains_key(&worker) {
            return Vec::new();
        }
        if is_planned && self.serves(worker) && self.is_served() {
            return self.postpone(now, format!("{worker} cannot prepare it: {text}"));
        }
        let evidence = format!("cannot prepare {epoch}: {text}");
        let mut outputs = vec![Output::Dismiss { worker, reason: evidence.clone() }];
        outputs.extend(self.lost(now, worker, evidence));
        outputs
    }

    fn stored(&mut self, now: Duration, epoch: Epoch) -> Vec<Output> {
        let Phase::Committing { view, .. } = &self.phase else { return Vec::new() };
        if view.epoch != epoch {
            return Vec::new();
        }
        let view = Arc::clone(view);
        self.note(epoch, |change| {
            let before = change.at + change.prepare.unwrap_or_default();
            change.commit = Some(now.saturating_sub(before));
        });
        self.committed = Some(Arc::clone(&view));
        self.phase = Phase::Serving;
        self.follower.begin();
        let mut outputs = vec![Output::Publish { view }];
        outputs.extend(match self.overtaken.take() {
            // Who leaves may be needed yet, if those who were to take over are lost.
            Some(cause) => self.plan(now, cause),
            None => self.follow_up(now),
        });
        outputs
    }

    fn superseded(&mut self, now: Duration, found: Epoch) -> Vec<Output> {
        self.epoch = self.epoch.max(found);
        match &self.phase {
            Phase::Committing { .. } => self.plan(now, Cause::Superseded),
            Phase::Adopting { .. }
            | Phase::Assembling { .. }
            | Phase::Preparing { .. }
            | Phase::Serving => Vec::new(),
        }
    }

    fn tick(&mut self, now: Duration) -> Vec<Output> {
        match &mut self.phase {
            Phase::Adopting { .. } => self.adopt(now),
            Phase::Assembling { .. } => self.assemble(now),
            Phase::Committing { view, retry } if retry.is_some_and(|at| at <= now) => {
                *retry = None;
                vec![Output::Store { view: Arc::clone(view) }]
            }
            Phase::Serving if self.repair.is_some_and(|at| at <= now) => self.repair(now),
            Phase::Committing { .. } | Phase::Preparing { .. } | Phase::Serving => Vec::new(),
        }
    }

    /// Experts had to do this much since the last time.
    fn observe(&mut self, now: Duration, window: &Window) -> Vec<Output> {
        if self.load.as_ref().is_none_or(|load| load.shape() != window.shape()) {
            self.load = Some(Load::unknown(window.shape()));
        }
        let load = self.load.as_mut().expect("it was just made");
        load.observe(window).expect("it counts what this window does");
        let every = self.settings.rebalance_every;
        if every.is_some_and(|every| self.levelled + every <= now) {
            self.level(now)
        } else {
            Vec::new()
        }
    }

    pub(crate) fn note(&mut self, epoch: Epoch, note: impl FnOnce(&mut Change)) {
        if let Some(change) = self.history.iter_mut().rev().find(|change| change.epoch == epoch) {
            note(change);
        }
    }
}

pub(crate) fn has(view: &View, worker: WorkerId) -> bool {
    view.members.iter().any(|member| member.worker == worker)
}

fn differs(what: &str, ours: &str, theirs: &str) -> String {
    format!("its {what} is {theirs}, the cluster's {ours}; start it with the cluster's")
}

/// Why `new` cannot serve beside `first`.
fn misfit(first: &Hello, new: &Hello) -> Option<String> {
    let differs = |what: &str, ours: String, theirs: String| {
        (ours != theirs).then(|| self::differs(what, &ours, &theirs))
    };
    differs("model", first.model.clone(), new.model.clone())
        .or_else(|| differs("numeric profile", first.profile.clone(), new.profile.clone()))
        .or_else(|| {
            differs("expert shape", format!("{:?}", first.shape), format!("{:?}", new.shape))
        })
        .or_else(|| {
            let block = |hello: &Hello| hello.kv.block_tokens.to_string();
            differs("KV block size", block(first), block(new))
        })
        .or_else(|| {
            let chunk = |hello: &Hello| format!("{:?}", hello.kv.chunk_tokens);
            differs("attention chunk", chunk(first), chunk(new))
        })
}
