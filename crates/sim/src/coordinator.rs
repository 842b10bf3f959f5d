//! The coordinator's shell: it feeds the real [`Control`] and carries out what that asks for.

use crate::net::{MS, Time};
use control::{Control, Hello, Input, Output, Settings};
use ids::{Epoch, ExpertId, Rank, WorkerId};
use placement::{Aim, View};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::Bug;
use crate::store::Written;

/// A worker that lets this long pass without a beat is gone.
const SILENCE_MAX: Time = 1000 * MS;

pub(crate) fn settings(workers: u16) -> Settings {
    Settings {
        workers_expected: workers,
        assemble_max: Duration::from_secs(2),
        adopt_max: Duration::from_secs(2),
        redundancy: 1,
        spare: 0,
        repair_after: Duration::from_millis(500),
        rebalance_every: None,
    }
}

/// A registered worker.
#[derive(Debug)]
struct Peer {
    worker: WorkerId,
    process: u32,
    heard: Time,
}

/// Why a membership ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dismissal {
    /// Its process can end.
    Drained,
    /// It did not prepare; it may try again.
    Unfit,
}

/// What the world has to do for a coordinator.
#[derive(Debug)]
pub(crate) enum Act {
    Prepare {
        process: u32,
        worker: WorkerId,
        rank: Rank,
        view: Arc<View>,
    },
    Store {
        expected: u64,
        view: Arc<View>,
    },
    Publish {
        view: Arc<View>,
    },
    Dismiss {
        process: u32,
        why: Dismissal,
    },
    /// The view is planned; check it.
    Planned {
        view: Arc<View>,
        aim: Aim,
    },
}

/// One leader's life.
pub(crate) struct Coordinator {
    pub(crate) control: Control,
    bug: Option<Bug>,
    /// Its clock starts here.
    started: Time,
    revision: u64,
    pub(crate) is_fenced: bool,
    peers: BTreeMap<String, Peer>,
    /// The newest view that counts.
    pub(crate) published: Option<Arc<View>>,
    /// When it asked to be woken.
    pub(crate) wake: Option<Time>,
    pub(crate) acts: Vec<Act>,
}

impl Coordinator {
    pub(crate) fn new(
        settings: Settings,
        now: Time,
        stands: Option<&View>,
        revision: u64,
        bug: Option<Bug>,
    ) -> Self {
        Self {
            control: Control::new(settings, Duration::ZERO, stands.cloned()),
            bug,
            started: now,
            revision,
            is_fenced: false,
            peers: BTreeMap::new(),
            published: None,
            wake: None,
            acts: Vec::new(),
        }
    }

    /// A worker's registration stream lives; it opens one if there is none.
    pub(crate) fn beat(&mut self, now: Time, process: u32, hello: Hello) {
        if let Some(peer) = self.peers.get_mut(&hello.incarnation) {
            peer.heard = now;
            return;
        }
        let incarnation = hello.incarnation.clone();
        for output in self.step(now, Input::Hello(hello)) {
            if let Output::Welcome { worker, .. } = output {
                let peer = Peer { worker, process, heard: now };
                self.peers.insert(incarnation.clone(), peer);
            } else {
                self.act(output);
            }
        }
    }

    /// A registration stream ended.
    pub(crate) fn gone(&mut self, now: Time, incarnation: &str) {
        if let Some(peer) = self.peers.remove(incarnation) {
            let evidence = "its registration stream ended".into();
            self.feed(now, Input::Lost { worker: peer.worker, evidence });
        }
    }

    /// Who has been silent for too long is gone.
    pub(crate) fn watch(&mut self, now: Time) {
        let silent = |peer: &Peer| peer.heard + SILENCE_MAX < now;
        let silent: Vec<String> = self
            .peers
            .iter()
            .filter(|(_, peer)| silent(peer))
            .map(|(incarnation, _)| incarnation.clone())
            .collect();
        for incarnation in silent {
            self.gone(now, &incarnation);
        }
    }

