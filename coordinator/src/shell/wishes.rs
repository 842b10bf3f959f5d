//! What operators want, and what they are told.

use super::{Answer, Scaled, Shell};
use control::{Control, Input, Levelling};
use ids::WorkerId;
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
        telemetry::spawn("coordinator.scale", async move {
            let mut left = Vec::new();
            for (worker, has_left) in leaving {
                // A worker that was lost meanwhile is gone as well.
                if has_left.await.is_ok() {
                    left.push(worker);
                }
            }
            let _left = reply.send(Ok(Scaled { left, missing }));
        });
    }

    /// Answers those who wait for the worker to leave; whether somebody did.
    pub(super) fn drained(&mut self, worker: WorkerId, result: &Result<(), String>) -> bool {
        let Some(waiting) = self.draining.remove(&worker) else { return false };
        for reply in waiting {
            // Whoever asked may have left.
            let _left = reply.send(result.clone());
        }
        true
    }
}
