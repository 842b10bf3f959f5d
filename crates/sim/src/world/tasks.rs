//! What workers do: prepare, run steps, and meet in the exchange.

use super::{Asked, BEAT, Call, Event, Message, Task, World, incarnation};
use crate::Bug;
use crate::coordinator::Dismissal;
use crate::net::{MS, Node, Time};
use crate::router::{Answer, Done, Failed, STEP_MAX};
use crate::worker::{Outcome, Running, Seat, StepOrder, Worker};
use ids::Rank;
use placement::View;
use std::sync::Arc;

/// Longest wait of a prepared member for the others.
const REACH_MAX: Time = 500 * MS;

impl World {
    pub(super) fn handle_task(&mut self, process: u32, task: Task) {
        match task {
            Task::Beat => {
                let hello = Box::new(self.hello(process));
                let beat = Event::Control(Call::Hello { process, hello });
                self.send(Node::Worker(process), Node::Coordinator, beat);
                self.at(self.now + BEAT, Event::Worker(process, Task::Beat));
            }
            Task::Prepare { seat, asked } => self.prepare(process, seat, asked),
            Task::Loaded { seat, asked, since } => self.loaded(process, seat, asked, since),
            Task::Dismissed { why: Dismissal::Drained } => self.kill(process),
            // Its next beat registers it again.
            Task::Dismissed { why: Dismissal::Unfit } => {}
            Task::Step { order } => {
                // The router has come to this epoch: what it asked for under an earlier one is void.
                let seat = self.workers.get(&process).and_then(|worker| worker.seat.as_ref());
                if seat.is_some_and(|seat| seat.view.epoch.0 < order.epoch) {
                    self.fail_step(process, Vec::new());
                }
                self.jobs.entry(process).or_default().push_back(order);
                self.work(process);
            }
            Task::Meet { step } => self.meet(process, step),
            Task::Computed { session, step } => self.computed(process, session, step),
            Task::Late { session, step } => self.late(process, session, step),
            Task::Keep { piece } => {
                let evicted = (self.rng.below(100) == 0).then(|| self.rng.below(100));
                let worker = self.workers.get_mut(&process).expect("`handle` found it");
                worker.keep(piece, self.bug);
                evicted.into_iter().for_each(|nth| worker.evict(nth));
            }
        }
    }

    fn prepare(&mut self, process: u32, seat: Seat, asked: Asked) {
        let worker = self.workers.get_mut(&process).expect("`handle` found it");
        worker.leader = worker.leader.max(asked.leader);
        if asked.leader < worker.leader && self.bug != Some(Bug::DeposedLeaderPrepares) {
            let disobeyed = Event::Control(Call::Disobeyed { asked });
            return self.send(Node::Worker(process), Node::Coordinator, disobeyed);
        }
        worker.epoch = worker.epoch.max(seat.view.epoch.0);
        let comes = |incarnation: &String| {
            seat.view.members.iter().any(|member| member.incarnation == *incarnation)
        };
        let lacks = worker.seat.as_ref().is_some_and(|current| {
            current.view.members.iter().any(|member| !comes(&member.incarnation))
        });
        worker.forget();
        let missing = Worker::needs(&seat.view, seat.rank).difference(&worker.experts).count();
        let missing = Time::try_from(missing).expect("experts are few");
        let took = self.rng.between(1, 5) * MS + missing * self.rng.between(100, 1000);
        let since = self.now + took;
        self.at(since, Event::Worker(process, Task::Loaded { seat, asked, since }));
        if lacks {
            // Nobody waits for a step that a lost worker will never finish.
            self.fail_step(process, Vec::new());
        }
    }

    fn loaded(&mut self, process: u32, seat: Seat, asked: Asked, since: Time) {
        let unreached = self.unreached(process, &seat.view);
        if !unreached.is_empty() && self.now < since + REACH_MAX {
            let again = Event::Worker(process, Task::Loaded { seat, asked, since });
            return self.at(self.now + 20 * MS, again);
        }
        let worker = self.workers.get_mut(&process).expect("`handle` found it");
        if asked.leader < worker.leader && self.bug != Some(Bug::DeposedLeaderPrepares) {
            return; // Another one leads since it began to load.
        }
        let needs = Worker::needs(&seat.view, seat.rank);
        if self.bug == Some(Bug::ForgottenEarly) {
            worker.experts.clear();
        }
        if self.bug != Some(Bug::NothingLoaded) {
            worker.experts.extend(needs);
        }
        self.laws.prepared(&incarnation(process), &seat.view);
        worker.offer(seat);
        self.send(
            Node::Worker(process),
            Node::Coordinator,
            Event::Control(Call::Prepared { asked, unreached }),
        );
    }

    /// Members that are not connected with the process.
    fn unreached(&self, process: u32, view: &View) -> Vec<Rank> {
        let is_reached = |other: u32| {
            self.workers.contains_key(&other)
                && !self.net.is_cut(self.now, Node::Worker(process), Node::Worker(other))
        };
        let missing = view.members.iter().filter(|member| !is_reached(member.pid));
        missing.map(|member| member.rank).collect()
    }

