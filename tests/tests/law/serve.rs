//! Serves sequences in a world through the real scheduler, engines and exchange, and writes down what each
//! sequence gets to hear.

use crate::world::{Client, World};
use herd::ranks::{Look, RankStep, Ranks, RunStep, Wanted, batch, cluster};
use herd_tests::rng::Rng;
use ids::{ExpertId, Rank, SeqId, StepId};
use scheduler::{Plan, Scheduler, Slice};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use worker::{KvBlocks, Model};

/// A step is short; more of them means that somebody starves.
const STEPS_MAX: u64 = 5000;

/// Bits of the logits at every computed position.
pub(crate) type Logits = BTreeMap<u32, Vec<u32>>;

/// What was sampled, with the bits of the log-probabilities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) token: u32,
    logprob: Option<u32>,
    top: Vec<(u32, u32)>,
}

/// What a sequence got.
#[derive(Clone, Debug, Default)]
pub(crate) struct Heard {
    pub(crate) logits: Logits,
    pub(crate) sampled: Vec<Token>,
}

/// What went on, so that a test can tell that something did.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Evidence {
    pub(crate) steps: u64,
    /// Batches of one rank with several sequences, and of these, with decodes beside prefills.
    pub(crate) mixed_batches: u64,
    pub(crate) decode_beside_prefill: u64,
    /// Steps in which several ranks had rows.
    pub(crate) several_ranks: u64,
    /// Slices that do not start a sequence, and have several tokens.
    pub(crate) later_chunks: u64,
    /// Slices that start within a block, and ones that cross the border of an attention chunk.
    pub(crate) start_in_block: u64,
    pub(crate) cross_chunk: u64,
    pub(crate) preemptions: u64,
    /// Sequences that were computed on several ranks, one after the other.
    pub(crate) moved: u64,
    pub(crate) failed_steps: u64,
    /// Rows whose expert ran on another rank, and ones of an expert that had a choice.
    pub(crate) remote_rows: u64,
    pub(crate) replicated_rows: u64,
}

impl Evidence {
    pub(crate) fn counts(&self) -> [(&'static str, u64); 12] {
        [
            ("steps", self.steps),
            ("batches of several sequences", self.mixed_batches),
            ("decodes beside prefills", self.decode_beside_prefill),
            ("steps on several ranks", self.several_ranks),
            ("later chunks of a prompt", self.later_chunks),
            ("slices that start in a block", self.start_in_block),
            ("slices across a chunk's border", self.cross_chunk),
            ("preemptions", self.preemptions),
            ("sequences that moved", self.moved),
            ("failed steps", self.failed_steps),
            ("rows served remotely", self.remote_rows),
            ("rows with a choice of replicas", self.replicated_rows),
        ]
    }

    /// Panics if one of the named things has not happened.
    #[track_caller]
    pub(crate) fn happened(&self, except: &[&str]) {
        for (what, count) in self.counts() {
            assert!(0 < count || except.contains(&what), "vacuous: no {what}; {self:?}");
        }
    }
}

/// Serves all clients to their end.
pub(crate) fn serve(
    model: &Model,
    world: &World,
    clients: &[Client],
    evidence: &mut Evidence,
) -> BTreeMap<SeqId, Heard> {
    let most = |of: fn(&scheduler::KvPools) -> u32| world.scheduler.pools.iter().map(of).max();
    let kv = KvBlocks {
        full: most(|pool| pool.full_blocks).unwrap(),
        chunked: most(|pool| pool.chunked_blocks).unwrap(),
    };
    let ranks = Ranks {
        model,
        placement: &world.placement,
        targets: &|layer, expert, source| world.targets(layer, expert, source),
        threads: world.threads,
        kv,
        look: Look::AtEverything,
    };
    cluster(&ranks, |step| Ok(Service::new(model, world, clients, evidence).run(step))).unwrap()
}

struct Service<'a> {
    model: &'a Model,
    world: &'a World,
    clients: &'a [Client],
    evidence: &'a mut Evidence,
    scheduler: Scheduler,
    heard: BTreeMap<SeqId, Heard>,
    /// Ranks that computed a sequence.
    homes: BTreeMap<SeqId, BTreeSet<usize>>,
    rng: Rng,
}

impl<'a> Service<'a> {
    fn new(
        model: &'a Model,
        world: &'a World,
        clients: &'a [Client],
        evidence: &'a mut Evidence,
    ) -> Self {
        let heard = clients.iter().map(|client| (client.id, Heard::default())).collect();
        let homes = clients.iter().map(|client| (client.id, BTreeSet::new())).collect();
        let scheduler = Scheduler::new(world.scheduler.clone()).unwrap();
        let rng = Rng::new(world.seed);
        Self { model, world, clients, evidence, scheduler, heard, homes, rng }
    }