    pub(crate) fn prepared(
        &mut self,
        now: Time,
        (epoch, worker): (Epoch, WorkerId),
        unreached: Vec<Rank>,
    ) {
        if self.bug == Some(Bug::OneAnswerPreparesAll) {
            let all: Vec<WorkerId> = self.peers.values().map(|peer| peer.worker).collect();
            for worker in all {
                self.feed(now, Input::Prepared { epoch, worker, unreached: Vec::new() });
            }
        }
        self.feed(now, Input::Prepared { epoch, worker, unreached });
    }

    pub(crate) fn written(&mut self, now: Time, epoch: Epoch, written: Written) {
        let input = match written {
            Written::Stands(revision) => {
                self.revision = revision;
                Input::Stored { epoch }
            }
            Written::Foreign { found, revision } => {
                self.revision = revision;
                Input::Superseded { found: found.map_or(Epoch(0), |view| view.epoch) }
            }
            Written::Fenced => {
                self.is_fenced = true;
                return;
            }
            Written::Unknown => Input::StoreFailed { epoch, text: "no answer".into() },
        };
        self.feed(now, input);
    }

    /// The id under which a process is a member.
    pub(crate) fn worker_of(&self, process: u32) -> Option<WorkerId> {
        self.peers.values().find(|peer| peer.process == process).map(|peer| peer.worker)
    }

    pub(crate) fn feed(&mut self, now: Time, input: Input) {
        for output in self.step(now, input) {
            self.act(output);
        }
    }

    fn step(&mut self, now: Time, input: Input) -> Vec<Output> {
        let outputs = self.control.step(Duration::from_micros(now - self.started), input);
        let micros = |at: Duration| Time::try_from(at.as_micros()).unwrap_or(Time::MAX);
        self.wake = self.control.deadline().map(|at| self.started + micros(at));
        outputs
    }

    fn act(&mut self, output: Output) {
        let process = |peers: &BTreeMap<String, Peer>, id| {
            peers.values().find(|peer| peer.worker == id).map(|peer| peer.process)
        };
        match output {
            // `beat` takes the welcome; all workers of this world are alike.
            Output::Welcome { .. }
            | Output::Refuse { .. }
            | Output::DrainRefused { .. }
            | Output::Scaled { .. }
            | Output::ScaleRefused { .. }
            | Output::GivenUp { .. }
            | Output::Lacking(_)
            | Output::Rebalanced(_) => {}
            Output::Prepare { worker, rank, view, aim } => {
                if rank == Rank(0) {
                    self.acts.push(Act::Planned { view: Arc::clone(&view), aim });
                }
                if let Some(process) = process(&self.peers, worker) {
                    self.acts.push(Act::Prepare { process, worker, rank, view });
                }
            }
            Output::Store { view } => {
                self.acts.push(Act::Store { expected: self.revision, view });
            }
            // Shares change no token, so the workers of this world do without; but they must be of the view that counts. A
            // new leader may tell them of a view that it has only found in the store.
            Output::Share { view, shares } => {
                let placement = &view.placement;
                let published = self.published.as_ref();
                assert!(published.is_none_or(|published| published.epoch == view.epoch));
                for layer in 0..placement.moe_layers() {
                    for expert in (0..).map(ExpertId).take(placement.experts()) {
                        let copies = placement.replicas(layer, expert).len();
                        assert_eq!(shares.parts(layer, expert).len(), copies);
                    }
                }
            }
            Output::Publish { view } => {
                self.published = Some(Arc::clone(&view));
                self.acts.push(Act::Publish { view });
            }
            Output::Dismiss { worker, reason } => {
                let peer = self.peers.extract_if(.., |_, peer| peer.worker == worker).next();
                if let Some((_, peer)) = peer {
                    let drained = reason == "drained";
                    let why = if drained { Dismissal::Drained } else { Dismissal::Unfit };
                    self.acts.push(Act::Dismiss { process: peer.process, why });
                }
            }
        }
    }
}
