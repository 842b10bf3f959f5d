//! Which view comes next: who is in it, and who holds which experts.

use crate::{Cause, Change, Control, Hello, Lack, Levelling, Output, machine::Phase};
use ids::{Rank, WorkerId};
use placement::{Aim, Holdings, Load, Member, Request, View, capacities, replan};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// Changes that the history keeps: enough for an hour of steady failures.
const HISTORY_MAX: usize = 256;
/// What levelling the load must gain, as a part of the fullest rank's load. A view change makes every
/// stream wait and computes its KV again, which nobody notices only if what follows is clearly faster.
const REBALANCE_GAIN_MIN: f64 = 0.05;

/// A view that may come, under the epoch before it, and how many copies of experts it makes workers load.
pub(crate) struct Next {
    view: View,
    pub(crate) loads: usize,
}

impl Control {
    /// Starts the next view over all members that stay.
    pub(crate) fn plan(&mut self, now: Duration, cause: Cause) -> Vec<Output> {
        self.overtaken = None;
        if self.members.is_empty() {
            self.phase = Phase::Assembling { since: None };
            return Vec::new();
        }
        self.keep_somebody();
        let aim = aim(&cause);
        match self.next_view(aim) {
            Ok(next) => self.start(now, (cause, aim), next),
            Err(lack) => self.lacking(now, aim, lack),
        }
    }

    /// The members cannot hold all experts. Those who serve go on if they can, and nobody leaves them.
    fn lacking(&mut self, now: Duration, aim: Aim, lack: Lack) -> Vec<Output> {
        if aim == Aim::Level && self.is_served() {
            self.phase = Phase::Serving;
            let refused = std::mem::take(&mut self.draining).into_iter();
            let reason = lack.to_string();
            return refused
                .map(|worker| Output::DrainRefused { worker, reason: reason.clone() })
                .collect();
        }
        self.phase = Phase::Assembling { since: Some(now) };
        let is_news = self.lack != Some(lack);
        self.lack = Some(lack);
        if is_news { vec![Output::Lacking(lack)] } else { Vec::new() }
    }

