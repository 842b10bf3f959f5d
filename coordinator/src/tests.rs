//! The coordinator over real gRPC, with workers that only answer `Prepare`.

use super::*;
use pb::coordinator_client::CoordinatorClient;
use pb::worker_server::{Worker, WorkerServer};
use std::time::Duration;
use store::Memory;
use tokio::net::TcpListener;
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status, Streaming};

/// Nothing here should take a second; a hang must fail instead.
const PATIENCE: Duration = Duration::from_secs(20);

/// Prepares whatever it is asked to, or cannot.
#[derive(Clone)]
enum Puppet {
    Able,
    Unable,
    /// Passes on what shares it is told.
    Told(mpsc::Sender<pb::ShareRequest>),
}

#[tonic::async_trait]
impl Worker for Puppet {
    type StepsStream = tokio_stream::Empty<Result<pb::StepResult, Status>>;

    async fn prepare(
        &self,
        request: Request<pb::PrepareRequest>,
    ) -> Result<Response<pb::PrepareResponse>, Status> {
        if matches!(self, Self::Unable) {
            return Err(Status::internal("disk on fire"));
        }
        let epoch = request.into_inner().view.unwrap().epoch;
        Ok(Response::new(pb::PrepareResponse { epoch, ..Default::default() }))
    }

    async fn share(
        &self,
        request: Request<pb::ShareRequest>,
    ) -> Result<Response<pb::ShareResponse>, Status> {
        if let Self::Told(told) = self {
            told.send(request.into_inner()).await.unwrap();
        }
        Ok(Response::new(pb::ShareResponse {}))
    }

    async fn steps(
        &self,
        _: Request<Streaming<pb::Step>>,
    ) -> Result<Response<Self::StepsStream>, Status> {
        Err(Status::unimplemented("a puppet does not step"))
    }
}

async fn start_puppet(puppet: Puppet) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = Server::builder().add_service(WorkerServer::new(puppet));
    telemetry::spawn("puppet", async move {
        server.serve_with_incoming(proto::incoming(listener)).await.unwrap();
    });
    address
}

fn settings(workers_expected: u16) -> Settings {
    Settings {
        workers_expected,
        assemble_max: Duration::from_secs(600),
        adopt_max: Duration::from_millis(500),
        redundancy: 0,
        spare: 0,
        repair_after: Duration::from_secs(1),
        rebalance_every: None,
    }
}

async fn coordinator(store: &Memory, workers: u16) -> (Handle, CoordinatorClient<Channel>) {
    coordinator_with(store, settings(workers)).await
}

async fn coordinator_with(
    store: &Memory,
    settings: Settings,
) -> (Handle, CoordinatorClient<Channel>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let handle = start(Config {
        settings,
        store: Arc::new(store.clone()),
        url: url.clone(),
        store_urls: vec![],
    });
    let server = handle.clone();
    telemetry::spawn("coordinator.server", async move {
        server.serve(listener).await.unwrap();
    });
    (handle, CoordinatorClient::connect(url).await.unwrap())
}

fn request(address: &str, profile: &str) -> pb::RegisterRequest {
    pb::RegisterRequest {
        address: address.into(),
        incarnation: address.into(),
        profile: profile.into(),
        model: "toy".into(),
        moe_layers: 1,
        experts: 4,
        expert_places: 4,
        kv: Some(pb::KvPools { block_tokens: 16, full_blocks: 4, ..Default::default() }),
        context_tokens: 64,
        ..Default::default()
    }
}

async fn join(
    client: &mut CoordinatorClient<Channel>,
    address: &str,
) -> Streaming<pb::RegisterEvent> {
    client.register(request(address, "f32")).await.unwrap().into_inner()
}

async fn next(views: &mut Streaming<pb::View>) -> String {
    let view = tokio::time::timeout(PATIENCE, views.message()).await.expect("no view comes");
    let view = view.unwrap().unwrap();
    let workers: Vec<String> = view.members.iter().map(|m| m.worker.to_string()).collect();
    format!("{}[{}]", view.epoch, workers.join(" "))
}

