//! Faults as they happen, and their end.

use super::{Call, Event, Outside, World};
use crate::faults::{self, Fault, Link};
use crate::net::{Node, Time};
use crate::store::Mood;
use crate::worker::Worker;
use control::{Input, PhaseName};
use placement::Window;
use std::collections::BTreeSet;

/// Workers beyond this many are not started: more add time, and no new situations.
const WORKERS_SPARE: usize = 4;

impl World {
    pub(super) fn fault(&mut self) {
        if !self.has_faults {
            return;
        }
        let fault = faults::draw(&mut self.rng);
        self.report.faults += 1;
        self.trace.push_back(format!("  {fault:?}"));
        self.happen(fault);
        let next = self.now + faults::gap(&mut self.rng);
        self.at(next, Event::Outside(Outside::Fault));
    }

    fn happen(&mut self, fault: Fault) {
        match fault {
            Fault::Kill { processes } => {
                for _ in 0..processes {
                    if let Some(process) = self.some_worker() {
                        self.kill(process);
                    }
                }
            }
            Fault::Freeze { span } => {
                let until = self.now + span;
                let Some(process) = self.some_worker() else { return };
                if let Some(worker) = self.workers.get_mut(&process) {
                    worker.frozen_until = worker.frozen_until.max(until);
                }
                self.at(until, Event::Outside(Outside::Thaw { process }));
            }
            Fault::Cut { link, span } => {
                let (Some(one), Some(other)) = (self.some_worker(), self.some_worker()) else {
                    return;
                };
                let (from, to) = ends(link, Node::Worker(one), Node::Worker(other));
                self.net.cut(from, to, self.now + span);
            }
            Fault::Tear { span } => self.tear(self.now + span),
            Fault::Join => {
                if self.workers.len() < usize::from(self.workers_expected) + WORKERS_SPARE {
                    self.join();
                }
            }
            Fault::Drain => {
                let process = self.some_worker();
                let now = self.now;
                let leader = self.leader.and_then(|leader| self.coordinators.get_mut(&leader));
                if let (Some(leader), Some(process)) = (leader, process)
                    && let Some(worker) = leader.worker_of(process)
                {
                    leader.feed(now, Input::Drain { worker });
                }
            }
            Fault::Rebalance => self.rebalance(),
            Fault::Store { mood, span } => {
                self.store.mood = mood;
                self.at(self.now + span, Event::Outside(Outside::StoreWell));
            }
            Fault::Crash { span } => {
                if let Some(leader) = self.leader.take() {
                    self.coordinators.remove(&leader);
                    self.at(self.now + span, Event::Control(Call::Elect));
                }
            }
            Fault::Depose { span } => {
                if self.leader.is_some() {
                    self.happen(Fault::Join);
                    self.at(self.now, Event::Control(Call::Elect));
                    self.at(self.now + span, Event::Outside(Outside::Kill));
                }
            }
        }
    }

    pub(super) fn kill_one(&mut self) {
        if self.has_faults {
            self.happen(Fault::Kill { processes: 1 });
        }
    }

    fn tear(&mut self, until: Time) {
        let workers: Vec<u32> = self.workers.keys().copied().collect();
        let (left, right): (Vec<u32>, Vec<u32>) =
            workers.into_iter().partition(|_| self.rng.below(2) == 0);
        for &one in &left {
            for &other in &right {
                self.net.cut(Node::Worker(one), Node::Worker(other), until);
                self.net.cut(Node::Worker(other), Node::Worker(one), until);
            }
        }
    }

    fn some_worker(&mut self) -> Option<u32> {
        let workers: Vec<u32> = self.workers.keys().copied().collect();
        self.rng.pick(&workers)
    }

    fn rebalance(&mut self) {
        let layer: Vec<u64> =
            (0..self.shape.experts).map(|_| self.rng.below(10) * self.rng.below(100)).collect();
        let layers = vec![layer; self.shape.moe_layers];
        let window = Window::new(&layers).expect("all layers are alike");
        let now = self.now;
        if let Some(leader) = self.leader.and_then(|leader| self.coordinators.get_mut(&leader)) {
            leader.feed(now, Input::Moment { window: window.clone() });
            leader.feed(now, Input::Load { window });
            leader.feed(now, Input::Rebalance);
        }
    }

    pub(super) fn thaw(&mut self, process: u32) {
        let is_awake = |worker: &Worker| worker.frozen_until <= self.now;
        if !self.workers.get(&process).is_some_and(is_awake) {
            return;
        }
        for task in self.mail.remove(&process).unwrap_or_default() {
            if self.workers.contains_key(&process) {
                self.handle_task(process, task);
            }
        }
    }

    /// The process ends, and everybody connected with it learns of it soon.
    pub(super) fn kill(&mut self, process: u32) {
        if self.workers.remove(&process).is_some() {
            self.jobs.remove(&process);
            self.mail.remove(&process);
            self.soon(Event::Control(Call::Gone { process }));
        }
    }

    /// From here on nothing goes wrong any more.
    pub(super) fn end_faults(&mut self) {
        self.has_faults = false;
        self.net.heal();
        self.store.mood = Mood::Well;
        let processes: Vec<u32> = self.workers.keys().copied().collect();
        for process in processes {
            if let Some(worker) = self.workers.get_mut(&process) {
                worker.frozen_until = worker.frozen_until.min(self.now);
            }
            self.thaw(process);
        }
        if self.workers.is_empty() {
            self.join();
        }
        self.trace.push_back("  the faults end".into());
    }

    /// All streams have ended, and all workers serve, with all the copies that there should be.
    pub(super) fn is_at_rest(&self) -> bool {
        let Some(leader) = self.leader.and_then(|leader| self.coordinators.get(&leader)) else {
            return false;
        };
        let status = leader.control.status();
        let Some(view) = &leader.published else { return false };
        let members: BTreeSet<u32> = view.members.iter().map(|member| member.pid).collect();
        let alive: BTreeSet<u32> = self.workers.keys().copied().collect();
        let is_whole = self.laws.is_whole(view);
        status.phase == PhaseName::Serving
            && is_whole
            && members == alive
            && self.router.is_idle()
            && self.laws.waiting().is_empty()
    }
}

fn ends(link: Link, one: Node, other: Node) -> (Node, Node) {
    match link {
        Link::RouterToWorker => (Node::Router, one),
        Link::WorkerToRouter => (one, Node::Router),
        Link::CoordinatorToWorker => (Node::Coordinator, one),
        Link::WorkerToCoordinator => (one, Node::Coordinator),
        Link::WorkerToWorker => (one, other),
        Link::CoordinatorToRouter => (Node::Coordinator, Node::Router),
        Link::RouterToCoordinator => (Node::Router, Node::Coordinator),
    }
}
