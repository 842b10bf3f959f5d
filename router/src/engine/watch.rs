//! Follows the coordinator's view. Losing the coordinator changes nothing: the last view stands
//! until a newer one arrives.

use ids::{Epoch, WorkerId};
use proto::pb;
use scheduler::KvPools;
use std::time::Duration;
use tokio::sync::watch;

/// Between attempts to reach a coordinator: soon at first, because most breaks are a failover.
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// What the engine needs of a view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) epoch: Epoch,
    /// By rank.
    pub(super) peers: Vec<Peer>,
    pub(super) context_tokens: u32,
}

/// One worker of a view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Peer {
    pub(super) worker: WorkerId,
    pub(super) pid: u32,
    pub(super) device: String,
    pub(super) address: String,
    /// Random per process start.
    pub(super) incarnation: String,
    pub(super) kv: KvPools,
    /// Positions of other ranks' sequences of which it can keep copies.
    pub(super) backup_tokens: u32,
}

impl Peer {
    /// Whether the other one's KV memory is this one's.
    pub(super) fn is_same_process(&self, other: &Self) -> bool {
        self.incarnation == other.incarnation && self.address == other.address
    }
}

/// Follows the views in a task of its own, which ends with the receiver.
pub(super) fn spawn(coordinators: &str) -> watch::Receiver<Option<Target>> {
    let (sender, receiver) = watch::channel(None);
    let coordinators: Vec<String> = coordinators.split(',').map(str::to_owned).collect();
    telemetry::spawn("router.watch_view", follow(coordinators, sender));
    receiver
}

async fn follow(coordinators: Vec<String>, views: watch::Sender<Option<Target>>) {
    let mut backoff = BACKOFF_FIRST;
    for coordinator in coordinators.iter().cycle() {
        let mut has_answered = false;
        tokio::select! {
            () = views.closed() => return,
            result = follow_one(coordinator, &views, &mut has_answered) => match result {
                Ok(()) => tracing::info!(coordinator, "the coordinator ended its view stream"),
                Err(error) => tracing::info!(coordinator, %error, "cannot follow views; will retry"),
            },
        }
        backoff = if has_answered { BACKOFF_FIRST } else { BACKOFF_MAX.min(backoff * 2) };
        tokio::select! {
            () = views.closed() => return,
            () = tokio::time::sleep(backoff) => {}
        }
    }
}

async fn follow_one(
    coordinator: &str,
    views: &watch::Sender<Option<Target>>,
    has_answered: &mut bool,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let channel = proto::standing(coordinator.to_owned())?.connect().await?;
    let mut client = pb::coordinator_client::CoordinatorClient::new(channel)
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX);
    let mut stream = client.watch_view(pb::WatchViewRequest {}).await?.into_inner();
    while let Some(wire) = stream.message().await? {
        let target = target_from_wire(wire)?;
        *has_answered = true;
        // An older view is a coordinator that does not know yet that it was replaced.
        views.send_if_modified(|current| {
            let is_news = current.as_ref().is_none_or(|current| current.epoch < target.epoch);
            if is_news {
                tracing::info!(epoch = %target.epoch, ranks = target.peers.len(), "new view");
                *current = Some(target);
            }
            is_news
        });
    }
    Ok(())
}

fn target_from_wire(wire: pb::View) -> Result<Target, proto::WireError> {
    let view = proto::view_from_wire(wire)?;
    Ok(Target {
        epoch: view.epoch,
        context_tokens: view.members.iter().map(|member| member.context_tokens).min().unwrap_or(0),
        peers: view
            .members
            .into_iter()
            .map(|member| Peer {
                worker: member.worker,
                pid: member.pid,
                device: member.device,
                address: member.address,
                incarnation: member.incarnation,
                kv: KvPools {
                    block_tokens: member.kv.block_tokens,
                    full_blocks: member.kv.full_blocks,
                    chunked_blocks: member.kv.chunked_blocks,
                    chunk_tokens: member.kv.chunk_tokens,
                },
                backup_tokens: member.kv.backup_tokens,
            })
            .collect(),
    })
}
