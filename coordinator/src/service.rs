//! The gRPC face of the coordinator.

use crate::shell::{Dismissal, Event, Registration};
use crate::{Handle, Term, report};
use control::{Hello, Input, Silence};
use futures::StreamExt;
use futures::stream::BoxStream;
use ids::{Epoch, WorkerId};
use placement::Shape;
use proto::pb;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tonic::{Request, Response, Status};

/// Implements `herd.v1.Coordinator`.
pub(crate) struct Service {
    handle: Handle,
}

impl Service {
    pub(crate) fn new(handle: Handle) -> Self {
        Self { handle }
    }

    /// The term of this coordinator; an error that names the leader if it stands by.
    async fn term(&self) -> Result<Term, Status> {
        if let Some(term) = self.handle.term() {
            return Ok(term);
        }
        let leader = self.handle.leader().await;
        Err(Status::failed_precondition(format!("this coordinator stands by; {leader} leads")))
    }

    async fn send(&self, event: Event) -> Result<(), Status> {
        self.term().await?.events.send(event).await.map_err(|_| ended())
    }
}

/// For workers and routers, which try what they were told of until one leads.
fn in_the_role(refused: Status) -> Status {
    let text = format!("{}; all coordinators belong in --coordinator", refused.message());
    Status::new(refused.code(), text)
}

fn ended() -> Status {
    Status::unavailable("the coordinator does not lead any more")
}

#[tonic::async_trait]
impl pb::coordinator_server::Coordinator for Service {
    type RegisterStream = ReceiverStream<Result<pb::RegisterEvent, Status>>;
    type WatchViewStream = BoxStream<'static, Result<pb::View, Status>>;

