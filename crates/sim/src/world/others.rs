//! Events of the coordinators, the store and the router, and what they ask of the world.

use super::{
    Asked, BEAT, Call, Event, Message, PING_MAX, STORE_RETRY, Task, WATCH, World, incarnation,
    router,
};
use crate::Bug;
use crate::coordinator::{Act, Coordinator, settings};
use crate::net::{MS, Node};
use crate::router::OPEN_MAX;
use crate::store::{Mood, Written};
use crate::worker::Seat;
use control::{Input, Silence};
use ids::SeqId;
use placement::{Placement, View};
use std::sync::Arc;

impl World {
    pub(super) fn handle_call(&mut self, call: Call) {
        let now = self.now;
        match call {
            Call::Hello { process, hello } => self.lead(|leader| leader.beat(now, process, *hello)),
            Call::Gone { process } => self.gone(process),
            Call::Watch { leader } => {
                if let Some(coordinator) = self.coordinators.get_mut(&leader) {
                    coordinator.watch(now);
                    self.at(now + WATCH, Event::Control(Call::Watch { leader }));
                }
            }
            Call::Wake { leader } => {
                if let Some(coordinator) = self.coordinators.get_mut(&leader)
                    && coordinator.wake.is_some_and(|wake| wake <= now)
                {
                    coordinator.feed(now, Input::Tick);
                }
            }
            Call::Elect => self.elect(),
            Call::Prepared { asked, unreached } => {
                if self.asked.remove(&asked)
                    && let Some(coordinator) = self.coordinators.get_mut(&asked.leader)
                {
                    coordinator.prepared(now, (asked.epoch, asked.worker), unreached);
                }
            }
            Call::Disobeyed { asked } => {
                if self.asked.contains(&asked) {
                    self.prepare_failed(asked);
                }
            }
            Call::Ping { asked } => self.ping(asked),
            Call::Write { leader, expected, view } => self.write(leader, expected, &view),
            Call::Written { leader, epoch, written } => {
                if let Some(coordinator) = self.coordinators.get_mut(&leader) {
                    coordinator.written(now, epoch, written);
                    if coordinator.is_fenced {
                        self.coordinators.remove(&leader);
                    }
                }
            }
            Call::Fault { epoch, suspects } => {
                let silence = Silence::default();
                let input = Input::Fault { epoch, text: "a step".into(), suspects, silence };
                self.lead(|leader| leader.feed(now, input));
            }
            Call::FirstToken { epoch } => {
                self.lead(|leader| leader.feed(now, Input::FirstToken { epoch }));
            }
        }
    }

    pub(super) fn handle_message(&mut self, message: Message) {
        let now = self.now;
        match message {
            Message::Look => {
                let leader = self.leader.and_then(|leader| self.coordinators.get(&leader));
                if let Some(view) = leader.and_then(|leader| leader.published.clone()) {
                    let news = Event::Router(Message::News { view });
                    self.send(Node::Coordinator, Node::Router, news);
                }
                self.at(now + BEAT, Event::Router(Message::Look));
            }
            Message::News { view } => self.router.news(now, view),
            Message::Opened { session } => self.router.opened(now, session),
            Message::Refused { session } => self.router.refused(now, session),
            Message::Answered { answer } => self.router.answer(now, answer),
            Message::Timer { tag } => self.router.timer(now, tag),
            Message::Submit => self.submit(),
            Message::Cancel { sequence } => {
                self.router.cancel(sequence);
                self.laws.left(sequence);
            }
        }
    }

    fn lead(&mut self, act: impl FnOnce(&mut Coordinator)) {
        if let Some(leader) = self.leader.and_then(|leader| self.coordinators.get_mut(&leader)) {
            act(leader);
        }
    }

    /// A new leader: it campaigns, reads what stands, and goes on from there.
    fn elect(&mut self) {
        if matches!(self.store.mood, Mood::Away | Mood::Mute) {
            return self.at(self.now + STORE_RETRY, Event::Control(Call::Elect));
        }
        self.elected += 1;
        let leader = self.elected;
        self.store.leader = leader;
        let settings = settings(self.workers_expected);
        let stands = self.store.view.as_deref();
        let coordinator =
            Coordinator::new(settings, self.now, stands, self.store.revision, self.bug);
        self.coordinators.insert(leader, coordinator);
        self.leader = Some(leader);
        self.at(self.now, Event::Control(Call::Watch { leader }));
        self.rouse(leader);
    }