#[tokio::test]
async fn members_come_and_go_and_every_watcher_sees_the_views() {
    let store = Memory::new();
    let (handle, mut client) = coordinator(&store, 2).await;
    leads(&handle).await;
    let mut views = client.watch_view(pb::WatchViewRequest {}).await.unwrap().into_inner();
    let a = join(&mut client, &start_puppet(Puppet::Able).await).await;
    let mut b = join(&mut client, &start_puppet(Puppet::Able).await).await;
    assert_eq!(next(&mut views).await, "1[0 1]");
    assert_eq!(b.message().await.unwrap().unwrap().worker, 1);

    drop(a);
    assert_eq!(next(&mut views).await, "2[1]");
    let refused = client.register(request("127.0.0.1:1", "bf16")).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);

    let fault =
        pb::report_request::News::Fault(pb::Fault { text: "late".into(), ..Default::default() });
    let report = |epoch| pb::ReportRequest { epoch, news: Some(fault.clone()) };
    client.report(report(1)).await.unwrap();
    client.report(report(2)).await.unwrap();
    assert_eq!(next(&mut views).await, "3[1]");
    let status = handle.status().await.unwrap();
    assert_eq!(status["epoch"], 3);
    assert_eq!(status["members"][0]["experts"], 4);
    assert_eq!(status["changes"].as_array().unwrap().len(), 3);

    // A watcher that comes late sees the view that stands.
    let mut late = client.watch_view(pb::WatchViewRequest {}).await.unwrap().into_inner();
    assert_eq!(next(&mut late).await, "3[1]");
}

#[tokio::test]
async fn worker_that_cannot_prepare_is_dismissed_with_the_reason() {
    let store = Memory::new();
    let (handle, mut client) = coordinator(&store, 2).await;
    leads(&handle).await;
    let mut views = client.watch_view(pb::WatchViewRequest {}).await.unwrap().into_inner();
    let _good = join(&mut client, &start_puppet(Puppet::Able).await).await;
    let mut bad = join(&mut client, &start_puppet(Puppet::Unable).await).await;
    assert_eq!(bad.message().await.unwrap().unwrap().worker, 1);
    assert_eq!(next(&mut views).await, "2[0]");
    let reason = tokio::time::timeout(PATIENCE, bad.message()).await.unwrap().unwrap_err();
    assert!(reason.message().contains("disk on fire"), "{reason}");
}

