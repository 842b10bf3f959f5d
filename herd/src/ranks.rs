//! Ranks as plain threads of this process, driven step by step: the engine and the exchange without
//! the services around them, for measurements.

use anyhow::Context;
use ids::{Epoch, Rank, StepId};
use kernels::{Cpu, Route, Row, SampleRow, Sampling, StepBatch, Table, Tensor};
use model::forward::Observer;
use placement::Placement;
use scheduler::{Plan, Slice};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};
use worker::{Engine, EngineError, KvBlocks, Model, Shard};

/// No rank waits longer for the others within one step.
const STEP_MAX: Duration = Duration::from_secs(600);

/// Threads that execute steps. Dropping it ends them.
pub struct Ranks {
    jobs: Vec<Sender<(StepId, StepBatch)>>,
    answers: Vec<Receiver<Result<u64, EngineError>>>,
}

impl Ranks {
    /// Loads every rank's shard.
    ///
    /// # Errors
    ///
    /// If weights cannot be loaded or memory is refused.
    pub fn start(
        model: &Arc<Model>,
        placement: &Arc<Placement>,
        threads: usize,
        kv: KvBlocks,
    ) -> anyhow::Result<Self> {
        let hub = all2all::local::Hub::new();
        let mut ranks = Self { jobs: Vec::new(), answers: Vec::new() };
        for rank in (0..placement.ranks()).map(Rank) {
            let (jobs, todo) = channel();
            let (tell, answers) = channel();
            let (model, placement, hub) =
                (Arc::clone(model), Arc::clone(placement), Arc::clone(&hub));
            std::thread::Builder::new().name(rank.to_string()).spawn(move || {
                let engine = engine(&model, &placement, rank, |shard| {
                    Engine::new(&model, shard, &hub, threads, kv)
                });
                serve(engine, &todo, &tell);
            })?;
            ranks.jobs.push(jobs);
            ranks.answers.push(answers);
        }
        for answers in &ranks.answers {
            answers.recv().context("a rank ended while it loaded")??;
        }
        Ok(ranks)
    }

    /// Runs one step on all ranks; the bytes of routed experts that they read.
    ///
    /// # Errors
    ///
    /// If a rank fails.
    pub fn step(&self, plan: &Plan) -> anyhow::Result<u64> {
        for (jobs, slices) in self.jobs.iter().zip(&plan.ranks) {
            // A rank that ended has left its error among its answers.
            let _ended = jobs.send((plan.step, batch(slices)));
        }
        let mut bytes = 0;
        for answers in &self.answers {
            bytes += answers.recv().context("a rank ended without an answer")??;
        }
        Ok(bytes)
    }
}

fn engine(
    model: &Model,
    placement: &Placement,
    rank: Rank,
    make: impl FnOnce(&Shard<'_>) -> Result<Engine, EngineError>,
) -> Result<(Engine, Vec<Vec<u64>>), EngineError> {
    let layers = 0..placement.moe_layers();
    let of_layer = |layer| {
        let of_rank = |rank| placement.local_experts(layer, Rank(rank));
        (0..placement.ranks()).map(of_rank).collect()
    };
    let held: Vec<_> = layers.map(of_layer).collect();
    let target = |layer, expert| placement.target(layer, expert, rank);
    let (epoch, ranks) = (Epoch(1), placement.ranks());
    let engine = make(&Shard { epoch, rank, ranks, held: &held, target: &target })?;
    Ok((engine, vec![expert_bytes(model)?; placement.moe_layers()]))
}

/// Bytes of each expert of a layer; all layers are alike.
fn expert_bytes(model: &Model) -> Result<Vec<u64>, EngineError> {
    if model.config.moe_layers().is_empty() {
        return Ok(Vec::new());
    }
    let mut wanted = vec![Vec::new(); model.config.moe_layers().len()];
    wanted[0].push(0);
    let first = model.experts(&wanted)?;
    let expert = &first[0].slots[0];
    let bytes = (expert.gate_up.bytes() + expert.down.bytes()) as u64;
    Ok(vec![bytes; model.config.experts])
}

/// Counts the experts that a rank's own rows chose.
struct Touched<'a> {
    bytes: &'a [Vec<u64>],
    seen: Vec<bool>,
    total: u64,
}

impl Observer<Cpu> for Touched<'_> {
    fn routed(&mut self, layer: usize, route: &Route) {
        self.seen.fill(false);
        for &expert in route.experts() {
            let expert = usize::from(expert);
            if !std::mem::replace(&mut self.seen[expert], true) {
                self.total += self.bytes[layer][expert];
            }
        }
    }
    fn logits(&mut self, _: &Tensor) {}
}

fn serve(
    engine: Result<(Engine, Vec<Vec<u64>>), EngineError>,
    todo: &Receiver<(StepId, StepBatch)>,
    answers: &Sender<Result<u64, EngineError>>,
) {
    let (mut engine, bytes) = match engine {
        Ok(loaded) => loaded,
        Err(error) => {
            let _gone = answers.send(Err(error));
            return;
        }
    };
    let experts = bytes.first().map_or(0, Vec::len);
    let mut touched = Touched { bytes: &bytes, seen: vec![false; experts], total: 0 };
    if answers.send(Ok(0)).is_err() {
        return;
    }
    while let Ok((step, batch)) = todo.recv() {
        touched.total = 0;
        let result = engine.step(step, &batch, Instant::now() + STEP_MAX, &mut touched);
        if answers.send(result.map(|_| touched.total)).is_err() {
            return;
        }
    }
}

/// A rank's slices in the device's form; greedy where the plan samples.
fn batch(slices: &[Slice]) -> StepBatch {
    let mut batch = StepBatch::default();
    for (table, slice) in (0..).zip(slices) {
        let rows = (slice.start..).zip(&slice.tokens);
        batch.rows.extend(rows.map(|(position, &token)| Row { token, position, table }));
        if slice.samples {
            let row = u32::try_from(batch.rows.len() - 1).expect("a step has fewer than 2^32 rows");
            batch.samples.push(SampleRow { row, sampling: Sampling::default() });
        }
        batch.tables.push(Table {
            full: slice.full_blocks.iter().map(|b| b.0).collect(),
            chunked: slice.chunked_blocks.iter().map(|b| b.0).collect(),
            chunked_first: slice.chunked_first,
        });
    }
    batch
}
