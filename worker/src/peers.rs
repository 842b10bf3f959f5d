//! Experts out of other members' memory: over a network faster than the disk of a newcomer, and packed
//! already. What does not come this way is read from the checkpoint, so nothing here is an error.
//!
//! A worker asks all other members of the coming view what they have, shares what it lacks out among
//! them, and takes it from all of them at once. Every piece carries a checksum. Sizes and places are
//! those that this worker's own checkpoint says; a peer that says otherwise is not listened to.
//!
//! The bytes have a port and threads of their own, on both sides, which give way to all others of the
//! worker: on its own port, and on the threads that answer there, they would hold up steps and beats.

use crate::background::{Background, beside_steps};
use crate::held::{Blank, Held};
use crate::site::senders;
use crate::weights::{Key, Model, ModelError};
use ids::Rank;
use kernels::DeviceError;
use pb::experts_client::ExpertsClient;
use pb::experts_server::ExpertsServer;
use placement::View;
use proto::pb;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status, Streaming};

/// Longest wait until a peer has said what it has: it has nothing to look up.
const ASK_MAX: Duration = Duration::from_millis(500);
/// Longest wait for the next piece.
const PIECE_MAX: Duration = Duration::from_secs(2);
/// Bytes of a piece: small enough to stay in the cache between checksum and copy.
const PIECE_BYTES: usize = 256 << 10;
/// Pieces that wait to be sent to a peer.
const PIECES_MAX: usize = 4;

/// Implements `herd.v1.Experts`.
pub(crate) struct Service {
    model: Arc<Model>,
    /// What the weights are packed for.
    profile: String,
    /// The port for their bytes; 0 if there is none but the worker's.
    port: u16,
    /// Closes when the worker is dropped.
    stopped: watch::Receiver<()>,
}

/// Serves experts at a port of its own, if it has one, until the worker is dropped. The service is to be had
/// at the worker's own port, too, where the port is told.
///
/// # Errors
///
/// If the runtime does not listen.
pub(crate) fn serve(
    background: &Background,
    listener: Option<TcpListener>,
    (model, profile): (Arc<Model>, String),
    stopped: watch::Receiver<()>,
) -> std::io::Result<ExpertsServer<Service>> {
    let port = listener.as_ref().map(|listener| listener.local_addr()).transpose()?;
    let port = port.map_or(0, |address| address.port());
    let mut ends = stopped.clone();
    let server = ExpertsServer::new(Service { model, profile, port, stopped })
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX);
    if let Some(listener) = listener {
        let here = background.handle();
        let _spawns_there = here.enter();
        let incoming = proto::incoming(tokio::net::TcpListener::from_std(listener)?);
        let served = tonic::transport::Server::builder().add_service(server.clone());
        telemetry::spawn("worker.experts.port", async move {
            tokio::select! {
                result = served.serve_with_incoming(incoming) => {
                    tracing::warn!(?result, "experts are sent from the worker's own port now");
                }
                // Only ever an error: the worker was dropped.
                _ = ends.changed() => {}
            }
        });
    }
    Ok(server)
}

impl Service {
    /// Whether weights that are packed here fit another process.
    fn check(&self, model: &str, profile: &str) -> Result<(), Status> {
        if model == self.model.config.fingerprint() && profile == self.profile {
            return Ok(());
        }
        let text = format!("this worker's weights are packed for {}, not {profile}", self.profile);
        Err(Status::failed_precondition(text))
    }
}

#[tonic::async_trait]
impl pb::experts_server::Experts for Service {
    async fn held(
        &self,
        request: Request<pb::HeldRequest>,
    ) -> Result<Response<pb::HeldResponse>, Status> {
        let pb::HeldRequest { model, profile } = request.into_inner();
        self.check(&model, &profile)?;
        let layers = by_layer(self.model.config.moe_layers().len(), &self.model.held());
        Ok(Response::new(pb::HeldResponse { layers, port: self.port.into() }))
    }

    type SendStream = ReceiverStream<Piece>;

