//! The store of a cluster that lives in one process: gone with it.

use crate::{
    BoxFuture, BoxStream, Entry, LeaseId, Revision, Store, StoreError, Swap, VALUE_BYTES_MAX, Write,
};
use std::collections::BTreeMap;
use std::future::ready;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// How long a watcher sleeps at most before it looks for expired leases.
const EXPIRY_LOOK: Duration = Duration::from_millis(100);

/// An in-memory store; clones share it.
#[derive(Debug, Clone)]
pub struct Memory {
    state: Arc<Mutex<State>>,
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    revision: u64,
    entries: BTreeMap<String, Entry>,
    leases: BTreeMap<LeaseId, (Duration, Instant)>,
    next_lease: i64,
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

impl Memory {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self { state: Arc::default(), changed: watch::channel(0).0 }
    }

    /// Works on the state after expired leases are gone, and wakes the watchers of what changed.
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        // Every change is one insert or removal, so a panic elsewhere leaves nothing half done.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let before = state.revision;
        state.expire(Instant::now());
        let result = work(&mut state);
        let after = state.revision;
        drop(state);
        if before != after {
            self.changed.send_replace(after);
        }
        result
    }
}

impl State {
    fn expire(&mut self, now: Instant) {
        let gone: Vec<LeaseId> =
            self.leases.iter().filter(|(_, (_, end))| *end <= now).map(|(id, _)| *id).collect();
        for lease in gone {
            self.end(lease);
        }
    }

    fn end(&mut self, lease: LeaseId) {
        self.leases.remove(&lease);
        let before = self.entries.len();
        self.entries.retain(|_, entry| entry.lease != Some(lease));
        if self.entries.len() != before {
            self.revision += 1;
        }
    }

    fn swap(&mut self, write: Write) -> Result<Swap, StoreError> {
        let Write { key, expected, value, lease, guard } = write;
        if VALUE_BYTES_MAX < value.len() {
            return Err(StoreError::TooLarge { key, bytes: value.len() });
        }
        if lease.is_some_and(|lease| !self.leases.contains_key(&lease)) {
            return Err(StoreError::LeaseGone);
        }
        let created = |key: &str| self.entries.get(key).map(|entry| entry.created);
        if guard.is_some_and(|guard| created(&guard.key) != Some(guard.created)) {
            return Ok(Swap::Fenced);
        }
        let found = self.entries.get(&key);
        if found.map(|entry| entry.revision) != expected {
            return Ok(Swap::Lost(found.cloned()));
        }
        self.revision += 1;
        let revision = Revision(self.revision);
        let created = found.map_or(revision, |entry| entry.created);
        self.entries.insert(key, Entry { value, revision, created, lease });
        Ok(Swap::Done(revision))
    }
}

impl Store for Memory {
    fn get(&self, key: &str) -> BoxFuture<'_, Result<Option<Entry>, StoreError>> {
        let entry = self.with(|state| state.entries.get(key).cloned());
        Box::pin(ready(Ok(entry)))
    }

    fn swap(&self, write: Write) -> BoxFuture<'_, Result<Swap, StoreError>> {
        Box::pin(ready(self.with(|state| state.swap(write))))
    }

    fn grant(&self, ttl: Duration) -> BoxFuture<'_, Result<(LeaseId, Duration), StoreError>> {
        let lease = self.with(|state| {
            state.next_lease += 1;
            let lease = LeaseId(state.next_lease);
            state.leases.insert(lease, (ttl, Instant::now() + ttl));
            lease
        });
        Box::pin(ready(Ok((lease, ttl))))
    }

    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        let result = self.with(|state| match state.leases.get_mut(&lease) {
            Some((ttl, end)) => {
                *end = Instant::now() + *ttl;
                Ok(())
            }
            None => Err(StoreError::LeaseGone),
        });
        Box::pin(ready(result))
    }

    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        self.with(|state| state.end(lease));
        Box::pin(ready(Ok(())))
    }

    fn watch(&self, key: &str) -> BoxStream<'static, Option<Entry>> {
        let seen = (self.clone(), self.changed.subscribe(), key.to_owned(), None);
        Box::pin(futures::stream::unfold(seen, |(store, mut changed, key, last)| async move {
            loop {
                changed.mark_unchanged();
                let now = store.with(|state| state.entries.get(&key).cloned());
                if last.as_ref() != Some(&now) {
                    return Some((now.clone(), (store, changed, key, Some(now))));
                }
                // Both a change and the end of the time are reasons to look again.
                let _look = tokio::time::timeout(EXPIRY_LOOK, changed.changed()).await;
            }
        }))
    }
}
