//! `herd bench engine`: how fast the engine and the exchange are on this machine, and how much of its
//! memory bandwidth the weights take.
//!
//! Tokens are a fixed scattered sequence, the same for every engine that is compared, so that all of
//! them visit the same number of experts; they are fed whatever the model would have said.

use crate::ranks::{Look, RankStep, Ranks, RunStep, Wanted, batch, cluster};
use anyhow::ensure;
use ids::{SeqId, StepId};
use kernels::Sampling;
use kernels::cuda::GraphFigures;
use placement::Shape;
use scheduler::{KvPools, NewSequence, Plan, Scheduler, Slice};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use worker::{KvBlocks, Model, Platform};

/// How to measure.
#[derive(Clone, Debug)]
pub struct Options {
    pub workers: u16,
    /// Threads of every worker.
    pub threads: usize,
    /// Sequences that decode at once, a case each.
    pub streams: Vec<u32>,
    /// Positions that every sequence holds when decoding is measured.
    pub context: u32,
    /// Whether every kernel of a GPU is measured, too.
    pub kernels: Kernels,
    /// Bytes per second that the device reads: [`measure_bandwidth`].
    pub bandwidth: f64,
    /// Tokens of the prefill case.
    pub prompt: u32,
    /// Steps of the decode case with one sequence.
    pub decode: u32,
    /// Token budget per rank and step.
    pub chunk: u32,
}

/// What is said of a GPU's kernels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kernels {
    Nothing,
    /// What each of them takes.
    Times,
}

/// Steps before the clock starts.
const WARM_STEPS: u32 = 2;
/// Steps of the decode cases with several sequences, at least.
const STEPS_MIN: u32 = 8;
/// Ids that no ordinary token has, at the end of the vocabulary.
const SPECIAL_TOKENS: usize = 64;

/// How fast so many threads, or the GPU, read weights, in bytes per second; tells `report`.
///
/// # Errors
///
/// If memory or threads are refused, or the device fails.
pub fn measure_bandwidth(
    platform: &Platform,
    threads: usize,
    report: &mut dyn FnMut(&Value),
) -> anyhow::Result<f64> {
    let bandwidth = platform.read_bandwidth(threads)?;
    let (device, gb_per_s) = (platform.describe(threads), round(bandwidth / 1e9));
    report(
        &json!({ "case": "memory", "device": device, "threads": threads, "gb_per_s": gb_per_s }),
    );
    Ok(bandwidth)
}

/// Runs every case and hands each figure to `report` as one JSON object.
///
/// # Errors
///
/// If the model is too small for the cases, cannot be loaded, or a step fails.
pub fn run(model: &Model, options: &Options, report: &mut dyn FnMut(&Value)) -> anyhow::Result<()> {
    let context = model.config.context_tokens;
    let longest = options.prompt.max(options.decoding_max()) + 1;
    ensure!(
        longest <= context,
        "the longest case has {longest} tokens, the model's context {context}; \
         give a smaller --prompt, --context or --decode"
    );
    ensure!(SPECIAL_TOKENS < model.config.vocab, "the vocabulary is too small for the cases");
    let shape =
        Shape { moe_layers: model.config.moe_layers().len(), experts: model.config.experts };
    let placement = placement::plan(shape, options.workers, 0)?;
    let of = |streams, tokens| KvBlocks::holding(&model.config, streams, tokens);
    let kv = of(1, options.prompt + 1).max(of(options.streams_max(), options.decoding_max()));
    let targets = |layer, expert, source| placement.targets(layer, expert, source);
    let (threads, look) = (options.threads, Look::AtTheEnd);
    let ranks = Ranks { model, placement: &placement, targets: &targets, threads, kv, look };
    cluster(&ranks, |run_step| {
        let pools = pools(kv.pools(&model.config));
        let weights = Weights::of(model);
        let mut bench = Bench { model, options, pools, run_step, weights };
        bench.prefill(report)?;
        options.streams.iter().try_for_each(|&streams| bench.decode(streams, report))
    })
}

