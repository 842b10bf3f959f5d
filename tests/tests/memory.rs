//! Where a worker's experts come from: out of the others' memory, as long as they have them.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use kernels::Dtype;
use proto::pb;
use proto::pb::coordinator_client::CoordinatorClient;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tonic::transport::Channel;
use worker::{Exchange, KvBlocks, Model, Processes, WithinHost, Worker};

const PATIENCE: Duration = Duration::from_secs(60);

/// A model of its own, as another process would have it.
fn toy() -> Arc<Model> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    Arc::new(Model::open(&root.join("models/toy-maverick"), Dtype::F32).unwrap())
}

async fn coordinator(redundancy: u16) -> (coordinator::Handle, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let handle = coordinator::start(coordinator::Config {
        settings: control::Settings {
            workers_expected: 1,
            assemble_max: PATIENCE,
            adopt_max: Duration::ZERO,
            redundancy,
            spare: 0,
            repair_after: Duration::from_millis(50),
            rebalance_every: None,
        },
        store: Arc::new(store::Memory::new()),
        url: url.clone(),
        store_urls: Vec::new(),
    });
    let server = handle.clone();
    telemetry::spawn("coordinator.server", async move { server.serve(listener).await.unwrap() });
    (handle, url)
}

async fn join(model: &Arc<Model>, coordinator: &str) -> Worker {
    let config = worker::Config {
        model: Arc::clone(model),
        exchange: Exchange::Processes(Processes {
            listen: "127.0.0.1:0".parse().unwrap(),
            advertise: None,
            within_host: WithinHost::SharedMemory,
        }),
        threads: 1,
        kv: KvBlocks::plan(&model.config, model.dtype, 1 << 26, 32).unwrap(),
        places: model.config.experts,
        coordinator: coordinator.to_owned(),
        advertise: None,
        chaos: worker::Chaos::Refused,
    };
    worker::start(config, TcpListener::bind("127.0.0.1:0").await.unwrap()).await.unwrap()
}

/// The first view that is as it should be.
async fn view(coordinator: &str, wanted: impl Fn(&pb::View) -> bool) -> pb::View {
    let mut client: CoordinatorClient<Channel> =
        CoordinatorClient::connect(coordinator.to_owned()).await.unwrap();
    let mut views = client.watch_view(pb::WatchViewRequest {}).await.unwrap().into_inner();
    let found = async {
        loop {
            let view = views.message().await.unwrap().expect("the coordinator lives");
            if wanted(&view) {
                return view;
            }
        }
    };
    tokio::time::timeout(PATIENCE, found).await.expect("the view comes")
}

/// Bytes of the checkpoint that a worker reads which loads no experts.
fn dense_bytes() -> u64 {
    let model = toy();
    model.dense().unwrap();
    model.checkpoint().bytes_read()
}

fn copies(view: &pb::View) -> usize {
    let of_layer = |layer: &pb::LayerPlacement| -> usize {
        layer.experts.iter().map(|expert| expert.ranks.len()).sum()
    };
    view.placement.iter().map(of_layer).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn newcomer_takes_its_experts_out_of_a_peers_memory() {
    let (_handle, coordinator) = coordinator(0).await;
    let (first, second) = (toy(), toy());
    let _first = join(&first, &coordinator).await;
    let alone = view(&coordinator, |view| view.members.len() == 1).await;
    let read_by_first = first.checkpoint().bytes_read();
    assert!(dense_bytes() < read_by_first, "nobody had its experts");
    let _second = join(&second, &coordinator).await;
    let both = view(&coordinator, |view| view.members.len() == 2).await;
    assert_eq!(copies(&both), copies(&alone), "one copy of each");
    assert_eq!(second.checkpoint().bytes_read(), dense_bytes());
    assert_eq!(first.checkpoint().bytes_read(), read_by_first);
}

/// Goal: a loss reads nothing while the streams wait; the copies are made afterwards, and out of memory.
#[tokio::test(flavor = "multi_thread")]
async fn lost_copies_are_made_again_out_of_memory() {
    let (_handle, coordinator) = coordinator(1).await;
    let models = [toy(), toy(), toy()];
    let mut workers = Vec::new();
    for (number, model) in models.iter().enumerate() {
        workers.push(join(model, &coordinator).await);
        view(&coordinator, |view| view.members.len() == number + 1).await;
    }
    let all = view(&coordinator, |view| view.members.len() == 3).await;
    let read = || models.each_ref().map(|model| model.checkpoint().bytes_read());
    let before = read();
    drop(workers.pop());
    let survivors = view(&coordinator, |view| view.members.len() == 2).await;
    assert!(copies(&survivors) < copies(&all), "nobody loads while streams wait");
    let whole = view(&coordinator, |view| copies(view) == copies(&all)).await;
    assert_eq!(whole.members.len(), 2);
    assert_eq!(read(), before);
}
