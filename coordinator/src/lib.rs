//! The coordinator: the shell around [`control::Control`].
//!
//! It turns calls, broken streams and answers into the machine's inputs and carries out its outputs.
//! It decides nothing, and it is not on the path of a token: a cluster serves without it, only its
//! membership stands still.
//!
//! Any number of coordinators may run over one store; the one that is elected leads, the others stand
//! by. A new leader takes the view over from the store and changes nothing that works.

mod health;
mod meter;
mod report;
mod service;
mod shell;
#[cfg(test)]
mod tests;
mod view_store;
mod wanted;

use control::Settings;
use proto::pb;
use std::sync::Arc;
use std::time::Duration;
use store::Store;
use tokio::sync::{mpsc, oneshot, watch};

/// Events between the services and the machine. A sender waits when it is full: registrations and
/// evidence are few, and none may be lost.
const EVENTS_MAX: usize = 256;
/// How long a leader is missed whose death nobody sees: a frozen one's, or a host's. Only membership waits meanwhile;
/// etcd grants no less.
const LEASE: Duration = Duration::from_secs(2);
/// A worker that answers no ping is frozen or cut off, and its streams end. A dead process shows at
/// once by its broken connection, and while steps run the router hears within milliseconds who is not
/// quite dead; so this is for an idle cluster, and a machine that is busy with other things may be slow.
const PING: Duration = Duration::from_millis(500);
const PING_MAX: Duration = Duration::from_secs(2);
/// Longest wait for the store when somebody asks who leads; the answer is a courtesy.
const ASK_MAX: Duration = Duration::from_millis(500);
/// The key that the leader holds; its value is the leader's address.
const LEADER_KEY: &str = "/herd/leader";

/// What a coordinator runs with.
pub struct Config {
    pub settings: Settings,
    pub store: Arc<dyn Store>,
    /// `http://host:port` under which others reach it.
    pub url: String,
    /// Addresses of the store, for the status.
    pub store_urls: Vec<String>,
}

/// Starts the coordinator's task on the current runtime; it ends with the last handle.
#[must_use]
pub fn start(config: Config) -> Handle {
    let (terms, term) = watch::channel(None);
    let store = Arc::clone(&config.store);
    let (resign, resigned) = watch::channel(false);
    let (url, store_urls) = (config.url.clone(), config.store_urls.clone());
    telemetry::spawn("coordinator", stand(config, terms, resigned));
    Handle { term, store, resign: Arc::new(resign), url, store_urls }
}

/// The time of one leadership.
#[derive(Debug, Clone)]
struct Term {
    events: mpsc::Sender<shell::Event>,
    views: watch::Receiver<Option<Arc<pb::View>>>,
}

/// Stands for election, leads, and stands again.
async fn stand(
    config: Config,
    terms: watch::Sender<Option<Term>>,
    mut resigned: watch::Receiver<bool>,
) {
    loop {
        let store = Arc::clone(&config.store);
        let mut leadership = tokio::select! {
            lead = store::campaign(store, LEADER_KEY, config.url.as_bytes(), LEASE) => lead,
            () = terms.closed() => return,
            () = is_set(&mut resigned) => return,
        };
        tracing::info!(url = config.url, "leads");
        let (events, inbox) = mpsc::channel(EVENTS_MAX);
        let (publish, views) = watch::channel(None);
        let context = shell::Context {
            store: Arc::clone(&config.store),
            guard: leadership.guard(),
            store_urls: config.store_urls.clone(),
            url: config.url.clone(),
        };
        let shell = shell::Shell::new(events.downgrade(), inbox, publish, context);
        terms.send_replace(Some(Term { events, views }));
        tokio::select! {
            () = shell.run(config.settings) => {}
            () = leadership.lost() => {}
            () = terms.closed() => return,
            () = is_set(&mut resigned) => {
                leadership.resign().await;
                return;
            }
        }
        tracing::warn!(url = config.url, "does not lead any more");
        terms.send_replace(None);
    }
}

/// Waits for the flag, or for the end of who could set it.
async fn is_set(flag: &mut watch::Receiver<bool>) {
    let _gone = flag.wait_for(|set| *set).await;
}

/// The services' end of the coordinator.
#[derive(Clone)]
pub struct Handle {
    term: watch::Receiver<Option<Term>>,
    store: Arc<dyn Store>,
    resign: Arc<watch::Sender<bool>>,
    url: String,
    store_urls: Vec<String>,
}

impl Handle {
    /// Gives the lead up and stands no more, so that nobody has to wait for the lease to end. Returns
    /// when the store knows, or does not answer.
    pub async fn resign(&self) {
        self.resign.send_replace(true);
        let mut term = self.term.clone();
        // The task ends, and its sender with it.
        while term.changed().await.is_ok() {}
    }

    /// Serves gRPC until the listener fails.
    ///
    /// # Errors
    ///
    /// Those of the listener.
    pub async fn serve(
        &self,
        listener: tokio::net::TcpListener,
    ) -> Result<(), tonic::transport::Error> {
        tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(PING))
            .http2_keepalive_timeout(Some(PING_MAX))
            .add_service(self.service())
            .serve_with_incoming(proto::incoming(listener))
            .await
    }

    fn service(&self) -> pb::coordinator_server::CoordinatorServer<service::Service> {
        pb::coordinator_server::CoordinatorServer::new(service::Service::new(self.clone()))
            .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
    }

    /// The document of `herd status --json`, without the router's part. `None` if it does not lead.
    pub async fn status(&self) -> Option<serde_json::Value> {
        let (reply, answer) = oneshot::channel();
        self.term()?.events.send(shell::Event::Status { reply }).await.ok()?;
        answer.await.ok()
    }

    fn term(&self) -> Option<Term> {
        self.term.borrow().clone()
    }

    /// What a coordinator that stands by says of itself.
    fn standby_status(&self) -> serde_json::Value {
        report::standby(&self.url, &self.store_urls)
    }

    /// Who leads, as far as the store tells in time.
    async fn leader(&self) -> String {
        match tokio::time::timeout(ASK_MAX, self.store.get(LEADER_KEY)).await {
            Ok(Ok(Some(entry))) => String::from_utf8_lossy(&entry.value).into_owned(),
            Ok(Ok(None)) => "nobody".into(),
            Ok(Err(_)) | Err(_) => "nobody knows who (the store does not answer)".into(),
        }
    }
}
