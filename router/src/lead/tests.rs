//! Candidates over a store in memory.

use super::*;
use store::Memory;

const PATIENCE: Duration = Duration::from_secs(30);

async fn until(handle: &LeadHandle, is_so: impl Fn(&Lead) -> bool) -> Lead {
    let mut lead = handle.lead.clone();
    let found = tokio::time::timeout(PATIENCE, lead.wait_for(is_so)).await;
    found.expect("the lead does not change").expect("the task lives").clone()
}

fn leads(lead: &Lead) -> bool {
    matches!(lead, Lead::Leads { .. })
}

#[tokio::test]
async fn one_leads_and_the_other_follows_when_it_resigns() {
    let store: Arc<dyn Store> = Arc::new(Memory::new());
    let first = Election::stand(Arc::clone(&store), "http://first");
    let Lead::Leads { term, since } = until(&first.handle(), leads).await else { panic!() };
    assert_eq!(term, since);
    let second = Election::stand(Arc::clone(&store), "http://second");
    let by_first = Lead::StandsBy { leader: Some("http://first".into()) };
    until(&second.handle(), |lead| *lead == by_first).await;
    // A refusal that the store does not confirm: a higher term, and nothing is known of the memory.
    first.handle().refused(term + 40);
    let now =
        until(&first.handle(), |lead| leads(lead) && *lead != (Lead::Leads { term, since })).await;
    assert_eq!(now, Lead::Leads { term: term + 41, since: term + 41 });
    first.resign().await;
    let Lead::Leads { term: next, .. } = until(&second.handle(), leads).await else { panic!() };
    assert!(term + 41 < next, "{next}");
}

#[tokio::test]
async fn leader_whose_key_vanishes_leads_on_and_one_that_was_replaced_does_not() {
    let store: Arc<dyn Store> = Arc::new(Memory::new());
    let first = Election::stand(Arc::clone(&store), "http://first");
    let before = until(&first.handle(), leads).await;
    let second = Election::stand(Arc::clone(&store), "http://second");
    let by_first = Lead::StandsBy { leader: Some("http://first".into()) };
    until(&second.handle(), |lead| *lead == by_first).await;

    // The key goes, as a store that comes back without leases loses it. The one who led is faster.
    steal(&*store, b"gone").await;
    let after = until(&first.handle(), |lead| *lead != before).await;
    let (Lead::Leads { term: old, since }, Lead::Leads { term, since: still }) = (&before, &after)
    else {
        panic!("{after:?}: it must not stand down before another one leads")
    };
    assert!(old < term);
    assert_eq!(since, still, "nobody else has led");
    until(&second.handle(), |lead| *lead == by_first).await;
}

/// Overwrites the leader's key under a lease that ends at once.
async fn steal(store: &dyn Store, value: &[u8]) {
    let stands = store.get(LEADER_KEY).await.unwrap().unwrap();
    let (lease, _) = store.grant(LEASE).await.unwrap();
    let thief = Write {
        key: LEADER_KEY.into(),
        expected: Some(stands.revision),
        value: value.to_vec(),
        lease: Some(lease),
        guard: None,
    };
    assert!(matches!(store.swap(thief).await, Ok(Swap::Done(_))));
    store.revoke(lease).await.unwrap();
}
