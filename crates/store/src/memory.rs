//! The store of a cluster that lives in one process: gone with it.

use crate::{BoxFuture, Entry, Revision, Store, StoreError, Swap, VALUE_BYTES_MAX};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// An in-memory store; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    revision: u64,
    entries: BTreeMap<String, Entry>,
}

impl Memory {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn swap_now(
        &self,
        key: &str,
        expected: Option<Revision>,
        value: Vec<u8>,
    ) -> Result<Swap, StoreError> {
        if VALUE_BYTES_MAX < value.len() {
            return Err(StoreError::TooLarge { key: key.to_owned(), bytes: value.len() });
        }
        let mut state = self.lock();
        let found = state.entries.get(key);
        if found.map(|entry| entry.revision) != expected {
            return Ok(Swap::Lost(found.cloned()));
        }
        state.revision += 1;
        let revision = Revision(state.revision);
        state.entries.insert(key.to_owned(), Entry { value, revision });
        Ok(Swap::Done(revision))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // Every change is one insert, so a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for Memory {
    fn get(&self, key: &str) -> BoxFuture<'_, Result<Option<Entry>, StoreError>> {
        let entry = self.lock().entries.get(key).cloned();
        Box::pin(std::future::ready(Ok(entry)))
    }

    fn swap(
        &self,
        key: &str,
        expected: Option<Revision>,
        value: Vec<u8>,
    ) -> BoxFuture<'_, Result<Swap, StoreError>> {
        Box::pin(std::future::ready(self.swap_now(key, expected, value)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_one_of_two_writers_wins() {
        let store = Memory::new();
        assert_eq!(store.get("/view").await, Ok(None));
        let Ok(Swap::Done(first)) = store.swap("/view", None, vec![1]).await else {
            panic!("nobody else writes")
        };
        let stands = Entry { value: vec![1], revision: first };
        assert_eq!(store.swap("/view", None, vec![2]).await, Ok(Swap::Lost(Some(stands.clone()))));
        assert_eq!(store.get("/view").await, Ok(Some(stands)));

        let Ok(Swap::Done(second)) = store.swap("/view", Some(first), vec![3]).await else {
            panic!("the revision is the one that stands")
        };
        assert!(first < second);
        let late = store.swap("/view", Some(first), vec![4]).await;
        assert_eq!(late, Ok(Swap::Lost(Some(Entry { value: vec![3], revision: second }))));
    }

    #[tokio::test]
    async fn revisions_of_different_keys_never_match_by_accident() {
        let store = Memory::new();
        let Ok(Swap::Done(a)) = store.swap("/a", None, vec![]).await else { panic!() };
        let Ok(Swap::Done(b)) = store.swap("/b", None, vec![]).await else { panic!() };
        assert_ne!(a, b);
    }

    #[tokio::test]
    async fn value_too_large_is_refused_by_name() {
        let store = Memory::new();
        let error = store.swap("/view", None, vec![0; VALUE_BYTES_MAX + 1]).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "the value of /view has 1048577 bytes, a store takes 1048576"
        );
        assert_eq!(store.get("/view").await, Ok(None));
    }
}
