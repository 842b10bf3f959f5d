//! The world: a queue of events in time, and what each of them does.

mod event;
mod harm;
mod others;
mod tasks;

use crate::coordinator::{Coordinator, settings};
use crate::faults;
use crate::law::Laws;
use crate::net::{MS, Net, Node, Time};
use crate::rng::Rng;
use crate::router::{self, Router};
use crate::store::{Mood, Store};
use crate::worker::{BLOCK_TOKENS, StepOrder, Worker};
use crate::{Bug, Failure, Options};
use control::Hello;
use event::{Asked, Call, Event, Message, Outside, Task, text};
use ids::Epoch;
use placement::{KvPools, Shape};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;

/// Between two beats of a worker's registration, and two looks of the router at the view.
const BEAT: Time = 200 * MS;
/// Between two looks of a coordinator at who is silent.
const WATCH: Time = 100 * MS;
/// A worker that answers no ping for this long while it prepares is gone.
const PING_MAX: Time = 2000 * MS;
const STORE_RETRY: Time = 500 * MS;
/// Service must have returned this long after the last fault.
const RETURN_MAX: Time = 30_000 * MS;
/// Events that a failure shows.
const TRACE_MAX: usize = 60;

/// How a run went.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    pub events: u64,
    /// Simulated time.
    pub seconds: u64,
    pub faults: u64,
    /// Views that counted.
    pub views: u64,
    /// Steps that counted.
    pub steps: u64,
    pub tokens: u64,
    pub streams: u64,
    /// Positions that came out of copies instead of being computed again.
    pub restored: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { events, seconds, faults, views, steps, tokens, streams, restored } = self;
        write!(f, "{events} events in {seconds} s, {faults} faults, {views} views, ")?;
        write!(f, "{steps} steps, {tokens} tokens, {streams} streams, {restored} restored")
    }
}

pub(crate) struct World {
    bug: Option<Bug>,
    now: Time,
    serial: u64,
    queue: BTreeMap<(Time, u64), Event>,
    rng: Rng,
    net: Net,
    laws: Laws,
    store: Store,
    /// For when a leader's tick is in the queue.
    woken: BTreeMap<u32, Time>,
    router: Router,
    workers: BTreeMap<u32, Worker>,
    /// What reached a process that stands still, in order; it finds it when it goes on.
    mail: BTreeMap<u32, VecDeque<Task>>,
    /// Steps that wait for the one that runs.
    jobs: BTreeMap<u32, VecDeque<StepOrder>>,
    coordinators: BTreeMap<u32, Coordinator>,
    /// The one that was elected last, if it lives.
    leader: Option<u32>,
    elected: u32,
    asked: BTreeSet<Asked>,
    workers_expected: u16,
    shape: Shape,
    born: u32,
    sequences: u64,
    has_faults: bool,
    report: Report,
    trace: VecDeque<String>,
}

/// Runs to the end; `bug` is planted.
pub(crate) fn run(options: Options, bug: Option<Bug>) -> Result<Report, Failure> {
    let mut world = World::new(options, bug);
    let mut end = Time::MAX;
    while let Some(((at, _), event)) = world.queue.pop_first() {
        world.now = at;
        world.report.events += 1;
        let step = world.report.events;
        if world.trace.len() == TRACE_MAX {
            world.trace.pop_front();
        }
        let line = format!("{step} at {} ms: {}", at / MS, text(&event));
        world.trace.push_back(line);
        world.handle(event);
        if options.steps <= step && world.has_faults {
            world.end_faults();
            end = world.now + RETURN_MAX;
        }
        let late = || format!("service does not return: {}", world.state());
        let broken = world.laws.broken.clone().or_else(|| (end < world.now).then(late));
        if let Some(text) = broken {
            let trace = world.trace.into_iter().collect();
            return Err(Failure { options, step, text, trace });
        }
        if !world.has_faults && world.is_at_rest() {
            if world.router.holds_blocks() {
                let text = "all streams have ended, and KV blocks are still taken".into();
                return Err(Failure { options, step, text, trace: Vec::new() });
            }
            break;
        }
    }
    world.report.seconds = world.now / (1000 * MS);
    world.report.steps = world.laws.commits;
    world.report.tokens = world.laws.tokens;
    world.report.streams = world.laws.ended;
    world.report.restored = world.router.restored;
    Ok(world.report)
}

