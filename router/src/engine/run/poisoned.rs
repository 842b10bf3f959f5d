//! When a sequence is given up because its values are not finite.

use super::{Engine, Session};
use crate::engine::{Event, link::StepFailure};

/// Attempts at a token of a sequence whose values are not finite. A passing fault is over by the second; if
/// the third fails too it is the model or a device, and the client is told instead of kept waiting.
const NOT_FINITE_MAX: u32 = 3;

impl Engine {
    /// Ends a sequence whose values have not been finite so often that trying again is pointless; the
    /// others go on.
    pub(super) fn give_up_on_poisoned(&mut self, session: &mut Session, failure: &StepFailure) {
        let Some(id) = failure.not_finite() else { return };
        let Some(live) = self.live.get_mut(&id) else { return };
        live.not_finite += 1;
        if live.not_finite < NOT_FINITE_MAX {
            return;
        }
        session.scheduler.cancel(id);
        let text = format!("{NOT_FINITE_MAX} attempts at the next token failed: {failure}");
        self.end(id, Event::Failed(text), "failed");
    }
}
