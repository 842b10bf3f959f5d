//! Random histories against the oracle: whatever happens, every sequence gets its own tokens.

use super::model::{self, Worker};
use crate::{Config, KvPools, NewSequence, Plan, RankStats, Scheduler, Slice};
use ids::{BlockId, Rank, SeqId, StepId};
use proptest::prelude::*;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

#[derive(Debug, Clone)]
enum Action {
    Submit {
        prompt_tokens: u32,
        tokens_max: u32,
        group: Option<u64>,
    },
    /// The n-th live sequence, counted round.
    Cancel(usize),
    /// It takes so many milliseconds.
    Step(u64),
    FailedStep,
    /// A step during which the n-th live sequence is cancelled.
    CancelDuring(usize),
    /// The n-th rank is lost, and another worker takes its place.
    Lose(usize),
    /// The same in the middle of a step.
    LoseDuring(usize),
    /// Rows of the next step get lost on their way to copies.
    LosePieces,
    /// The n-th rank forgets its copies.
    Evict(usize),
}

fn action() -> impl Strategy<Value = Action> {
    let group = prop_oneof![Just(None), (0..2_u64).prop_map(Some)];
    prop_oneof![
        3 => (1..40_u32, 1..12_u32, group).prop_map(|(prompt_tokens, tokens_max, group)| {
            Action::Submit { prompt_tokens, tokens_max, group }
        }),
        1 => any::<usize>().prop_map(Action::Cancel),
        6 => (0..40_u64).prop_map(Action::Step),
        1 => Just(Action::FailedStep),
        1 => any::<usize>().prop_map(Action::CancelDuring),
        1 => any::<usize>().prop_map(Action::Lose),
        1 => any::<usize>().prop_map(Action::LoseDuring),
        1 => Just(Action::LosePieces),
        1 => any::<usize>().prop_map(Action::Evict),
    ]
}

/// All but the chunks, which are the model's.
fn kv() -> impl Strategy<Value = KvPools> {
    (1..5_u32, 4..24_u32, 4..16_u32).prop_map(|(block_tokens, full_blocks, chunked_blocks)| {
        KvPools { block_tokens, full_blocks, chunked_blocks, chunk_tokens: None }
    })
}

fn config() -> impl Strategy<Value = Config> {
    let ranks = prop::collection::vec((kv(), 0..150_u32), 1..4);
    let chunk = prop_oneof![Just(None), (2..11_u32).prop_map(Some)];
    (ranks, chunk, 1..5_u32, 0..60_u32, any::<bool>()).prop_map(
        |(ranks, chunk_tokens, sequences, more, has_backups)| {
            let (pools, backup_tokens): (Vec<KvPools>, _) = ranks.into_iter().unzip();
            let pools = pools.into_iter().map(|kv| KvPools { chunk_tokens, ..kv }).collect();
            Config {
                pools,
                step_tokens: sequences + more,
                prefill_max: Duration::from_millis(10),
                sequences_max: sequences,
                queue_max: 6,
                context_tokens: 48,
                backup_tokens: if has_backups { backup_tokens } else { Vec::new() },
            }
        },
    )
}

/// A sequence as its owner sees it.
struct Wanted {
    prompt: Vec<u32>,
    tokens: usize,
}

struct World {
    config: Config,
    scheduler: Scheduler,
    workers: Vec<Worker>,
    plan: Plan,
    wanted: BTreeMap<SeqId, Wanted>,
    histories: BTreeMap<SeqId, Vec<u32>>,
    loses_pieces: bool,
    steps: u64,
    submitted: u64,
    finished: u64,
}

impl World {
    fn new(config: Config) -> Self {
        Self {
            scheduler: Scheduler::new(config.clone()).unwrap(),
            workers: config.pools.iter().map(|&kv| Worker::new(kv)).collect(),
            config,
            plan: Plan::new(),
            wanted: BTreeMap::new(),
            histories: BTreeMap::new(),
            loses_pieces: false,
            steps: 0,
            submitted: 0,
            finished: 0,
        }
    }

    fn act(&mut self, action: &Action) {
        match *action {
            Action::Submit { prompt_tokens, tokens_max, group } => {
                self.submit(prompt_tokens, tokens_max, group);
            }
            Action::Cancel(nth) => self.cancel(nth),
            Action::Step(took_ms) => {
                if self.plan() {
                    self.scheduler.time(Duration::from_millis(took_ms));
                    self.commit();
                }
            }
            Action::FailedStep => self.failed_step(),
            Action::CancelDuring(nth) => {
                if self.plan() {
                    self.cancel(nth);
                    self.commit();
                }
            }
            Action::Lose(nth) => self.lose(nth % self.workers.len()),
            Action::LoseDuring(nth) => {
                if self.plan() {
                    model::fail(&mut self.workers, &self.plan);
                    self.scheduler.abort();
                }
                self.lose(nth % self.workers.len());
            }
            Action::LosePieces => self.loses_pieces = true,
            Action::Evict(nth) => {
                let nth = nth % self.workers.len();
                self.workers[nth].evict();
            }
        }
    }

