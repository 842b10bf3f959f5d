//! Election of one leader among many candidates: whoever makes the key leads, while it stands.
//!
//! Losing the store is not losing the lead: nobody else can take it then either, and a leader's
//! writes are guarded by the key it made. Only the news that the key is gone or another's ends it.
//!
//! A leader that dies is missed until its lease ends, unless a candidate sees it die ([`campaign`]).

use crate::incumbent::Incumbent;
use crate::{Guard, LeaseId, Store, StoreError, Swap, Write};
use futures::StreamExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Between attempts on a store that does not answer.
pub(crate) const RETRY: Duration = Duration::from_millis(200);

/// The lead of an election. Dropping it gives it up.
#[derive(Debug)]
pub struct Leadership {
    guard: Guard,
    lost: watch::Receiver<bool>,
    keep: watch::Sender<()>,
}

impl Leadership {
    /// To be put on every write of the leader.
    #[must_use]
    pub fn guard(&self) -> Guard {
        self.guard.clone()
    }

    /// Gives the lead up; returns when the store knows, or does not answer.
    pub async fn resign(self) {
        let Self { keep, mut lost, .. } = self;
        drop(keep);
        // The task ends, and its sender with it.
        while lost.changed().await.is_ok() {}
    }

    /// Returns when somebody else may lead.
    pub async fn lost(&mut self) {
        // An error means that the task which watches is gone: then nobody vouches for the lead.
        let _gone = self.lost.wait_for(|lost| *lost).await;
    }
}

/// Waits until this candidate leads. `value` tells the others who it is; if it is the `http://host:port` at
/// which this process listens until it gives the lead up, they see it die and do not wait for its lease.
pub async fn campaign(store: Arc<dyn Store>, key: &str, value: &[u8], ttl: Duration) -> Leadership {
    loop {
        match attempt(&store, key, value, ttl).await {
            Ok(Some(leadership)) => return leadership,
            Ok(None) => {
                let mut incumbent = Incumbent::follow(&store, key, value);
                while incumbent.next().await.is_some() {}
            }
            Err(error) => {
                tracing::warn!(%error, "cannot stand for election; will retry");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// One attempt to make the key; `None` if it is there already.
pub(crate) async fn attempt(
    store: &Arc<dyn Store>,
    key: &str,
    value: &[u8],
    ttl: Duration,
) -> Result<Option<Leadership>, StoreError> {
    let (lease, ttl) = store.grant(ttl).await?;
    let write = Write {
        key: key.to_owned(),
        expected: None,
        value: value.to_vec(),
        lease: Some(lease),
        guard: None,
    };
    let swapped = store.swap(write).await;
    let Ok(Swap::Done(created)) = swapped else {
        // If an unanswered write was carried out after all, this takes it back.
        store.revoke(lease).await?;
        return swapped.map(|_| None);
    };
    let guard = Guard { key: key.to_owned(), created };
    let (tell_lost, lost) = watch::channel(false);
    let (keep, kept) = watch::channel(());
    let task = Keeper { store: Arc::clone(store), guard: guard.clone(), lease, ttl };
    telemetry::spawn("store.leadership", task.run(tell_lost, kept));
    Ok(Some(Leadership { guard, lost, keep }))
}

struct Keeper {
    store: Arc<dyn Store>,
    guard: Guard,
    lease: LeaseId,
    ttl: Duration,
}

impl Keeper {
    /// Renews the lease until the lead is lost or given up.
    async fn run(self, lost: watch::Sender<bool>, mut kept: watch::Receiver<()>) {
        let mut states = self.store.watch(&self.guard.key);
        loop {
            tokio::select! {
                // Only ever an error: the leadership was dropped.
                _ = kept.changed() => {
                    // If the store is away, the lease runs out by itself.
                    let _away = self.store.revoke(self.lease).await;
                    return;
                }
                () = tokio::time::sleep(self.ttl / 3) => {
                    if self.store.keep_alive(self.lease).await == Err(StoreError::LeaseGone) {
                        break;
                    }
                }
                state = states.next() => {
                    let created = state.flatten().map(|entry| entry.created);
                    if created != Some(self.guard.created) {
                        break;
                    }
                }
            }
        }
        tracing::warn!(key = self.guard.key, "the lead is lost");
        lost.send_replace(true);
    }
}
