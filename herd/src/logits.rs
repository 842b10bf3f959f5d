//! `herd logits`: the logits of a token sequence, through the engine and the exchange of a cluster
//! whose ranks are threads of this process.
//!
//! The scheduler cuts the prompt into chunks and places it on a rank as in service; the other ranks
//! serve their experts.

use crate::ranks::{Look, Ranks, RunStep, Wanted, batch, cluster};
use anyhow::{Context, bail, ensure};
use half::bf16;
use ids::{SeqId, StepId};
use kernels::{BLOCK_TOKENS, Sampling};
use placement::Shape;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use scheduler::{KvPools, NewSequence, Plan, Scheduler};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use worker::{KvBlocks, Model};

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
        prefill_max: Duration::MAX,
        sequences_max: 1,
        queue_max: 1,
        context_tokens: config.context_tokens,
        backup_tokens: Vec::new(),
    })?;
    let new = NewSequence {
        id: SeqId(1),
        prompt: prompt.to_vec(),
        tokens_max: options.greedy.max(1),
        group: None,
        has_begun: false,
    };
    scheduler.submit(new)?;
    let shape = Shape { moe_layers: config.moe_layers().len(), experts: config.experts };
    let placement = placement::plan(shape, options.workers, options.redundancy)?;
    let ranks = Ranks {
        model,
        placement: &placement,
        targets: &|layer, expert, source| placement.targets(layer, expert, source),
        threads: options.threads,
        kv: KvBlocks { full: blocks, chunked: blocks },
        look: Look::AtEverything,
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
        let batches =
            plan.ranks.iter().map(|slices| batch(slices, Wanted::All, |_| Sampling::default()));
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

/// Largest absolute difference of two rows of logits; infinite if there is what is no number.
///
/// # Panics
///
/// If they differ in length.
#[must_use]
pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "as many logits");
    let of = |(a, b): (&f32, &f32)| match (a - b).abs() {
        difference if difference.is_nan() => f32::INFINITY,
        difference => difference,
    };
    a.iter().zip(b).map(of).fold(0.0, f32::max)
}

/// Widens bf16 bytes; the golden files hold some.
#[must_use]
pub fn widen_bf16(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
}
