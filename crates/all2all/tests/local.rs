//! The in-process exchange keeps the rules of every exchange, and what only it promises.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

#[path = "common/counting.rs"]
mod counting;

use all2all::conformance::Network;
use all2all::local::{Hub, Local};
use all2all::{AllToAll, ExchangeError, Routes, View};
use counting::allocations;
use ids::{Epoch, ExpertId, Rank};
use std::sync::Arc;
use std::time::Duration;

struct InProcess(Arc<Hub>);

impl Network for InProcess {
    type End = Local;

    fn grace(&self) -> Duration {
        Duration::from_secs(5)
    }

    fn join(&self, view: View) -> Result<Local, ExchangeError> {
        self.0.join(view)
    }
}

all2all::conformance!(InProcess(Hub::new()), allocations);

/// One expert, on rank 0.
fn view(epoch: u64, me: u16, ranks: u16) -> View {
    let held = (0..ranks).map(|r| if r == 0 { vec![ExpertId(0)] } else { vec![] }).collect();
    let routes = Routes::new(Rank(me), 1, &[held], |_, _| vec![Rank(0)]).unwrap();
    let active = vec![true; usize::from(ranks)];
    View { epoch: Epoch(epoch), me: Rank(me), ranks, active, routes: Arc::new(routes) }
}

#[test]
fn rank_is_taken_once_per_epoch() {
    let hub = Hub::new();
    let taken = |result: Result<Local, ExchangeError>| match result {
        Err(ExchangeError::Join { reason, .. }) => reason,
        _ => panic!("joined"),
    };
    let mut end = hub.join(view(5, 0, 2)).unwrap();
    assert_eq!(taken(hub.join(view(5, 0, 2))), "the rank is taken");
    assert_eq!(taken(hub.join(view(5, 1, 3))), "its view has another number of ranks");
    end.reconfigure(view(6, 0, 2), Duration::ZERO).unwrap();
    assert_eq!(taken(hub.join(view(5, 1, 2))), "a newer epoch has begun");
}