    async fn send(
        &self,
        request: Request<pb::SendRequest>,
    ) -> Result<Response<Self::SendStream>, Status> {
        let pb::SendRequest { model, profile, layers } = request.into_inner();
        self.check(&model, &profile)?;
        let (piece, pieces) = mpsc::channel(PIECES_MAX);
        let (model, mut stopped) = (Arc::clone(&self.model), self.stopped.clone());
        // Reading waits, for a GPU for instance. It ends when nobody takes pieces any more.
        beside_steps("experts-out", move || send(&model, layers, &piece))?;
        let (passed, passing) = mpsc::channel(1);
        telemetry::spawn("worker.experts", async move {
            tokio::select! {
                () = pass(pieces, passed) => {}
                // Only ever an error: the worker was dropped.
                _ = stopped.changed() => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(passing)))
    }
}

/// What a worker asks its peers for, and how.
struct Wanted {
    model: String,
    profile: String,
    layers: usize,
}

/// A member that holds some of what is missing.
struct Holder {
    /// Where it sends them, `host:port`, the best place first.
    addresses: Vec<String>,
    held: BTreeSet<Key>,
}

/// Takes what is missing out of the memory of the view's other members, as far as they have it, by tasks
/// of `background`; a worker without has no members beside it in other processes.
pub(crate) async fn take(
    (model, background): (&Arc<Model>, Option<&Handle>),
    (view, me): (&View, Rank),
    missing: &[Key],
    still_wanted: &(dyn Fn() -> bool + Sync),
) {
    // Workers of one process share their memory.
    let Some(background) = background else { return };
    let is_other = |member: &&placement::Member| member.rank != me && !member.address.is_empty();
    let others: Vec<&placement::Member> = view.members.iter().filter(is_other).collect();
    if missing.is_empty() || others.is_empty() {
        return;
    }
    let start = Instant::now();
    let wanted = Arc::new(Wanted {
        model: view.model.clone(),
        profile: view.profile.clone(),
        layers: model.config.moe_layers().len(),
    });
    let mut asked = JoinSet::new();
    for (order, member) in others.into_iter().enumerate() {
        let (address, wanted) = (member.address.clone(), Arc::clone(&wanted));
        asked.spawn(async move { (order, ask(&address, &wanted).await) });
    }
    let mut holders: Vec<(usize, Holder)> = Vec::new();
    while let Some(answer) = asked.join_next().await {
        if let Ok((order, Some(holder))) = answer {
            holders.push((order, holder));
        }
    }
    holders.sort_by_key(|(order, _)| *order);
    let mut takers = JoinSet::new();
    let shares = share_out(missing, holders.iter().map(|(_, holder)| &holder.held));
    for ((_, holder), share) in holders.into_iter().zip(shares) {
        if !share.is_empty() {
            let (model, wanted) = (Arc::clone(model), Arc::clone(&wanted));
            let taker = async move { take_from(&model, &holder.addresses, &wanted, share).await };
            takers.spawn_on(taker, background);
        }
    }
    let (mut experts, mut bytes) = (0, 0);
    // A later view ends this: the tasks end with their set.
    while still_wanted()
        && let Some(taken) = takers.join_next().await
    {
        let Ok(taken) = taken else { continue };
        experts += taken.experts;
        bytes += taken.bytes;
    }
    if 0 < experts {
        let (gigabytes, seconds) = (bytes as f64 / 1e9, start.elapsed().as_secs_f64());
        tracing::info!(
            "{experts} of {} experts from peers: {gigabytes:.2} GB in {seconds:.2} s, {:.2} GB/s",
            missing.len(),
            gigabytes / seconds.max(1e-9)
        );
    }
}

fn client(address: &str) -> Option<ExpertsClient<Channel>> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).ok()?;
    let channel = endpoint.connect_timeout(ASK_MAX).tcp_nodelay(true).connect_lazy();
    Some(ExpertsClient::new(channel).max_decoding_message_size(proto::MESSAGE_BYTES_MAX))
}

/// What a peer has; `None` if it does not say.
async fn ask(address: &str, wanted: &Wanted) -> Option<Holder> {
    let mut client = client(address)?;
    let request = pb::HeldRequest { model: wanted.model.clone(), profile: wanted.profile.clone() };
    match timeout(ASK_MAX, client.held(request)).await {
        Ok(Ok(answer)) => {
            let pb::HeldResponse { layers, port } = answer.into_inner();
            Some(Holder { addresses: senders(address, port), held: keys(layers).collect() })
        }
        Ok(Err(status)) => {
            tracing::debug!(address, %status, "a peer does not say what it holds");
            None
        }
        Err(_) => None,
    }
}