/// Leads within the lease of a leader that has died, and as soon as the lead is free.
async fn leads(handle: &Handle) {
    let wait = async {
        while handle.status().await.is_none() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("it is elected");
}

#[tokio::test]
async fn standby_names_the_leader_and_takes_the_view_over_unchanged() {
    let store = Memory::new();
    let (first, mut client) = coordinator(&store, 1).await;
    leads(&first).await;
    let (second, mut standby) = coordinator(&store, 1).await;
    let worker = start_puppet(Puppet::Able).await;
    let refused = standby.register(request(&worker, "f32")).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    assert!(refused.message().contains("stands by; http://127.0.0.1:"), "{refused}");
    assert!(refused.message().contains("--coordinator"), "{refused}");

    let mut views = client.watch_view(pb::WatchViewRequest {}).await.unwrap().into_inner();
    let mut member = join(&mut client, &worker).await;
    assert_eq!(member.message().await.unwrap().unwrap().worker, 0);
    assert_eq!(next(&mut views).await, "1[0]");

    first.resign().await;
    // The worker and the router learn that they must look for the new leader.
    assert!(tokio::time::timeout(PATIENCE, member.message()).await.unwrap().is_err());
    leads(&second).await;
    let mut views = standby.watch_view(pb::WatchViewRequest {}).await.unwrap().into_inner();
    let mut member = join(&mut standby, &worker).await;
    assert_eq!(member.message().await.unwrap().unwrap().worker, 0);
    assert_eq!(next(&mut views).await, "1[0]");
}

/// The first worker joins, and its view counts.
async fn serves_one(client: &mut CoordinatorClient<Channel>) -> Streaming<pb::RegisterEvent> {
    let mut views = client.watch_view(pb::WatchViewRequest {}).await.unwrap().into_inner();
    let member = join(client, &start_puppet(Puppet::Able).await).await;
    assert_eq!(next(&mut views).await, "1[0]");
    member
}

#[tokio::test]
async fn epochs_go_on_from_the_store_after_a_restart() {
    let store = Memory::new();
    let (first, mut client) = coordinator(&store, 1).await;
    leads(&first).await;
    let _member = serves_one(&mut client).await;
    first.resign().await;

    let (second, mut client) = coordinator(&store, 1).await;
    leads(&second).await;
    let mut views = client.watch_view(pb::WatchViewRequest {}).await.unwrap().into_inner();
    let _member = join(&mut client, &start_puppet(Puppet::Able).await).await;
    assert_eq!(next(&mut views).await, "2[1]");
}

#[tokio::test]
async fn later_leader_knows_how_many_workers_are_wanted() {
    let store = Memory::new();
    let (first, mut client) = coordinator(&store, 1).await;
    leads(&first).await;
    let _member = serves_one(&mut client).await;
    client.scale(pb::ScaleRequest { workers: 3 }).await.unwrap();
    // It is written beside the answer.
    let written = async {
        while wanted::read(&store).await != Ok(Some(3)) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, written).await.expect("it is written");
    first.resign().await;
    let (second, _client) = coordinator(&store, 1).await;
    leads(&second).await;
    assert_eq!(second.status().await.unwrap()["workers_wanted"], 3);
}

#[tokio::test]
async fn workers_are_told_how_copies_share_the_load_they_report() {
    let store = Memory::new();
    let (handle, mut client) =
        coordinator_with(&store, Settings { redundancy: 1, ..settings(3) }).await;
    leads(&handle).await;
    let mut views = client.watch_view(pb::WatchViewRequest {}).await.unwrap().into_inner();
    let (tell, mut told) = mpsc::channel(64);
    let mut members = Vec::new();
    for _ in 0..3 {
        members.push(join(&mut client, &start_puppet(Puppet::Told(tell.clone())).await).await);
    }
    assert_eq!(next(&mut views).await, "1[0 1 2]");
    let report = |rows: Vec<u64>| {
        let load = pb::ExpertLoad { worker: 1, layers: vec![pb::LayerLoad { rows }] };
        pb::ReportRequest { epoch: 0, news: Some(pb::report_request::News::Load(load)) }
    };
    // Experts 0 and 1 have all rows.
    client.report(report(vec![400, 400, 0, 0])).await.unwrap();
    for _ in 0..3 {
        let request = tokio::time::timeout(PATIENCE, told.recv()).await.expect("told").unwrap();
        assert_eq!((request.epoch, request.layers.len()), (1, 1));
        let shares = proto::shares_from_wire(request.layers).unwrap();
        let status = handle.status().await.unwrap();
        let mut ranks = [0.0; 3];
        for (expert, holders) in (0..).zip(status["placement"][0].as_array().unwrap()) {
            let parts = shares.parts(0, ids::ExpertId(expert));
            for (rank, part) in holders.as_array().unwrap().iter().zip(parts) {
                let rows = if expert < 2 { 400.0 } else { 0.0 };
                ranks[usize::try_from(rank.as_u64().unwrap()).unwrap()] += rows * part;
            }
        }
        assert!(ranks.iter().all(|rows| (rows - 800.0 / 3.0).abs() < 3.0), "{ranks:?}");
        assert_eq!(status["shares"]["told"], 1);
        assert_eq!(status["shares"]["parts"][0].as_array().unwrap().len(), 4);
    }
}
