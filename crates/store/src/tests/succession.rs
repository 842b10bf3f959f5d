//! Who takes over, and when: leases are so long here that only evidence ends a lead.

use super::*;
use futures::future::Either;
use std::time::Instant;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

const LEASE: Duration = Duration::from_secs(600);
/// Time enough to do what must not be done.
const WHILE: Duration = Duration::from_millis(700);

/// A process that stands for election, as far as others see it.
struct Process {
    listener: TcpListener,
    leads: JoinHandle<Leadership>,
}

impl Process {
    async fn start(store: &Arc<dyn Store>) -> Self {
        let (store, listener) =
            (Arc::clone(store), TcpListener::bind("127.0.0.1:0").await.unwrap());
        let url = format!("http://{}", listener.local_addr().unwrap());
        let campaign = async move { campaign(store, "/lead", url.as_bytes(), LEASE).await };
        Self { listener, leads: tokio::spawn(campaign) }
    }

    /// The connection of somebody who watches it.
    async fn accept(&self) -> TcpStream {
        let accepted = tokio::time::timeout(PATIENCE, self.listener.accept()).await;
        accepted.expect("nobody watches it").unwrap().0
    }

    /// It dies; what it believed.
    async fn die(self, connections: impl IntoIterator<Item = TcpStream>) -> Leadership {
        let Self { listener, leads } = self;
        drop(listener);
        connections.into_iter().for_each(drop);
        soon(leads).await
    }
}

async fn soon(leads: JoinHandle<Leadership>) -> Leadership {
    tokio::time::timeout(PATIENCE, leads).await.expect("it does not lead").unwrap()
}

/// A store and a process that leads there.
async fn led() -> (Arc<dyn Store>, Process) {
    let store: Arc<dyn Store> = Arc::new(Memory::new());
    let first = Process::start(&store).await;
    let mut states = store.watch("/lead");
    while next(&mut states).await.is_none() {}
    (store, first)
}

#[tokio::test]
async fn leader_that_dies_is_succeeded_before_its_lease_ends() {
    let (store, first) = led().await;
    let second = Process::start(&store).await;
    let watching = first.accept().await;
    tokio::time::sleep(WHILE).await;
    assert!(!second.leads.is_finished(), "the first one lives");
    let mut first = first.die([watching]).await;
    let second = soon(second.leads).await;
    assert_ne!(second.guard(), first.guard());
    // Whoever was deposed alive hears of it.
    tokio::time::timeout(PATIENCE, first.lost()).await.expect("it hears of its end");
}

#[tokio::test]
async fn all_who_stand_by_see_it_and_one_leads() {
    let (store, first) = led().await;
    let (second, third) = (Process::start(&store).await, Process::start(&store).await);
    let watching = [first.accept().await, first.accept().await];
    let _first = first.die(watching).await;
    let first_to_lead = futures::future::select(second.leads, third.leads);
    let first_to_lead = tokio::time::timeout(PATIENCE, first_to_lead).await;
    let (leads, listener, waits) = match first_to_lead.expect("one of them leads") {
        Either::Left((leads, waits)) => (leads.unwrap(), second.listener, waits),
        Either::Right((leads, waits)) => (leads.unwrap(), third.listener, waits),
    };
    let leads = Process { listener, leads: tokio::spawn(async { leads }) };
    let watching = leads.accept().await;
    tokio::time::sleep(WHILE).await;
    assert!(!waits.is_finished(), "the first one's death is no evidence of another's");
    let _leads = leads.die([watching]).await;
    soon(waits).await;
}

#[tokio::test]
async fn candidate_that_stands_by_leaves_the_dead_no_time_to_come_back() {
    let (store, first) = led().await;
    let candidate = stand(Arc::clone(&store), "/lead", b"second", LEASE);
    let watching = first.accept().await;
    let start = Instant::now();
    let _first = first.die([watching]).await;
    let mut standing = candidate.standing();
    let leads = standing.wait_for(|standing| matches!(standing, Standing::Leads(_)));
    tokio::time::timeout(PATIENCE, leads).await.expect("it leads").unwrap();
    let took = start.elapsed();
    assert!(took < crate::candidate::GRACE, "{took:?}: as long as for one that may live");
}

#[tokio::test]
async fn listener_that_only_closes_connections_is_no_evidence() {
    let (store, first) = led().await;
    let second = Process::start(&store).await;
    for _ in 0..3 {
        drop(first.accept().await);
    }
    let _watching = first.accept().await;
    tokio::time::sleep(WHILE).await;
    assert!(!second.leads.is_finished());
}

#[tokio::test]
async fn leader_that_was_never_reached_is_not_deposed() {
    let (store, first) = led().await;
    let first = first.die([]).await;
    let second = Process::start(&store).await;
    tokio::time::sleep(WHILE).await;
    assert!(!second.leads.is_finished());
    // It leads until it says otherwise.
    first.resign().await;
    soon(second.leads).await;
}
