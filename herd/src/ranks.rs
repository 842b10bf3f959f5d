//! Ranks as plain threads of this process, driven step by step: the engine and the exchange without
//! the services around them, for tools, measurements and tests.

use anyhow::{Context, ensure};
use ids::{Epoch, ExpertId, Rank, SeqId, StepId};
use kernels::{Row, SampleRow, Sampled, Sampling, StepBatch, Table};
use placement::Placement;
use scheduler::Slice;
use std::sync::mpsc;
use std::time::{Duration, Instant};
use worker::{Engine, KvBlocks, Model, Observer, Shard};

/// No rank waits longer for the others within one step.
const STEP_MAX: Duration = Duration::from_secs(600);

/// A cluster whose ranks are threads.
pub struct Ranks<'a> {
    pub model: &'a Model,
    pub placement: &'a Placement,
    /// (MoE layer, expert, source) to one of the expert's replicas.
    pub targets: &'a (dyn Fn(usize, ExpertId, Rank) -> Vec<Rank> + Sync),
    /// Of the device, per rank.
    pub threads: usize,
    pub kv: KvBlocks,
    pub look: Look,
}

/// What is looked at in a step. On a GPU every look within a step waits for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Look {
    /// Tokens and expert load: what a step tells in service.
    AtTheEnd,
    /// Logits and choices of experts, too.
    AtEverything,
}

/// What came of one rank's part of a step; also what its tool looks at.
#[derive(Debug, Default)]
pub struct RankStep {
    /// One per [`SampleRow`].
    pub sampled: Vec<Sampled>,
    /// `[samples, vocab]`
    pub logits: Vec<f32>,
    /// `[moe layers][rows]`
    pub experts: Vec<Vec<u16>>,
    /// Rows that this rank's copies of experts had, `[moe layers][experts]`; empty if none had any.
    pub served: Vec<Vec<u64>>,
}

impl Observer for RankStep {
    fn routed(&mut self, _: usize, experts: &[u16]) {
        self.experts.push(experts.to_vec());
    }
    fn logits(&mut self, logits: &[f32]) {
        self.logits = logits.to_vec();
    }
}

/// Runs one step, one batch per rank, and returns each rank's part of it.
pub type RunStep<'a> = dyn FnMut(StepId, Vec<StepBatch>) -> anyhow::Result<Vec<RankStep>> + 'a;

type Answer = Result<RankStep, worker::EngineError>;

/// Starts a rank per thread and gives `body` a function that runs one step on all of them.
///
/// # Errors
///
/// That of `body`, which sees it if a rank fails.
pub fn cluster<T>(
    ranks: &Ranks<'_>,
    body: impl FnOnce(&mut RunStep<'_>) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let hub = all2all::local::Hub::new();
    let placement = ranks.placement;
    let held: Vec<_> = (0..placement.moe_layers())
        .map(|layer| {
            let of = |rank| placement.local_experts(layer, Rank(rank));
            (0..placement.ranks()).map(of).collect::<Vec<_>>()
        })
        .collect();
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for rank in (0..placement.ranks()).map(Rank) {
            let (jobs, todo) = mpsc::channel::<(StepId, StepBatch)>();
            let (answers, done) = mpsc::channel::<Answer>();
            let (hub, held) = (&hub, &held);
            scope.spawn(move || {
                let targets = |layer, expert| (ranks.targets)(layer, expert, rank);
                let (epoch, count) = (Epoch(1), placement.ranks());
                let shard = Shard { epoch, rank, ranks: count, held, targets: &targets };
                let engine = Engine::new(ranks.model, &shard, hub, ranks.threads, ranks.kv);
                serve(engine, ranks.look, &todo, &answers);
            });
            threads.push((jobs, done));
        }
        body(&mut |step, batches| {
            ensure!(batches.len() == threads.len(), "a step needs one batch per rank");
            for ((jobs, _), batch) in threads.iter().zip(batches) {
                // A rank that ended has left its error among its answers.
                let _ended = jobs.send((step, batch));
            }
            let answer = |(_, done): &(_, mpsc::Receiver<Answer>)| {
                Ok(done.recv().context("a rank ended without an answer")??)
            };
            threads.iter().map(answer).collect()
        })
    })
}

/// A rank's thread: steps until nobody asks for more.
fn serve(
    engine: Result<Engine, worker::EngineError>,
    look: Look,
    todo: &mpsc::Receiver<(StepId, StepBatch)>,
    answers: &mpsc::Sender<Answer>,
) {
    let mut engine = match engine {
        Ok(engine) => engine,
        Err(error) => {
            let _gone = answers.send(Err(error));
            return;
        }
    };
    while let Ok((step, batch)) = todo.recv() {
        let mut done = RankStep::default();
        let deadline = Instant::now() + STEP_MAX;
        let observer: Option<&mut dyn Observer> = match look {
            Look::AtTheEnd => None,
            Look::AtEverything => Some(&mut done),
        };
        let answer = engine.step(step, &batch, deadline, observer);
        let served = engine.take_load().unwrap_or_default();
        let answer = answer.map(|sampled| RankStep { sampled, served, ..done });
        if answers.send(answer).is_err() {
            return;
        }
    }
}

/// Which rows a tool wants logits of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// Every row; each samples as its sequence does.
    All,
    /// The last row of a slice that samples, as in service.
    Sampled,
}

/// A rank's slices in the device's form.
///
/// # Panics
///
/// If a step had 2^32 rows.
#[must_use]
pub fn batch(slices: &[Slice], wanted: Wanted, sampling: impl Fn(SeqId) -> Sampling) -> StepBatch {
    let mut batch = StepBatch::default();
    for (table, slice) in (0..).zip(slices) {
        let last = slice.tokens.len().checked_sub(1).filter(|_| slice.samples);
        for (i, (position, &token)) in (slice.start..).zip(&slice.tokens).enumerate() {
            let row = u32::try_from(batch.rows.len()).expect("a step has fewer than 2^32 rows");
            batch.rows.push(Row { token, position, table });
            if wanted == Wanted::All || last == Some(i) {
                batch.samples.push(SampleRow { row, sampling: sampling(slice.sequence) });
            }
        }
        batch.tables.push(Table {
            full: slice.full_blocks.iter().map(|b| b.0).collect(),
            chunked: slice.chunked_blocks.iter().map(|b| b.0).collect(),
            chunked_first: slice.chunked_first,
        });
    }
    batch
}