    /// A view change in which the ranks are told in another order, too.
    fn lose(&mut self, lost: usize) {
        let ranks = self.workers.len();
        self.workers[lost] = Worker::new(self.config.pools[lost]);
        let turn = |index: usize| (index + 1) % ranks;
        self.workers.rotate_left(1 % ranks);
        self.config.pools.rotate_left(1 % ranks);
        let backups = self.config.backup_tokens.len().min(1);
        self.config.backup_tokens.rotate_left(backups);
        let kept: Vec<_> = (0..ranks).map(turn).map(|old| (old != lost).then_some(old)).collect();
        let empty = Scheduler::new(self.config.clone()).unwrap();
        let scheduler = std::mem::replace(&mut self.scheduler, empty);
        self.scheduler = scheduler.reconfigure(self.config.clone(), &kept).unwrap();
    }

    fn submit(&mut self, prompt_tokens: u32, tokens_max: u32, group: Option<u64>) {
        let id = SeqId(self.submitted);
        let prompt: Vec<u32> =
            (0..prompt_tokens).map(|i| i + 1000 * u32::try_from(id.0).unwrap()).collect();
        let has_begun = id.0.is_multiple_of(3);
        let new = NewSequence { id, prompt: prompt.clone(), tokens_max, group, has_begun };
        if self.scheduler.submit(new).is_ok() {
            let room = self.scheduler.context_tokens() - prompt_tokens;
            self.histories.insert(id, prompt.clone());
            self.wanted.insert(id, Wanted { prompt, tokens: tokens_max.min(room) as usize });
            self.submitted += 1;
        }
    }

    fn cancel(&mut self, nth: usize) {
        if let Some(&id) = self.wanted.keys().nth(nth % self.wanted.len().max(1)) {
            self.scheduler.cancel(id);
            self.wanted.remove(&id);
        }
    }

    fn plan(&mut self) -> bool {
        self.steps += 1;
        let some = self.scheduler.plan(StepId(self.steps), &mut self.plan);
        for (slices, kv) in self.plan.ranks.iter().zip(&self.config.pools) {
            let tokens: usize = slices.iter().map(|slice| slice.tokens.len()).sum();
            assert!(tokens <= self.config.step_tokens as usize, "budget");
            assert!(slices.len() <= self.config.sequences_max as usize, "sequences");
            assert_disjoint(slices, |slice| &slice.full_blocks, kv.full_blocks);
            assert_disjoint(slices, |slice| &slice.chunked_blocks, kv.chunked_blocks);
        }
        some
    }

    /// A step fails half way and is planned again: the same, if nothing else happened, but for prefill if
    /// somebody decodes.
    fn failed_step(&mut self) {
        if self.plan() {
            model::fail(&mut self.workers, &self.plan);
            let first = self.plan.clone();
            let preemptions = self.scheduler.stats().preemptions;
            self.scheduler.abort();
            let aborted = self.scheduler.clone();
            assert!(self.plan());
            if preemptions == aborted.stats().preemptions && aborted.stats().queued == 0 {
                let second = without_backups(self.plan.ranks.clone());
                assert_eq!(second, what_is_due(without_backups(first.ranks)));
                // By now every sequence that can have a copy has a rank for it.
                self.scheduler.abort();
                let aborted = self.scheduler.clone();
                assert!(self.plan());
                self.scheduler.abort();
                assert_eq!(self.scheduler, aborted, "as if never planned");
                assert!(self.plan());
            }
            self.commit();
        }
    }

    fn commit(&mut self) {
        let ran = loop {
            match model::run(&mut self.workers, &self.plan, &self.histories) {
                Ok(ran) => break ran,
                Err((rank, missing)) => {
                    self.scheduler.abort();
                    self.scheduler.unrestore(rank, &missing);
                    if !self.plan() {
                        return;
                    }
                }
            }
        };
        let sampled = ran.sampled;
        // What ranks say is what they had before the rows of this step.
        for (rank, worker) in (0..).map(Rank).zip(&mut self.workers) {
            let held = worker.take_news();
            self.scheduler.held(held.into_iter().map(|held| (rank, held)));
        }
        self.scheduler.commit(&sampled);
        let is_lost = std::mem::take(&mut self.loses_pieces);
        for (rank, piece) in ran.pieces {
            if !is_lost {
                self.workers[rank.index()].keep(piece);
            }
        }
        for (id, token) in sampled {
            let Some(wanted) = self.wanted.get(&id) else { continue };
            let history = self.histories.get_mut(&id).unwrap();
            history.push(token);
            if history.len() == wanted.prompt.len() + wanted.tokens {
                assert_eq!(*history, model::generate(&wanted.prompt, wanted.tokens));
                self.wanted.remove(&id);
                self.finished += 1;
            }
        }
        self.assert_chunks_bounded();
    }

    /// Between steps a sequence holds at most the blocks that one chunk touches.
    fn assert_chunks_bounded(&self) {
        let stats = self.scheduler.stats();
        for (RankStats { running, chunked_free_blocks, .. }, kv) in
            stats.ranks.iter().zip(&self.config.pools)
        {
            if kv.chunk_tokens.is_some() {
                let held = kv.chunked_blocks - chunked_free_blocks;
                assert!(held <= running * (kv.window_blocks() + 1), "{held} by {running}");
            }
        }
    }

