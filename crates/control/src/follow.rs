//! The shares of an expert's copies follow the load from moment to moment, without a change of view.

use crate::machine::Phase;
use crate::{Control, Output};
use placement::{Aim, Window};
use std::sync::Arc;

/// Moments after which the members are told again what they were told: somebody may not have heard it.
const TELL_AGAIN: u32 = 8;

impl Control {
    /// Experts had to do this much in the last moment. Tells the members better shares, if there are any.
    pub(crate) fn moment(&mut self, window: &Window) -> Vec<Output> {
        self.follower.observe(window);
        match &self.phase {
            // What is planned stops nobody who serves.
            Phase::Serving | Phase::Preparing { aim: Aim::Level, .. } => {}
            Phase::Adopting { .. }
            | Phase::Assembling { .. }
            | Phase::Preparing { aim: Aim::Survive, .. }
            | Phase::Committing { .. } => return Vec::new(),
        }
        let Some(view) = &self.committed else { return Vec::new() };
        let shape = view.placement.shape();
        let load = self.load.as_ref().filter(|load| load.shape() == shape);
        // An error means that the traffic is another model's; there will be some of this one.
        let better = self.follower.shares(&view.placement, load).ok().flatten().cloned();
        self.untold += 1;
        let shares = match (better, self.follower.told()) {
            (Some(better), _) => {
                self.shared += 1;
                better
            }
            (None, Some(told)) if TELL_AGAIN <= self.untold => told.clone(),
            (None, _) => return Vec::new(),
        };
        self.untold = 0;
        vec![Output::Share { view: Arc::clone(view), shares }]
    }
}
