//! The task that owns the machine: events in, calls out.

mod evidence;
mod shares;
mod wishes;

use crate::health::Healths;
use crate::meter::Meter;
use crate::{report, view_store, wanted};
use control::{Control, Hello, Input, Levelling, Output, Settings};
use evidence::Evidence;
use ids::{Epoch, Rank, WorkerId};
use placement::{Aim, View};
use proto::pb;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use store::{Guard, Revision, Store, StoreError};
use tokio::sync::{mpsc, oneshot, watch};
use tonic::transport::{Channel, Endpoint};
use view_store::Written;

/// Between attempts to read the store at the start.
const STORE_RETRY: Duration = Duration::from_millis(500);
/// Span of time whose load is one sample for the planner: long enough for thousands of tokens, short
/// beside the time in which traffic changes.
const WINDOW: Duration = Duration::from_secs(10);
/// A worker that answers no ping for this long while it prepares is gone. Preparing itself may take
/// as long as loading does.
const PING: Duration = Duration::from_millis(250);
const PING_MAX: Duration = Duration::from_millis(750);
const CONNECT_MAX: Duration = Duration::from_secs(2);

/// What the services and the shell's own calls report.
#[derive(Debug)]
pub(crate) enum Event {
    Register {
        hello: Hello,
        reply: oneshot::Sender<Result<Registration, String>>,
    },
    /// A registration stream ended.
    Gone {
        worker: WorkerId,
        connection: u64,
    },
    Input(Input),
    /// An operator wants a worker to leave; answered when it has, or cannot.
    Drain {
        worker: WorkerId,
        reply: oneshot::Sender<Result<(), Stays>>,
    },
    /// What a worker's experts had to do, `[moe layers][experts]`.
    Load {
        worker: WorkerId,
        layers: Vec<Vec<u64>>,
    },
    /// How a worker's GPU is.
    Gpu(pb::GpuHealth),
    /// An operator wants the load level; answered when it is, or will not be.
    Rebalance {
        reply: oneshot::Sender<Levelling>,
    },
    /// An operator wants so many workers; answered when those beyond have left.
    Scale {
        workers: u16,
        reply: oneshot::Sender<Result<Scaled, String>>,
    },
    /// The store has answered since a member was doubted.
    Evidence(Evidence),
    Written {
        epoch: Epoch,
        result: Result<Written, StoreError>,
    },
    Status {
        reply: oneshot::Sender<serde_json::Value>,
    },
}

/// A member's standing stream.
#[derive(Debug)]
pub(crate) struct Registration {
    pub(crate) worker: WorkerId,
    pub(crate) connection: u64,
    /// Fires when the membership ends.
    pub(crate) dismissed: oneshot::Receiver<Dismissal>,
}

/// What became of an operator's wish for a number of workers.
#[derive(Debug)]
pub(crate) struct Scaled {
    pub(crate) left: Vec<WorkerId>,
    /// Workers that somebody must start.
    pub(crate) missing: u16,
}

/// Why a worker that should leave has not been drained.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum Stays {
    #[error("it was lost before it was drained")]
    Lost,
    #[error("{0}")]
    Refused(String),
}

/// Why a membership ends.
#[derive(Debug)]
pub(crate) enum Dismissal {
    /// As an operator wished: the worker shall end.
    Drained,
    /// The worker may register again.
    Failed(String),
}

struct Peer {
    connection: u64,
    dismiss: oneshot::Sender<Dismissal>,
    channel: Option<Channel>,
}

/// What a leader works with.
pub(crate) struct Context {
    pub(crate) store: Arc<dyn Store>,
    /// Its fence.
    pub(crate) guard: Guard,
    pub(crate) store_urls: Vec<String>,
    pub(crate) url: String,
}

/// What an operator is told.
enum Answer {
    Scaled { leaving: Vec<(WorkerId, Left)>, missing: u16 },
    ScaleRefused(String),
    Levelling(Levelling),
}

/// Fires when a worker has left, or cannot.
type Left = oneshot::Receiver<Result<(), Stays>>;

