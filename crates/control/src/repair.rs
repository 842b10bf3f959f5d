//! What a view left undone because the streams waited, and planned views that come to nothing.

use crate::machine::{Phase, has};
use crate::{Cause, Control, Output, Settings};
use ids::{ExpertId, Rank};
use placement::{Aim, Member, Shape, View, capacities};
use std::time::Duration;

/// How long a planned view that a serving member could not prepare is let alone. What is in its way is
/// the file system or the memory, and does not pass at once.
const TRY_AGAIN: Duration = Duration::from_secs(10);

impl Control {
    /// After a view counts: goes on with what was begun before, and notices what the view lacks.
    pub(crate) fn follow_up(&mut self, now: Duration) -> Vec<Output> {
        let mut outputs = self.dismiss_drained();
        match self.unfinished() {
            Some(cause) => outputs.extend(self.plan(now, cause)),
            // What a repair could not mend no other one will.
            None if self.was_repaired() => {}
            None => self.repair = self.is_short().then(|| now + self.settings.repair_after),
        }
        outputs
    }

    /// The time has come to make what the view lacks.
    pub(crate) fn repair(&mut self, now: Duration) -> Vec<Output> {
        self.repair = None;
        if let Some(cause) = self.unfinished() {
            return self.plan(now, cause);
        }
        // Fewer copies than ranks leave some without any, wherever they are.
        match self.next_view(Aim::Level) {
            Ok(next) if 0 < next.loads => self.start(now, (Cause::Repair, Aim::Level), next),
            Ok(_) | Err(_) => Vec::new(),
        }
    }

    fn was_repaired(&self) -> bool {
        self.history.back().is_some_and(|change| change.cause == Cause::Repair)
    }

    /// Members that should have left the view, or are not yet in it.
    fn unfinished(&self) -> Option<Cause> {
        let view = self.committed.as_deref()?;
        let leaving = self.draining.iter().find(|worker| has(view, **worker));
        let newcomer = self.members.keys().find(|worker| !has(view, **worker));
        leaving.copied().map(Cause::Drained).or_else(|| newcomer.copied().map(Cause::Joined))
    }

    /// A newcomer is gone before the planned view counts: the one that counts serves on.
    pub(crate) fn newcomer_lost(&mut self, now: Duration, evidence: String) -> Vec<Output> {
        let mut outputs = vec![self.give_up(evidence)];
        outputs.extend(match self.overtaken.take() {
            Some(cause) => self.plan(now, cause),
            None => self.follow_up(now),
        });
        outputs
    }

    /// A serving member cannot prepare what was planned. It serves on: to do without it would burden the
    /// others with even more.
    pub(crate) fn postpone(&mut self, now: Duration, reason: String) -> Vec<Output> {
        let mut outputs = vec![self.give_up(reason)];
        match self.overtaken.take() {
            Some(cause) => outputs.extend(self.plan(now, cause)),
            None => {
                let is_unfinished = self.unfinished().is_some() || self.is_short();
                self.repair = is_unfinished.then(|| now + TRY_AGAIN);
            }
        }
        outputs
    }

    fn give_up(&mut self, reason: String) -> Output {
        let epoch = self.epoch;
        self.phase = Phase::Serving;
        self.note(epoch, |change| change.given_up = Some(reason.clone()));
        Output::GivenUp { epoch, reason }
    }

    fn is_short(&self) -> bool {
        let Some(view) = self.committed.as_deref() else { return false };
        let placement = &view.placement;
        let shape = Shape { moe_layers: placement.moe_layers(), experts: placement.experts() };
        let places = |member: &Member| self.members.get(&member.worker).map_or(0, |m| m.places);
        let places: Vec<usize> = view.members.iter().map(places).collect();
        let Settings { redundancy, spare, .. } = self.settings;
        let redundancy = redundancy.min(placement.ranks().saturating_sub(1));
        let capacity = capacities(shape, &places, redundancy, usize::from(spare));
        // As many as `replan` makes.
        let fit =
            capacity.map_or(0, |capacity| capacity.iter().sum::<usize>() / shape.experts.max(1));
        is_short(view, fit.min(usize::from(redundancy) + 1))
    }
}

/// Whether the view has fewer copies of an expert, or a member that holds none at all.
fn is_short(view: &View, copies: usize) -> bool {
    let placement = &view.placement;
    let experts = || (0..).map(ExpertId).take(placement.experts());
    let layers = || 0..placement.moe_layers();
    let lacks = |layer| experts().any(|expert| placement.replicas(layer, expert).len() < copies);
    let holds_none =
        |rank| layers().all(|layer| placement.local_experts(layer, Rank(rank)).is_empty());
    // Fewer experts than ranks leave some without any.
    let is_enough = usize::from(placement.ranks()) <= placement.experts() * copies;
    layers().any(lacks) || (is_enough && (0..placement.ranks()).any(holds_none))
}
