//! `herd logits`: the logits of a token sequence, through the engine and the exchange of a cluster
//! whose ranks are threads of this process.
//!
//! The scheduler cuts the prompt into chunks and places it on a rank as in service; the other ranks
//! serve their experts. [`cluster`] runs any steps, of any number of sequences: tests drive it too.

use anyhow::{Context, bail, ensure};
use half::bf16;
use ids::{Epoch, ExpertId, Rank, SeqId, StepId};
use kernels::{
    BLOCK_TOKENS, Cpu, Route, Row, SampleRow, Sampled, Sampling, StepBatch, Table, Tensor,
};
use model::forward::Observer;
use placement::{Placement, Shape};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use scheduler::{KvPools, NewSequence, Plan, Scheduler, Slice};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};
use worker::{Engine, KvBlocks, Model, Shard};

/// No rank waits longer for the others within one step.
const STEP_MAX: Duration = Duration::from_secs(600);

/// How to run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub workers: u16,
    pub threads: usize,
    /// Prompt tokens per step.
    pub chunk: u32,
    /// Tokens to generate greedily after the prompt.
    pub greedy: u32,
    /// Copies of every expert beyond the first.
    pub redundancy: u16,
}

/// What came out.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub vocab: usize,
    /// `[tokens, vocab]`, row-major.
    pub logits: Vec<f32>,
    /// `[moe layers][tokens]`: the chosen expert of every prompt position.
    pub experts: Vec<Vec<u16>>,
    /// Greedy continuation.
    pub greedy: Vec<u32>,
}

/// Reads `input_ids` (`[T]` i64) from a safetensors file.
///
/// # Errors
///
/// If the file cannot be read or the tensor is missing, of another type, or out of range.
///
/// # Panics
///
/// Never: ids are read in whole chunks of 8 bytes.
pub fn read_input(path: &Path) -> anyhow::Result<Vec<u32>> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    let file = SafeTensors::deserialize(&bytes).with_context(|| path.display().to_string())?;
    let tensor = file.tensor("input_ids").with_context(|| format!("{}", path.display()))?;
    ensure!(
        tensor.dtype() == Dtype::I64 && tensor.shape().len() == 1,
        "{}: input_ids is {:?} {:?}, expected I64 [T]",
        path.display(),
        tensor.dtype(),
        tensor.shape()
    );
    let id = |b: &[u8]| {
        let id = i64::from_le_bytes(b.try_into().expect("chunks of 8 bytes"));
        u32::try_from(id).with_context(|| format!("input_ids holds {id}, not a token id"))
    };
    tensor.data().chunks_exact(8).map(id).collect()
}

