//! How many workers an operator wants, in the store: a later leader must know it too.

use std::sync::Arc;
use store::{Guard, Store, StoreError, Swap, Write};

const KEY: &str = "/herd/workers";
/// Nobody but a leader writes, and there is one at a time.
const TRIES: usize = 3;

/// What was wanted last; what is no number counts as nothing.
pub(crate) async fn read(store: &dyn Store) -> Result<Option<u16>, StoreError> {
    let entry = store.get(KEY).await?;
    let text = entry.and_then(|entry| String::from_utf8(entry.value).ok());
    Ok(text.and_then(|text| text.parse().ok()))
}

/// Writes it, if the writer still leads.
pub(crate) async fn write(
    store: Arc<dyn Store>,
    guard: Guard,
    workers: u16,
) -> Result<(), StoreError> {
    for _ in 0..TRIES {
        let expected = store.get(KEY).await?.map(|entry| entry.revision);
        let write = Write {
            key: KEY.into(),
            expected,
            value: workers.to_string().into_bytes(),
            lease: None,
            guard: Some(guard.clone()),
        };
        match store.swap(write).await? {
            Swap::Done(_) => return Ok(()),
            Swap::Lost(_) => {}
            Swap::Fenced => break,
        }
    }
    Err(StoreError::Unavailable("another coordinator leads".into()))
}
