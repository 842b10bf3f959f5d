//! Members of which a router hears nothing: frozen, cut off, or too slow to tell the difference.
//!
//! A router's word is enough: whoever it cannot reach cannot serve, and a view with it would make
//! every stream wait. If the worker lives it registers again, but not at once and later each time, so
//! that one that only the router cannot reach does not stop the streams again and again.

use crate::{Control, Hello, Output, Silence};
use ids::{Epoch, WorkerId};
use std::time::Duration;

/// How long a worker that was silent once is kept out.
const KEPT_OUT_FIRST: Duration = Duration::from_secs(1);
/// The longest; then it gets another chance.
const KEPT_OUT_MAX: Duration = Duration::from_secs(60);
/// A worker that was not silent for this long is trusted as any other.
const FORGIVEN: Duration = Duration::from_secs(600);

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
        let view = self.committed.as_ref().filter(|view| view.epoch == epoch)?;
        let member = |rank: &ids::Rank| view.members.get(rank.index());
        let is_here = |worker: &WorkerId| self.members.contains_key(worker);
        let workers = silence.ranks.iter().filter_map(member).map(|member| member.worker);
        let workers: Vec<WorkerId> = workers.filter(is_here).collect();
        let last = *workers.last()?;
        if self.members.len() == workers.len() {
            return None;
        }
        let evidence = format!("the router heard nothing from it for {:?}", silence.lasted);
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
        if before < self.epoch {
            self.note(self.epoch, |change| change.detect = Some(silence.lasted));
        }
        Some(outputs)
    }

    fn keep_out(&mut self, now: Duration, incarnation: String) {
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
        (!self.members.is_empty()).then(|| {
            format!(
                "the router heard nothing from it; it may come back in {:.1} s",
                wait.as_secs_f64()
            )
        })
    }
}
