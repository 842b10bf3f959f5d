//! One suite for every store, and what only a real etcd can show: restarts, freezes, several members.

mod secure;
mod server;
mod succession;

use super::*;
use futures::StreamExt;
use server::Server;
use std::sync::Arc;

/// Nothing here should take as long; a hang must fail instead.
const PATIENCE: Duration = Duration::from_secs(30);
/// etcd grants no shorter lease.
const TTL: Duration = Duration::from_secs(2);

fn write(key: &str, expected: Option<Revision>, value: &[u8]) -> Write {
    Write { key: key.into(), expected, value: value.to_vec(), lease: None, guard: None }
}

async fn done(store: &dyn Store, write: Write) -> Revision {
    match store.swap(write).await {
        Ok(Swap::Done(revision)) => revision,
        other => panic!("nobody else writes: {other:?}"),
    }
}

async fn next(states: &mut BoxStream<'static, Option<Entry>>) -> Option<Vec<u8>> {
    let state = tokio::time::timeout(PATIENCE, states.next()).await.expect("nothing changes");
    state.expect("a watch never ends").map(|entry| entry.value)
}

/// Everything that every store must do.
async fn suite(store: Arc<dyn Store>) {
    one_writer_wins(&*store).await;
    guard_fences(&*store).await;
    too_large_is_refused(&*store).await;
    watch_shows_every_state(&*store).await;
    leases_end(&*store).await;
    one_candidate_leads(store).await;
}

async fn one_writer_wins(store: &dyn Store) {
    assert_eq!(store.get("/a").await, Ok(None));
    let first = done(store, write("/a", None, b"1")).await;
    let stands = Entry { value: b"1".to_vec(), revision: first, created: first, lease: None };
    assert_eq!(store.swap(write("/a", None, b"2")).await, Ok(Swap::Lost(Some(stands.clone()))));
    assert_eq!(store.get("/a").await, Ok(Some(stands)));
    let second = done(store, write("/a", Some(first), b"3")).await;
    assert!(first < second);
    let stands = Entry { value: b"3".to_vec(), revision: second, created: first, lease: None };
    assert_eq!(store.swap(write("/a", Some(first), b"4")).await, Ok(Swap::Lost(Some(stands))));
    assert_eq!(store.swap(write("/b", Some(first), b"4")).await, Ok(Swap::Lost(None)));
}

async fn guard_fences(store: &dyn Store) {
    let created = done(store, write("/leader", None, b"me")).await;
    let guard = Some(Guard { key: "/leader".into(), created });
    let mine = Write { guard: guard.clone(), ..write("/view", None, b"1") };
    let first = done(store, mine).await;
    // Changing the leader's value does not end its lead; only another creation does.
    done(store, write("/leader", Some(created), b"still me")).await;
    let mine = Write { guard, ..write("/view", Some(first), b"2") };
    let second = done(store, mine.clone()).await;
    let foreign = Guard { key: "/leader".into(), created: second };
    let fenced = Write { guard: Some(foreign), expected: Some(second), ..mine.clone() };
    assert_eq!(store.swap(fenced).await, Ok(Swap::Fenced));
    let absent = Guard { key: "/nobody".into(), created };
    let fenced = Write { guard: Some(absent), expected: Some(second), ..mine };
    assert_eq!(store.swap(fenced).await, Ok(Swap::Fenced));
    assert_eq!(store.get("/view").await.unwrap().unwrap().value, b"2");
}

async fn too_large_is_refused(store: &dyn Store) {
    let error = store.swap(write("/big", None, &vec![0; VALUE_BYTES_MAX + 1])).await.unwrap_err();
    assert_eq!(error.to_string(), "the value of /big has 1048577 bytes, a store takes 1048576");
    done(store, write("/big", None, &vec![0; VALUE_BYTES_MAX])).await;
}

async fn watch_shows_every_state(store: &dyn Store) {
    let mut states = store.watch("/watched");
    assert_eq!(next(&mut states).await, None);
    let first = done(store, write("/watched", None, b"1")).await;
    assert_eq!(next(&mut states).await, Some(b"1".to_vec()));
    done(store, write("/watched-not", None, b"x")).await;
    done(store, write("/watched", Some(first), b"2")).await;
    assert_eq!(next(&mut states).await, Some(b"2".to_vec()));
    assert_eq!(next(&mut store.watch("/watched")).await, Some(b"2".to_vec()));
}

