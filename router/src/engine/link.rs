//! The step streams to all workers of one view. They carry a step to every rank and collect what
//! every rank answers; they decide only whether an answer belongs to the step.

use super::suspicion::{BEAT, Signs, Silence, Suspicion};
use super::watch::{Peer, Target};
use futures::future;
use ids::{Epoch, Rank, SeqId, StepId};
use proto::pb;
use scheduler::{Held, Plan};
use std::{collections::BTreeSet, time::Duration};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Endpoint};

/// Longest wait for a worker to accept its step stream.
const OPEN_MAX: Duration = Duration::from_secs(2);
/// The router waits this much longer than the workers, who know better what went wrong.
const GRACE: Duration = Duration::from_millis(500);
/// Longest that the echo of a fault waits for the fault: answers of a step come within a few milliseconds.
const ECHO_MAX: Duration = Duration::from_millis(50);
/// Beats between two reports of a silence that lasts.
const TELL_AGAIN: u32 = 10;
/// Steps a worker may leave unread. More than one only after failed steps.
const UNREAD_STEPS_MAX: usize = 4;

/// Why a step did not complete.
#[derive(Debug, thiserror::Error)]
pub(super) enum StepFailure {
    #[error("rank {rank} reports: {text}; it suspects {suspects:?}")]
    Fault {
        rank: usize,
        text: String,
        suspects: Vec<u32>,
        not_finite: Option<SeqId>,
        missing: Vec<SeqId>,
    },
    #[error("the stream to rank {rank} broke: {text}")]
    Broken { rank: usize, text: String },
    #[error("no sign of life from ranks {:?} for {:?}", silence.ranks, silence.lasted)]
    Silent { silence: Silence },
    #[error("rank {rank} does not hear ranks {unheard:?}")]
    Unheard { rank: usize, unheard: Vec<u32> },
    #[error("no answer of all ranks within {limit:?}")]
    Deadline { limit: Duration },
    #[error("rank {rank} did not sample {sequence}")]
    Incomplete { rank: usize, sequence: SeqId },
    #[error("rank {rank} refuses: another router leads since term {term}")]
    Outranked { rank: usize, term: u64 },
    #[error("this router does not lead any more")]
    Deposed,
    #[error("{epoch} goes on without a rank of this step")]
    Superseded { epoch: Epoch },
}

/// What to do about a failed step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Remedy {
    /// The streams stand: plan the step again, unless a newer view arrives.
    Retry,
    /// Open the streams again, to this view or the next.
    Reopen,
    /// Nothing is broken: another epoch or another leadership goes on.
    Yield,
}

impl StepFailure {
    /// Ranks that may be to blame.
    pub(super) fn suspects(&self) -> Vec<u32> {
        match self {
            Self::Fault { suspects, .. } => suspects.clone(),
            Self::Unheard { unheard, .. } => unheard.clone(),
            Self::Broken { rank, .. } => u32::try_from(*rank).into_iter().collect(),
            Self::Silent { silence } => silence.ranks.iter().map(|&rank| number(rank)).collect(),
            Self::Deadline { .. }
            | Self::Incomplete { .. }
            | Self::Outranked { .. }
            | Self::Deposed
            | Self::Superseded { .. } => Vec::new(),
        }
    }

    /// The sequence that made it fail by a value that is not finite.
    pub(super) fn not_finite(&self) -> Option<SeqId> {
        match self {
            Self::Fault { not_finite, .. } => *not_finite,
            Self::Broken { .. }
            | Self::Silent { .. }
            | Self::Unheard { .. }
            | Self::Deadline { .. }
            | Self::Incomplete { .. }
            | Self::Outranked { .. }
            | Self::Deposed
            | Self::Superseded { .. } => None,
        }
    }

    /// A rank, and sequences that can not go on from copies there: it does not have them, or what came of one is not
    /// finite.
    pub(super) fn unrestorable(&self) -> Option<(Rank, Vec<SeqId>)> {
        let Self::Fault { rank, missing, not_finite, .. } = self else { return None };
        let sequences = missing.iter().chain(not_finite).copied().collect();
        Some((Rank(u16::try_from(*rank).ok()?), sequences))
    }

