//! What operators want, and what they are told.

use super::{Answer, Scaled, Shell, Stays};
use crate::wanted;
use control::{Control, Input, Levelling};
use ids::WorkerId;
use std::sync::Arc;
use tokio::sync::oneshot;

impl Shell {
    pub(super) fn rebalance(&mut self, control: &mut Control, reply: oneshot::Sender<Levelling>) {
        // A part of a window shows what a few streams did for a moment, but it is better than nothing.
        if self.meter.last().is_none() {
            self.close_window(control);
        }
        self.feed(control, Input::Rebalance);
        let Some(Answer::Levelling(levelling)) = self.answer.take() else {
            unreachable!("the machine answers every wish for a level load")
        };
        match levelling {
            Levelling::Begun { epoch, .. } => self.levelling.push((epoch, levelling, reply)),
            Levelling::Level { .. } | Levelling::Unknown | Levelling::Busy => {
                // Whoever asked may have left.
                let _left = reply.send(levelling);
            }
        }
    }

    pub(super) fn scale(
        &mut self,
        control: &mut Control,
        workers: u16,
        reply: oneshot::Sender<Result<Scaled, String>>,
    ) {
        self.feed(control, Input::Scale { workers });
        let (leaving, missing) = match self.answer.take() {
            Some(Answer::Scaled { leaving, missing }) => (leaving, missing),
            Some(Answer::ScaleRefused(reason)) => {
                // Whoever asked may have left.
                let _left = reply.send(Err(reason));
                return;
            }
            Some(Answer::Levelling(_)) | None => {
                unreachable!("the machine answers every wish for a number of workers")
            }
        };
        self.remember(workers);
        telemetry::spawn("coordinator.scale", async move {
            let (mut left, mut refused) = (Vec::new(), None);
            for (worker, has_left) in leaving {
                match has_left.await {
                    Ok(Ok(())) => left.push(worker),
                    // It is gone as well.
                    Ok(Err(Stays::Lost)) => left.push(worker),
                    Ok(Err(stays)) => refused = Some(stays.to_string()),
                    // The leader ends, and the next one knows how many are wanted.
                    Err(_) => {}
                }
            }
            let answer = match refused {
                Some(reason) => Err(reason),
                None => Ok(Scaled { left, missing }),
            };
            let _left = reply.send(answer);
        });
    }

    /// A later leader shall know how many are wanted.
    pub(super) fn remember(&self, workers: u16) {
        let (store, guard) = (Arc::clone(&self.context.store), self.context.guard.clone());
        telemetry::spawn("coordinator.wanted", async move {
            if let Err(error) = wanted::write(store, guard, workers).await {
                tracing::warn!(workers, %error, "a later leader will not know how many are wanted");
            }
        });
    }

    /// Answers those who wait for the worker to leave; whether somebody did.
    pub(super) fn drained(&mut self, worker: WorkerId, result: &Result<(), Stays>) -> bool {
        let Some(waiting) = self.draining.remove(&worker) else { return false };
        for reply in waiting {
            // Whoever asked may have left.
            let _left = reply.send(result.clone());
        }
        true
    }
}
