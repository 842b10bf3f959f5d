//! A whole cluster over real gRPC: what streams yield must not depend on how many workers there are,
//! what else runs, or which of them are lost on the way.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use herd::cluster::{Cluster, Config};
use kernels::Dtype;
use router::engine::{EngineHandle, Event, Finish, Generate, Sampling};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use worker::{KvBlocks, Model};

/// Nothing here should take ten seconds; a hang must fail instead.
const PATIENCE: Duration = Duration::from_secs(120);

fn toy_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("models/toy-maverick")
}

fn toy(dtype: Dtype) -> Arc<Model> {
    Arc::new(Model::open(&toy_folder(), dtype).unwrap())
}

async fn start(model: &Arc<Model>, workers: u16) -> Cluster {
    let kv = KvBlocks::plan(&model.config, model.dtype, 1 << 28, 32).unwrap();
    let config = Config {
        model: Arc::clone(model),
        threads: 1,
        settings: control::Settings {
            workers_expected: workers,
            assemble_max: Duration::from_secs(60),
            adopt_max: Duration::ZERO,
            redundancy: 1,
            spare: 0,
            repair_after: Duration::from_secs(1),
            rebalance_every: None,
        },
        kv,
        step_tokens: 48,
        prefill_max: Duration::from_millis(100),
        sequences_max: 16,
        queue_max: 256,
        step_deadline: Duration::from_secs(20),
        address: "none".into(),
    };
    let cluster = Cluster::start(config).await.unwrap();
    tokio::time::timeout(PATIENCE, async {
        while !cluster.engine.is_ready() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("the cluster serves");
    cluster
}

/// Prompts of many lengths; every third one samples.
fn generate(n: u32) -> Generate {
    let mut sampling = Sampling { seed: u64::from(n), logprobs: Some(2), ..Sampling::greedy() };
    if n.is_multiple_of(3) {
        sampling.temperature = 0.8;
        sampling.top_p = 0.9;
        sampling.presence_penalty = 0.3;
    }
    Generate {
        prompt: (0..2 + n * 37 % 150).map(|i| (i * i * 7 + n * 13) % 2000).collect(),
        tokens_max: 10 + n * 5 % 40,
        sampling,
        stop_tokens: vec![2001, 2007, 2008],
        group: u64::from(n),
    }
}

type Output = (Vec<(u32, Option<u32>)>, Finish);

/// Tokens with the bits of their log-probabilities, and the end.
async fn collect(engine: &EngineHandle, n: u32) -> Output {
    let mut stream = engine.submit(generate(n)).await.unwrap();
    let mut tokens = Vec::new();
    loop {
        let event = tokio::time::timeout(PATIENCE, stream.next()).await.expect("a stream hangs");
        match event.expect("a stream ends with its end") {
            Event::Token(t) => tokens.push((t.token, t.logprob.map(f32::to_bits))),
            Event::End(finish) => return (tokens, finish),
            Event::Failed(text) | Event::Deposed(text) => panic!("stream {n} failed: {text}"),
        }
    }
}

async fn all(engine: &EngineHandle, count: u32) -> Vec<Output> {
    futures::future::join_all((0..count).map(|n| collect(engine, n))).await
}

async fn one_by_one(model: &Arc<Model>, count: u32) -> Vec<Output> {
    let cluster = start(model, 1).await;
    let mut outputs = Vec::new();
    for n in 0..count {
        outputs.push(collect(&cluster.engine, n).await);
    }
    outputs
}

async fn check(dtype: Dtype) {
    let model = toy(dtype);
    let want = one_by_one(&model, 24).await;
    assert!(want.iter().any(|(tokens, _)| 20 < tokens.len()), "streams are long");
    for workers in [1, 2, 4] {
        let cluster = start(&model, workers).await;
        let got = all(&cluster.engine, 24).await;
        assert_eq!(got, want, "{workers} workers, {dtype}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_streams_equal_sequential_ones_on_any_number_of_workers_f32() {
    check(Dtype::F32).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_streams_equal_sequential_ones_on_any_number_of_workers_bf16() {
    check(Dtype::Bf16).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_and_joining_workers_change_no_token_and_end_no_stream() {
    check_losses(&toy(Dtype::Bf16), 48).await;
}

/// The workers of a process share a GPU, and lend each other rows there.
#[tokio::test(flavor = "multi_thread")]
async fn lost_and_joining_workers_on_a_gpu_change_no_token_and_end_no_stream() {
    let gpu = worker::Gpu::new(Arc::new(kernels::cuda::Driver::emulated().unwrap()));
    let platform = worker::Platform::Cuda(gpu);
    check_losses(&Arc::new(Model::open_for(&toy_folder(), Dtype::F32, platform).unwrap()), 4).await;
}

async fn check_losses(model: &Arc<Model>, count: u32) {
    let want = one_by_one(model, count).await;
    let mut cluster = start(model, 4).await;
    let engine = cluster.engine.clone();
    let streams = tokio::spawn(async move { all(&engine, count).await });
    let steps = |cluster: &Cluster| cluster.engine.status_json()["steps"].as_u64().unwrap();
    for round in 0..3 {
        let before = steps(&cluster);
        while !streams.is_finished() && steps(&cluster) < before + 5 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(!streams.is_finished(), "the streams end before round {round}");
        drop(cluster.workers.remove(0));
        cluster.add_worker().await.unwrap();
    }
    assert_eq!(streams.await.unwrap(), want);
    let status = cluster.status().await.unwrap();
    assert!(4 <= status["epoch"].as_u64().unwrap(), "views changed: {status}");
    assert_eq!(status["members"].as_array().unwrap().len(), 4);
}

/// Goal: a deposed leader and its successor cannot make ranks of different views out of one epoch.
#[tokio::test(flavor = "multi_thread")]
async fn worker_serves_one_view_per_epoch() {
    let cluster = start(&toy(Dtype::F32), 2).await;
    let mut coordinator =
        proto::pb::coordinator_client::CoordinatorClient::connect(cluster.coordinator.clone())
            .await
            .unwrap();
    let request = proto::pb::WatchViewRequest {};
    let mut views = coordinator.watch_view(request).await.unwrap().into_inner();
    let stands = views.message().await.unwrap().unwrap();
    let url = format!("http://{}", stands.members[0].address);
    let mut worker = proto::pb::worker_client::WorkerClient::connect(url).await.unwrap();
    let mut prepare = async |view: &proto::pb::View| {
        let request =
            proto::pb::PrepareRequest { view: Some(view.clone()), rank: 0, urgent: false };
        worker.prepare(request).await.map(|_| ()).map_err(|status| status.message().to_owned())
    };
    let next = proto::pb::View { epoch: stands.epoch + 1, ..stands.clone() };
    let mut other = next.clone();
    other.placement[0].experts[0].ranks.reverse();
    assert_ne!(next, other);
    assert_eq!(prepare(&next).await, Ok(()));
    assert_eq!(prepare(&next).await, Ok(()), "asked for again");
    let refused = prepare(&other).await.unwrap_err();
    assert!(refused.contains("n2 is another view here"), "{refused}");
    let refused = prepare(&stands).await.unwrap_err();
    assert!(refused.contains("n1: the epoch is over"), "{refused}");
    // What was only prepared changes nothing for those who are served.
    assert_eq!(collect(&cluster.engine, 1).await, one_by_one(&toy(Dtype::F32), 2).await[1]);
}
