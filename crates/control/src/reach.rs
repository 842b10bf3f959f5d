//! Members that do not reach each other, though the coordinator reaches them all: a network that is torn
//! between workers, a firewall, a wrong interface.
//!
//! Whoever prepares a view says whom it does not reach. A view needs all pairs, so some must leave: those
//! who reach the fewest, one after the other, until all that are left reach each other; newcomers first,
//! for they hold nothing yet. Of a network torn into two parts the smaller one leaves, all at once.

use crate::machine::{Phase, has};
use crate::{Cause, Control, Output};
use ids::{Rank, WorkerId};
use placement::{Aim, View};
use std::collections::BTreeSet;
use std::time::Duration;

/// Pairs of ranks, the lower one first.
pub(crate) type Gaps = BTreeSet<(Rank, Rank)>;

/// Adds whom `rank` does not reach. A rank that no member has says nothing.
pub(crate) fn tell(gaps: &mut Gaps, view: &View, rank: Rank, unreached: &[Rank]) {
    let is_other = |other: &&Rank| **other != rank && other.index() < view.members.len();
    gaps.extend(unreached.iter().filter(is_other).map(|&other| (rank.min(other), rank.max(other))));
}

/// Who must leave so that no gap is left. Of several who reach equally few, the higher rank.
fn leaving(gaps: &Gaps, is_newcomer: impl Fn(Rank) -> bool) -> Vec<Rank> {
    let mut gaps = gaps.clone();
    let mut leaving = Vec::new();
    loop {
        let ends: BTreeSet<Rank> = gaps.iter().flat_map(|&(one, other)| [one, other]).collect();
        let lacks = |rank: Rank| gaps.iter().filter(|gap| gap.0 == rank || gap.1 == rank).count();
        let most = ends.into_iter().max_by_key(|&rank| (is_newcomer(rank), lacks(rank), rank));
        let Some(rank) = most else { return leaving };
        gaps.retain(|gap| gap.0 != rank && gap.1 != rank);
        leaving.push(rank);
    }
}

impl Control {
    /// All members have prepared the view, and some do not reach each other.
    pub(crate) fn part(&mut self, now: Duration) -> Vec<Output> {
        let Phase::Preparing { view, gaps, aim, .. } = &self.phase else { return Vec::new() };
        let (view, gaps, aim) = (view.clone(), gaps.clone(), *aim);
        let worker = |rank: Rank| view.members[rank.index()].worker;
        let serves =
            |rank: Rank| self.committed.as_ref().is_some_and(|serving| has(serving, worker(rank)));
        let leaving = leaving(&gaps, |rank| !serves(rank));
        if aim == Aim::Level
            && self.is_served()
            && let Some(&rank) = leaving.iter().find(|&&rank| serves(rank))
        {
            // It fails no step, or that step's failure would have come first.
            let reason = format!("{} {}", worker(rank), unreached(&view, &gaps, rank));
            return self.postpone(now, reason);
        }
        let leaving: Vec<(WorkerId, String)> =
            leaving.into_iter().map(|rank| (worker(rank), unreached(&view, &gaps, rank))).collect();
        self.send_off(now, leaving)
    }

    /// Ends the membership of workers that may come back later; the next view follows at once.
    fn send_off(&mut self, now: Duration, leaving: Vec<(WorkerId, String)>) -> Vec<Output> {
        let mut outputs = Vec::new();
        let mut cause = None;
        for (worker, reason) in leaving {
            let Some(hello) = self.members.remove(&worker) else { continue };
            self.draining.remove(&worker);
            self.keep_out(now, hello.incarnation);
            outputs.push(Output::Dismiss { worker, reason: reason.clone() });
            cause.get_or_insert((worker, reason));
        }
        let Some((worker, evidence)) = cause else { return outputs };
        let is_planned = matches!(self.phase, Phase::Preparing { aim: Aim::Level, .. });
        outputs.extend(if is_planned && self.is_served() {
            self.newcomer_lost(now, format!("{worker} {evidence}"))
        } else {
            self.plan(now, Cause::Lost { worker, evidence })
        });
        outputs
    }
}

/// `and w0, w1 do not reach each other`: what is said of `rank`.
fn unreached(view: &View, gaps: &Gaps, rank: Rank) -> String {
    let other = |gap: &(Rank, Rank)| match *gap {
        (one, other) if one == rank => Some(other),
        (one, other) if other == rank => Some(one),
        _ => None,
    };
    let names: Vec<String> = gaps
        .iter()
        .filter_map(other)
        .map(|other| {
            let member = &view.members[other.index()];
            format!("{} at {}", member.worker, member.exchange)
        })
        .collect();
    format!("and {} do not reach each other", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn gaps(pairs: &[(u16, u16)]) -> Gaps {
        pairs.iter().map(|&(one, other)| (Rank(one), Rank(other))).collect()
    }

    fn leaves(pairs: &[(u16, u16)], newcomers: &[u16]) -> Vec<u16> {
        let mut leaving: Vec<u16> =
            leaving(&gaps(pairs), |rank| newcomers.contains(&rank.0)).iter().map(|r| r.0).collect();
        leaving.sort_unstable();
        leaving
    }

    /// All pairs between `0..one` and `one..all`.
    fn torn(one: u16, all: u16) -> Vec<(u16, u16)> {
        (0..one).flat_map(|left| (one..all).map(move |right| (left, right))).collect()
    }

    #[test]
    fn smaller_part_leaves_and_of_equal_ones_the_later() {
        assert_eq!(leaves(&torn(2, 4), &[]), [2, 3]);
        assert_eq!(leaves(&torn(1, 4), &[]), [0]);
        assert_eq!(leaves(&torn(3, 8), &[]), [0, 1, 2]);
        assert_eq!(leaves(&torn(32, 64), &[]), (32..64).collect::<Vec<_>>());
        assert_eq!(leaves(&[(0, 2), (0, 3)], &[2, 3]), [2, 3], "newcomers go first");
        assert_eq!(leaves(&[], &[]), []);
    }

    proptest! {
        /// Those who stay reach each other, somebody stays, and nobody leaves who misses nobody.
        #[test]
        fn who_stays_reaches_all_others(pairs in prop::collection::vec((0u16..9, 0u16..9), 0..30)) {
            let pairs: Vec<_> = pairs.into_iter().filter(|(one, other)| one < other).collect();
            let leaving = leaves(&pairs, &[]);
            prop_assert!(leaving.len() < 9);
            for (one, other) in &pairs {
                prop_assert!(leaving.contains(one) || leaving.contains(other));
            }
            for rank in leaving {
                prop_assert!(pairs.iter().any(|(one, other)| [*one, *other].contains(&rank)));
            }
        }
    }
}
