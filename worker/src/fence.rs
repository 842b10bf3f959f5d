//! Which router a worker obeys: the one of the highest term that it has seen.
//!
//! Two routers that both believe to lead must never both write KV memory. A step of a lower term than
//! the highest is refused, whether it arrives late or waits in the queue; one that runs when a higher
//! term arrives is aborted. Here is only the order of the two: the service raises the term and then
//! looks at what runs, the thread says what runs and then looks at the term, so one of them sees the
//! other.

use std::sync::atomic::{AtomicU64, Ordering};

/// Shared by the service and the worker's thread.
#[derive(Debug, Default)]
pub(crate) struct Fence {
    /// The highest term of any step.
    term: AtomicU64,
    /// One more than the term of the step that runs; 0: none runs.
    running: AtomicU64,
}

/// A step is refused: a router of this term leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outranked {
    pub(crate) term: u64,
}

/// A step may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Admitted {
    Quietly,
    /// A step of an earlier router runs and must be aborted.
    OverRunning,
}

impl Fence {
    /// A step of this term has arrived.
    pub(crate) fn arrive(&self, term: u64) -> Result<Admitted, Outranked> {
        let before = self.term.fetch_max(term, Ordering::SeqCst);
        if term < before {
            return Err(Outranked { term: before });
        }
        match self.running.load(Ordering::SeqCst) {
            running if (1..=term).contains(&running) => Ok(Admitted::OverRunning),
            _ => Ok(Admitted::Quietly),
        }
    }

    /// The thread begins a step of this term, if it may.
    pub(crate) fn begin(&self, term: u64) -> Result<(), Outranked> {
        self.running.store(term.saturating_add(1), Ordering::SeqCst);
        let highest = self.term.load(Ordering::SeqCst);
        if term < highest {
            self.end();
            return Err(Outranked { term: highest });
        }
        Ok(())
    }

    /// The step is over.
    pub(crate) fn end(&self) {
        self.running.store(0, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lower_term_is_refused_on_arrival_and_in_the_queue() {
        let fence = Fence::default();
        assert_eq!(fence.arrive(0), Ok(Admitted::Quietly));
        assert_eq!(fence.begin(0), Ok(()));
        fence.end();
        assert_eq!(fence.arrive(5), Ok(Admitted::Quietly));
        // One of term 7 arrives while one of term 5 waits.
        assert_eq!(fence.arrive(7), Ok(Admitted::Quietly));
        assert_eq!(fence.begin(5), Err(Outranked { term: 7 }));
        assert_eq!(fence.arrive(5), Err(Outranked { term: 7 }));
        assert_eq!(fence.arrive(0), Err(Outranked { term: 7 }), "a router without election");
        assert_eq!(fence.begin(7), Ok(()));
    }

    #[test]
    fn running_step_of_a_lower_term_is_to_be_aborted_and_that_of_the_same_is_not() {
        let fence = Fence::default();
        for running in 0..4 {
            for arriving in 4..6 {
                fence.begin(running).unwrap();
                assert_eq!(fence.arrive(arriving), Ok(Admitted::OverRunning));
                fence.end();
                assert_eq!(fence.arrive(arriving), Ok(Admitted::Quietly));
                fence.term.store(0, Ordering::SeqCst);
            }
        }
        fence.arrive(5).unwrap();
        fence.begin(5).unwrap();
        assert_eq!(fence.arrive(5), Ok(Admitted::Quietly));
        assert_eq!(fence.arrive(4), Err(Outranked { term: 5 }));
    }
}