    /// A process has ended: its connections are reset.
    fn gone(&mut self, process: u32) {
        let now = self.now;
        for coordinator in self.coordinators.values_mut() {
            coordinator.gone(now, &incarnation(process));
        }
        self.router.broken(now, &incarnation(process));
        let asked: Vec<Asked> =
            self.asked.iter().copied().filter(|a| a.process == process).collect();
        for asked in asked {
            self.prepare_failed(asked);
        }
    }

    fn prepare_failed(&mut self, asked: Asked) {
        let now = self.now;
        self.asked.remove(&asked);
        if let Some(coordinator) = self.coordinators.get_mut(&asked.leader) {
            let Asked { epoch, worker, .. } = asked;
            coordinator.feed(now, Input::PrepareFailed { epoch, worker, text: "gone".into() });
        }
    }

    fn ping(&mut self, asked: Asked) {
        if !self.asked.contains(&asked) {
            return;
        }
        let worker = self.workers.get(&asked.process);
        let answers = worker.is_some_and(|worker| worker.frozen_until <= self.now)
            && !self.net.is_cut(self.now, Node::Coordinator, Node::Worker(asked.process));
        if answers {
            self.at(self.now + PING_MAX / 4, Event::Control(Call::Ping { asked }));
        } else {
            self.prepare_failed(asked);
        }
    }

    fn write(&mut self, leader: u32, expected: u64, view: &Arc<View>) {
        let written = if self.store.mood == Mood::Away {
            Written::Unknown
        } else {
            let (written, is_new) = self.store.write(leader, expected, view, self.bug);
            if is_new {
                self.laws.stored(view, leader, &self.store);
            }
            if self.store.mood == Mood::Mute { Written::Unknown } else { written }
        };
        let epoch = view.epoch;
        let answer = Event::Control(Call::Written { leader, epoch, written });
        self.send(Node::Store, Node::Coordinator, answer);
    }

    fn submit(&mut self) {
        let id = SeqId(self.sequences);
        self.sequences += 1;
        let request = router::Request {
            prompt: (0..self.rng.between(1, 30)).map(|_| self.token()).collect(),
            tokens_max: 1 + self.token() % 40,
            stop: self.token(),
            seed: self.rng.draw(),
        };
        self.laws.submitted(id, &request);
        self.router.submit(self.now, id, request);
        if self.rng.below(20) == 0 {
            let leaves = self.now + self.rng.between(1, 500) * MS;
            self.at(leaves, Event::Router(Message::Cancel { sequence: id }));
        }
        if self.has_faults {
            let next = self.now + self.rng.between(1, 300) * MS;
            self.at(next, Event::Router(Message::Submit));
        }
    }

    fn token(&mut self) -> u32 {
        u32::try_from(self.rng.below(50)).expect("below 50")
    }

    /// Does what the router and the coordinators ask for.
    pub(super) fn carry_out(&mut self) {
        let leaders: Vec<u32> = self.coordinators.keys().copied().collect();
        for leader in leaders {
            let coordinator = self.coordinators.get_mut(&leader).expect("it was just listed");
            let acts = std::mem::take(&mut coordinator.acts);
            for act in acts {
                self.act(leader, act);
            }
            self.rouse(leader);
        }
        for output in std::mem::take(&mut self.router.outputs) {
            self.obey(output);
        }
    }

    fn rouse(&mut self, leader: u32) {
        let wake = self.coordinators.get(&leader).and_then(|coordinator| coordinator.wake);
        if let Some(wake) = wake.filter(|&wake| self.woken.get(&leader) != Some(&wake)) {
            self.woken.insert(leader, wake);
            self.at(wake, Event::Control(Call::Wake { leader }));
        }
    }