    /// What these workers lack to hold all experts.
    pub(crate) fn lack_of<'a>(&self, staying: impl Iterator<Item = &'a Hello>) -> Option<Lack> {
        let staying: Vec<&Hello> = staying.collect();
        let experts = staying.first()?.shape.experts;
        let places = staying.iter().map(|hello| hello.places.min(experts)).sum();
        (places < experts).then_some(Lack { experts, places, workers: staying.len() })
    }

    /// Levels the load, if that is worth a view change, and says so.
    pub(crate) fn rebalance(&mut self, now: Duration) -> Vec<Output> {
        let (levelling, mut outputs) = self.try_level(now);
        outputs.insert(0, Output::Rebalanced(levelling));
        outputs
    }

    /// Levels the load, if that is worth a view change.
    pub(crate) fn level(&mut self, now: Duration) -> Vec<Output> {
        self.try_level(now).1
    }

    fn try_level(&mut self, now: Duration) -> (Levelling, Vec<Output>) {
        self.levelled = now;
        let (Phase::Serving, Some(view)) = (&self.phase, &self.committed) else {
            return (Levelling::Busy, Vec::new());
        };
        let view = Arc::clone(view);
        self.keep_somebody();
        let Some(load) = &self.load else { return (Levelling::Unknown, Vec::new()) };
        let Ok(next) = self.next_view(Aim::Level) else { return (Levelling::Busy, Vec::new()) };
        let before = 1.0 / load.balance(&view.placement);
        let after = 1.0 / load.balance(&next.view.placement);
        if 1.0 - after / before < REBALANCE_GAIN_MIN {
            return (Levelling::Level { before, after }, Vec::new());
        }
        let outputs = self.start(now, (Cause::Rebalance, Aim::Level), next);
        (Levelling::Begun { epoch: self.epoch, before, after }, outputs)
    }

    /// If those who were to take over are gone, who should leave stays: better a cluster that nobody
    /// wanted than none.
    fn keep_somebody(&mut self) {
        if self.members.len() == self.draining.len() {
            self.draining.clear();
        }
    }

    pub(crate) fn start(
        &mut self,
        now: Duration,
        (cause, aim): (Cause, Aim),
        next: Next,
    ) -> Vec<Output> {
        let Next { mut view, loads } = next;
        self.epoch = self.epoch.next();
        view.epoch = self.epoch;
        let view = Arc::new(view);
        if self.history.len() == HISTORY_MAX {
            self.history.pop_front();
        }
        self.history.push_back(Change::new(view.epoch, cause, now, loads));
        let prepare = |member: &Member| Output::Prepare {
            worker: member.worker,
            rank: member.rank,
            view: Arc::clone(&view),
            aim,
        };
        let outputs = view.members.iter().map(prepare).collect();
        let waiting = view.members.iter().map(|member| member.worker).collect();
        self.phase = Phase::Preparing { view, waiting, gaps: BTreeSet::new(), aim };
        (self.repair, self.lack) = (None, None);
        outputs
    }

    /// Members of the last view keep their order and what they hold, newcomers follow by id.
    pub(crate) fn next_view(&self, aim: Aim) -> Result<Next, Lack> {
        let last = self.committed.as_deref();
        // By incarnation: who was taken for lost and has registered again still holds what it held.
        let old_rank = |hello: &Hello| {
            let is_it = |member: &&Member| member.incarnation == hello.incarnation;
            last?.members.iter().find(is_it).map(|member| member.rank)
        };
        // Who is to leave still serves while the streams wait: to do without it takes loading.
        let stays = |worker: &WorkerId| aim == Aim::Survive || !self.draining.contains(worker);
        let staying = self.members.iter().filter(|(worker, _)| stays(worker));
        let mut order: Vec<(&WorkerId, &Hello)> = staying.collect();
        if let Some(lack) = self.lack_of(order.iter().map(|(_, hello)| *hello)) {
            return Err(lack);
        }
        order.sort_by_key(|(worker, hello)| (old_rank(hello).unwrap_or(Rank(u16::MAX)), **worker));
        let member = |(rank, (&worker, hello)): (u16, (&WorkerId, &Hello))| Member {
            worker,
            rank: Rank(rank),
            address: hello.address.clone(),
            incarnation: hello.incarnation.clone(),
            pid: hello.pid,
            device: hello.device.clone(),
            kv: hello.kv,
            context_tokens: hello.context_tokens,
            exchange: hello.exchange.clone(),
        };
        let first = order.first().expect("a view has members").1;
        let places: Vec<usize> = order.iter().map(|(_, hello)| hello.places).collect();
        let (shape, profile, model) = (first.shape, first.profile.clone(), first.model.clone());
        let members: Vec<Member> = (0..).zip(order).map(member).collect();
        let ranks = u16::try_from(members.len()).expect("a rank is 16 bits, and each has one");
        let redundancy = self.settings.redundancy.min(ranks - 1);
        let new_rank = |old: Rank| {
            let was = &last?.members[old.index()].incarnation;
            members.iter().find(|member| member.incarnation == *was).map(|member| member.rank)
        };
        // A cluster that emptied may have been filled again with another model.
        let current = match last.filter(|last| last.model == model) {
            Some(last) => Holdings::carried(&last.placement, new_rank),
            None => Holdings::none(shape),
        };
        let unknown = Load::unknown(shape);
        let load = self.load.as_ref().filter(|load| load.shape() == shape).unwrap_or(&unknown);
        let spare = usize::from(self.settings.spare);
        let capacity = match aim {
            Aim::Level => {
                capacities(shape, &places, redundancy, spare).expect("it was counted above")
            }
            // Whoever takes what nobody holds any more gives nothing away for it, as long as there is memory.
            Aim::Survive => places.iter().map(|&places| places.min(shape.experts)).collect(),
        };
        let request = Request { aim, capacity: &capacity, redundancy, current: &current, load };
        let planned =
            replan(&request).expect("there is a place for every copy, and a rank for each");
        let loads = planned.loads.len();
        let placement = planned.placement;
        let view = View { epoch: self.epoch, members, placement, profile, model };
        Ok(Next { view, loads })
    }
}

/// What was not planned must be over soon; what was may as well end level.
fn aim(cause: &Cause) -> Aim {
    match cause {
        Cause::Lost { .. } | Cause::Fault { .. } | Cause::Superseded => Aim::Survive,
        Cause::Start
        | Cause::Joined(_)
        | Cause::Drained(_)
        | Cause::Scaled { .. }
        | Cause::Rebalance
        | Cause::Repair => Aim::Level,
    }
}