/// Each expert to the holder that has least to send so far.
fn share_out<'a>(
    missing: &[Key],
    holders: impl Iterator<Item = &'a BTreeSet<Key>> + Clone,
) -> Vec<Vec<Key>> {
    let mut shares: Vec<Vec<Key>> = holders.clone().map(|_| Vec::new()).collect();
    for key in missing {
        let of_key = holders.clone().enumerate().filter(|(_, held)| held.contains(key));
        if let Some((holder, _)) = of_key.min_by_key(|(holder, _)| shares[*holder].len()) {
            shares[holder].push(*key);
        }
    }
    shares
}

#[derive(Default)]
struct Taken {
    experts: usize,
    bytes: usize,
}

/// Takes a share from one peer, as far as it comes.
async fn take_from(
    model: &Arc<Model>,
    addresses: &[String],
    wanted: &Wanted,
    share: Vec<Key>,
) -> Taken {
    let request = pb::SendRequest {
        model: wanted.model.clone(),
        profile: wanted.profile.clone(),
        layers: by_layer(wanted.layers, &share),
    };
    let Some(mut pieces) = begin(addresses, request).await else { return Taken::default() };
    // Putting them in place waits, for a GPU for instance. It ends when no more pieces come.
    let (piece, arrived) = mpsc::channel(PIECES_MAX);
    let (tell, putting) = oneshot::channel();
    let to = Arc::clone(model);
    let body = move || {
        // Nobody wants to know if the view is wanted no more.
        let _given_up = tell.send(put(&to, Coming::new(share), arrived));
    };
    if let Err(error) = beside_steps("experts-in", body) {
        tracing::warn!(%error, "no thread takes a peer's experts; they come from disk");
        return Taken::default();
    }
    loop {
        let next = match timeout(PIECE_MAX, pieces.message()).await {
            Ok(Ok(Some(next))) => next,
            Ok(Ok(None)) => break,
            Ok(Err(status)) => {
                tracing::debug!(%status, "a peer stopped sending experts");
                break;
            }
            Err(_) => {
                tracing::warn!("a peer sends no more experts; the rest comes from disk");
                break;
            }
        };
        if piece.send(next).await.is_err() {
            break;
        }
    }
    drop(piece);
    putting.await.unwrap_or_default()
}

/// Has experts sent from the first of these addresses that sends any.
async fn begin(
    addresses: &[String],
    request: pb::SendRequest,
) -> Option<Streaming<pb::ExpertPiece>> {
    for address in addresses {
        let Some(mut client) = client(address) else { continue };
        match timeout(PIECE_MAX, client.send(request.clone())).await {
            Ok(Ok(answer)) => return Some(answer.into_inner()),
            Ok(Err(status)) => tracing::debug!(address, %status, "no experts are sent from there"),
            Err(_) => tracing::debug!(address, "no experts are sent from there"),
        }
    }
    None
}

/// Puts pieces in place as they come.
fn put(model: &Model, mut coming: Coming, mut pieces: mpsc::Receiver<pb::ExpertPiece>) -> Taken {
    let mut taken = Taken::default();
    while let Some(piece) = pieces.blocking_recv() {
        taken.bytes += piece.bytes.len();
        match coming.put(&piece, |layer| model.blank_expert(layer)) {
            Ok(None) => {}
            Ok(Some((key, expert))) => {
                model.keep(key, expert);
                taken.experts += 1;
            }
            Err(error) => {
                tracing::warn!(%error, "a peer's experts are refused; the rest comes from disk");
                break;
            }
        }
    }
    taken
}

/// Why a piece cannot be used.
#[derive(Debug, thiserror::Error)]
enum PieceError {
    #[error("expert {1} of MoE layer {0} was not asked for, or not now")]
    Unasked(u32, u32),
    #[error("a piece at {at} of part {part} does not follow what came before")]
    OutOfOrder { part: u32, at: u64 },
    #[error("a piece changed on its way")]
    Checksum,
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// The experts of a share, which come one after the other.
struct Coming {
    share: VecDeque<Key>,
    /// The one that is coming, and how far.
    current: Option<Partial>,
}

struct Partial {
    expert: Blank,
    part: usize,
    at: usize,
}

impl Coming {
    fn new(share: Vec<Key>) -> Self {
        Self { share: share.into(), current: None }
    }

