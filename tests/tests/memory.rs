//! Where a worker's experts come from: out of the others' memory, as long as they have them.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use kernels::Dtype;
use kernels::cuda::Driver;
use proto::pb;
use proto::pb::coordinator_client::CoordinatorClient;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tonic::transport::Channel;
use worker::{Exchange, Gpu, KvBlocks, Model, Platform, Processes, WithinHost, Worker};

const PATIENCE: Duration = Duration::from_secs(60);

/// A model of its own, as another process would have it.
fn toy() -> Arc<Model> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    Arc::new(Model::open(&root.join("models/toy-maverick"), Dtype::F32).unwrap())
}

/// With FP8 experts, on an emulated GPU of its own.
fn fp8_on_gpu(dtype: Dtype) -> Arc<Model> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/fp8-tiny");
    let platform = Platform::Cuda(Gpu::new(Arc::new(Driver::emulated().unwrap())));
    Arc::new(Model::open_for(&dir, dtype, platform).unwrap())
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
            experts_port: 0,
        }),
        threads: 1,
        kv: KvBlocks::plan(&model.config, model.dtype, 1 << 26, 32).unwrap(),
        places: model.config.experts,
        backup_bytes: 1 << 24,
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

fn copies(view: &pb::View) -> usize {
    let of_layer = |layer: &pb::LayerPlacement| -> usize {
        layer.experts.iter().map(|expert| expert.ranks.len()).sum()
    };
    view.placement.iter().map(of_layer).sum()
}

/// Two processes with a model of `open` each.
async fn newcomer_takes_from_memory(open: impl Fn() -> Arc<Model>) {
    let (_handle, coordinator) = coordinator(0).await;
    let (first, second) = (open(), open());
    let _first = join(&first, &coordinator).await;
    let alone = view(&coordinator, |view| view.members.len() == 1).await;
    let read = |model: &Model| model.checkpoint().bytes_read();
    let (read_by_first, all) = (read(&first), first.checkpoint().bytes());
    assert_eq!(read_by_first, all, "nobody had its experts");
    let _second = join(&second, &coordinator).await;
    let both = view(&coordinator, |view| view.members.len() == 2).await;
    assert_eq!(copies(&both), copies(&alone), "one copy of each");
    let routed = |name: &str| name.contains(".experts.");
    let tensors = second.checkpoint().tensors();
    let dense: u64 = tensors.filter(|t| !routed(&t.name)).map(|t| t.bytes).sum();
    assert!(dense < all);
    assert_eq!(read(&second), dense, "no expert came from its files");
    assert_eq!(read(&first), read_by_first);
}

#[tokio::test(flavor = "multi_thread")]
async fn newcomer_takes_its_experts_out_of_a_peers_memory() {
    newcomer_takes_from_memory(toy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn newcomer_takes_its_experts_out_of_a_peers_gpu() {
    newcomer_takes_from_memory(|| fp8_on_gpu(Dtype::Bf16)).await;
    newcomer_takes_from_memory(|| fp8_on_gpu(Dtype::F32)).await;
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