async fn leases_end(store: &dyn Store) {
    let (lease, ttl) = store.grant(TTL).await.unwrap();
    assert!(TTL <= ttl, "{ttl:?}");
    done(store, Write { lease: Some(lease), ..write("/leased", None, b"1") }).await;
    store.keep_alive(lease).await.unwrap();
    let mut states = store.watch("/leased");
    assert_eq!(next(&mut states).await, Some(b"1".to_vec()));
    assert_eq!(store.get("/leased").await.unwrap().unwrap().lease, Some(lease));
    // It expires: nobody keeps it.
    assert_eq!(next(&mut states).await, None);
    assert_eq!(store.keep_alive(lease).await, Err(StoreError::LeaseGone));
    let late = Write { lease: Some(lease), ..write("/leased", None, b"2") };
    assert_eq!(store.swap(late).await, Err(StoreError::LeaseGone));

    let (lease, _) = store.grant(TTL).await.unwrap();
    done(store, Write { lease: Some(lease), ..write("/leased", None, b"3") }).await;
    assert_eq!(next(&mut states).await, Some(b"3".to_vec()));
    store.revoke(lease).await.unwrap();
    assert_eq!(next(&mut states).await, None);
    store.revoke(lease).await.unwrap();
}

async fn one_candidate_leads(store: Arc<dyn Store>) {
    let first = campaign(Arc::clone(&store), "/lead", b"first", TTL).await;
    let second = tokio::spawn({
        let store = Arc::clone(&store);
        async move { campaign(store, "/lead", b"second", TTL).await }
    });
    // Longer than the lease: the lead is kept.
    tokio::time::sleep(TTL + Duration::from_millis(1500)).await;
    assert!(!second.is_finished());
    assert_eq!(store.get("/lead").await.unwrap().unwrap().value, b"first");
    let old = first.guard();
    drop(first);
    let mut second = tokio::time::timeout(PATIENCE, second).await.unwrap().unwrap();
    assert_ne!(second.guard(), old);
    let fenced = Write { guard: Some(old), ..write("/x", None, b"") };
    assert_eq!(store.swap(fenced).await, Ok(Swap::Fenced));
    // Somebody takes the key away: the leader learns it.
    let stands = store.get("/lead").await.unwrap().unwrap();
    let (lease, _) = store.grant(TTL).await.unwrap();
    let thief = Write { lease: Some(lease), ..write("/lead", Some(stands.revision), b"thief") };
    done(&*store, thief).await;
    store.revoke(lease).await.unwrap();
    tokio::time::timeout(PATIENCE, second.lost()).await.expect("the leader hears of its end");
}

#[tokio::test]
async fn memory_keeps_the_rules() {
    suite(Arc::new(Memory::new())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_keeps_the_rules() {
    let server = Server::start();
    suite(Arc::new(server.client())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watch_and_writes_outlast_a_restarted_etcd() {
    let mut server = Server::start();
    let etcd = server.client();
    let first = done(&etcd, write("/a", None, b"1")).await;
    let mut states = etcd.watch("/a");
    assert_eq!(next(&mut states).await, Some(b"1".to_vec()));
    server.kill();
    assert!(matches!(etcd.get("/a").await, Err(StoreError::Unavailable(_))));
    server.restart();
    let mut written = etcd.swap(write("/a", Some(first), b"2")).await;
    for _ in 0..100 {
        if matches!(written, Ok(Swap::Done(_))) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        written = etcd.swap(write("/a", Some(first), b"2")).await;
    }
    assert!(matches!(written, Ok(Swap::Done(_))), "{written:?}");
    assert_eq!(next(&mut states).await, Some(b"2".to_vec()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frozen_etcd_is_an_error_in_time_and_changes_nothing_for_the_leader() {
    let server = Server::start();
    let etcd = server.client();
    let store: Arc<dyn Store> = Arc::new(etcd.clone());
    let mut leader = campaign(store, "/lead", b"me", TTL).await;
    server.freeze();
    let answer = tokio::time::timeout(PATIENCE, etcd.get("/lead")).await.expect("it hangs");
    assert!(matches!(answer, Err(StoreError::Unavailable(_))), "{answer:?}");
    server.thaw();
    // A store that was away takes the lead only if its lease really ran out there.
    let lost = tokio::time::timeout(Duration::from_secs(1), leader.lost()).await.is_ok();
    let stands = etcd.get("/lead").await.unwrap();
    assert_eq!(lost, stands.is_none_or(|entry| entry.created != leader.guard().created));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_endpoint_is_passed_over() {
    let server = Server::start();
    let urls = format!("http://127.0.0.1:9,{}", server.url());
    let etcd = Etcd::new(&EtcdConfig { urls, user: None, tls: None }).unwrap();
    done(&etcd, write("/a", None, b"1")).await;
    assert_eq!(next(&mut etcd.watch("/a")).await, Some(b"1".to_vec()));
    assert!(Etcd::new(&EtcdConfig { urls: "http://a b".into(), user: None, tls: None }).is_err());
}
