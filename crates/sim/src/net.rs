//! Messages between processes: late, in order, and stuck where a link is cut.

use crate::rng::Rng;
use std::collections::BTreeMap;

/// Microseconds since the start.
pub(crate) type Time = u64;
pub(crate) const MS: Time = 1000;

/// One way of a message inside the cluster.
const DELAY_FIRST: Time = 50;
const DELAY_LAST: Time = 2 * MS;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Node {
    Router,
    Store,
    /// Whoever coordinates: its standbys live on the same machine.
    Coordinator,
    Worker(u32),
}

/// Connections of every pair of nodes, one for each direction.
#[derive(Debug, Default)]
pub(crate) struct Net {
    /// Cut until then. What is sent meanwhile arrives afterwards, as TCP sends it again.
    cuts: BTreeMap<(Node, Node), Time>,
    last: BTreeMap<(Node, Node), Time>,
}

impl Net {
    /// When a message that is sent now arrives.
    pub(crate) fn arrival(&mut self, now: Time, from: Node, to: Node, rng: &mut Rng) -> Time {
        let start = self.cuts.get(&(from, to)).copied().unwrap_or(0).max(now);
        let at = start + rng.between(DELAY_FIRST, DELAY_LAST);
        let last = self.last.entry((from, to)).or_insert(0);
        *last = at.max(*last + 1);
        *last
    }

    pub(crate) fn cut(&mut self, from: Node, to: Node, until: Time) {
        let end = self.cuts.entry((from, to)).or_insert(0);
        *end = until.max(*end);
    }

    /// Whether a ping there and back would be lost now.
    pub(crate) fn is_cut(&self, now: Time, one: Node, other: Node) -> bool {
        let is_cut = |pair| self.cuts.get(&pair).is_some_and(|&until| now < until);
        is_cut((one, other)) || is_cut((other, one))
    }

    /// All links carry again; what waited still arrives before what is sent now.
    pub(crate) fn heal(&mut self) {
        self.cuts.clear();
    }

    /// Whether any link was cut.
    pub(crate) fn has_cuts(&self) -> bool {
        !self.cuts.is_empty()
    }
}
