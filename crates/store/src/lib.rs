//! The cluster's store: small values under names, each with a revision, changed by compare-and-swap.
//!
//! It holds what must outlive a coordinator: who leads, and the view. It is not on the path of a
//! token. A call that fails has an unknown outcome, never "did not happen": read before trying again.

mod candidate;
mod election;
mod etcd;
mod incumbent;
mod memory;
#[cfg(test)]
mod tests;

pub use candidate::{Candidate, Standing, stand};
pub use election::{Leadership, campaign};
pub use etcd::{Etcd, EtcdConfig, EtcdTls};
pub use futures::future::BoxFuture;
pub use futures::stream::BoxStream;
pub use memory::Memory;

use std::time::Duration;

/// Counts the changes of a store; a value's revision is that of its last change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Revision(pub u64);

/// A lease: what is written under it goes when it expires.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LeaseId(pub i64);

/// A value and when it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub value: Vec<u8>,
    /// Of the last change.
    pub revision: Revision,
    /// Of the write that made the key.
    pub created: Revision,
    /// With which it goes.
    pub lease: Option<LeaseId>,
}

/// What a swap found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Swap {
    /// The value is now the new one.
    Done(Revision),
    /// Somebody else wrote in between; nothing was changed. What stands there now.
    Lost(Option<Entry>),
    /// The guard does not hold; nothing was changed.
    Fenced,
}

/// Lets a write happen only while a key is the one that was made at `created`: a leader's fence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guard {
    pub key: String,
    pub created: Revision,
}

/// A write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    pub key: String,
    /// The revision that the key must have; `None`: it must not exist.
    pub expected: Option<Revision>,
    pub value: Vec<u8>,
    pub lease: Option<LeaseId>,
    pub guard: Option<Guard>,
}

/// Why a store did not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The value is larger than a store takes.
    #[error("the value of {key} has {bytes} bytes, a store takes {}", VALUE_BYTES_MAX)]
    TooLarge { key: String, bytes: usize },
    /// The lease has expired or was revoked.
    #[error("the lease is gone")]
    LeaseGone,
    /// No answer; the call may have been carried out.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
    /// The store refuses, and will again.
    #[error("the store refuses: {0}")]
    Refused(String),
}

/// Largest value. etcd refuses requests above 1.5 MiB; the view of 1024 ranks with 128 experts in 24
/// layers takes 0.1 MiB.
pub const VALUE_BYTES_MAX: usize = 1 << 20;

/// A store.
pub trait Store: Send + Sync + 'static {
    /// The value under `key`, if there is one.
    ///
    /// # Errors
    ///
    /// [`StoreError::Unavailable`].
    fn get(&self, key: &str) -> BoxFuture<'_, Result<Option<Entry>, StoreError>>;

    /// Writes if the key has the expected revision and the guard holds.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    fn swap(&self, write: Write) -> BoxFuture<'_, Result<Swap, StoreError>>;

    /// A lease of about `ttl`; the time it was really given.
    ///
    /// # Errors
    ///
    /// [`StoreError::Unavailable`].
    fn grant(&self, ttl: Duration) -> BoxFuture<'_, Result<(LeaseId, Duration), StoreError>>;

    /// Starts the lease's time again.
    ///
    /// # Errors
    ///
    /// [`StoreError::LeaseGone`] or [`StoreError::Unavailable`].
    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Ends a lease and what was written under it.
    ///
    /// # Errors
    ///
    /// [`StoreError::Unavailable`].
    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>>;

    /// What stands under `key`, now and after every change. Changes in quick succession may show as
    /// one. It never ends: it outlasts broken connections, compaction and a restarted store.
    fn watch(&self, key: &str) -> BoxStream<'static, Option<Entry>>;
}
