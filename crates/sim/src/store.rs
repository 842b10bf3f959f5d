//! The store: one view, written by compare-and-swap under the leader's guard. It may be slow or away,
//! and an answer may get lost after the write was done.

use crate::Bug;
use placement::View;
use std::sync::Arc;

/// How it behaves at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    Well,
    Slow,
    /// It answers nothing.
    Away,
    /// It writes, and the answer gets lost.
    Mute,
}

/// What came of a write; the coordinator sees `Unknown` as an error.
#[derive(Debug, Clone)]
pub(crate) enum Written {
    Stands(u64),
    Foreign { found: Option<Arc<View>>, revision: u64 },
    Fenced,
    Unknown,
}

#[derive(Debug)]
pub(crate) struct Store {
    pub(crate) mood: Mood,
    /// Generation of the coordinator that leads.
    pub(crate) leader: u32,
    pub(crate) revision: u64,
    pub(crate) view: Option<Arc<View>>,
}

impl Store {
    pub(crate) fn new() -> Self {
        Self { mood: Mood::Well, leader: 0, revision: 0, view: None }
    }

    /// The outcome, and whether the view was written by this call.
    pub(crate) fn write(
        &mut self,
        writer: u32,
        expected: u64,
        view: &Arc<View>,
        bug: Option<Bug>,
    ) -> (Written, bool) {
        let is_open = bug == Some(Bug::UnguardedStore);
        if writer != self.leader && !is_open {
            return (Written::Fenced, false);
        }
        if expected == self.revision || is_open {
            self.revision += 1;
            self.view = Some(Arc::clone(view));
            return (Written::Stands(self.revision), true);
        }
        // An earlier attempt whose answer was lost has done it.
        if self.view.as_ref() == Some(view) {
            return (Written::Stands(self.revision), false);
        }
        (Written::Foreign { found: self.view.clone(), revision: self.revision }, false)
    }
}
