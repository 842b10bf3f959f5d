//! Rows on their way to the workers that keep copies of them. Nobody waits for them: what finds the way full is dropped,
//! and shows as a gap at the other end.

use pb::backups_client::BackupsClient;
use proto::pb;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Endpoint;

/// Bytes that wait for one worker.
const WAITING_MAX: usize = 64 << 20;
/// Longest wait for a connection, and the shortest between two attempts.
const CONNECT_MAX: Duration = Duration::from_millis(500);

/// The ways to other workers.
pub(crate) struct Sender {
    runtime: Handle,
    /// By `host:port` of the worker's service.
    ways: BTreeMap<String, Way>,
}

struct Way {
    rows: mpsc::UnboundedSender<pb::KeepRequest>,
    waiting: Arc<AtomicUsize>,
    task: JoinHandle<()>,
    opened: Instant,
}

impl Way {
    /// Its task has ended, and another attempt is due: the worker was not reached, or has ended the stream.
    fn is_to_be_opened_again(&self) -> bool {
        self.rows.is_closed() && CONNECT_MAX <= self.opened.elapsed()
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        // It may wait for a worker that takes nothing any more.
        self.task.abort();
    }
}

impl Sender {
    /// Its tasks run there.
    pub(crate) fn new(runtime: Handle) -> Self {
        Self { runtime, ways: BTreeMap::new() }
    }

    /// Leaves all workers but these.
    pub(crate) fn retain(&mut self, addresses: &[String]) {
        self.ways.retain(|address, _| addresses.contains(address));
    }

    /// Whether there is a way to a worker.
    #[cfg(test)]
    pub(crate) fn has(&self, address: &str) -> bool {
        self.ways.contains_key(address)
    }

    /// Sends rows to a worker, or drops them.
    pub(crate) fn send(&mut self, address: &str, rows: pb::KeepRequest) {
        let Self { runtime, ways } = self;
        if ways.get(address).is_none_or(Way::is_to_be_opened_again) {
            ways.insert(address.to_owned(), open(runtime, address));
        }
        let Some(way) = ways.get(address) else { return };
        let bytes = size(&rows);
        if WAITING_MAX < way.waiting.fetch_add(bytes, Ordering::Relaxed) + bytes
            || way.rows.send(rows).is_err()
        {
            way.waiting.fetch_sub(bytes, Ordering::Relaxed);
        }
    }
}

fn size(request: &pb::KeepRequest) -> usize {
    request.rows.iter().map(|rows| rows.full.len() + rows.chunked.len()).sum()
}

fn open(runtime: &Handle, address: &str) -> Way {
    let (rows, coming) = mpsc::unbounded_channel();
    let waiting = Arc::new(AtomicUsize::new(0));
    let (counted, address) = (Arc::clone(&waiting), address.to_owned());
    let _here = runtime.enter();
    let task = telemetry::spawn("worker.backups", async move {
        if let Err(error) = carry(&address, coming, counted).await {
            tracing::debug!(address, %error, "no KV rows are sent there for a while");
        }
    });
    Way { rows, waiting, task, opened: Instant::now() }
}

/// Sends rows until there are no more, or the worker takes none.
async fn carry(
    address: &str,
    rows: mpsc::UnboundedReceiver<pb::KeepRequest>,
    waiting: Arc<AtomicUsize>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(CONNECT_MAX)
        .tcp_nodelay(true);
    let client = BackupsClient::new(endpoint.connect().await?);
    let sent = UnboundedReceiverStream::new(rows).map(move |rows| {
        waiting.fetch_sub(size(&rows), Ordering::Relaxed);
        rows
    });
    client.max_encoding_message_size(proto::MESSAGE_BYTES_MAX).keep(sent).await?;
    Ok(())
}