    fn run(mut self, run_step: &mut RunStep<'_>) -> BTreeMap<SeqId, Heard> {
        let last_arrival = self.world.arrivals.iter().copied().max().unwrap();
        let mut plan = Plan::new();
        for number in 0.. {
            assert!(number < STEPS_MAX, "somebody starves in {:?}", self.world);
            for (client, _) in
                self.clients.iter().zip(&self.world.arrivals).filter(|(_, at)| **at == number)
            {
                self.scheduler.submit(client.sequence()).unwrap();
            }
            let step = StepId(number + 1);
            if self.scheduler.plan(step, &mut plan) {
                self.step(step, &plan, run_step);
            } else if last_arrival <= number {
                break;
            }
        }
        self.evidence.preemptions += self.scheduler.stats().preemptions;
        self.evidence.moved += self.homes.values().filter(|ranks| 1 < ranks.len()).count() as u64;
        self.heard
    }

    fn step(&mut self, step: StepId, plan: &Plan, run_step: &mut RunStep<'_>) {
        let sampling = |id: SeqId| self.client(id).sampling.clone();
        let batches =
            plan.ranks.iter().map(|slices| batch(slices, Wanted::All, sampling)).collect();
        let done = run_step(step, batches).unwrap();
        self.note(plan, &done);
        let failed = self.world.failing != 0 && self.rng.one_in(self.world.failing);
        self.evidence.failed_steps += u64::from(failed);
        let mut sampled = Vec::new();
        for (slices, done) in plan.ranks.iter().zip(&done) {
            let mut rows = 0;
            for slice in slices {
                self.hear(slice, &done.logits, rows);
                rows += slice.tokens.len();
                if slice.samples && !failed {
                    let token = &done.sampled[rows - 1];
                    let bits = |(token, logprob): &(u32, f32)| (*token, logprob.to_bits());
                    let top = token.top.iter().map(bits).collect();
                    let heard = self.heard.get_mut(&slice.sequence).unwrap();
                    let (token, logprob) = (token.token, token.logprob.map(f32::to_bits));
                    heard.sampled.push(Token { token, logprob, top });
                    sampled.push((slice.sequence, token));
                }
            }
            assert_eq!(done.sampled.len(), rows);
        }
        for (client, leaves) in self.clients.iter().zip(&self.world.leaves) {
            if leaves.is_some_and(|after| after <= self.heard[&client.id].sampled.len()) {
                self.scheduler.cancel(client.id);
            }
        }
        match failed {
            true => self.scheduler.abort(),
            false => {
                // However much prefill the times let in.
                self.scheduler.time(Duration::from_millis(self.rng.between(0, 60).into()));
                self.scheduler.commit(&sampled);
            }
        }
    }

    /// The logits of a slice whose first row in its rank's batch is `row`. What was heard before, must be
    /// heard again.
    fn hear(&mut self, slice: &Slice, logits: &[f32], row: usize) {
        let vocab = self.model.config.vocab;
        let heard = self.heard.get_mut(&slice.sequence).unwrap();
        let rows = logits.chunks_exact(vocab).skip(row).take(slice.tokens.len());
        for (position, logits) in (slice.start..).zip(rows) {
            let bits: Vec<u32> = logits.iter().map(|x| x.to_bits()).collect();
            let before = heard.logits.insert(position, bits);
            if let Some(before) = before {
                let sequence = slice.sequence;
                assert!(
                    before == heard.logits[&position],
                    "{sequence} at {position}: other bits when computed again"
                );
            }
        }
    }

    fn client(&self, id: SeqId) -> &Client {
        self.clients.iter().find(|client| client.id == id).unwrap()
    }

    fn note(&mut self, plan: &Plan, done: &[RankStep]) {
        let evidence = &mut *self.evidence;
        evidence.steps += 1;
        let busy = plan.ranks.iter().filter(|slices| !slices.is_empty()).count();
        evidence.several_ranks += u64::from(1 < busy);
        for (rank, slices) in plan.ranks.iter().enumerate() {
            let decodes = slices.iter().filter(|s| s.tokens.len() == 1 && s.start > 0).count();
            let prefills = slices.iter().filter(|s| 1 < s.tokens.len()).count();
            evidence.mixed_batches += u64::from(1 < slices.len());
            evidence.decode_beside_prefill += u64::from(0 < decodes && 0 < prefills);
            for slice in slices {
                let end = slice.start + u32::try_from(slice.tokens.len()).unwrap() - 1;
                self.homes.get_mut(&slice.sequence).unwrap().insert(rank);
                evidence.later_chunks += u64::from(0 < slice.start && slice.start < end);
                evidence.start_in_block += u64::from(!slice.start.is_multiple_of(16));
                let chunk = self.model.config.chunk_tokens;
                let crosses = chunk.is_some_and(|chunk| slice.start / chunk != end / chunk);
                evidence.cross_chunk += u64::from(crosses);
            }
        }
        for (rank, done) in (0..).map(Rank).zip(done) {
            for (layer, experts) in done.experts.iter().enumerate() {
                for expert in experts.iter().copied().map(ExpertId) {
                    let targets = self.world.targets(layer, expert, rank);
                    let remote = targets.iter().any(|target| *target != rank);
                    let replicas = self.world.placement.replicas(layer, expert).len();
                    evidence.remote_rows += u64::from(remote);
                    evidence.replicated_rows += u64::from(1 < replicas);
                }
            }
        }
    }
}