    /// Nothing new arrives: everything must end, and every block come back.
    fn drain(&mut self) {
        // One sequence alone takes at most a step per token, and after a preemption again; the
        // oldest is never preempted, so a generous bound is quadratic in the sequences.
        let bound = self.steps + 64 * (1 + self.wanted.len() as u64) * 48;
        while self.plan() {
            self.commit();
            assert!(self.steps < bound, "no progress: {:?}", self.scheduler.stats());
        }
        assert!(self.wanted.is_empty(), "{:?} never ended", self.wanted.keys());
        let stats = self.scheduler.stats();
        assert_eq!((stats.running, stats.queued), (0, 0));
        self.assert_copies_released();
        for (rank, kv) in stats.ranks.iter().zip(&self.config.pools) {
            assert_eq!(rank.full_free_blocks, kv.full_blocks);
            let chunked = if kv.chunk_tokens.is_some() { kv.chunked_blocks } else { 0 };
            assert_eq!(rank.chunked_free_blocks, chunked);
        }
    }
}

impl World {
    /// Nobody is left, so the next step tells every rank to keep no copy.
    fn assert_copies_released(&mut self) {
        self.submit(1, 1, None);
        assert!(self.plan());
        self.commit();
        // That of the one sequence of this step.
        let id = SeqId(self.submitted - 1);
        for worker in &mut self.workers {
            assert!(worker.copies().iter().all(|&copy| copy == id), "{:?}", worker.copies());
        }
    }
}

fn assert_disjoint(slices: &[Slice], table: impl Fn(&Slice) -> &Vec<BlockId>, blocks: u32) {
    let mut seen = BTreeSet::new();
    for slice in slices {
        for &block in table(slice) {
            assert!(block.0 < blocks, "{block} does not exist");
            assert!(seen.insert(block), "{block} has two owners");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn every_sequence_gets_its_own_tokens(
        config in config(),
        actions in prop::collection::vec(action(), 1..80),
    ) {
        let mut world = World::new(config);
        for action in &actions {
            world.act(action);
        }
        world.drain();
    }
}

/// The random test must not pass by never preempting, never crossing a chunk, never going on from a copy or
/// never finishing.
#[test]
fn busy_small_rank_preempts_restores_and_finishes() {
    let kv = KvPools { block_tokens: 3, full_blocks: 14, chunked_blocks: 8, chunk_tokens: Some(7) };
    let mut world = World::new(Config {
        pools: vec![kv, kv],
        step_tokens: 9,
        prefill_max: Duration::from_millis(10),
        sequences_max: 4,
        queue_max: 6,
        context_tokens: 40,
        backup_tokens: vec![200, 200],
    });
    for round in 0..60 {
        world.act(&Action::Submit {
            prompt_tokens: 1 + round * 7 % 20,
            tokens_max: 1 + round * 5 % 19,
            group: Some(u64::from(round) / 3),
        });
        world.act(match round % 7 {
            0 => &Action::FailedStep,
            3 => &Action::LoseDuring(0),
            _ => &Action::Step(1),
        });
    }
    world.drain();
    let restored: u64 = world.workers.iter().map(|worker| worker.restored).sum();
    assert!(20 < restored, "{restored}");
    let preemptions = world.scheduler.stats().preemptions;
    assert!(4 < preemptions, "{preemptions}");
    assert!(20 < world.finished, "{}", world.finished);
}

/// What decodes of a step, or all of it if nothing does.
fn what_is_due(ranks: Vec<Vec<Slice>>) -> Vec<Vec<Slice>> {
    let decodes = |slice: &Slice| slice.samples && slice.tokens.len() == 1;
    if !ranks.iter().flatten().any(decodes) {
        return ranks;
    }
    ranks.into_iter().map(|slices| slices.into_iter().filter(decodes).collect()).collect()
}

/// There may be more room for copies than there was a moment ago.
fn without_backups(mut ranks: Vec<Vec<Slice>>) -> Vec<Vec<Slice>> {
    for slice in ranks.iter_mut().flatten() {
        slice.backup = None;
    }
    ranks
}

/// Long prompts keep arriving; a sequence that decodes gets a token in every step.
#[test]
fn decode_never_waits_for_prefills() {
    let kv = KvPools { block_tokens: 4, full_blocks: 900, chunked_blocks: 900, chunk_tokens: None };
    let mut world = World::new(Config {
        pools: vec![kv],
        step_tokens: 8,
        prefill_max: Duration::from_millis(10),
        sequences_max: 4,
        queue_max: 6,
        context_tokens: 400,
        backup_tokens: Vec::new(),
    });
    world.submit(1, 50, None);
    for _ in 0..50 {
        world.submit(300, 1, None);
        world.act(&Action::Step(1));
    }
    assert_eq!(world.histories[&SeqId(0)].len(), 51);
}