    /// Ranks that give no sign of life, and for how long.
    pub(super) fn silence(&self) -> Option<&Silence> {
        match self {
            Self::Silent { silence } => Some(silence),
            Self::Fault { .. }
            | Self::Broken { .. }
            | Self::Unheard { .. }
            | Self::Deadline { .. }
            | Self::Incomplete { .. }
            | Self::Outranked { .. }
            | Self::Deposed
            | Self::Superseded { .. } => None,
        }
    }

    pub(super) fn remedy(&self) -> Remedy {
        match self {
            Self::Fault { .. }
            | Self::Silent { .. }
            | Self::Unheard { .. }
            | Self::Deadline { .. }
            | Self::Incomplete { .. } => Remedy::Retry,
            Self::Broken { .. } => Remedy::Reopen,
            Self::Outranked { .. } | Self::Deposed | Self::Superseded { .. } => Remedy::Yield,
        }
    }
}

/// Standing streams to every rank of one epoch.
#[derive(Debug)]
pub(super) struct Links {
    epoch: Epoch,
    links: Vec<Link>,
}

#[derive(Debug)]
struct Link {
    rank: usize,
    steps: mpsc::Sender<pb::Step>,
    results: Streaming<pb::StepResult>,
}

impl Links {
    /// Opens the streams to all workers of a view, or none.
    pub(super) async fn open(target: &Target) -> Result<Self, StepFailure> {
        let peers = target.peers.iter().enumerate();
        let opening = peers.map(|(rank, peer)| async move {
            let broken = |text: String| StepFailure::Broken { rank, text };
            match tokio::time::timeout(OPEN_MAX, open(rank, peer)).await {
                Ok(Ok(link)) => Ok(link),
                Ok(Err(error)) => Err(broken(error.to_string())),
                Err(_elapsed) => {
                    let silence = Silence { ranks: vec![rank], lasted: OPEN_MAX };
                    Err(StepFailure::Silent { silence })
                }
            }
        });
        Ok(Self { epoch: target.epoch, links: future::try_join_all(opening).await? })
    }

    /// Runs one step on all ranks, under a router's journal and term. `sample` says how to sample a sequence. Silent ranks
    /// are told of, but the step goes on: only a newer view proves that they are gone.
    pub(super) async fn step(
        &mut self,
        (plan, journal, term): (&Plan, u64, u64),
        deadline: Duration,
        (suspicion, tell): (&mut Suspicion, impl Fn(StepFailure)),
        sample: impl Fn(SeqId) -> pb::Sample,
    ) -> Result<Stepped, StepFailure> {
        for ((link, slices), released) in self.links.iter().zip(&plan.ranks).zip(&plan.released) {
            let to_wire = |slice| {
                let slice: &scheduler::Slice = slice;
                proto::slice_to_wire(slice, slice.samples.then(|| sample(slice.sequence)))
            };
            let step = pb::Step {
                epoch: self.epoch.0,
                step: plan.step.0,
                deadline_ms: u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX),
                slices: slices.iter().map(to_wire).collect(),
                router_term: term,
                journal,
                released: released.iter().map(|id| id.0).collect(),
            };
            link.steps.try_send(step).map_err(|error| StepFailure::Broken {
                rank: link.rank,
                text: format!("cannot send the step: {error}"),
            })?;
        }
        let (epoch, limit) = (self.epoch, deadline + GRACE);
        let signs = Signs::new(self.links.len());
        let links = self.links.iter_mut();
        let results =
            future::try_join_all(links.map(|link| link.result((epoch, plan.step), &signs)));
        tokio::select! {
            // What has come counts before the silence does.
            biased;
            results = results => sampled(plan, results?),
            never = watch(suspicion, &signs, tell) => match never {},
            () = tokio::time::sleep(limit) => Err(StepFailure::Deadline { limit }),
        }
    }
}

