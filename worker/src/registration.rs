//! A worker's membership: one standing stream to the coordinator, opened again when it breaks.
//!
//! Losing the coordinator stops no step; it only means that membership cannot change meanwhile.

use crate::Config;
use crate::tally::Tally;
use kernels::cuda::nvml::{GpuHealth, Nvml};
use placement::KvPools;
use proto::pb;
use proto::pb::coordinator_client::CoordinatorClient;
use proto::pb::report_request::News;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tonic::transport::Channel;

/// Between attempts: soon at first, because most breaks are a failover.
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Between reports of what the experts had to do, and of how the GPU is. A plan looks at many of them.
const REPORT_PERIOD: Duration = Duration::from_secs(1);

/// What a worker reports again and again. A report may be lost: the next ones make up for it.
pub(crate) struct Reports {
    tally: Arc<Tally>,
    nvml: Option<Arc<Nvml>>,
    /// The last look at the GPU, while it is not over. It outlasts registrations.
    look: Mutex<Option<JoinHandle<GpuHealth>>>,
}

impl Reports {
    pub(crate) fn new(tally: Arc<Tally>, nvml: Option<Arc<Nvml>>) -> Self {
        Self { tally, nvml, look: Mutex::default() }
    }
}

type Error = Box<dyn std::error::Error + Send + Sync>;

/// How the worker introduces itself.
pub(crate) fn card(config: &Config, address: &str, incarnation: &str) -> pb::RegisterRequest {
    let (model, platform) = (&config.model.config, &config.model.platform);
    let small = |n: usize| u32::try_from(n).expect("layers and experts are numbered in 16 bits");
    let kv = KvPools { backup_tokens: config.backup_tokens(), ..config.kv.pools(model) };
    pb::RegisterRequest {
        address: address.to_owned(),
        incarnation: incarnation.to_owned(),
        pid: std::process::id(),
        device: platform.describe(config.threads),
        profile: platform.profile(config.model.dtype),
        model: model.fingerprint(),
        moe_layers: small(model.moe_layers().len()),
        experts: small(model.experts),
        expert_places: small(config.places),
        kv: Some(proto::pools_to_wire(kv)),
        context_tokens: model.context_tokens,
        exchange: String::new(),
        epoch: 0,
    }
}

/// Stays registered until the worker is drained. `epoch`: the newest that the worker was asked to prepare.
pub(crate) async fn keep(
    coordinators: String,
    (card, epoch): (pb::RegisterRequest, Arc<AtomicU64>),
    reports: Reports,
) {
    let mut backoff = BACKOFF_FIRST;
    let coordinators: Vec<&str> = coordinators.split(',').collect();
    for coordinator in coordinators.iter().cycle() {
        let mut was_registered = false;
        let card = pb::RegisterRequest { epoch: epoch.load(Ordering::SeqCst), ..card.clone() };
        match register(coordinator, (card, &reports), &mut was_registered).await {
            Ok(Registered::Drained) => {
                tracing::info!(coordinator, "drained");
                return;
            }
            Ok(Registered::Ended) => {
                tracing::info!(coordinator, "the coordinator ended the registration");
            }
            Err(error) => tracing::warn!(coordinator, error = %chain(&*error), "not registered"),
        }
        backoff = if was_registered { BACKOFF_FIRST } else { BACKOFF_MAX.min(backoff * 2) };
        tokio::time::sleep(backoff).await;
    }
}

/// How a registration ended without an error.
enum Registered {
    Drained,
    Ended,
}

async fn register(
    coordinator: &str,
    (card, reports): (pb::RegisterRequest, &Reports),
    was_registered: &mut bool,
) -> Result<Registered, Error> {
    let channel = proto::standing(coordinator.to_owned())?.connect().await?;
    let mut client = CoordinatorClient::new(channel);
    let mut events = client.register(card).await?.into_inner();
    let Some(welcome) = events.message().await? else { return Ok(Registered::Ended) };
    tracing::info!(worker = welcome.worker, coordinator, "registered");
    *was_registered = true;
    // It never ends by itself.
    let reporting = report(client, welcome.worker, reports);
    let last = tokio::select! {
        event = events.message() => event?,
        () = reporting => None,
    };
    Ok(if last.is_some_and(|event| event.leave) { Registered::Drained } else { Registered::Ended })
}

/// Tells what there is to tell, again and again.
async fn report(mut client: CoordinatorClient<Channel>, worker: u32, reports: &Reports) {
    loop {
        tokio::time::sleep(REPORT_PERIOD).await;
        let load = reports.tally.take().map(|layers| {
            let layers = layers.into_iter().map(|rows| pb::LayerLoad { rows }).collect();
            News::Load(pb::ExpertLoad { worker, layers })
        });
        let health = match &reports.nvml {
            Some(nvml) => health(nvml, &mut *reports.look.lock().await).await,
            None => None,
        };
        let health = health.map(|health| News::Gpu(health_to_wire(worker, health)));
        for news in [load, health].into_iter().flatten() {
            let report = pb::ReportRequest { epoch: 0, news: Some(news) };
            match tokio::time::timeout(REPORT_PERIOD, client.report(report)).await {
                Ok(Ok(_)) => {}
                Ok(Err(status)) => tracing::debug!(%status, "the report was not taken"),
                Err(_elapsed) => tracing::debug!("the report was not answered"),
            }
        }
    }
}

/// Looks at the GPU, unless the last look is not over: that takes as long as a GPU in trouble wants.
async fn health(nvml: &Arc<Nvml>, look: &mut Option<JoinHandle<GpuHealth>>) -> Option<GpuHealth> {
    let task = look.get_or_insert_with(|| {
        let nvml = Arc::clone(nvml);
        tokio::task::spawn_blocking(move || nvml.health())
    });
    let done = tokio::time::timeout(REPORT_PERIOD, task).await.ok()?;
    *look = None;
    // An error means that the process ends.
    done.ok()
}

fn health_to_wire(worker: u32, health: GpuHealth) -> pb::GpuHealth {
    let GpuHealth {
        memory_used,
        memory_total,
        sm_mhz,
        memory_mhz,
        temperature_c,
        ecc_uncorrected,
        last_xid,
        throttle,
    } = health;
    pb::GpuHealth {
        worker,
        memory_used,
        memory_total,
        sm_mhz,
        memory_mhz,
        temperature_c,
        ecc_uncorrected,
        last_xid,
        throttle,
    }
}

/// An error with all its causes: tonic's own text hides them.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
