//! The engine against a cluster of toy workers: whatever fails, every stream yields the tokens that
//! its sequence alone would.

pub(crate) mod fake;
mod lead;

use super::*;
use fake::{Cluster, next_token};
use std::sync::atomic::Ordering;

/// Nothing here should take a second; a hang must fail instead.
const PATIENCE: Duration = Duration::from_secs(30);

fn config(cluster: &Cluster) -> EngineConfig {
    EngineConfig {
        coordinator: cluster.coordinator.clone(),
        address: "127.0.0.1:1".into(),
        step_tokens: 24,
        prefill_max: Duration::from_millis(100),
        sequences_max: 8,
        queue_max: 64,
        step_deadline: Duration::from_secs(5),
    }
}

fn generate(n: u32) -> Generate {
    Generate {
        prompt: (0..1 + n * 7 % 40).map(|i| (i * i + n) % 50).collect(),
        tokens_max: 5 + n * 3 % 30,
        sampling: Sampling { seed: u64::from(n), ..Sampling::greedy() },
        stop_tokens: vec![n % 50],
        group: u64::from(n),
    }
}

/// What the sequence yields on its own: its tokens and its end.
fn alone(generate: &Generate) -> (Vec<u32>, Finish) {
    let mut history = generate.prompt.clone();
    let mut tokens = Vec::new();
    loop {
        let must_go_on = tokens.len() < generate.sampling.tokens_min as usize;
        let banned = if must_go_on { &generate.stop_tokens[..] } else { &[] };
        let token = next_token(&history, generate.sampling.seed, banned);
        if generate.stop_tokens.contains(&token) {
            return (tokens, Finish::Stop { token });
        }
        history.push(token);
        tokens.push(token);
        if tokens.len() == generate.tokens_max as usize {
            return (tokens, Finish::Length);
        }
    }
}

async fn collect(mut stream: TokenStream) -> (Vec<u32>, Finish) {
    let mut tokens = Vec::new();
    loop {
        let event = tokio::time::timeout(PATIENCE, stream.next()).await.expect("the stream hangs");
        match event.expect("a stream ends with `End`") {
            Event::Token(sampled) => tokens.push(sampled.token),
            Event::End(finish) => {
                assert_eq!(stream.next().await, None, "nothing follows the end");
                return (tokens, finish);
            }
            Event::Failed(text) | Event::Deposed(text) => panic!("the stream failed: {text}"),
        }
    }
}