impl Options {
    /// Tokens of the longest sequence of the decode cases.
    fn decoding_max(&self) -> u32 {
        self.context.saturating_add(self.sampled_max())
    }

    /// Steps that are measured.
    fn steps(&self, streams: u32) -> u32 {
        if streams == 1 { self.decode } else { (self.decode / streams).max(STEPS_MIN) }
    }

    /// Token budget of a step: twice as much at least as decoding takes.
    fn step_tokens(&self) -> u32 {
        self.chunk.max(2 * self.streams_max())
    }

    /// Tokens that a sequence samples at most: while others are prefilled, in every step, and where kernels are measured.
    fn sampled_max(&self) -> u32 {
        let streams = self.streams_max();
        let prompts = streams.saturating_mul(self.context);
        let prefill = prompts.div_ceil(self.step_tokens() - streams) + streams;
        prefill + WARM_STEPS + self.decode.max(STEPS_MIN) + 1
    }

    fn streams_max(&self) -> u32 {
        self.streams.iter().copied().max().unwrap_or(1)
    }
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
    options: &'a Options,
    pools: KvPools,
    run_step: &'a mut RunStep<'a>,
    weights: Weights,
}

/// What the steps of a case took together.
#[derive(Default)]
struct Sum {
    steps: u32,
    tokens: u64,
    seconds: f64,
    /// Of dense weights and of experts that had rows.
    weight_bytes: u64,
    expert_bytes: u64,
    /// KV cache of the positions that the rows attend to.
    kv_bytes: u64,
    /// Sequences that only decoded in the last step.
    slices_of_one: u32,
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
        self.report("prefill".into(), (1, 0), (&sum, None), report);
        Ok(())
    }

    fn decode(&mut self, streams: u32, report: &mut dyn FnMut(&Value)) -> anyhow::Result<()> {
        let steps = self.options.steps(streams);
        let mut scheduler = self.scheduler()?;
        for stream in 0..streams {
            scheduler.submit(self.sequence(stream, self.options.context))?;
        }
        let mut plan = Plan::new();
        let mut before = Sum::default();
        // Those that are prefilled first decode meanwhile.
        while before.slices_of_one != streams {
            self.step(&mut scheduler, &mut plan, &mut before, 0)?;
        }
        for number in 0..WARM_STEPS {
            self.step(&mut scheduler, &mut plan, &mut before, number)?;
        }
        let mut sum = Sum::default();
        for number in WARM_STEPS..WARM_STEPS + steps {
            self.step(&mut scheduler, &mut plan, &mut sum, number)?;
        }
        let times = self.kernel_times(|bench| {
            let mut measured = Sum::default();
            let last = WARM_STEPS + steps;
            bench.step(&mut scheduler, &mut plan, &mut measured, last)?;
            Ok(measured)
        })?;
        ensure!(sum.tokens == u64::from(steps * streams), "every step decodes all streams");
        let case = if streams == 1 { "decode".into() } else { format!("decode-{streams}") };
        self.report(case, (streams, self.options.context), (&sum, times), report);
        Ok(())
    }

    /// What the kernels of some steps take, if anybody wants to know.
    fn kernel_times(
        &mut self,
        steps: impl FnOnce(&mut Self) -> anyhow::Result<Sum>,
    ) -> anyhow::Result<Option<Value>> {
        let wanted = self.options.kernels == Kernels::Times;
        let Some(gpu) = self.model.platform.gpu().filter(|_| wanted) else { return Ok(None) };
        gpu.driver().time_kernels();
        let sum = steps(self)?;
        let steps = f64::from(sum.steps);
        let of = |time: &kernels::cuda::KernelTime| {
            let launches = f64::from(time.launches) / steps;
            let ms = time.seconds * 1e3 / steps;
            json!({ "kernel": time.kernel, "launches_per_step": launches, "ms_per_step": round(ms) })
        };
        let times: Vec<Value> = gpu.driver().kernel_times()?.iter().map(of).collect();
        Ok(Some(
            json!({ "expert_bytes_per_step": sum.expert_bytes / u64::from(sum.steps), "times": times }),
        ))
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
        let experts = experts_read(&done) * self.weights.expert;
        sum.expert_bytes += experts;
        sum.weight_bytes += busy * self.weights.dense + experts;
        sum.kv_bytes += slices.clone().map(|slice| self.kv_bytes(slice)).sum::<u64>();
        let decoding = slices.clone().filter(|slice| slice.tokens.len() == 1);
        sum.slices_of_one = u32::try_from(decoding.count())?;
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
            step_tokens: self.options.step_tokens(),
            prefill_max: Duration::MAX,
            sequences_max: self.options.streams_max(),
            queue_max: self.options.streams_max(),
            context_tokens: self.model.config.context_tokens,
            backup_tokens: Vec::new(),
        })?)
    }

    fn sequence(&self, stream: u32, tokens: u32) -> NewSequence {
        let salt = 13 + 101 * u64::from(stream);
        NewSequence {
            id: SeqId(u64::from(stream)),
            prompt: (0..u64::from(tokens)).map(|i| self.token(i, salt)).collect(),
            tokens_max: self.options.sampled_max(),
            group: None,
            has_begun: false,
        }
    }

    /// A fixed scattered sequence of ordinary token ids.
    fn token(&self, index: u64, salt: u64) -> u32 {
        let ordinary = (self.model.config.vocab - SPECIAL_TOKENS) as u64;
        u32::try_from((index * 7919 + salt) % ordinary).expect("a vocabulary has 32-bit ids")
    }

    /// Bytes of the KV cache that a slice reads, each of its positions once.
    fn kv_bytes(&self, slice: &Slice) -> u64 {
        let blocks = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let read = KvBlocks {
            full: blocks(slice.full_blocks.len()),
            chunked: blocks(slice.chunked_blocks.len()),
        };
        read.bytes(&self.model.config, self.model.dtype)
    }

    fn report(
        &self,
        case: String,
        (streams, context): (u32, u32),
        (sum, times): (&Sum, Option<Value>),
        report: &mut dyn FnMut(&Value),
    ) {
        let bytes_per_s = |bytes: u64| bytes as f64 / sum.seconds;
        let mut line = json!({
            "engine": "herd",
            "case": case,
            "workers": self.options.workers,
            "threads": self.options.threads,
            "dtype": self.model.dtype.to_string(),
            "streams": streams,
            "context": context,
            "tokens": sum.tokens,
            "seconds": round(sum.seconds),
            "tokens_per_s": round(sum.tokens as f64 / sum.seconds),
            "ms_per_step": round(sum.seconds / f64::from(sum.steps) * 1e3),
            "weight_bytes_per_step": sum.weight_bytes / u64::from(sum.steps),
            "kv_bytes_per_step": sum.kv_bytes / u64::from(sum.steps),
            "bandwidth_share": round(bytes_per_s(sum.weight_bytes) / self.options.bandwidth),
            "bandwidth_share_with_kv":
                round(bytes_per_s(sum.weight_bytes + sum.kv_bytes) / self.options.bandwidth),
        });
        if let Some(times) = times {
            line["kernels"] = times;
        }
        if let Some(gpu) = self.model.platform.gpu() {
            let GraphFigures { made, replayed, enqueued, refused } = gpu.driver().graphs();
            line["graphs_so_far"] = json!({ "made": made, "replayed": replayed, "enqueued": enqueued, "refused": refused });
        }
        report(&line);
    }
}

/// Copies of experts, of all layers and ranks, that had rows.
fn experts_read(done: &[RankStep]) -> u64 {
    let rows = done.iter().flat_map(|rank| rank.served.iter().flatten());
    rows.filter(|&&rows| 0 < rows).count() as u64
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