/// Writes `logits` `[T, V]`, `router.{i}.expert` `[T]` per MoE layer and `greedy_ids`.
///
/// # Errors
///
/// If the file cannot be written.
pub fn write_output(path: &Path, outcome: &Outcome) -> anyhow::Result<()> {
    let rows = outcome.logits.len() / outcome.vocab;
    let mut data: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
    let logits = bytemuck::cast_slice(&outcome.logits).to_vec();
    data.insert("logits".into(), (Dtype::F32, vec![rows, outcome.vocab], logits));
    let longs = |ids: &mut dyn Iterator<Item = i64>| -> Vec<u8> {
        ids.flat_map(i64::to_le_bytes).collect()
    };
    for (layer, experts) in outcome.experts.iter().enumerate() {
        let bytes = longs(&mut experts.iter().map(|&e| i64::from(e)));
        data.insert(format!("moe.{layer}.expert"), (Dtype::I64, vec![experts.len()], bytes));
    }
    let greedy = longs(&mut outcome.greedy.iter().map(|&t| i64::from(t)));
    data.insert("greedy_ids".into(), (Dtype::I64, vec![outcome.greedy.len()], greedy));
    let views = data
        .iter()
        .map(|(name, (dtype, shape, bytes))| {
            Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    safetensors::serialize_to_file(views, None, path)
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Whether the model can run the prompt.
///
/// # Errors
///
/// If it is empty, longer than the context, or names a token outside the vocabulary.
pub fn check_prompt(model: &Model, prompt: &[u32]) -> anyhow::Result<()> {
    let (vocab, context) = (model.config.vocab, model.config.context_tokens as usize);
    if let Some(token) = prompt.iter().find(|&&t| t as usize >= vocab) {
        bail!(
            "token {token} lies outside the vocabulary of {vocab}; use the model's own tokenizer"
        );
    }
    ensure!(!prompt.is_empty(), "input_ids is empty; give at least one token");
    ensure!(
        prompt.len() < context,
        "input_ids has {} tokens, the context holds {context}; give fewer",
        prompt.len()
    );
    Ok(())
}

/// Runs the prompt, then the greedy continuation.
///
/// # Errors
///
/// If the prompt is empty, too long or names tokens outside the vocabulary; if a rank fails.
pub fn run(model: &Model, prompt: &[u32], options: Options) -> anyhow::Result<Outcome> {
    check_prompt(model, prompt)?;
    let config = &model.config;
    let total = u32::try_from(prompt.len())? + options.greedy + 1;
    let block = u32::try_from(BLOCK_TOKENS)?;
    let blocks = total.div_ceil(block) + 1;
    let chunk_tokens = config.chunk_tokens.filter(|_| config.chunked.contains(&true));
    let pools =
        KvPools { block_tokens: block, full_blocks: blocks, chunked_blocks: blocks, chunk_tokens };
    let mut scheduler = Scheduler::new(scheduler::Config {
        pools: vec![pools; usize::from(options.workers)],
        step_tokens: options.chunk,
        sequences_max: 1,
        queue_max: 1,
        context_tokens: config.context_tokens,
    })?;
    let new = NewSequence {
        id: SeqId(1),
        prompt: prompt.to_vec(),
        tokens_max: options.greedy.max(1),
        group: None,
    };
    scheduler.submit(new)?;
    let shape = Shape { moe_layers: config.moe_layers().len(), experts: config.experts };
    let placement = placement::plan(shape, options.workers, options.redundancy)?;
    let ranks = Ranks {
        model,
        placement: &placement,
        target: &|layer, expert, source| placement.target(layer, expert, source),
        threads: options.threads,
        kv: KvBlocks { full: blocks, chunked: blocks },
    };
    cluster(&ranks, |step| {
        let mut outcome = Outcome {
            vocab: config.vocab,
            logits: Vec::new(),
            experts: vec![Vec::new(); shape.moe_layers],
            greedy: Vec::new(),
        };
        drive(&mut scheduler, step, (prompt.len(), options.greedy), &mut outcome)?;
        Ok(outcome)
    })
}

/// A cluster whose ranks are threads.
pub struct Ranks<'a> {
    pub model: &'a Model,
    pub placement: &'a Placement,
    /// (MoE layer, expert, source) to one of the expert's replicas.
    pub target: &'a (dyn Fn(usize, ExpertId, Rank) -> Rank + Sync),
    /// Of the device, per rank.
    pub threads: usize,
    pub kv: KvBlocks,
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
}

impl Observer<Cpu> for RankStep {
    fn routed(&mut self, _: usize, route: &Route) {
        self.experts.push(route.experts().to_vec());
    }
    fn logits(&mut self, logits: &Tensor) {
        self.logits = logits.data().to_vec();
    }
}

/// Runs one step, one batch per rank, and returns each rank's part of it.
pub type RunStep<'a> = dyn FnMut(StepId, Vec<StepBatch>) -> anyhow::Result<Vec<RankStep>> + 'a;

/// Plans and runs steps until the prompt and the continuation are done.
fn drive(
    scheduler: &mut Scheduler,
    run_step: &mut RunStep<'_>,
    (prompt, greedy): (usize, u32),
    outcome: &mut Outcome,
) -> anyhow::Result<()> {
    let mut step = StepId(1);
    let mut plan = Plan::new();
    let mut positions = 0;
    while scheduler.plan(step, &mut plan) {
        let with_slice = plan.ranks.iter().position(|slices| !slices.is_empty());
        let rank = with_slice.context("a step without tokens")?;
        let slice = plan.ranks[rank][0].clone();
        let batches = plan.ranks.iter().map(|slices| batch(slices, |_| Sampling::default()));
        let done = run_step(step, batches.collect())?.swap_remove(rank);
        if positions < prompt {
            outcome.logits.extend(done.logits);
            for (all, new) in outcome.experts.iter_mut().zip(done.experts) {
                all.extend(new);
            }
        }
        positions += slice.tokens.len();
        let last = done.sampled.last().map(|s| s.token).filter(|_| slice.samples);
        let sampled: Vec<(SeqId, u32)> = last.map(|t| (slice.sequence, t)).into_iter().collect();
        scheduler.commit(&sampled);
        outcome.greedy.extend(sampled.iter().map(|s| s.1).take(greedy as usize));
        if positions >= prompt && outcome.greedy.len() >= greedy as usize {
            scheduler.cancel(slice.sequence);
            break;
        }
        step = step.next();
    }
    Ok(())
}

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
                let target = |layer, expert| (ranks.target)(layer, expert, rank);
                let (epoch, count) = (Epoch(1), placement.ranks());
                let shard = Shard { epoch, rank, ranks: count, held, target: &target };
                let engine = Engine::new(ranks.model, &shard, hub, ranks.threads, ranks.kv);
                serve(engine, &todo, &answers);
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
        let answer = engine.step(step, &batch, deadline, &mut done);
        let answer = answer.map(|sampled| RankStep { sampled, ..done });
        if answers.send(answer).is_err() {
            return;
        }
    }
}

/// A rank's slices in the device's form; every row's logits are wanted, and each row samples as its
/// sequence does.
///
/// # Panics
///
/// If a step had 2^32 rows.
#[must_use]
pub fn batch(slices: &[Slice], sampling: impl Fn(SeqId) -> Sampling) -> StepBatch {
    let mut batch = StepBatch::default();
    for (table, slice) in (0..).zip(slices) {
        for (position, &token) in (slice.start..).zip(&slice.tokens) {
            let row = u32::try_from(batch.rows.len()).expect("a step has fewer than 2^32 rows");
            batch.rows.push(Row { token, position, table });
            batch.samples.push(SampleRow { row, sampling: sampling(slice.sequence) });
        }
        batch.tables.push(Table {
            full: slice.full_blocks.iter().map(|b| b.0).collect(),
            chunked: slice.chunked_blocks.iter().map(|b| b.0).collect(),
            chunked_first: slice.chunked_first,
        });
    }
    batch
}

/// Largest absolute difference of two rows of logits.
#[must_use]
pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Widens bf16 bytes; the golden files hold some.
#[must_use]
pub fn widen_bf16(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
}