pub(crate) struct Shell {
    /// Weak: the shell ends when nobody else can send any more.
    events: mpsc::WeakSender<Event>,
    inbox: mpsc::Receiver<Event>,
    publish: watch::Sender<Option<Arc<pb::View>>>,
    context: Context,
    revision: Option<Revision>,
    /// A write was fenced: somebody else leads.
    is_fenced: bool,
    started: Instant,
    peers: BTreeMap<WorkerId, Peer>,
    connections: u64,
    /// Who waits for a worker to leave.
    draining: BTreeMap<WorkerId, Vec<oneshot::Sender<Result<(), Stays>>>>,
    /// Who waits for a levelled view, with its epoch.
    levelling: Vec<(Epoch, Levelling, oneshot::Sender<Levelling>)>,
    meter: Meter,
    healths: Healths,
    /// The machine's answer to the operator whose wish it has just taken in.
    answer: Option<Answer>,
    /// The registration that waits for the machine's answer.
    registering: Option<Result<WorkerId, String>>,
}

impl Shell {
    pub(crate) fn new(
        events: mpsc::WeakSender<Event>,
        inbox: mpsc::Receiver<Event>,
        publish: watch::Sender<Option<Arc<pb::View>>>,
        context: Context,
    ) -> Self {
        Self {
            events,
            inbox,
            publish,
            context,
            revision: None,
            is_fenced: false,
            started: Instant::now(),
            peers: BTreeMap::new(),
            draining: BTreeMap::new(),
            levelling: Vec::new(),
            meter: Meter::default(),
            healths: Healths::default(),
            answer: None,
            connections: 0,
            registering: None,
        }
    }

