//! The shares of an expert's copies follow the load from moment to moment, without a change of view.

use crate::machine::Phase;
use crate::{Control, Output};
use placement::{Aim, Window};
use std::sync::Arc;

impl Control {
    /// Experts had to do this much in the last moment.
    pub(crate) fn moment(&mut self, window: &Window) -> Vec<Output> {
        self.follower.observe(window);
        self.share()
    }

    /// Tells the members better shares, if there are any.
    pub(crate) fn share(&mut self) -> Vec<Output> {
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
        let Ok(Some(shares)) = self.follower.shares(&view.placement, load) else {
            return Vec::new();
        };
        self.shared += 1;
        vec![Output::Share { view: Arc::clone(view), shares: shares.clone() }]
    }
}