    async fn register(
        &self,
        request: Request<pb::RegisterRequest>,
    ) -> Result<Response<Self::RegisterStream>, Status> {
        let hello = hello_from_wire(request.into_inner())?;
        let (reply, answer) = oneshot::channel();
        let events = self.term().await.map_err(in_the_role)?.events;
        events.send(Event::Register { hello, reply }).await.map_err(|_| ended())?;
        let registration =
            answer.await.map_err(|_| ended())?.map_err(Status::failed_precondition)?;
        let (sender, receiver) = mpsc::channel(1);
        let welcome = pb::RegisterEvent { worker: registration.worker.0, leave: false };
        sender.try_send(Ok(welcome)).expect("the channel is new and has room for one");
        telemetry::spawn("coordinator.member", stay(registration, sender, events.downgrade()));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn watch_view(
        &self,
        _request: Request<pb::WatchViewRequest>,
    ) -> Result<Response<Self::WatchViewStream>, Status> {
        let views = WatchStream::new(self.term().await.map_err(in_the_role)?.views);
        let news =
            views.filter_map(|view| std::future::ready(view.map(|view| Ok((*view).clone()))));
        Ok(Response::new(news.boxed()))
    }

    async fn report(
        &self,
        request: Request<pb::ReportRequest>,
    ) -> Result<Response<pb::ReportResponse>, Status> {
        let pb::ReportRequest { epoch, news } = request.into_inner();
        let epoch = Epoch(epoch);
        let input = match news {
            Some(pb::report_request::News::Fault(pb::Fault {
                text,
                suspects,
                silent,
                silent_ms,
            })) => {
                let lasted = Duration::from_millis(u64::from(silent_ms));
                let silence = Silence { ranks: proto::ranks_from_wire(&silent), lasted };
                let suspects = proto::ranks_from_wire(&suspects);
                Input::Fault { epoch, text, suspects, silence }
            }
            Some(pb::report_request::News::FirstToken(pb::FirstToken {})) => {
                Input::FirstToken { epoch }
            }
            Some(pb::report_request::News::Load(pb::ExpertLoad { worker, layers })) => {
                let layers = layers.into_iter().map(|layer| layer.rows).collect();
                self.send(Event::Load { worker: WorkerId(worker), layers }).await?;
                return Ok(Response::new(pb::ReportResponse {}));
            }
            Some(pb::report_request::News::Gpu(health)) => {
                self.send(Event::Gpu(health)).await?;
                return Ok(Response::new(pb::ReportResponse {}));
            }
            None => return Err(Status::invalid_argument("a report without news")),
        };
        self.send(Event::Input(input)).await?;
        Ok(Response::new(pb::ReportResponse {}))
    }

    async fn drain(
        &self,
        request: Request<pb::DrainRequest>,
    ) -> Result<Response<pb::DrainResponse>, Status> {
        let worker = WorkerId(request.into_inner().worker);
        let (reply, answer) = oneshot::channel();
        self.send(Event::Drain { worker, reply }).await?;
        answer
            .await
            .map_err(|_| ended())?
            .map_err(|stays| Status::failed_precondition(stays.to_string()))?;
        Ok(Response::new(pb::DrainResponse {}))
    }

    async fn rebalance(
        &self,
        _request: Request<pb::RebalanceRequest>,
    ) -> Result<Response<pb::RebalanceResponse>, Status> {
        let (reply, answer) = oneshot::channel();
        self.send(Event::Rebalance { reply }).await?;
        let levelling = answer.await.map_err(|_| ended())?;
        let json = report::levelling(levelling).to_string();
        Ok(Response::new(pb::RebalanceResponse { json }))
    }

    async fn scale(
        &self,
        request: Request<pb::ScaleRequest>,
    ) -> Result<Response<pb::ScaleResponse>, Status> {
        let workers = request.into_inner().workers;
        let workers = u16::try_from(workers).ok().filter(|&workers| 0 < workers);
        let workers =
            workers.ok_or_else(|| Status::invalid_argument("workers must be 1 to 65535"))?;
        let (reply, answer) = oneshot::channel();
        self.send(Event::Scale { workers, reply }).await?;
        let scaled = answer.await.map_err(|_| ended())?.map_err(Status::failed_precondition)?;
        let drained = scaled.left.iter().map(|worker| worker.0).collect();
        Ok(Response::new(pb::ScaleResponse { missing: u32::from(scaled.missing), drained }))
    }

    async fn status(
        &self,
        _request: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusResponse>, Status> {
        let status = match self.handle.status().await {
            Some(status) => status,
            None => self.handle.standby_status(),
        };
        Ok(Response::new(pb::StatusResponse { json: status.to_string() }))
    }
}

/// Lives as long as a worker's stream, and tells of its end.
async fn stay(
    registration: Registration,
    sender: mpsc::Sender<Result<pb::RegisterEvent, Status>>,
    events: mpsc::WeakSender<Event>,
) {
    let Registration { worker, connection, dismissed } = registration;
    tokio::select! {
        () = sender.closed() => {
            if let Some(events) = events.upgrade() {
                // Nobody listens: the term is over.
                let _ended = events.send(Event::Gone { worker, connection }).await;
            }
        }
        dismissal = dismissed => {
            let taken = "another stream or another leader has taken its place";
            let last = match dismissal.unwrap_or_else(|_| Dismissal::Failed(taken.into())) {
                Dismissal::Drained => Ok(pb::RegisterEvent { worker: worker.0, leave: true }),
                Dismissal::Failed(reason) => Err(Status::aborted(reason)),
            };
            // The worker may be gone already.
            let _gone = sender.send(last).await;
        }
    }
}

fn hello_from_wire(wire: pb::RegisterRequest) -> Result<Hello, Status> {
    let kv = wire.kv.ok_or_else(|| Status::invalid_argument("the registration lacks kv"))?;
    let size = |field: &str, value: u32| {
        usize::try_from(value).map_err(|_| Status::invalid_argument(format!("{field} is {value}")))
    };
    Ok(Hello {
        places: size("expert_places", wire.expert_places)?,
        shape: Shape {
            moe_layers: size("moe_layers", wire.moe_layers)?,
            experts: size("experts", wire.experts)?,
        },
        incarnation: wire.incarnation,
        address: wire.address,
        pid: wire.pid,
        device: wire.device,
        profile: wire.profile,
        model: wire.model,
        kv: proto::pools_from_wire(kv),
        context_tokens: wire.context_tokens,
        exchange: wire.exchange,
        epoch: Epoch(wire.epoch),
    })
}
