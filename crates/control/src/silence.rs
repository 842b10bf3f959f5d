//! Members of which a router hears nothing: frozen, cut off, or too slow to tell the difference. And
//! members that the router hears well, but others do not: they fail step after step.
//!
//! A router's word is enough: whoever it cannot reach cannot serve, and a view with it would make
//! every stream wait. If the worker lives it registers again, but not at once and later each time, so
//! that one that only the router cannot reach does not stop the streams again and again.

use crate::machine::Phase;
use crate::{Control, Hello, Output, Silence};
use ids::{Epoch, Rank, WorkerId};
use placement::Aim;
use std::collections::BTreeMap;
use std::time::Duration;

/// Members that prepare a planned view load experts beside their steps, and are late with all else. Silence
/// counts against them from here on; routers tell of one that lasts again and again.
const BUSY: Duration = Duration::from_millis(300);
/// How long a worker that was silent once is kept out.
const KEPT_OUT_FIRST: Duration = Duration::from_secs(1);
/// The longest; then it gets another chance.
const KEPT_OUT_MAX: Duration = Duration::from_secs(60);
/// A worker that was not silent for this long is trusted as any other.
const FORGIVEN: Duration = Duration::from_secs(600);

/// So many failed steps in a row, without one that counts between: then trying again with the same
/// members helps nobody.
const FAILURES_MAX: u32 = 3;

/// Failed steps since the last one that counted, and whom they blame.
#[derive(Debug, Default)]
pub(crate) struct Failures {
    count: u32,
    /// In parts of [`BLAME`].
    blame: BTreeMap<WorkerId, u32>,
}

/// What a failed step's only suspect is blamed with.
const BLAME: u32 = 1 << 20;

/// A worker that was silent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Distrust {
    /// It is no member before.
    until: Duration,
    kept_out: Duration,
}

impl Control {
    /// Ends the membership of silent ranks. `None` if there are none, or if nobody would be left: then
    /// it is not they who are cut off.
    pub(crate) fn silent(
        &mut self,
        now: Duration,
        epoch: Epoch,
        silence: &Silence,
    ) -> Option<Vec<Output>> {
        let is_loading = matches!(self.phase, Phase::Preparing { aim: Aim::Level, .. });
        if is_loading && !silence.lasted.is_zero() && silence.lasted < BUSY {
            return Some(Vec::new());
        }
        let view = self.committed.as_ref().filter(|view| view.epoch == epoch)?;
        let member = |rank: &Rank| view.members.get(rank.index());
        let is_here = |worker: &WorkerId| self.members.contains_key(worker);
        let workers = silence.ranks.iter().filter_map(member).map(|member| member.worker);
        let workers: Vec<WorkerId> = workers.filter(is_here).collect();
        let last = *workers.last()?;
        if self.members.len() == workers.len() {
            return None;
        }
        let evidence = if silence.lasted.is_zero() {
            format!("{FAILURES_MAX} steps failed, and it is blamed most")
        } else {
            format!("the router heard nothing from it for {:?}", silence.lasted)
        };
        let mut outputs = Vec::new();
        for worker in workers {
            let incarnation = self.members[&worker].incarnation.clone();
            self.keep_out(now, incarnation);
            outputs.push(Output::Dismiss { worker, reason: evidence.clone() });
            if worker != last {
                self.members.remove(&worker);
                self.draining.remove(&worker);
            }
        }
        let before = self.epoch;
        outputs.extend(self.lost(now, last, evidence));
        if before < self.epoch && !silence.lasted.is_zero() {
            self.note(self.epoch, |change| change.detect = Some(silence.lasted));
        }
        Some(outputs)
    }

    /// Takes a failed step's suspects in. Once steps fail again and again, the one who is blamed most, or
    /// the youngest of several: where two do not reach each other either will do. A rank that is cut off
    /// blames all others, and they blame it alone; so one of many suspects is blamed with little.
    pub(crate) fn blamed(&mut self, suspects: &[Rank]) -> Option<Rank> {
        let view = self.committed.as_ref()?;
        self.failures.count += 1;
        let many = u32::try_from(suspects.len()).ok()?;
        let share = BLAME.checked_div(many.saturating_mul(many)).unwrap_or(0);
        for member in suspects.iter().filter_map(|rank| view.members.get(rank.index())) {
            *self.failures.blame.entry(member.worker).or_default() += share;
        }
        if self.failures.count < FAILURES_MAX {
            return None;
        }
        let most = self.failures.blame.iter().max_by_key(|(worker, blame)| (**blame, **worker));
        let worker = *most?.0;
        self.failures = Failures::default();
        view.members.iter().find(|member| member.worker == worker).map(|member| member.rank)
    }

    /// A step counted.
    pub(crate) fn absolve(&mut self) {
        self.failures = Failures::default();
    }

    pub(crate) fn keep_out(&mut self, now: Duration, incarnation: String) {
        self.distrusted.retain(|_, distrust| now < distrust.until + FORGIVEN);
        let before = self.distrusted.get(&incarnation);
        let kept_out =
            before.map_or(KEPT_OUT_FIRST, |before| KEPT_OUT_MAX.min(before.kept_out * 2));
        self.distrusted.insert(incarnation, Distrust { until: now + kept_out, kept_out });
    }

    /// Why a worker cannot be a member yet.
    pub(crate) fn distrust(&self, now: Duration, hello: &Hello) -> Option<String> {
        let distrust = self.distrusted.get(&hello.incarnation)?;
        let wait = distrust.until.checked_sub(now).filter(|wait| !wait.is_zero())?;
        (!self.members.is_empty())
            .then(|| format!("it made steps fail; it may come back in {:.1} s", wait.as_secs_f64()))
    }
}
