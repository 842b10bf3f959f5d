//! The view in the store: one key, written by compare-and-swap.

use prost::Message;
use proto::pb;
use std::sync::Arc;
use store::{Entry, Revision, Store, StoreError, Swap};

const KEY: &str = "/herd/view";

/// What came of a write.
#[derive(Debug)]
pub(crate) enum Written {
    /// The store holds the view.
    Stands(Revision),
    /// It holds another one, with this epoch.
    Foreign { epoch: u64, revision: Option<Revision> },
}

/// The epoch and revision of the view that stands; epoch 0 and `None` in an empty store.
pub(crate) async fn read(store: &dyn Store) -> Result<(u64, Option<Revision>), StoreError> {
    let entry = store.get(KEY).await?;
    Ok(entry.map_or((0, None), |entry| (epoch(&entry), Some(entry.revision))))
}

/// Writes `view` over the one with revision `expected`.
pub(crate) async fn write(
    store: Arc<dyn Store>,
    expected: Option<Revision>,
    view: Arc<pb::View>,
) -> Result<Written, StoreError> {
    match store.swap(KEY, expected, view.encode_to_vec()).await? {
        Swap::Done(revision) => Ok(Written::Stands(revision)),
        // An earlier attempt whose answer was lost has done it.
        Swap::Lost(Some(entry)) if epoch(&entry) == view.epoch && decodes_to(&entry, &view) => {
            Ok(Written::Stands(entry.revision))
        }
        Swap::Lost(entry) => Ok(Written::Foreign {
            epoch: entry.as_ref().map_or(0, epoch),
            revision: entry.map(|entry| entry.revision),
        }),
    }
}

fn decodes_to(entry: &Entry, view: &pb::View) -> bool {
    pb::View::decode(entry.value.as_slice()).is_ok_and(|stands| stands == *view)
}

/// A value that is no view has epoch 0, so any view may replace it.
fn epoch(entry: &Entry) -> u64 {
    pb::View::decode(entry.value.as_slice()).map_or(0, |view| view.epoch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use store::Memory;

    fn view(epoch: u64) -> Arc<pb::View> {
        Arc::new(pb::View { epoch, ..Default::default() })
    }

    #[tokio::test]
    async fn repeated_write_is_recognised_and_a_foreign_view_is_named() {
        let store: Arc<dyn Store> = Arc::new(Memory::new());
        assert!(matches!(read(&*store).await, Ok((0, None))));
        let Ok(Written::Stands(first)) = write(store.clone(), None, view(3)).await else {
            panic!()
        };
        let Ok(Written::Stands(again)) = write(store.clone(), None, view(3)).await else {
            panic!()
        };
        assert_eq!(first, again);
        let foreign = write(store.clone(), None, view(4)).await;
        let Ok(Written::Foreign { epoch: 3, revision: Some(found) }) = foreign else { panic!() };
        assert!(matches!(write(store, Some(found), view(4)).await, Ok(Written::Stands(_))));
    }
}
