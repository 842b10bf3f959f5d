//! `herd bench engine`: how fast the engine and the exchange are on this machine, and how much of its
//! memory bandwidth the weights take.
//!
//! Tokens are a fixed scattered sequence, the same for every engine that is compared, so that all of
//! them visit the same number of experts; they are fed whatever the model would have said.

use crate::ranks::{RankStep, Ranks, RunStep, Wanted, batch, cluster};
use anyhow::ensure;
use ids::{SeqId, StepId};
use kernels::Sampling;
use placement::Shape;
use scheduler::{KvPools, NewSequence, Plan, Scheduler};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Instant;
use worker::{KvBlocks, Model};

/// How to measure.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub workers: u16,
    /// Threads of every worker.
    pub threads: usize,
    /// Tokens of the prefill case.
    pub prompt: u32,
    /// Steps of the decode case with one sequence.
    pub decode: u32,
    /// Token budget per rank and step.
    pub chunk: u32,
}

/// Positions that every sequence holds when decoding is measured.
const CONTEXT: u32 = 16;
/// Steps before the clock starts.
const WARM_STEPS: u32 = 2;
/// Ids that no ordinary token has, at the end of the vocabulary.
const SPECIAL_TOKENS: usize = 64;

/// Runs every case and hands each figure to `report` as one JSON object.
///
/// # Errors
///
/// If the model is too small for the cases, cannot be loaded, or a step fails.
pub fn run(model: &Model, options: Options, report: &mut dyn FnMut(&Value)) -> anyhow::Result<()> {
    let context = model.config.context_tokens;
    let longest = options.prompt.max(CONTEXT + WARM_STEPS + options.decode) + 1;
    ensure!(
        longest <= context,
        "the longest case has {longest} tokens, the model's context {context}; \
         give a smaller --prompt or --decode"
    );
    ensure!(SPECIAL_TOKENS < model.config.vocab, "the vocabulary is too small for the cases");
    let threads = options.threads * usize::from(options.workers);
    let bandwidth = kernels::read_bandwidth(threads)?;
    report(&json!({ "case": "memory", "threads": threads, "gb_per_s": round(bandwidth / 1e9) }));

    let shape =
        Shape { moe_layers: model.config.moe_layers().len(), experts: model.config.experts };
    let placement = placement::plan(shape, options.workers, 0)?;
    let kv = KvBlocks::plan(&model.config, model.dtype, u64::MAX, 32)?;
    let targets = |layer, expert, source| placement.targets(layer, expert, source);
    let threads = options.threads;
    let ranks = Ranks { model, placement: &placement, targets: &targets, threads, kv };
    cluster(&ranks, |run_step| {
        let pools = pools(kv.pools(&model.config));
        let weights = Weights::of(model);
        let mut bench = Bench { model, options, pools, run_step, weights, bandwidth };
        bench.prefill(report)?;
        for streams in [1, 8, 32] {
            bench.decode(streams, report)?;
        }
        Ok(())
    })
}

/// Bytes that a step reads.
struct Weights {
    /// By every rank that has rows.
    dense: u64,
    /// Per expert that has rows.
    expert: u64,
}

impl Weights {
    fn of(model: &Model) -> Self {
        let footprint = model.footprint();
        let layers = (model.config.moe_layers().len() as u64).max(1);
        Self { dense: footprint.read, expert: footprint.expert / layers }
    }
}

struct Bench<'a> {
    model: &'a Model,
    options: Options,
    pools: KvPools,
    run_step: &'a mut RunStep<'a>,
    weights: Weights,
    /// Bytes per second.
    bandwidth: f64,
}

/// What the steps of a case took together.
#[derive(Default)]
struct Sum {
    steps: u32,
    tokens: u64,
    seconds: f64,
    weight_bytes: u64,
}