async fn open(rank: usize, peer: &Peer) -> Result<Link, Box<dyn std::error::Error + Send + Sync>> {
    let endpoint = Endpoint::from_shared(format!("http://{}", peer.address))?
        .connect_timeout(OPEN_MAX)
        .tcp_nodelay(true);
    let mut client = pb::worker_client::WorkerClient::new(endpoint.connect().await?)
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(proto::MESSAGE_BYTES_MAX);
    let (steps, receiver) = mpsc::channel(UNREAD_STEPS_MAX);
    let results = client.steps(ReceiverStream::new(receiver)).await?.into_inner();
    Ok(Link { rank, steps, results })
}

/// Tells of ranks that are silent and should not be, or do not hear each other, and again while that lasts.
async fn watch(
    suspicion: &mut Suspicion,
    signs: &Signs,
    tell: impl Fn(StepFailure),
) -> std::convert::Infallible {
    let mut ticks = tokio::time::interval(BEAT);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first one fires at once.
    ticks.tick().await;
    let mut told = 0;
    loop {
        ticks.tick().await;
        let silence = suspicion.tick(signs).map(|silence| StepFailure::Silent { silence });
        let unheard = || {
            let (rank, unheard) = signs.unheard()?;
            Some(StepFailure::Unheard { rank, unheard })
        };
        if 0 < told {
            told -= 1;
        } else if let Some(news) = silence.or_else(unheard) {
            tell(news);
            told = TELL_AGAIN;
        }
    }
}

pub(super) fn number(rank: usize) -> u32 {
    u32::try_from(rank).expect("ranks are numbered in 16 bits")
}

impl Link {
    /// The answer to `step`. Answers to earlier steps, which failed elsewhere, are dropped.
    async fn result(
        &mut self,
        (epoch, step): (Epoch, StepId),
        signs: &Signs,
    ) -> Result<pb::StepResult, StepFailure> {
        let rank = self.rank;
        let broken = |text| StepFailure::Broken { rank, text };
        loop {
            let result = self.results.message().await.map_err(|s| broken(s.to_string()))?;
            let result = result.ok_or_else(|| broken("the worker ended it".into()))?;
            // Beats of a worker that the step does not reach are those of one that does not answer.
            if step.0 <= result.step {
                signs.heard(rank);
            }
            if (result.epoch, result.step) != (epoch.0, step.0) {
                // A beat has no epoch.
                if result.step == step.0 && result.epoch == 0 {
                    signs.misses(rank, result.unheard);
                }
                continue;
            }
            signs.answered(rank);
            if result.router_term != 0 {
                return Err(StepFailure::Outranked { rank, term: result.router_term });
            }
            if result.fault.is_empty() {
                return Ok(result);
            }
            if result.echo {
                // The answer of the rank where it began is on its way, and says more.
                tokio::time::sleep(ECHO_MAX).await;
            }
            let (text, suspects) = (result.fault, result.suspects);
            let not_finite = result.not_finite.map(SeqId);
            let missing = result.missing.into_iter().map(SeqId).collect();
            return Err(StepFailure::Fault { rank, text, suspects, not_finite, missing });
        }
    }
}

/// What came of a step.
#[derive(Debug, Default)]
pub(super) struct Stepped {
    pub(super) sampled: Vec<pb::Sampled>,
    /// What ranks say of copies that they keep.
    pub(super) held: Vec<(Rank, Held)>,
}

/// What all ranks have answered, after checking that no token is missing.
fn sampled(plan: &Plan, results: Vec<pb::StepResult>) -> Result<Stepped, StepFailure> {
    let mut all = Stepped::default();
    for (rank, (slices, result)) in plan.ranks.iter().zip(results).enumerate() {
        let got: BTreeSet<u64> = result.sampled.iter().map(|sampled| sampled.sequence).collect();
        let mut asked = slices.iter().filter(|slice| slice.samples);
        if let Some(missing) = asked.find(|slice| !got.contains(&slice.sequence.0)) {
            return Err(StepFailure::Incomplete { rank, sequence: missing.sequence });
        }
        all.sampled.extend(result.sampled);
        let rank = Rank(u16::try_from(rank).expect("ranks are numbered in 16 bits"));
        all.held.extend(result.held.iter().map(|held| (rank, proto::held_from_wire(held))));
    }
    Ok(all)
}
