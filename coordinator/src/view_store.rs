//! The view in the store: one key, written by compare-and-swap.

use placement::View;
use prost::Message;
use proto::pb;
use std::sync::Arc;
use store::{Entry, Guard, Revision, Store, StoreError, Swap, Write};

const KEY: &str = "/herd/view";

/// What came of a write.
#[derive(Debug)]
pub(crate) enum Written {
    /// The store holds the view.
    Stands(Revision),
    /// It holds another one, with this epoch.
    Foreign { epoch: u64, revision: Option<Revision> },
    /// The writer does not lead any more.
    Fenced,
}

/// The view that stands and its revision. What is no view counts as none, and may be overwritten.
pub(crate) async fn read(
    store: &dyn Store,
) -> Result<(Option<View>, Option<Revision>), StoreError> {
    let Some(entry) = store.get(KEY).await? else { return Ok((None, None)) };
    let view = pb::View::decode(entry.value.as_slice()).ok();
    let view = view.and_then(|view| proto::view_from_wire(view).ok());
    Ok((view, Some(entry.revision)))
}

/// Writes `view` over the one with revision `expected`, if the writer still leads.
pub(crate) async fn write(
    store: Arc<dyn Store>,
    guard: Guard,
    expected: Option<Revision>,
    view: Arc<pb::View>,
) -> Result<Written, StoreError> {
    let write = Write {
        key: KEY.into(),
        expected,
        value: view.encode_to_vec(),
        lease: None,
        guard: Some(guard),
    };
    match store.swap(write).await? {
        Swap::Done(revision) => Ok(Written::Stands(revision)),
        // An earlier attempt whose answer was lost has done it.
        Swap::Lost(Some(entry)) if epoch(&entry) == view.epoch && decodes_to(&entry, &view) => {
            Ok(Written::Stands(entry.revision))
        }
        Swap::Lost(entry) => Ok(Written::Foreign {
            epoch: entry.as_ref().map_or(0, epoch),
            revision: entry.map(|entry| entry.revision),
        }),
        Swap::Fenced => Ok(Written::Fenced),
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
    use std::time::Duration;
    use store::Memory;

    fn view(epoch: u64) -> Arc<pb::View> {
        Arc::new(pb::View { epoch, ..Default::default() })
    }

    #[tokio::test]
    async fn repeated_write_is_recognised_and_a_foreign_view_is_named() {
        let store: Arc<dyn Store> = Arc::new(Memory::new());
        let lead = store::campaign(store.clone(), "/lead", b"", Duration::from_secs(60)).await;
        let write = |expected, epoch| write(store.clone(), lead.guard(), expected, view(epoch));
        assert!(matches!(read(&*store).await, Ok((None, None))));
        let Ok(Written::Stands(first)) = write(None, 3).await else { panic!() };
        let Ok(Written::Stands(again)) = write(None, 3).await else { panic!() };
        assert_eq!(first, again);
        let foreign = write(None, 4).await;
        let Ok(Written::Foreign { epoch: 3, revision: Some(found) }) = foreign else { panic!() };
        assert!(matches!(write(Some(found), 4).await, Ok(Written::Stands(_))));
        let guard = Guard { created: found, ..lead.guard() };
        let fenced = super::write(store.clone(), guard, Some(found), view(5)).await;
        assert!(matches!(fenced, Ok(Written::Fenced)), "{fenced:?}");
    }
}
