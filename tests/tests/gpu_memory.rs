//! The memory of a GPU, on the emulated device: what is planned is what is taken, and no step takes any.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use herd::ranks::{Look, Ranks, RunStep, cluster};
use ids::StepId;
use kernels::cuda::{Driver, Taken};
use kernels::{Dtype, Row, SampleRow, Sampling, StepBatch, StepRoom, Table};
use placement::Shape;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use worker::{Gpu, KvBlocks, MemoryPlan, Model, Platform, Share};

const SMALL: StepRoom = StepRoom { rows: 24, samples: 24 };

const KV: KvBlocks = KvBlocks { full: 40, chunked: 40 };

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

fn open(dtype: Dtype, room: StepRoom) -> (Model, Arc<Driver>) {
    let driver = Arc::new(Driver::emulated().unwrap());
    let platform = Platform::Cuda(Gpu::new(Arc::clone(&driver)).with_room(room));
    (Model::open_for(&case("maverick-tiny"), dtype, platform).unwrap(), driver)
}

/// A step of `sequences`, each of so many rows, of which the last `samples` are sampled.
fn step(sequences: u32, rows_each: u32, samples: usize) -> StepBatch {
    let blocks = rows_each.div_ceil(16);
    let table = |sequence: u32| {
        let blocks: Vec<u32> = (sequence * blocks..(sequence + 1) * blocks).collect();
        Table { full: blocks.clone(), chunked: blocks, chunked_first: 0 }
    };
    let row =
        |table: u32, position: u32| Row { token: (position * 7 + table) % 50, position, table };
    let rows: Vec<Row> =
        (0..sequences).flat_map(|s| (0..rows_each).map(move |p| row(s, p))).collect();
    let sample = |row: usize| {
        let row = u32::try_from(row).unwrap();
        SampleRow { row, sampling: Sampling::default() }
    };
    let samples = (rows.len() - samples..rows.len()).map(sample).collect();
    StepBatch { rows, tables: (0..sequences).map(table).collect(), samples }
}

fn on_ranks<T>(
    model: &Model,
    ranks: u16,
    body: impl FnOnce(&mut RunStep<'_>) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let config = &model.config;
    let shape = Shape { moe_layers: config.moe_layers().len(), experts: config.experts };
    let placement = placement::plan(shape, ranks, 0).unwrap();
    let targets = |layer, expert, source| placement.targets(layer, expert, source);
    let look = Look::AtEverything;
    let ranks = Ranks { model, placement: &placement, targets: &targets, threads: 1, kv: KV, look };
    cluster(&ranks, body)
}

/// Runs a step without rows, which every rank answers once it has started, and then these; what was taken before and
/// after them.
fn taken(
    (dtype, room): (Dtype, StepRoom),
    ranks: u16,
    steps: &[StepBatch],
) -> (Taken, Taken, MemoryPlan) {
    let (model, driver) = open(dtype, room);
    let share = Share { memory: 1 << 40, backups: 0, ranks, workers: ranks };
    let plan = MemoryPlan::new(&model, KV, share).unwrap();
    let (before, after) = on_ranks(&model, ranks, |run| {
        let each = |step: &StepBatch| vec![step.clone(); usize::from(ranks)];
        run(StepId(1), each(&StepBatch::default()))?;
        let before = driver.taken();
        for (id, step) in (2..).map(StepId).zip(steps) {
            run(id, each(step))?;
        }
        Ok((before, driver.taken()))
    })
    .unwrap();
    (before, after, plan)
}

/// Prompts and decoding, as large as they may be: in a small room, and in one for `rows`.
#[track_caller]
fn check(dtype: Dtype, ranks: u16, rows: u32) {
    let small = [step(1, 24, 24), step(24, 1, 24), step(2, 12, 1), step(1, 24, 24)];
    let (before, after, small_plan) = taken((dtype, SMALL), ranks, &small);
    assert_eq!(after, before, "{dtype} {ranks}: steps take memory");
    let large = [step(1, rows, 40), step(40, 1, 40)];
    let room = StepRoom { rows: rows as usize, samples: 40 };
    let (large_before, after, large_plan) = taken((dtype, room), ranks, &large);
    assert_eq!(after, large_before, "{dtype} {ranks}: steps take memory");
    // Weights and KV cache are the same.
    let more = large_before.bytes - before.bytes;
    assert_eq!(more, large_plan.workspace - small_plan.workspace, "{dtype} {ranks}");
    assert!(0 < more && 0 < small_plan.workspace);
}

#[test]
fn no_step_takes_memory_and_the_plan_is_what_is_taken_f32() {
    check(Dtype::F32, 1, 48);
    check(Dtype::F32, 2, 48);
}

#[test]
fn no_step_takes_memory_and_the_plan_is_what_is_taken_bf16() {
    // Attention does not split so many rows of one sequence.
    check(Dtype::Bf16, 1, 272);
    check(Dtype::Bf16, 4, 48);
}

#[test]
fn larger_step_is_refused_and_spoils_nothing() {
    for (too_large, text) in [
        (step(25, 1, 1), "a step has 25 rows, this worker has memory for 24"),
        (step(1, 24, 24), "a step has 24 rows to sample, this worker has memory for 8"),
    ] {
        let (model, _) = open(Dtype::F32, StepRoom { samples: 8, ..SMALL });
        let error =
            on_ranks(&model, 1, |run| run(StepId(1), vec![too_large])).unwrap_err().to_string();
        assert!(error.starts_with(text) && error.contains("--step-tokens"), "{error}");
        assert_eq!(model.platform.failure(), None);
    }
}

#[test]
fn plan_shows_the_workspace_and_names_it_where_memory_is_too_small() {
    let (model, _) = open(Dtype::Bf16, SMALL);
    let share = |memory| Share { memory, backups: 0, ranks: 1, workers: 1 };
    let plan = MemoryPlan::new(&model, KV, share(1 << 40)).unwrap();
    assert!(plan.to_string().contains(", workspace of steps 72.2 MiB, up to"), "{plan}");
    let others = plan.dense + plan.kv + plan.expert;
    let fits = MemoryPlan::new(&model, KV, share(others + plan.workspace)).unwrap();
    assert_eq!(fits.places, 1);
    let error = MemoryPlan::new(&model, KV, share(others + plan.workspace - 1)).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("the workspace of steps 72.2 MiB"), "{text}");
    assert!(text.ends_with("or make steps smaller (--step-tokens)"), "{text}");
}
