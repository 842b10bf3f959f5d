//! `herd router`: the front door and scheduler of a cluster, as a process of its own.

use super::BadInput;
use super::etcd::EtcdArgs;
use super::parts::{ChildArgs, ModelArgs, ServeArgs, Signals, block_on, say};
use anyhow::Context;
use router::engine::{EngineConfig, EngineHandle};
use router::http::{Front, ServedModel};
use router::lead::{Election, LeadHandle};
use std::future::Future;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Longest wait for the store to hear that this router leads no more.
const RESIGN_MAX: Duration = Duration::from_secs(2);

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    serve: ServeArgs,
    /// The coordinator, `http://host:port`; several separated by commas.
    #[arg(long, env = "HERD_COORDINATOR")]
    coordinator: String,
    /// Most sequences that run at once on one worker; the others wait.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    sequences: u32,
    /// Under which address clients and other routers reach it, if not under that of --listen. A proxy there
    /// that ends looks to them as if the router had.
    #[arg(long)]
    advertise: Option<String>,
    /// With it routers are elected: any number stand by, one leads.
    #[command(flatten)]
    etcd: EtcdArgs,
    #[command(flatten)]
    child: ChildArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    block_on(async {
        let dir = args.model.dir()?;
        let door = Door::open(&args.serve, &dir).await?;
        let url = args.etcd.known_as(&door.address, args.advertise.as_ref())?;
        let election = args.etcd.open().await?.map(|store| Election::stand(store, &url));
        let lead = election.as_ref().map_or_else(LeadHandle::alone, Election::handle);
        let config = EngineConfig {
            coordinator: args.coordinator.clone(),
            address: door.address.clone(),
            step_tokens: args.serve.step_tokens.max(args.sequences),
            prefill_max: args.serve.prefill_max(),
            sequences_max: args.sequences,
            queue_max: args.serve.queue,
            step_deadline: args.serve.step_deadline(),
        };
        let engine = router::engine::start_elected(config, lead);
        let mut signals = Signals::of_role(&args.child)?;
        say(&format!("router: http://{}/v1 serves {}", door.address, door.model.id));
        let mut open = door.serve(engine, &args.coordinator);
        tokio::select! {
            () = signals.next() => {}
            () = args.child.parent_gone() => return Ok(()),
            error = open.ended() => return Err(error),
        }
        let resign = async {
            if let Some(election) = election {
                // A store that is away ends the lease by itself.
                let _away = tokio::time::timeout(RESIGN_MAX, election.resign()).await;
            }
        };
        open.drain(args.serve.drain_max_s, &mut signals, resign).await;
        Ok(())
    })
}

/// The HTTP side before it serves: whatever can be wrong with it shows before anything is loaded.
pub(crate) struct Door {
    pub(crate) address: String,
    pub(crate) model: Arc<ServedModel>,
    listener: TcpListener,
    metrics: telemetry::PrometheusHandle,
}

impl Door {
    pub(crate) async fn open(args: &ServeArgs, dir: &Path) -> anyhow::Result<Self> {
        let model = ServedModel::load(dir, args.model_name(dir))
            .with_context(|| BadInput(format!("cannot serve {}", dir.display())))?;
        let listener = TcpListener::bind(&args.listen)
            .await
            .with_context(|| format!("cannot listen on {}; give another --listen", args.listen))?;
        let address = listener.local_addr()?.to_string();
        let metrics = telemetry::init_metrics().map_err(anyhow::Error::msg)?;
        router::engine::describe();
        Ok(Self { address, model: Arc::new(model), listener, metrics })
    }

    pub(crate) fn serve(self, engine: EngineHandle, coordinators: &str) -> OpenDoor {
        let metrics = self.metrics;
        let front = Front {
            model: self.model,
            metrics: Box::new(move || metrics.render()),
            status: router::status::of_coordinators(coordinators),
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let shutdown = async {
            // Also if the sender is dropped: then everything ends.
            let _dropped = stopped.await;
        };
        let server = router::http::serve(self.listener, front, engine.clone(), shutdown);
        OpenDoor { engine, stop, server: tokio::spawn(server) }
    }
}

/// The HTTP side while it serves.
pub(crate) struct OpenDoor {
    engine: EngineHandle,
    stop: oneshot::Sender<()>,
    server: JoinHandle<std::io::Result<()>>,
}

impl OpenDoor {
    /// Why it ended by itself, which it never should.
    pub(crate) async fn ended(&mut self) -> anyhow::Error {
        match (&mut self.server).await {
            Ok(Ok(())) => anyhow::anyhow!("the HTTP server ended"),
            Ok(Err(error)) => anyhow::Error::new(error).context("the HTTP server ended"),
            Err(error) => anyhow::Error::new(error).context("the HTTP server panicked"),
        }
    }

    /// Lets running requests end; new ones are told that it drains. Then `resign` gives the lead up, and only
    /// after that the door closes: a leader that nobody reaches is taken for dead.
    pub(crate) async fn drain(
        self,
        limit_s: u64,
        signals: &mut Signals,
        resign: impl Future<Output = ()>,
    ) {
        let Self { engine, stop, server } = self;
        say(&format!("stopping: running requests have {limit_s} s; Ctrl-C again stops now"));
        let cut_off = async {
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(limit_s)) => {
                    "stopped; some requests were cut off"
                }
                () = signals.next() => "stopped at once; some requests were cut off",
            }
        };
        let mut cut_off = pin!(cut_off);
        let ended = tokio::select! {
            () = engine.drain() => None,
            text = &mut cut_off => Some(text),
        };
        resign.await;
        // The server may have ended by itself.
        let _ended = stop.send(());
        let text = match ended {
            Some(text) => text,
            None => tokio::select! {
                // Its result is that of a server that was told to stop.
                _ = server => "stopped",
                text = cut_off => text,
            },
        };
        say(text);
    }
}
