//! The gRPC face of the faults that a worker inflicts on itself.

use crate::chaos::{Chaos, Fault, From, Kind, Phase};
use crate::runner::Runner;
use pb::chaos_server::ChaosServer;
use pb::inject_request as wire;
use proto::pb;
use std::time::{Duration, Instant};
use tonic::{Request, Response, Status};

/// Longest pause and longest time of a lasting fault.
const LAST_MAX: Duration = Duration::from_secs(3600);

/// Implements `herd.v1.Chaos`.
pub(crate) struct Service {
    chaos: Chaos,
    runner: Runner,
}

pub(crate) fn server(chaos: Chaos, runner: Runner) -> ChaosServer<Service> {
    ChaosServer::new(Service { chaos, runner })
}

#[tonic::async_trait]
impl pb::chaos_server::Chaos for Service {
    async fn inject(
        &self,
        request: Request<pb::InjectRequest>,
    ) -> Result<Response<pb::InjectResponse>, Status> {
        match self.chaos {
            Chaos::Refused => {
                let text = "this worker takes no faults; start it with --allow-chaos";
                return Err(Status::permission_denied(text));
            }
            Chaos::Allowed => {}
        }
        let fault = fault(request.get_ref(), Instant::now())?;
        if fault.kind == Kind::Corrupt && !self.runner.sums() {
            let text =
                "rows go through memory without checksums; start the workers with --exchange tcp";
            return Err(Status::failed_precondition(text));
        }
        if !self.runner.hooks().arm(fault) {
            return Err(Status::resource_exhausted("too many faults are armed"));
        }
        tracing::warn!(?fault, "a fault is armed");
        Ok(Response::new(pb::InjectResponse {}))
    }
}

fn fault(request: &pb::InjectRequest, now: Instant) -> Result<Fault, Status> {
    let pb::InjectRequest { ms, for_ms, from, layer, .. } = *request;
    let invalid = |text: &str| Err(Status::invalid_argument(text));
    let (time, lasts) = (Duration::from_millis(ms.into()), Duration::from_millis(for_ms.into()));
    if LAST_MAX < time.max(lasts) {
        return invalid("no fault lasts longer than an hour");
    }
    let kind = match request.kind() {
        wire::Kind::Unspecified => return invalid("the fault lacks its kind"),
        wire::Kind::Pause | wire::Kind::Slow if time.is_zero() => {
            return invalid("ms is 0; say how long the worker shall stand still");
        }
        wire::Kind::Slow if lasts.is_zero() => {
            return invalid("for_ms is 0; say how long the worker shall be slow");
        }
        wire::Kind::Kill => Kind::Kill,
        wire::Kind::Pause => Kind::Pause(time),
        wire::Kind::Slow => Kind::Slow { by: time, until: now + lasts },
        wire::Kind::Corrupt => Kind::Corrupt,
        wire::Kind::Nan => Kind::Nan { until: (!lasts.is_zero()).then(|| now + lasts) },
    };
    let phase = match request.phase() {
        wire::Phase::Any => None,
        wire::Phase::Dispatch => Some(Phase::Dispatch),
        wire::Phase::Experts => Some(Phase::Experts),
        wire::Phase::Combine => Some(Phase::Combine),
    };
    match (kind, phase) {
        (Kind::Corrupt, Some(Phase::Experts)) => {
            return invalid("no frame is sent while experts run; give dispatch or combine");
        }
        (Kind::Nan { .. }, Some(Phase::Dispatch | Phase::Experts)) => {
            return invalid("results exist in the phase combine");
        }
        // Without a layer, once per step and not at each of its places.
        (Kind::Slow { .. }, None) => return invalid("slow needs a layer and a phase"),
        (Kind::Slow { .. }, Some(_)) if layer.is_none() => {
            return invalid("slow needs a layer and a phase");
        }
        (Kind::Kill | Kind::Pause(_) | Kind::Slow { .. } | Kind::Corrupt | Kind::Nan { .. }, _) => {
        }
    }
    let layer = layer.map(u16::try_from).transpose();
    let layer = layer.map_err(|_| Status::invalid_argument("layers are numbered in 16 bits"))?;
    let from = match from {
        None => From::Offset(0),
        Some(wire::From::StepOffset(steps)) => From::Offset(steps),
        Some(wire::From::Step(step)) => From::Step(step),
    };
    Ok(Fault { kind, from, layer, phase })
}