    pub(crate) async fn run(mut self, settings: Settings) {
        let (stands, wanted) = self.read_store().await;
        let mut control = Control::new(settings, self.started.elapsed(), stands);
        if let Some(workers) = wanted {
            control.want(workers);
        }
        let mut windows = tokio::time::interval(WINDOW);
        windows.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut moments = tokio::time::interval(shares::MOMENT);
        moments.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !self.is_fenced {
            let deadline = control.deadline().map(|at| self.started + at);
            let tick = async {
                match deadline {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                event = self.inbox.recv() => match event {
                    Some(event) => self.event(&mut control, event),
                    None => return,
                },
                () = tick => self.feed(&mut control, Input::Tick),
                _ = windows.tick() => self.close_window(&mut control),
                _ = moments.tick() => self.close_moment(&mut control),
            }
        }
    }

    /// The view that stands, and how many workers are wanted.
    async fn read_store(&mut self) -> (Option<View>, Option<u16>) {
        let store = Arc::clone(&self.context.store);
        loop {
            let read = async {
                Ok::<_, StoreError>((
                    view_store::read(&*store).await?,
                    wanted::read(&*store).await?,
                ))
            };
            match read.await {
                Ok(((view, revision), wanted)) => {
                    self.revision = revision;
                    return (view, wanted);
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot read the view; will retry");
                    tokio::time::sleep(STORE_RETRY).await;
                }
            }
        }
    }

    fn event(&mut self, control: &mut Control, event: Event) {
        match event {
            Event::Input(input) => {
                if matches!(input, Input::Fault { .. }) {
                    self.weigh(Evidence::Fault(input));
                } else {
                    self.feed(control, input);
                }
            }
            Event::Evidence(Evidence::Fault(input)) => self.feed(control, input),
            Event::Drain { worker, reply } => {
                self.draining.entry(worker).or_default().push(reply);
                let before = control.wanted();
                self.feed(control, Input::Drain { worker });
                if let Some(workers) = control.wanted().filter(|_| control.wanted() != before) {
                    self.remember(workers);
                }
            }
            Event::Load { worker, layers } => {
                let Some(shape) = control.shape() else { return };
                if let Err(text) = self.meter.add(worker, layers, shape) {
                    tracing::warn!(text, "a load report is dropped");
                }
            }
            Event::Gpu(health) => self.healths.add(self.started.elapsed(), health),
            Event::Rebalance { reply } => self.rebalance(control, reply),
            Event::Scale { workers, reply } => self.scale(control, workers, reply),
            Event::Register { hello, reply } => self.register(control, hello, reply),
            Event::Gone { worker, connection } => {
                self.weigh(Evidence::Ended { worker, connection });
            }
            Event::Evidence(Evidence::Ended { worker, connection }) => {
                // A worker that has registered again meanwhile is not gone.
                if self.peers.get(&worker).is_some_and(|peer| peer.connection == connection) {
                    self.peers.remove(&worker);
                    self.drained(worker, &Err(Stays::Lost));
                    let evidence = "its registration stream ended".into();
                    self.feed(control, Input::Lost { worker, evidence });
                }
            }
            Event::Written { epoch, result } => {
                let input = self.written(epoch, result);
                self.feed(control, input);
            }
            Event::Status { reply } => {
                // Whoever asked may have left.
                let Context { url, store_urls, .. } = &self.context;
                let gpu = |worker| self.healths.of(worker, self.started.elapsed()).cloned();
                let measured = report::Told { load: self.meter.last(), gpu: &gpu };
                let _left =
                    reply.send(report::json(&control.status(), measured, (url, store_urls)));
            }
        }
    }

    /// Hands what was counted to the machine.
    fn close_window(&mut self, control: &mut Control) {
        let members: Vec<WorkerId> = control.status().members.iter().map(|m| m.worker).collect();
        if let Some(window) = self.meter.close(&members) {
            self.feed(control, Input::Load { window });
        }
    }

    fn register(
        &mut self,
        control: &mut Control,
        hello: Hello,
        reply: oneshot::Sender<Result<Registration, String>>,
    ) {
        let address = hello.address.clone();
        self.feed(control, Input::Hello(hello));
        let answer = self.registering.take().expect("the machine answers every hello");
        let answer = answer.map(|worker| {
            tracing::info!(%worker, address, "registered");
            let (connection, dismissed) = self.connect(worker, &address);
            Registration { worker, connection, dismissed }
        });
        if let Err(reason) = &answer {
            tracing::warn!(address, reason, "registration refused");
        }
        if let Err(Ok(lost)) = reply.send(answer) {
            // The caller left before it got its id.
            self.peers.remove(&lost.worker);
            let evidence = "it left while it registered".into();
            self.feed(control, Input::Lost { worker: lost.worker, evidence });
        }
    }

    /// Replaces the stream of a worker; `prepare` may have made its peer already.
    fn connect(&mut self, worker: WorkerId, address: &str) -> (u64, oneshot::Receiver<Dismissal>) {
        self.connections += 1;
        let (dismiss, dismissed) = oneshot::channel();
        let channel = channel(address);
        self.peers.insert(worker, Peer { connection: self.connections, dismiss, channel });
        (self.connections, dismissed)
    }

    fn written(&mut self, epoch: Epoch, result: Result<Written, StoreError>) -> Input {
        match result {
            Ok(Written::Stands(revision)) => {
                self.revision = Some(revision);
                Input::Stored { epoch }
            }
            Ok(Written::Foreign { epoch, revision }) => {
                self.revision = revision;
                Input::Superseded { found: Epoch(epoch) }
            }
            Ok(Written::Fenced) => {
                self.is_fenced = true;
                Input::StoreFailed { epoch, text: "another coordinator leads".into() }
            }
            Err(error) => {
                tracing::warn!(%epoch, %error, "cannot store the view; will retry");
                Input::StoreFailed { epoch, text: error.to_string() }
            }
        }
    }

    fn feed(&mut self, control: &mut Control, input: Input) {
        let before = Instant::now();
        let outputs = control.step(self.started.elapsed(), input);
        if outputs.iter().any(|output| matches!(output, Output::Prepare { .. })) {
            control.note_plan(before.elapsed());
            if let Some(change) = control.status().changes.last() {
                tracing::info!(epoch = %change.epoch, cause = %change.cause, "view change");
            }
        }
        for output in outputs {
            self.act(output);
        }
    }

    fn act(&mut self, output: Output) {
        match output {
            Output::Welcome { worker, .. } => self.registering = Some(Ok(worker)),
            Output::Refuse { reason, .. } => self.registering = Some(Err(reason)),
            Output::DrainRefused { worker, reason } => {
                tracing::warn!(%worker, reason, "drain refused");
                self.drained(worker, &Err(Stays::Refused(reason)));
            }
            Output::Scaled { leaving, missing } => {
                let waiting = |worker: WorkerId| {
                    let (reply, left) = oneshot::channel();
                    self.draining.entry(worker).or_default().push(reply);
                    (worker, left)
                };
                let leaving = leaving.into_iter().map(waiting).collect();
                self.answer = Some(Answer::Scaled { leaving, missing });
            }
            Output::ScaleRefused { reason } => self.answer = Some(Answer::ScaleRefused(reason)),
            Output::Rebalanced(levelling) => self.answer = Some(Answer::Levelling(levelling)),
            Output::Prepare { worker, rank, view, aim } => self.prepare((worker, rank), &view, aim),
            Output::Lacking(lack) => tracing::warn!(%lack, "cannot serve"),
            Output::GivenUp { epoch, reason } => {
                tracing::warn!(%epoch, reason, "planned view given up");
                for (.., reply) in self.levelling.extract_if(.., |(begun, ..)| *begun == epoch) {
                    // Whoever asked may have left.
                    let _left = reply.send(Levelling::Busy);
                }
            }
            Output::Store { view } => self.store(&view),
            Output::Publish { view } => {
                tracing::info!(epoch = %view.epoch, ranks = view.members.len(), "view committed");
                self.publish.send_replace(Some(Arc::new(proto::view_to_wire(&view))));
                for (_, levelling, reply) in
                    self.levelling.extract_if(.., |(epoch, ..)| *epoch <= view.epoch)
                {
                    // Whoever asked may have left.
                    let _left = reply.send(levelling);
                }
            }
            Output::Share { view, shares } => self.share(&view, &shares),
            Output::Dismiss { worker, reason } => {
                tracing::warn!(%worker, reason, "dismissed");
                let is_drained = self.drained(worker, &Ok(()));
                let dismissal =
                    if is_drained { Dismissal::Drained } else { Dismissal::Failed(reason) };
                if let Some(peer) = self.peers.remove(&worker) {
                    // Its stream may have ended by itself.
                    let _gone = peer.dismiss.send(dismissal);
                }
            }
        }
    }

    fn prepare(&self, (worker, rank): (WorkerId, Rank), view: &View, aim: Aim) {
        let Some(events) = self.events.upgrade() else { return };
        let address = &view.members[rank.index()].address;
        let known = self.peers.get(&worker).and_then(|peer| peer.channel.clone());
        let channel = known.or_else(|| channel(address));
        let request = pb::PrepareRequest {
            view: Some(proto::view_to_wire(view)),
            rank: u32::from(rank.0),
            urgent: aim == Aim::Survive,
        };
        let epoch = view.epoch;
        telemetry::spawn("coordinator.prepare", async move {
            let input = match call_prepare(channel, request).await {
                Ok(pb::PrepareResponse { from_peers, from_disk, unreached, .. }) => {
                    if 0 < from_peers + from_disk {
                        tracing::info!(%epoch, %worker, from_peers, from_disk, "experts loaded");
                    }
                    let unreached = proto::ranks_from_wire(&unreached);
                    Input::Prepared { epoch, worker, unreached }
                }
                Err(text) => Input::PrepareFailed { epoch, worker, text },
            };
            // Nobody listens: the coordinator ends.
            let _ended = events.send(Event::Input(input)).await;
        });
    }

    fn store(&self, view: &View) {
        let Some(events) = self.events.upgrade() else { return };
        let (store, guard) = (Arc::clone(&self.context.store), self.context.guard.clone());
        let revision = self.revision;
        let (epoch, wire) = (view.epoch, Arc::new(proto::view_to_wire(view)));
        telemetry::spawn("coordinator.store", async move {
            let result = view_store::write(store, guard, revision, wire).await;
            // Nobody listens: the coordinator ends.
            let _ended = events.send(Event::Written { epoch, result }).await;
        });
    }
}

/// A channel that connects when it is first used; `None` if the address is none.
fn channel(address: &str) -> Option<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).ok()?;
    let endpoint = endpoint
        .connect_timeout(CONNECT_MAX)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING)
        .keep_alive_timeout(PING_MAX);
    Some(endpoint.connect_lazy())
}

async fn call_prepare(
    channel: Option<Channel>,
    request: pb::PrepareRequest,
) -> Result<pb::PrepareResponse, String> {
    let channel = channel.ok_or("its address is not host:port")?;
    let mut client = pb::worker_client::WorkerClient::new(channel)
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(proto::MESSAGE_BYTES_MAX);
    let answer = client.prepare(request).await;
    answer
        .map(tonic::Response::into_inner)
        .map_err(|status| format!("{}: {}", status.code(), status.message()))
}