impl World {
    fn new(options: Options, bug: Option<Bug>) -> Self {
        let workers = options.workers.max(1);
        let mut world = Self {
            bug,
            now: 0,
            serial: 0,
            queue: BTreeMap::new(),
            rng: Rng::new(options.seed),
            net: Net::default(),
            laws: Laws::new(settings(workers).redundancy),
            store: Store::new(),
            woken: BTreeMap::new(),
            router: Router::new(bug),
            workers: BTreeMap::new(),
            mail: BTreeMap::new(),
            jobs: BTreeMap::new(),
            coordinators: BTreeMap::new(),
            leader: None,
            elected: 0,
            asked: BTreeSet::new(),
            workers_expected: workers,
            shape: Shape { moe_layers: 2, experts: usize::from(workers).max(8) },
            born: 0,
            sequences: 0,
            has_faults: true,
            report: Report::default(),
            trace: VecDeque::new(),
        };
        world.at(0, Event::Control(Call::Elect));
        for _ in 0..workers {
            world.join();
        }
        world.at(1, Event::Router(Message::Look));
        world.at(2, Event::Router(Message::Submit));
        let first = 500 * MS + faults::gap(&mut world.rng);
        world.at(first, Event::Outside(Outside::Fault));
        world
    }

    fn at(&mut self, time: Time, event: Event) {
        self.serial += 1;
        self.queue.insert((time.max(self.now), self.serial), event);
    }

    fn send(&mut self, from: Node, to: Node, event: Event) {
        let arrival = self.net.arrival(self.now, from, to, &mut self.rng);
        self.at(arrival, event);
    }

    fn soon(&mut self, event: Event) {
        let delay = self.rng.between(1, 5) * MS;
        self.at(self.now + delay, event);
    }

    fn join(&mut self) {
        self.born += 1;
        self.workers.insert(self.born, Worker::default());
        let start = self.now + self.rng.between(1, 100) * MS;
        self.at(start, Event::Worker(self.born, Task::Beat));
    }

    fn hello(&self, process: u32) -> Hello {
        Hello {
            incarnation: incarnation(process),
            address: format!("{process}:1"),
            pid: process,
            device: "cpu".into(),
            profile: "cpu/f32".into(),
            model: "toy".into(),
            shape: self.shape,
            places: self.shape.experts,
            kv: KvPools {
                block_tokens: BLOCK_TOKENS,
                // The longest sequence changes with who is in the view.
                full_blocks: if process.is_multiple_of(5) { 30 } else { 40 },
                chunked_blocks: 40,
                chunk_tokens: None,
                backup_tokens: [200, 1000, 0][process as usize % 3],
            },
            context_tokens: 200,
            exchange: String::new(),
            epoch: Epoch(self.workers.get(&process).map_or(0, |worker| worker.epoch)),
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Worker(process, task) => {
                let Some(worker) = self.workers.get(&process) else { return };
                if self.now < worker.frozen_until {
                    self.mail.entry(process).or_default().push_back(task);
                } else {
                    self.handle_task(process, task);
                }
            }
            Event::Control(call) => self.handle_call(call),
            Event::Router(message) => self.handle_message(message),
            Event::Outside(Outside::StoreWell) => self.store.mood = Mood::Well,
            Event::Outside(Outside::Fault) => self.fault(),
            Event::Outside(Outside::Kill) => self.kill_one(),
            Event::Outside(Outside::Thaw { process }) => self.thaw(process),
        }
        self.carry_out();
    }
}

fn incarnation(process: u32) -> String {
    format!("p{process}")
}
