//! The cluster's store: small values under names, each with a revision, changed by compare-and-swap.
//!
//! It holds what must outlive a coordinator, above all the view. It is not on the path of a token.
//! A call that fails has an unknown outcome, never "did not happen": read before trying again.

mod memory;

pub use futures::future::BoxFuture;
pub use memory::Memory;

/// Counts the changes of a store; a value's revision is that of its last change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Revision(pub u64);

/// A value and when it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub value: Vec<u8>,
    pub revision: Revision,
}

/// What a swap found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Swap {
    /// The value is now the new one.
    Done(Revision),
    /// Somebody else wrote in between; nothing was changed. What stands there now.
    Lost(Option<Entry>),
}

/// Why a store did not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The value is larger than a store takes.
    #[error("the value of {key} has {bytes} bytes, a store takes {}", VALUE_BYTES_MAX)]
    TooLarge { key: String, bytes: usize },
    /// No answer; the call may have been carried out.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
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

    /// Writes `value` if the key still has the revision `expected` (`None`: does not exist).
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    fn swap(
        &self,
        key: &str,
        expected: Option<Revision>,
        value: Vec<u8>,
    ) -> BoxFuture<'_, Result<Swap, StoreError>>;
}