impl Bench<'_> {
    /// The prompt of one sequence from empty, twice; the second counts.
    fn prefill(&mut self, report: &mut dyn FnMut(&Value)) -> anyhow::Result<()> {
        let mut sum = Sum::default();
        for _ in 0..2 {
            let mut scheduler = self.scheduler()?;
            scheduler.submit(self.sequence(0, self.options.prompt))?;
            sum = Sum::default();
            let mut plan = Plan::new();
            while sum.tokens < u64::from(self.options.prompt) {
                self.step(&mut scheduler, &mut plan, &mut sum, 0)?;
            }
        }
        self.report("prefill".into(), 1, &sum, report);
        Ok(())
    }

    fn decode(&mut self, streams: u32, report: &mut dyn FnMut(&Value)) -> anyhow::Result<()> {
        let steps =
            if streams == 1 { self.options.decode } else { (self.options.decode / streams).max(8) };
        let mut scheduler = self.scheduler()?;
        for stream in 0..streams {
            scheduler.submit(self.sequence(stream, CONTEXT))?;
        }
        let mut plan = Plan::new();
        let prompts = u64::from(streams * CONTEXT);
        let mut before = Sum::default();
        while before.tokens < prompts {
            self.step(&mut scheduler, &mut plan, &mut before, 0)?;
        }
        for number in 0..WARM_STEPS {
            self.step(&mut scheduler, &mut plan, &mut before, number)?;
        }
        let mut sum = Sum::default();
        for number in WARM_STEPS..WARM_STEPS + steps {
            self.step(&mut scheduler, &mut plan, &mut sum, number)?;
        }
        ensure!(sum.tokens == u64::from(steps * streams), "every step decodes all streams");
        let case = if streams == 1 { "decode".into() } else { format!("decode-{streams}") };
        self.report(case, streams, &sum, report);
        Ok(())
    }

    /// Plans, runs and commits one step; every sampling sequence is given its fixed next token.
    fn step(
        &mut self,
        scheduler: &mut Scheduler,
        plan: &mut Plan,
        sum: &mut Sum,
        number: u32,
    ) -> anyhow::Result<()> {
        ensure!(scheduler.plan(StepId(u64::from(sum.steps)), plan), "there is nothing to do");
        let of_rank = |slices: &Vec<_>| batch(slices, Wanted::Sampled, |_| Sampling::default());
        let batches = plan.ranks.iter().map(of_rank).collect();
        let started = Instant::now();
        let done = (self.run_step)(plan.step, batches)?;
        sum.seconds += started.elapsed().as_secs_f64();
        sum.steps += 1;
        let slices = plan.ranks.iter().flatten();
        let busy = plan.ranks.iter().filter(|slices| !slices.is_empty()).count() as u64;
        sum.weight_bytes += busy * self.weights.dense + experts_read(&done) * self.weights.expert;
        sum.tokens += slices.clone().map(|slice| slice.tokens.len() as u64).sum::<u64>();
        let next = |id: SeqId| self.token(u64::from(number), 29 + 1009 * id.0);
        let sampled: Vec<(SeqId, u32)> = slices
            .filter(|slice| slice.samples)
            .map(|slice| (slice.sequence, next(slice.sequence)))
            .collect();
        scheduler.commit(&sampled);
        Ok(())
    }

    fn scheduler(&self) -> anyhow::Result<Scheduler> {
        Ok(Scheduler::new(scheduler::Config {
            pools: vec![self.pools; usize::from(self.options.workers)],
            step_tokens: self.options.chunk.max(32),
            sequences_max: 32,
            queue_max: 32,
            context_tokens: self.model.config.context_tokens,
        })?)
    }

    fn sequence(&self, stream: u32, tokens: u32) -> NewSequence {
        let salt = 13 + 101 * u64::from(stream);
        NewSequence {
            id: SeqId(u64::from(stream)),
            prompt: (0..u64::from(tokens)).map(|i| self.token(i, salt)).collect(),
            tokens_max: self.options.decode + WARM_STEPS + 2,
            group: None,
        }
    }

    /// A fixed scattered sequence of ordinary token ids.
    fn token(&self, index: u64, salt: u64) -> u32 {
        let ordinary = (self.model.config.vocab - SPECIAL_TOKENS) as u64;
        u32::try_from((index * 7919 + salt) % ordinary).expect("a vocabulary has 32-bit ids")
    }

    fn report(&self, case: String, streams: u32, sum: &Sum, report: &mut dyn FnMut(&Value)) {
        let bytes_per_s = sum.weight_bytes as f64 / sum.seconds;
        report(&json!({
            "engine": "herd",
            "case": case,
            "workers": self.options.workers,
            "threads": self.options.threads,
            "dtype": self.model.dtype.to_string(),
            "streams": streams,
            "tokens": sum.tokens,
            "seconds": round(sum.seconds),
            "tokens_per_s": round(sum.tokens as f64 / sum.seconds),
            "ms_per_step": round(sum.seconds / f64::from(sum.steps) * 1e3),
            "weight_bytes_per_step": sum.weight_bytes / u64::from(sum.steps),
            "bandwidth_share": round(bytes_per_s / self.bandwidth),
        }));
    }
}

/// Experts of all layers that had rows of any rank.
fn experts_read(done: &[RankStep]) -> u64 {
    let layers = done.iter().map(|rank| rank.experts.len()).max().unwrap_or(0);
    let of_layer = |layer: usize| {
        let chosen = done.iter().filter_map(|rank| rank.experts.get(layer)).flatten();
        chosen.collect::<BTreeSet<_>>().len() as u64
    };
    (0..layers).map(of_layer).sum()
}

fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

fn pools(kv: placement::KvPools) -> KvPools {
    KvPools {
        block_tokens: kv.block_tokens,
        full_blocks: kv.full_blocks,
        chunked_blocks: kv.chunked_blocks,
        chunk_tokens: kv.chunk_tokens,
    }
}
