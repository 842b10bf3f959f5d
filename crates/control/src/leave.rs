//! Who leaves because an operator wants it: one worker, or all beyond a number.

use crate::machine::{Phase, has};
use crate::{Cause, Control, Output};
use ids::WorkerId;
use std::time::Duration;

/// Why nobody leaves yet.
const WAITING: &str = "a new leader is waiting for the members; try again";

impl Control {
    /// How many workers an operator wants; `None`: nobody has said.
    #[must_use]
    pub fn wanted(&self) -> Option<u16> {
        self.wanted
    }

    /// What an operator told an earlier leader: so many workers.
    pub fn want(&mut self, workers: u16) {
        self.wanted = Some(workers);
    }

    /// A member that is to leave stays until a view without it counts.
    pub(crate) fn drain(&mut self, now: Duration, worker: WorkerId) -> Vec<Output> {
        if let Some(reason) = self.drain_refusal(worker) {
            return vec![Output::DrainRefused { worker, reason }];
        }
        if !self.draining.insert(worker) {
            return Vec::new();
        }
        // Whoever is drained is not to be replaced.
        let staying = u16::try_from(self.members.len() - self.draining.len()).unwrap_or(u16::MAX);
        self.wanted = self.wanted.map(|wanted| wanted.min(staying));
        self.send_away(now, Cause::Drained(worker))
    }

    /// The youngest members beyond `workers` leave, in one view change; those that are too few are
    /// for somebody else to start.
    pub(crate) fn scale(&mut self, now: Duration, workers: u16) -> Vec<Output> {
        let workers = workers.max(1);
        if let Phase::Adopting { .. } = self.phase {
            return vec![Output::ScaleRefused { reason: WAITING.into() }];
        }
        let staying = || self.members.iter().filter(|(worker, _)| !self.draining.contains(worker));
        let leaving: Vec<WorkerId> =
            staying().map(|(&worker, _)| worker).skip(usize::from(workers)).collect();
        let hellos = staying().map(|(_, hello)| hello).take(usize::from(workers));
        if let Some(lack) = self.lack_of(hellos).filter(|_| !leaving.is_empty()) {
            return vec![Output::ScaleRefused { reason: lack.to_string() }];
        }
        self.wanted = Some(workers);
        let staying = self.members.len() - self.draining.len() - leaving.len();
        let missing = workers.saturating_sub(u16::try_from(staying).unwrap_or(u16::MAX));
        let mut outputs = vec![Output::Scaled { leaving: leaving.clone(), missing }];
        if !leaving.is_empty() {
            self.draining.extend(leaving);
            outputs.extend(self.send_away(now, Cause::Scaled { workers }));
        }
        outputs
    }

    /// Makes or awaits the view without those that are to leave.
    fn send_away(&mut self, now: Duration, cause: Cause) -> Vec<Output> {
        match &self.phase {
            Phase::Adopting { .. } | Phase::Assembling { .. } => self.dismiss_drained(),
            Phase::Serving => self.plan(now, cause),
            Phase::Preparing { .. } | Phase::Committing { .. } => {
                self.overtaken.get_or_insert(cause);
                Vec::new()
            }
        }
    }

    fn drain_refusal(&self, worker: WorkerId) -> Option<String> {
        if !self.members.contains_key(&worker) {
            return Some(format!("{worker} is no member"));
        }
        if let Phase::Adopting { .. } = self.phase {
            return Some(WAITING.into());
        }
        let stays = |other: &&WorkerId| **other != worker && !self.draining.contains(other);
        let staying = self.members.iter().filter(|(other, _)| stays(other));
        if self.members.keys().find(stays).is_none() {
            return Some(format!("{worker} is the last member; start another one first"));
        }
        self.lack_of(staying.map(|(_, hello)| hello)).map(|lack| lack.to_string())
    }

    /// Ends the membership of those who are to leave and are in no view any more.
    pub(crate) fn dismiss_drained(&mut self) -> Vec<Output> {
        let committed = self.committed.as_deref();
        let leaves = |worker: &WorkerId| !committed.is_some_and(|view| has(view, *worker));
        let leaving: Vec<WorkerId> = self.draining.iter().copied().filter(leaves).collect();
        let mut outputs = Vec::new();
        for worker in leaving {
            self.draining.remove(&worker);
            self.members.remove(&worker);
            outputs.push(Output::Dismiss { worker, reason: "drained".into() });
        }
        outputs
    }
}