    fn act(&mut self, leader: u32, act: Act) {
        match act {
            Act::Planned { view, aim } => {
                let serving = self.coordinators.get(&leader).and_then(|c| c.published.clone());
                self.laws.planned(&self.spoil(view), aim, serving.as_deref());
            }
            Act::Prepare { process, worker, rank, view } => {
                let asked = Asked { leader, epoch: view.epoch, worker, process };
                let seat = Seat { view: self.spoil(view), rank, is_poisoned: false };
                self.asked.insert(asked);
                self.at(self.now + PING_MAX, Event::Control(Call::Ping { asked }));
                let order = Event::Worker(process, Task::Prepare { seat, asked });
                self.send(Node::Coordinator, Node::Worker(process), order);
            }
            Act::Store { expected, view } => {
                let view = self.spoil(view);
                let slow =
                    if self.store.mood == Mood::Slow { self.rng.between(1, 800) * MS } else { 0 };
                let arrival = self.net.arrival(
                    self.now + slow,
                    Node::Coordinator,
                    Node::Store,
                    &mut self.rng,
                );
                self.at(arrival, Event::Control(Call::Write { leader, expected, view }));
            }
            Act::Publish { view } => {
                self.report.views += 1;
                let view = self.spoil(view);
                self.laws.published(&view);
                if self.leader == Some(leader) {
                    let news = Event::Router(Message::News { view });
                    self.send(Node::Coordinator, Node::Router, news);
                }
            }
            Act::Dismiss { process, why } => {
                let dismissed = Event::Worker(process, Task::Dismissed { why });
                self.send(Node::Coordinator, Node::Worker(process), dismissed);
            }
        }
    }

    /// The view as a planner with a bug would have made it.
    fn spoil(&self, view: Arc<View>) -> Arc<View> {
        if self.bug != Some(Bug::ReplicaDropped) {
            return view;
        }
        let placement = &view.placement;
        let experts = || (0..).map(ids::ExpertId).take(placement.experts());
        let replicas = |layer, expert: ids::ExpertId| {
            let all = placement.replicas(layer, expert);
            if expert.0 == 0 { all[..1].to_vec() } else { all.to_vec() }
        };
        let layer = |layer| experts().map(|expert| replicas(layer, expert)).collect();
        let layers = (0..placement.moe_layers()).map(layer).collect();
        let placement = Placement::new(placement.ranks(), layers).expect("one replica is left");
        Arc::new(View { placement, ..(*view).clone() })
    }

    fn obey(&mut self, output: router::Output) {
        match output {
            router::Output::Open { session, view } => self.open(session, &view),
            router::Output::Send { rank, order } => {
                let view = self.router.view().expect("a step needs a view");
                let process = view.members[rank.index()].pid;
                let order = Event::Worker(process, Task::Step { order });
                self.send(Node::Router, Node::Worker(process), order);
            }
            router::Output::Report { epoch, suspects } => {
                let report = Event::Control(Call::Fault { epoch, suspects });
                self.send(Node::Router, Node::Coordinator, report);
            }
            router::Output::FirstToken { epoch } => {
                let report = Event::Control(Call::FirstToken { epoch });
                self.send(Node::Router, Node::Coordinator, report);
            }
            router::Output::Wake { at, tag } => self.at(at, Event::Router(Message::Timer { tag })),
            router::Output::Committed { view, step } => self.laws.committed(&view, step),
            router::Output::Token { sequence, token } => self.laws.token(sequence, token),
            router::Output::End { sequence, stop } => self.laws.end(sequence, stop),
        }
    }

    /// Streams to all members: refused at once by the dead, late by those who cannot be reached.
    fn open(&mut self, session: u64, view: &View) {
        let processes = || view.members.iter().map(|member| member.pid);
        let is_dead = processes().any(|process| !self.workers.contains_key(&process));
        let is_deaf = processes().any(|process| {
            let frozen = self.workers.get(&process).is_some_and(|w| self.now < w.frozen_until);
            frozen || self.net.is_cut(self.now, Node::Router, Node::Worker(process))
        });
        let took = match (is_dead, is_deaf) {
            (true, _) => MS,
            (false, true) => OPEN_MAX,
            (false, false) => self.rng.between(1, 4) * MS,
        };
        let message = if is_dead || is_deaf {
            Message::Refused { session }
        } else {
            Message::Opened { session }
        };
        self.at(self.now + took, Event::Router(message));
    }

    /// What a failure says about the cluster.
    pub(super) fn state(&self) -> String {
        let leader = self.leader.and_then(|leader| self.coordinators.get(&leader));
        let status = leader.map(|leader| leader.control.status());
        let phase = status.as_ref().map(|status| status.phase);
        let epoch = status.and_then(|status| status.epoch);
        format!(
            "{} workers, leader in {phase:?} at {epoch:?}, router {:?}, waiting {:?}",
            self.workers.len(),
            self.router,
            self.laws.waiting(),
        )
    }
}