    /// Takes a piece in; an expert, once it is complete.
    fn put(
        &mut self,
        piece: &pb::ExpertPiece,
        blank: impl FnOnce(usize) -> Result<Blank, ModelError>,
    ) -> Result<Option<(Key, Held)>, PieceError> {
        let key = (piece.moe_layer as usize, piece.expert as usize);
        if self.share.front() != Some(&key) {
            return Err(PieceError::Unasked(piece.moe_layer, piece.expert));
        }
        if crc_fast::crc32_iscsi(&piece.bytes) != piece.crc32c {
            return Err(PieceError::Checksum);
        }
        let mut current = match self.current.take() {
            Some(current) => current,
            None => Partial { expert: blank(key.0)?, part: 0, at: 0 },
        };
        let out_of_order = || PieceError::OutOfOrder { part: piece.part, at: piece.at };
        let parts = current.expert.part_bytes();
        if (piece.part as usize, piece.at) != (current.part, current.at as u64)
            || piece.bytes.is_empty()
        {
            return Err(out_of_order());
        }
        let end = current.at + piece.bytes.len();
        if parts[current.part] < end {
            return Err(out_of_order());
        }
        current.expert.put(current.part, current.at, &piece.bytes).map_err(ModelError::from)?;
        current.at = end;
        // Scales that there are not have no bytes.
        while current.part < parts.len() && current.at == parts[current.part] {
            (current.part, current.at) = (current.part + 1, 0);
        }
        if current.part < parts.len() {
            self.current = Some(current);
            return Ok(None);
        }
        self.share.pop_front();
        Ok(Some((key, current.expert.complete())))
    }
}

type Piece = Result<pb::ExpertPiece, Status>;

/// Passes pieces on, until one side has enough.
async fn pass(mut from: mpsc::Receiver<Piece>, to: mpsc::Sender<Piece>) {
    while let Some(piece) = from.recv().await {
        if to.send(piece).await.is_err() {
            return;
        }
    }
}

/// Sends experts, as far as this process has them, until the peer has enough.
fn send(model: &Model, layers: Vec<pb::ExpertIds>, to: &mpsc::Sender<Piece>) {
    for key in keys(layers) {
        let Some(expert) = model.expert(key) else { return };
        for piece in pieces(key, &expert) {
            let piece = piece.map_err(|error| Status::unavailable(error.to_string()));
            if to.blocking_send(piece).is_err() {
                return;
            }
        }
    }
}

fn pieces(
    (layer, expert): Key,
    held: &Held,
) -> impl Iterator<Item = Result<pb::ExpertPiece, DeviceError>> {
    let number = |n: usize| u32::try_from(n).expect("layers and experts are few");
    held.part_bytes().into_iter().enumerate().flat_map(move |(part, all)| {
        (0..all).step_by(PIECE_BYTES).map(move |at| {
            let mut bytes = vec![0; PIECE_BYTES.min(all - at)];
            held.read(part, at, &mut bytes)?;
            Ok(pb::ExpertPiece {
                moe_layer: number(layer),
                expert: number(expert),
                part: number(part),
                at: at as u64,
                crc32c: crc_fast::crc32_iscsi(&bytes),
                bytes: bytes.into(),
            })
        })
    })
}

/// The wire form of a set of experts.
fn by_layer(layers: usize, keys: &[Key]) -> Vec<pb::ExpertIds> {
    let mut of: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
    for &(layer, expert) in keys {
        of.entry(layer).or_default().push(u32::try_from(expert).expect("experts are few"));
    }
    (0..layers).map(|l| pb::ExpertIds { experts: of.remove(&l).unwrap_or_default() }).collect()
}

fn keys(layers: Vec<pb::ExpertIds>) -> impl Iterator<Item = Key> {
    let of_layer = |(layer, ids): (usize, pb::ExpertIds)| {
        ids.experts.into_iter().map(move |expert| (layer, expert as usize))
    };
    layers.into_iter().enumerate().flat_map(of_layer)
}

#[cfg(test)]
mod tests;
