//! The engine of a router that is elected, deposed and refused.

use super::*;
use tokio::sync::{mpsc, watch};

fn leads(term: u64) -> Lead {
    Lead::Leads { term, since: term }
}

fn elected(
    cluster: &Cluster,
    lead: Lead,
) -> (EngineHandle, watch::Sender<Lead>, mpsc::Receiver<u64>) {
    let (handle, tell, refused) = LeadHandle::scripted(lead);
    (start_elected(config(cluster), handle), tell, refused)
}

#[tokio::test]
async fn deposed_engine_ends_its_streams_at_once_and_serves_again_when_elected() {
    let cluster = Cluster::start(2).await;
    cluster.publish(1, 2, 64);
    let (engine, tell, _refused) = elected(&cluster, leads(3));
    let long = Generate { tokens_max: 150, stop_tokens: vec![], ..generate(1) };
    let mut stream = engine.submit(long.clone()).await.unwrap();
    assert!(matches!(stream.next().await, Some(Event::Token(_))));
    tell.send_replace(Lead::StandsBy { leader: Some("http://b".into()) });
    let last = loop {
        match tokio::time::timeout(PATIENCE, stream.next()).await.unwrap().unwrap() {
            Event::Token(_) => {}
            last @ (Event::End(_) | Event::Failed(_) | Event::Deposed(_)) => break last,
        }
    };
    let text = "this router does not lead any more; retry at http://b";
    assert_eq!(last, Event::Deposed(text.into()));
    let refused = engine.submit(long.clone()).await.map(drop).unwrap_err();
    assert_eq!(refused.to_string(), "this router stands by; http://b serves");
    assert!(!engine.is_ready());
    let steps = cluster.script.last.load(Ordering::SeqCst);
    // Another router uses the KV memory meanwhile.
    check(&elected(&cluster, leads(4)).0, 20).await;
    assert!(!engine.is_ready());
    tell.send_replace(leads(steps + 5));
    check(&engine, 20).await;
}

#[tokio::test]
async fn refused_engine_executes_nothing_until_it_has_a_higher_term() {
    let cluster = Cluster::start(2).await;
    cluster.publish(1, 2, 64);
    cluster.script.term.store(9, Ordering::SeqCst);
    let (engine, tell, mut refused) = elected(&cluster, leads(5));
    let stream = engine.submit(generate(1)).await.unwrap();
    let term = tokio::time::timeout(PATIENCE, refused.recv()).await.unwrap();
    assert_eq!(term, Some(9));
    assert_eq!(cluster.script.tokens.load(Ordering::SeqCst), 0);
    tell.send_replace(Lead::StandsBy { leader: None });
    tokio::task::yield_now().await;
    tell.send_replace(leads(10));
    assert_eq!(collect(stream).await, alone(&generate(1)), "it paused, and was not lost");
}

#[tokio::test]
async fn leader_that_is_elected_again_computes_nothing_twice() {
    let cluster = Cluster::start(2).await;
    cluster.publish(1, 2, 64);
    let (engine, tell, _refused) = elected(&cluster, Lead::Leads { term: 5, since: 5 });
    let long = Generate { tokens_max: 120, stop_tokens: vec![], ..generate(3) };
    let positions = long.prompt.len() as u64 + 119;
    let mut stream = engine.submit(long.clone()).await.unwrap();
    assert!(matches!(stream.next().await, Some(Event::Token(_))));
    tell.send_replace(Lead::Leads { term: 6, since: 5 });
    let (tokens, _) = collect(stream).await;
    assert_eq!(tokens.len(), 119, "one was read above");
    assert_eq!(cluster.script.tokens.load(Ordering::SeqCst), positions);
    assert_eq!(cluster.script.term.load(Ordering::SeqCst), 6, "steps carry the new term");
}