/// Submits `count` sequences at once and compares each with what it yields alone.
async fn check(engine: &EngineHandle, count: u32) {
    let streams: Vec<_> = futures::future::join_all((0..count).map(|n| async move {
        let generate = generate(n);
        (alone(&generate), engine.submit(generate).await.unwrap())
    }))
    .await;
    for (n, (want, stream)) in streams.into_iter().enumerate() {
        assert_eq!(collect(stream).await, want, "stream {n}");
    }
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let wait = async {
        while !is_so() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
}

#[tokio::test]
async fn concurrent_streams_yield_what_each_yields_alone() {
    let cluster = Cluster::start(2).await;
    cluster.publish(1, 2, 64);
    let engine = start(config(&cluster));
    check(&engine, 50).await;
    until("idle", || engine.status_json()["streams"] == 0).await;
}

/// The most tokens of a step in which a prompt of 180 meets a stream, if a token takes 2 ms.
async fn crowd(prefill_max: Duration) -> u64 {
    let cluster = Cluster::start(1).await;
    cluster.script.token_ms.store(2, Ordering::SeqCst);
    cluster.publish(1, 1, 256);
    let engine = start(EngineConfig { prefill_max, step_tokens: 100, ..config(&cluster) });
    let long = |prompt_tokens: u32, tokens_max: u32| Generate {
        prompt: (0..prompt_tokens).collect(),
        tokens_max,
        stop_tokens: vec![],
        ..generate(1)
    };
    let (stream, begun) = (long(60, 130), cluster.script.last.load(Ordering::SeqCst) + 5);
    let _stream = engine.submit(stream).await.unwrap();
    until("it streams", || begun < cluster.script.last.load(Ordering::SeqCst)).await;
    let prompt = long(180, 2);
    let want = alone(&prompt);
    assert_eq!(collect(engine.submit(prompt).await.unwrap()).await, want);
    cluster.script.crowd.load(Ordering::SeqCst)
}

#[tokio::test]
async fn prompt_holds_a_stream_up_no_longer_than_it_may() {
    assert_eq!(crowd(Duration::from_secs(60)).await, 100, "all that a step may hold");
    // By the times that it measured; what they are on a busy machine is its affair.
    let held = crowd(Duration::from_millis(40)).await;
    assert!(held < 100, "{held} tokens in 40 ms");
}

#[tokio::test]
async fn ranks_that_do_not_hear_each_other_are_told_of_and_the_step_goes_on() {
    let cluster = Cluster::start(2).await;
    cluster.script.deaf_at.store(3, Ordering::SeqCst);
    cluster.publish(1, 2, 64);
    let engine = start(config(&cluster));
    check(&engine, 10).await;
    until("it is told", || !cluster.script.reported.lock().unwrap().is_empty()).await;
    for fault in &*cluster.script.reported.lock().unwrap() {
        let text = "rank 0 does not hear ranks [1]".to_owned();
        let want = proto::pb::Fault { text, suspects: vec![1], silent: vec![], silent_ms: 0 };
        assert_eq!(*fault, want);
    }
    assert_eq!(engine.status_json()["failed_steps"], 0);
}

#[tokio::test]
async fn dropped_stream_is_computed_by_one_more_step_at_most() {
    let cluster = Cluster::start(2).await;
    cluster.publish(1, 2, 64);
    let engine = start(config(&cluster));
    let long = |n| Generate { tokens_max: 150, stop_tokens: vec![], ..generate(n) };
    for round in 0..10_u64 {
        // Steps go on after the other one has left.
        let stays = engine.submit(long(1)).await.unwrap();
        let mut leaves = engine.submit(long(2)).await.unwrap();
        leaves.next().await.unwrap();
        drop(leaves);
        // A step later than the next one is planned after the client has left.
        let last = cluster.script.last.load(Ordering::SeqCst);
        until("it is gone", || engine.status_json()["streams"] == 1).await;
        until("steps go on", || last + 4 < cluster.script.last.load(Ordering::SeqCst)).await;
        let computed = cluster.script.computed.lock().unwrap()[&(2 * round + 1)];
        assert!(computed <= last + 1, "step {computed} computed it, it left during {last}");
        drop(stays);
        until("idle", || engine.status_json()["streams"] == 0).await;
    }
}

#[tokio::test]
async fn ranks_that_stay_compute_nothing_twice() {
    let cluster = Cluster::start(2).await;
    cluster.publish(1, 2, 512);
    let engine = start(config(&cluster));
    let mut positions = 0;
    let mut streams = Vec::new();
    for n in 0..12 {
        let generate = Generate { tokens_max: 150, stop_tokens: vec![], ..generate(n) };
        let (tokens, finish) = alone(&generate);
        let stop = usize::from(matches!(finish, Finish::Stop { .. }));
        // The last token is sampled but never computed.
        positions += (generate.prompt.len() + tokens.len() + stop - 1) as u64;
        streams.push(((tokens, finish), engine.submit(generate).await.unwrap()));
    }
    for epoch in 2..4 {
        cluster.publish(epoch, 2, 512);
        until("the view is served", || engine.status_json()["epoch"] == epoch).await;
        assert_ne!(engine.status_json()["streams"], 0, "the view changes under load");
        let last = cluster.script.last.load(Ordering::SeqCst);
        until("steps go on", || last < cluster.script.last.load(Ordering::SeqCst)).await;
    }
    for (want, stream) in streams {
        assert_eq!(collect(stream).await, want);
    }
    assert_eq!(cluster.script.tokens.load(Ordering::SeqCst), positions);
}

/// A cluster whose third rank is lost when `streams` sequences are in the middle of it.
async fn lose_a_rank(streams: u32, before: impl Fn(&Cluster)) -> Cluster {
    let cluster = Cluster::start(3).await;
    cluster.backup_tokens.store(4000, Ordering::SeqCst);
    cluster.publish(1, 3, 512);
    let engine = start(config(&cluster));
    let long = |n: u32| Generate { tokens_max: 60, stop_tokens: vec![], ..generate(n) };
    let mut running = Vec::new();
    for n in 0..streams {
        running.push((alone(&long(n)), engine.submit(long(n)).await.unwrap()));
    }
    let begun = cluster.script.last.load(Ordering::SeqCst) + 20;
    until("they run", || begun < cluster.script.last.load(Ordering::SeqCst)).await;
    before(&cluster);
    cluster.publish(2, 2, 512);
    for (n, (want, stream)) in running.into_iter().enumerate() {
        assert_eq!(collect(stream).await, want, "stream {n}");
    }
    until("copies are released", || cluster.script.copies.lock().unwrap().len() <= 12).await;
    cluster
}

#[tokio::test]
async fn sequences_of_a_lost_rank_go_on_from_copies() {
    let cluster = lose_a_rank(12, |_| {}).await;
    let positions = |n: u32| (generate(n).prompt.len() + 60 - 1) as u64;
    let computed = cluster.script.tokens.load(Ordering::SeqCst);
    let again = computed - (0..12).map(positions).sum::<u64>();
    // Four sequences, each of which lost what was computed in the last steps.
    assert!(again <= 4 * 4 + 12, "{again} positions were computed again");
    assert!(4 * 20 <= cluster.script.restored.load(Ordering::SeqCst));
    assert_eq!(cluster.script.missed.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn copies_that_are_missing_change_no_token() {
    let forget = |cluster: &Cluster| {
        cluster.script.forgets.store(true, Ordering::SeqCst);
        cluster.script.copies.lock().unwrap().clear();
    };
    let cluster = lose_a_rank(12, forget).await;
    assert!(0 < cluster.script.missed.load(Ordering::SeqCst));
}

#[tokio::test]
async fn scarce_memory_preempts_but_changes_no_token() {
    let cluster = Cluster::start(1).await;
    cluster.publish(1, 1, 20);
    let engine = start(config(&cluster));
    check(&engine, 30).await;
}

#[tokio::test]
async fn faulty_steps_are_retried_and_change_no_token() {
    let cluster = Cluster::start(2).await;
    cluster.publish(1, 2, 64);
    cluster.script.faults.lock().unwrap().extend([2, 5, 6]);
    let engine = start(config(&cluster));
    check(&engine, 20).await;
    assert_eq!(cluster.script.failed.load(Ordering::SeqCst), 3);
    assert_eq!(engine.status_json()["failed_steps"], 3);
}

/// A passing fault costs a step again; one that stays ends its own sequence, and no other.
#[tokio::test]
async fn poisoned_sequence_is_tried_again_and_given_up_in_the_end() {
    let cluster = Cluster::start(2).await;
    cluster.publish(1, 2, 64);
    *cluster.script.poisoned.lock().unwrap() = Some((3, 2));
    let engine = start(config(&cluster));
    check(&engine, 8).await;
    assert_eq!(engine.status_json()["failed_steps"], 2);

    *cluster.script.poisoned.lock().unwrap() = Some((3, u32::MAX));
    let mut poisoned = engine.submit(generate(3)).await.unwrap();
    let good = engine.submit(generate(4)).await.unwrap();
    let event = tokio::time::timeout(PATIENCE, poisoned.next()).await.expect("it hangs");
    let Some(Event::Failed(text)) = event else { panic!("{event:?}") };
    assert!(text.contains("3 attempts at the next token failed"), "{text}");
    assert_eq!(collect(good).await, alone(&generate(4)));
    assert_eq!(engine.status_json()["failed_steps"], 5);
}

#[tokio::test]
async fn broken_stream_is_opened_again_and_changes_no_token() {
    let cluster = Cluster::start(2).await;
    cluster.publish(1, 2, 64);
    cluster.script.break_at.store(4, Ordering::SeqCst);
    let engine = start(config(&cluster));
    check(&engine, 20).await;
    assert_eq!(cluster.script.break_at.load(Ordering::SeqCst), 0, "it broke");
}

#[tokio::test]
async fn view_changes_change_no_token() {
    let cluster = Cluster::start(3).await;
    cluster.publish(1, 2, 64);
    let engine = start(config(&cluster));
    let changes = async {
        for (step, epoch, ranks) in [(4, 2, 3), (9, 3, 1), (15, 4, 2)] {
            until("a step", || step <= cluster.script.last.load(Ordering::SeqCst)).await;
            cluster.publish(epoch, ranks, 64);
        }
    };
    tokio::join!(check(&engine, 40), changes);
    until("the last view", || engine.status_json()["epoch"] == 4).await;
}

#[tokio::test]
async fn requests_wait_for_the_first_view() {
    let cluster = Cluster::start(1).await;
    let engine = start(EngineConfig { queue_max: 2, ..config(&cluster) });
    assert!(!engine.is_ready());
    let first = engine.submit(generate(1)).await.unwrap();
    let second = engine.submit(generate(2)).await.unwrap();
    let third = engine.submit(generate(3)).await.unwrap_err();
    assert!(matches!(third, SubmitError::NotReady(_)), "{third}");

    cluster.publish(1, 1, 64);
    assert_eq!(collect(first).await, alone(&generate(1)));
    assert_eq!(collect(second).await, alone(&generate(2)));
    assert!(engine.is_ready());
    assert_eq!(engine.context_tokens(), 200);
}

#[tokio::test]
async fn full_queue_refuses_and_dropped_streams_make_room() {
    let cluster = Cluster::start(1).await;
    let engine = start(EngineConfig { queue_max: 2, sequences_max: 1, ..config(&cluster) });
    cluster.publish(1, 1, 64);
    until("ready", || engine.is_ready()).await;
    let endless = || Generate { tokens_max: 150, stop_tokens: vec![], ..generate(3) };
    let mut held = Vec::new();
    let refused = loop {
        match engine.submit(endless()).await {
            Ok(stream) => held.push(stream),
            Err(error) => break error,
        }
        assert!(held.len() < 20, "the queue has no end");
    };
    assert_eq!(refused, SubmitError::QueueFull { retry_after_s: RETRY_AFTER_S });
    drop(held);
    until("room", || engine.status_json()["streams"] == 0).await;
    assert_eq!(collect(engine.submit(generate(4)).await.unwrap()).await, alone(&generate(4)));
}

#[tokio::test]
async fn stop_tokens_wait_for_tokens_min() {
    let cluster = Cluster::start(1).await;
    cluster.publish(1, 1, 64);
    let engine = start(config(&cluster));
    let mut generate = generate(5);
    generate.stop_tokens = (0..45).collect();
    generate.sampling.tokens_min = 12;
    generate.tokens_max = 40;
    let want = alone(&generate);
    assert!(12 <= want.0.len() && want.0.len() < 40, "{want:?}");
    until("ready", || engine.is_ready()).await;
    assert_eq!(collect(engine.submit(generate).await.unwrap()).await, want);
}

#[tokio::test]
async fn what_cannot_fit_is_refused() {
    let cluster = Cluster::start(1).await;
    cluster.publish(1, 1, 10);
    let engine = start(config(&cluster));
    until("ready", || engine.is_ready()).await;
    let long = Generate { prompt: vec![1; 41], ..generate(1) };
    let error = SubmitError::TooLong { prompt_tokens: 41, context_tokens: 41 };
    assert_eq!(engine.submit(long).await.unwrap_err(), error);
}

#[tokio::test]
async fn draining_ends_the_running_and_refuses_the_new() {
    let cluster = Cluster::start(1).await;
    cluster.publish(1, 1, 64);
    let engine = start(config(&cluster));
    until("ready", || engine.is_ready()).await;
    let stream = engine.submit(generate(2)).await.unwrap();
    tokio::time::timeout(PATIENCE, engine.drain()).await.expect("drained");
    assert_eq!(engine.submit(generate(3)).await.unwrap_err(), SubmitError::Draining);
    assert_eq!(collect(stream).await, alone(&generate(2)));
}
