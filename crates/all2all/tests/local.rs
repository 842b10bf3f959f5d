//! The in-process exchange: rows arrive once and unchanged, and faults end a step on every rank.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use all2all::local::{Hub, Local};
use all2all::{
    AllToAll, ExchangeError, FaultKind, HostRows, LayerKey, Reason, Routes, StepOutcome, View,
};
use ids::{Epoch, ExpertId, Rank, StepId};
use std::sync::Arc;
use std::time::{Duration, Instant};

const EXPERTS: u16 = 6;

/// Expert `e` lives on rank `e % ranks`.
fn view(epoch: u64, me: u16, ranks: u16) -> View {
    let held = (0..ranks)
        .map(|r| (0..EXPERTS).filter(|e| e % ranks == r).map(ExpertId).collect())
        .collect();
    let target = |_, expert: ExpertId| Rank(expert.0 % ranks);
    let routes = Routes::new(Rank(me), usize::from(EXPERTS), &[held], target).unwrap();
    let active = vec![true; usize::from(ranks)];
    View { epoch: Epoch(epoch), me: Rank(me), ranks, active, routes: Arc::new(routes) }
}

/// One layer; an expert's answer to a row is the row with its slot added to every byte.
fn layer(
    end: &mut Local,
    step: u64,
    experts: &[u16],
    within: Duration,
) -> Result<(), ExchangeError> {
    let row_bytes = 5;
    let me = u8::try_from(end.view().me.0).unwrap();
    let rows: Vec<u8> =
        (0..experts.len() * row_bytes).map(|i| u8::try_from(i % 50).unwrap() + me * 50).collect();
    let key = LayerKey { step: StepId(step), layer: 0 };
    end.begin_step(end.view().epoch, key.step, Instant::now() + within)?;
    let sent = end.dispatch_send(key, HostRows { bytes: &rows, row_bytes }, experts)?;
    let arrived = end.dispatch_recv(sent)?;
    let (here, offsets) = end.arrived(&arrived);
    let mut results = here.bytes.to_vec();
    for (slot, pair) in (1_u8..).zip(offsets.windows(2)) {
        for byte in &mut results[pair[0] as usize * row_bytes..pair[1] as usize * row_bytes] {
            *byte = byte.wrapping_add(slot);
        }
    }
    let pending = end.combine_send(arrived, HostRows { bytes: &results, row_bytes })?;
    let mut out = vec![0; rows.len()];
    end.combine_recv(pending, &mut out)?;
    let ranks = end.view().ranks;
    for (row, (got, &expert)) in out.chunks(row_bytes).zip(experts).enumerate() {
        let slot = u8::try_from(expert / ranks + 1).unwrap();
        let want: Vec<u8> =
            rows[row * row_bytes..][..row_bytes].iter().map(|b| b.wrapping_add(slot)).collect();
        assert_eq!(got, want, "row {row}");
    }
    match end.end_step() {
        StepOutcome::Complete => Ok(()),
        StepOutcome::Faulted(fault) => Err(ExchangeError::Faulted(fault)),
    }
}

const LONG: Duration = Duration::from_secs(30);

#[test]
fn every_row_comes_back_once_from_its_expert() {
    for ranks in 1..=4_u16 {
        let hub = Hub::new();
        std::thread::scope(|scope| {
            for me in 0..ranks {
                let mut end = hub.join(view(1, me, ranks)).unwrap();
                scope.spawn(move || {
                    for step in 0..50 {
                        // No rows, all rows to one expert, and a mixture.
                        let experts: Vec<u16> = match (step + u64::from(me)) % 3 {
                            0 => vec![],
                            1 => vec![4; 9],
                            _ => (0..17).map(|i| (i * 7 + me) % EXPERTS).collect(),
                        };
                        layer(&mut end, step, &experts, LONG).unwrap();
                    }
                });
            }
        });
    }
}

#[track_caller]
fn fault_of(result: Result<(), ExchangeError>) -> (FaultKind, Vec<Rank>) {
    match result {
        Err(ExchangeError::Faulted(fault)) => (fault.kind, fault.suspects),
        other => panic!("expected a fault, got {other:?}"),
    }
}

#[test]
fn dropped_peer_is_named_at_once_and_poisons_the_epoch() {
    let hub = Hub::new();
    let (mut a, b) = (hub.join(view(1, 0, 2)).unwrap(), hub.join(view(1, 1, 2)).unwrap());
    drop(b);
    assert_eq!(fault_of(layer(&mut a, 1, &[0, 1], LONG)), (FaultKind::PeerClosed, vec![Rank(1)]));
    let again = a.begin_step(Epoch(1), StepId(2), Instant::now() + LONG);
    assert_eq!(again, Err(ExchangeError::Poisoned { epoch: Epoch(1) }));
    a.reconfigure(view(2, 0, 1), LONG).unwrap();
    layer(&mut a, 2, &[0, 1], LONG).unwrap();
}

#[test]
fn silent_peer_is_suspected_at_the_deadline() {
    let hub = Hub::new();
    let (mut a, _b) = (hub.join(view(1, 0, 2)).unwrap(), hub.join(view(1, 1, 2)).unwrap());
    let fault = fault_of(layer(&mut a, 1, &[0, 1], Duration::from_millis(30)));
    assert_eq!(fault, (FaultKind::Deadline, vec![Rank(1)]));
}

#[test]
fn abort_ends_the_wait_of_every_rank() {
    let hub = Hub::new();
    let mut ends: Vec<Local> = (0..3).map(|me| hub.join(view(1, me, 3)).unwrap()).collect();
    let silent = ends.pop().unwrap();
    let aborter = ends[0].aborter();
    aborter.abort(Epoch(0), Reason::ViewChange);
    std::thread::scope(|scope| {
        let waits: Vec<_> = ends
            .iter_mut()
            .map(|end| scope.spawn(move || fault_of(layer(end, 1, &[0, 1, 2], LONG)).0))
            .collect();
        aborter.abort(Epoch(1), Reason::ViewChange);
        let faults: Vec<FaultKind> = waits.into_iter().map(|wait| wait.join().unwrap()).collect();
        assert_eq!(
            faults,
            [FaultKind::Aborted(Reason::ViewChange), FaultKind::Aborted(Reason::PeerFaulted)]
        );
    });
    drop(silent);
}

#[test]
fn epochs_only_rise() {
    let hub = Hub::new();
    let mut a = hub.join(view(5, 0, 1)).unwrap();
    let deadline = Instant::now() + LONG;
    assert!(matches!(
        a.begin_step(Epoch(4), StepId(1), deadline),
        Err(ExchangeError::StaleEpoch { .. })
    ));
    assert!(matches!(
        a.begin_step(Epoch(6), StepId(1), deadline),
        Err(ExchangeError::NotReady { .. })
    ));
    assert!(matches!(a.reconfigure(view(5, 0, 1), LONG), Err(ExchangeError::StaleEpoch { .. })));
    assert!(matches!(hub.join(view(5, 0, 1)), Err(ExchangeError::Join { .. })));
}