    /// Takes up the next step, if none runs.
    fn work(&mut self, process: u32) {
        loop {
            let worker = self.workers.get_mut(&process).expect("it lives");
            let jobs = self.jobs.entry(process).or_default();
            let newest = jobs.iter().map(|job| job.session).max();
            if worker.running.is_some() {
                return;
            }
            let Some(order) = jobs.pop_front() else { return };
            if Some(order.session) < newest {
                continue; // The router has left that stream.
            }
            let can = worker.sits_in(order.epoch)
                && worker.seat.as_ref().is_some_and(|seat| !seat.is_poisoned);
            let missing = if can { worker.missing(&order) } else { Vec::new() };
            if !can || !missing.is_empty() {
                if let Some(seat) = worker.seat.as_mut().filter(|_| can) {
                    seat.is_poisoned = true;
                }
                let failed = Failed { suspects: Vec::new(), missing };
                self.answer(process, &order, Err(failed));
                continue;
            }
            if let Some(seat) = &worker.seat {
                self.laws.served(&incarnation(process), &seat.view);
            }
            let outcome = worker.compute(&order);
            let StepOrder { session, step, .. } = order;
            worker.running = Some(Running { session, step, outcome });
            self.at(self.now, Event::Worker(process, Task::Meet { step }));
            self.at(self.now + STEP_MAX, Event::Worker(process, Task::Late { session, step }));
            return;
        }
    }

    fn answer(&mut self, process: u32, order: &StepOrder, result: Result<Done, Failed>) {
        let worker = &self.workers[&process];
        let rank = worker.seat.as_ref().map_or(Rank(0), |seat| seat.rank);
        let StepOrder { session, epoch, step, .. } = *order;
        let answer = Answer { session, epoch, step, rank, result };
        self.send(Node::Worker(process), Node::Router, Event::Router(Message::Answered { answer }));
    }

    /// The exchange: once all ranks of the view run the step and reach each other, all complete it.
    fn meet(&mut self, process: u32, step: u64) {
        let Some(view) = self.running_view(process, step) else { return };
        let members: Vec<u32> = view.members.iter().map(|member| member.pid).collect();
        let is_here = |&other: &u32| self.running_view(other, step).as_ref() == Some(&view);
        if !members.iter().all(is_here) {
            return;
        }
        let is_cut = |one: u32, other: u32| {
            self.net.is_cut(self.now, Node::Worker(one), Node::Worker(other))
        };
        let mut pairs = members.iter().flat_map(|&one| members.iter().map(move |&o| (one, o)));
        if self.net.has_cuts() && pairs.any(|(one, other)| is_cut(one, other)) {
            return self.at(self.now + 5 * MS, Event::Worker(process, Task::Meet { step }));
        }
        for process in members {
            let running = self.workers[&process].running.as_ref().expect("it runs the step");
            let session = running.session;
            let took = self.rng.between(500, 3000);
            self.at(self.now + took, Event::Worker(process, Task::Computed { session, step }));
        }
    }

    fn running_view(&self, process: u32, step: u64) -> Option<Arc<View>> {
        let worker = self.workers.get(&process)?;
        worker.running.as_ref().filter(|running| running.step == step)?;
        worker.seat.as_ref().map(|seat| Arc::clone(&seat.view))
    }

    fn computed(&mut self, process: u32, session: u64, step: u64) {
        let worker = self.workers.get_mut(&process).expect("`handle` found it");
        let mine = |running: &mut Running| running.session == session && running.step == step;
        let Some(running) = worker.running.take_if(mine) else { return };
        self.laws.computed(&incarnation(process), worker, step);
        let Outcome { sampled, pieces } = running.outcome;
        let view = worker.seat.as_ref().map(|seat| Arc::clone(&seat.view));
        let done = Done { sampled, held: worker.take_news() };
        let Some(view) = view else { return };
        self.answer(process, &StepOrder::empty((session, view.epoch.0, step)), Ok(done));
        for (rank, piece) in pieces {
            // Now and then one finds the way full.
            if self.rng.below(50) != 0 {
                let to = view.members[rank.index()].pid;
                let keep = Event::Worker(to, Task::Keep { piece });
                self.send(Node::Worker(process), Node::Worker(to), keep);
            }
        }
        self.work(process);
    }

    fn late(&mut self, process: u32, session: u64, step: u64) {
        let worker = &self.workers[&process];
        let is_mine = |running: &Running| running.session == session && running.step == step;
        if !worker.running.as_ref().is_some_and(is_mine) {
            return;
        }
        let Some(view) = self.running_view(process, step) else { return };
        let absent = view
            .members
            .iter()
            .filter(|member| self.running_view(member.pid, step).as_ref() != Some(&view));
        let suspects = absent.map(|member| member.rank).collect();
        self.fail_step(process, suspects);
    }

    /// Ends the running step with a fault, which poisons the exchange of its view.
    fn fail_step(&mut self, process: u32, suspects: Vec<Rank>) {
        let worker = self.workers.get_mut(&process).expect("it lives");
        let Some(Running { session, step, .. }) = worker.running.take() else { return };
        let Some(seat) = &mut worker.seat else { return };
        seat.is_poisoned = true;
        let epoch = seat.view.epoch.0;
        let failed = Failed { suspects, missing: Vec::new() };
        self.answer(process, &StepOrder::empty((session, epoch, step)), Err(failed));
        self.work(process);
    }
}
