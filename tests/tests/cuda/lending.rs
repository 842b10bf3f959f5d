//! Ranks on one device lend each other rows: nothing passes through the host within a step, and whatever becomes of a rank
//! in the middle of one, the others serve the same tokens in the next view.

use super::{case, device};
use all2all::local::Hub;
use all2all::{FaultKind, Reason};
use ids::{Epoch, ExpertId, Rank, StepId};
use kernels::cuda::Driver;
use kernels::{Dtype, Row, SampleRow, Sampling, StepBatch, Table};
use placement::{Placement, Shape, Shares};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use worker::{Engine, EngineError, Gpu, KvBlocks, Model, Observer, Platform, Seat, Shard};

/// A deadline that nobody reaches.
const LONG: Duration = Duration::from_secs(100);
/// One that passes.
const SHORT: Duration = Duration::from_millis(300);
const TOKENS: usize = 4;
const BLOCKS: u32 = 4;

/// What a rank does when it comes to a MoE layer.
type Deed = Box<dyn FnMut(usize) + Send>;

/// How many ranks are through with a step.
type Through = Arc<AtomicUsize>;

struct Does(Deed);

impl Observer for Does {
    fn routed(&mut self, moe_layer: usize, _: &[u16]) {
        (self.0)(moe_layer);
    }
    fn logits(&mut self, _: &[f32]) {}
}

/// Ranks with a sequence each.
struct World<'a> {
    model: &'a Model,
    hub: Arc<Hub>,
    ranks: Vec<Option<Engine>>,
    epoch: Epoch,
    step: StepId,
}

fn model(name: &str, dtype: Dtype) -> (Model, Arc<Driver>) {
    let driver = device();
    let platform = Platform::Cuda(Gpu::new(Arc::clone(&driver)));
    (Model::open_for(&case(name), dtype, platform).unwrap(), driver)
}

/// Every expert twice, if there are ranks for it.
fn place(model: &Model, ranks: u16) -> Placement {
    let shape =
        Shape { moe_layers: model.config.moe_layers().len(), experts: model.config.experts };
    placement::plan(shape, ranks, u16::from(1 < ranks)).unwrap()
}

impl<'a> World<'a> {
    fn new(model: &'a Model, ranks: u16) -> Self {
        let (epoch, step) = (Epoch(0), StepId(0));
        let mut world = Self { model, hub: Hub::new(), ranks: Vec::new(), epoch, step };
        world.ranks.resize_with(usize::from(ranks), || None);
        world.reform();
        world
    }

    /// The next view, of as many ranks.
    fn reform(&mut self) {
        self.epoch = Epoch(self.epoch.0 + 1);
        let ranks = u16::try_from(self.ranks.len()).unwrap();
        let placement = place(self.model, ranks);
        let of_layer =
            |layer| (0..ranks).map(|rank| placement.local_experts(layer, Rank(rank))).collect();
        let held: Vec<Vec<Vec<ExpertId>>> = (0..placement.moe_layers()).map(of_layer).collect();
        for (rank, engine) in (0..).map(Rank).zip(&mut self.ranks) {
            let targets = |layer, expert| placement.targets(layer, expert, rank);
            let shard = Shard { epoch: self.epoch, rank, ranks, held: &held, targets: &targets };
            match engine {
                Some(engine) => {
                    engine.take(Seat::load(self.model, &shard, &|| true).unwrap()).unwrap()
                }
                None => {
                    let kv = KvBlocks { full: BLOCKS, chunked: BLOCKS };
                    *engine = Some(Engine::new(self.model, &shard, &self.hub, 1, kv).unwrap());
                }
            }
        }
    }

    /// One step on all ranks. A rank whose deed unwinds is gone.
    fn run(
        &mut self,
        sequences: &[Sequence],
        within: Duration,
        deed: impl Fn(Rank, &Engine, &Through) -> Option<Deed>,
    ) -> Vec<Option<Result<u32, EngineError>>> {
        let through = Through::default();
        self.step = self.step.next();
        let (step, deadline) = (self.step, Instant::now() + within);
        std::thread::scope(|scope| {
            let mut started = Vec::new();
            for (rank, (engine, sequence)) in
                (0..).map(Rank).zip(self.ranks.iter_mut().zip(sequences))
            {
                let mut running = engine.take().unwrap();
                let mut does = deed(rank, &running, &through).map(Does);
                let (batch, through) = (sequence.batch(), Arc::clone(&through));
                started.push(scope.spawn(move || {
                    let eyes = does.as_mut().map(|does| does as &mut dyn Observer);
                    let sampled = running.step(step, &batch, deadline, eyes);
                    through.fetch_add(1, Ordering::Release);
                    *engine = Some(running);
                    sampled.map(|sampled| sampled[0].token)
                }));
            }
            started.into_iter().map(|thread| thread.join().ok()).collect()
        })
    }

    /// Every rank shares the rows of an expert among its copies as it likes.
    fn share_anew(&mut self) {
        let placement = place(self.model, u16::try_from(self.ranks.len()).unwrap());
        for (rank, engine) in self.ranks.iter_mut().enumerate() {
            let mut turn = self.step.0 + rank as u64 * 3;
            let mut parts = |copies: usize| -> Vec<f32> {
                turn += 1;
                let first = [1.0, 0.0, 0.5, 0.125][usize::try_from(turn % 4).unwrap()];
                if copies == 2 { vec![first, 1.0 - first] } else { vec![1.0; 1] }
            };
            let experts = || (0..).map(ExpertId).take(placement.experts());
            let layer = |layer| {
                experts().map(|e| parts(placement.replicas(layer, e).len())).collect::<Vec<_>>()
            };
            let layers = (0..placement.moe_layers()).map(layer).collect();
            engine.as_mut().unwrap().share(&Shares::new(layers).unwrap()).unwrap();
        }
    }

    /// All steps that are still to come, and what came of them.
    #[track_caller]
    fn serve(&mut self, sequences: &mut [Sequence]) {
        while sequences[0].chosen.len() < TOKENS {
            let done = self.run(sequences, LONG, |_, _, _| None);
            for (sequence, token) in sequences.iter_mut().zip(done) {
                sequence.chosen.push(token.unwrap().unwrap());
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
struct Sequence {
    prompt: Vec<u32>,
    chosen: Vec<u32>,
}

impl Sequence {
    /// Those of so many ranks, of different lengths.
    fn all(ranks: usize) -> Vec<Self> {
        let prompt = |rank: usize| {
            (0..3 + 13 * rank).map(|i| u32::try_from((i * 37 + rank * 11) % 400).unwrap()).collect()
        };
        (0..ranks).map(|rank| Self { prompt: prompt(rank), chosen: Vec::new() }).collect()
    }

    /// The prompt in one piece, or the token that was chosen last.
    fn batch(&self) -> StepBatch {
        let (start, tokens) = match &self.chosen[..] {
            [] => (0, &self.prompt[..]),
            [.., last] => (self.prompt.len() + self.chosen.len() - 1, std::slice::from_ref(last)),
        };
        let row = |(position, &token)| Row { token, position, table: 0 };
        let rows: Vec<Row> = (u32::try_from(start).unwrap()..).zip(tokens).map(row).collect();
        let last = u32::try_from(rows.len() - 1).unwrap();
        let blocks: Vec<u32> = (0..BLOCKS).collect();
        StepBatch {
            rows,
            tables: vec![Table { full: blocks.clone(), chunked: blocks, chunked_first: 0 }],
            samples: vec![SampleRow { row: last, sampling: Sampling::default() }],
        }
    }
}

/// Each of the sequences alone.
fn alone(model: &Model, mut sequences: Vec<Sequence>) -> Vec<Sequence> {
    for sequence in &mut sequences {
        World::new(model, 1).serve(std::slice::from_mut(sequence));
    }
    sequences
}

#[test]
fn no_row_passes_through_the_host() {
    for (name, dtype) in [("maverick-tiny", Dtype::F32), ("fp8-tiny", Dtype::Bf16)] {
        let (model, driver) = model(name, dtype);
        let want = alone(&model, Sequence::all(4));
        for ranks in [1, 2, 4] {
            let mut world = World::new(&model, u16::try_from(ranks).unwrap());
            let mut sequences = Sequence::all(ranks);
            let before = driver.reads();
            world.serve(&mut sequences);
            assert_eq!(sequences, want[..ranks], "{name} over {ranks}");
            // The tokens and the notes, at the end of every rank's step.
            let steps = u64::try_from(TOKENS * ranks).unwrap();
            assert_eq!(driver.reads() - before, 2 * steps, "{name} over {ranks}");
        }
    }
}

#[test]
fn copies_may_share_anew_between_any_two_steps() {
    for (name, dtype) in [("maverick-tiny", Dtype::F32), ("fp8-tiny", Dtype::Bf16)] {
        let (model, driver) = model(name, dtype);
        let want = alone(&model, Sequence::all(4));
        let mut world = World::new(&model, 4);
        let mut sequences = Sequence::all(4);
        let mut served = Vec::new();
        for _ in 0..TOKENS {
            world.share_anew();
            let before = driver.reads();
            let done = world.run(&sequences, LONG, |_, _, _| None);
            assert_eq!(driver.reads() - before, 2 * 4, "as without");
            for (sequence, token) in sequences.iter_mut().zip(done) {
                sequence.chosen.push(token.unwrap().unwrap());
            }
            let load = |engine: &Option<Engine>| engine.as_ref().unwrap().take_load();
            served.push(world.ranks.iter().map(load).collect::<Vec<_>>());
        }
        assert_eq!(sequences, want, "{name}");
        // What the ranks serve is not what they serve without.
        let mut plain = World::new(&model, 4);
        let mut again = Sequence::all(4);
        let mut differ = 0;
        for served in served {
            let done = plain.run(&again, LONG, |_, _, _| None);
            for (sequence, token) in again.iter_mut().zip(done) {
                sequence.chosen.push(token.unwrap().unwrap());
            }
            let load = |engine: &Option<Engine>| engine.as_ref().unwrap().take_load();
            differ += usize::from(served != plain.ranks.iter().map(load).collect::<Vec<_>>());
        }
        assert!(0 < differ, "the shares moved no row");
        let other = Shares::new(vec![vec![vec![1.0]; 3]]).unwrap();
        let error = world.ranks[0].as_mut().unwrap().share(&other).unwrap_err();
        assert_eq!(error.to_string(), "shares: layer 0 shares e0 among 1 copies, it has 2");
    }
}

/// Goal: a view brings experts that lie elsewhere, and decoding goes on with the graph of the one before.
#[test]
fn other_experts_in_the_same_places_change_no_launch() {
    let (first, driver) = model("maverick-tiny", Dtype::Bf16);
    let platform = Platform::Cuda(Gpu::new(Arc::clone(&driver)));
    let second = Model::open_for(&case("maverick-tiny"), Dtype::Bf16, platform).unwrap();
    let mut world = World::new(&first, 1);
    let mut sequences = Sequence::all(1);
    world.serve(&mut sequences);
    let before = driver.graphs();
    world.model = &second;
    world.reform();
    let mut again = Sequence::all(1);
    world.serve(&mut again);
    assert_eq!(again, sequences);
    let after = driver.graphs();
    // The prompt and the first token behind it name the new routes.
    let (made, replayed) = (after.made - before.made, after.replayed - before.replayed);
    assert_eq!((made, replayed), (0, 2));
}

/// What happened to the ranks of a step that failed: none of them has a token.
#[track_caller]
fn faults(results: &[Option<Result<u32, EngineError>>]) -> Vec<Option<(FaultKind, Vec<Rank>)>> {
    let fault = |result: &Result<u32, EngineError>| {
        let error = result.as_ref().expect_err("a step is all or nothing");
        let fault = error.fault().unwrap_or_else(|| panic!("{error}"));
        (fault.kind, fault.suspects.clone())
    };
    results.iter().map(|result| result.as_ref().map(fault)).collect()
}

/// A step of 4 ranks fails, and another view of the survivors goes on as if nothing had been. `deed` is what ranks do in
/// it.
#[track_caller]
fn check(
    within: Duration,
    deed: impl Fn(Rank, &Engine, &Through) -> Option<Deed> + Copy,
    check_faults: impl Fn(&[Option<(FaultKind, Vec<Rank>)>]),
) {
    for (dtype, prompts) in [(Dtype::F32, 0), (Dtype::Bf16, 1)] {
        let (model, _) = model("maverick-tiny", dtype);
        let want = alone(&model, Sequence::all(4));
        let mut world = World::new(&model, 4);
        let mut sequences = Sequence::all(4);
        // In the prompts, or in the step behind.
        for _ in 0..prompts {
            let done = world.run(&sequences, LONG, |_, _, _| None);
            for (sequence, token) in sequences.iter_mut().zip(done) {
                sequence.chosen.push(token.unwrap().unwrap());
            }
        }
        for _ in 0..2 {
            let failed = faults(&world.run(&sequences, within, deed));
            check_faults(&failed);
            world.ranks.retain(Option::is_some);
            sequences.truncate(world.ranks.len());
            world.reform();
            if sequences.len() < 4 {
                break;
            }
        }
        world.serve(&mut sequences);
        assert_eq!(sequences, want[..sequences.len()], "{dtype}");
    }
}

#[test]
fn rank_that_is_aborted_in_a_step_ends_it_for_all() {
    let deed = |rank: Rank, engine: &Engine, _: &Through| {
        let (aborter, epoch) = (engine.aborter().unwrap(), engine.epoch().unwrap());
        let deed = move |layer: usize| {
            if layer == 1 {
                aborter.abort(epoch, Reason::ViewChange);
            }
        };
        (rank == Rank(2)).then(|| Box::new(deed) as Deed)
    };
    check(LONG, deed, |faults| {
        for (rank, fault) in (0..).map(Rank).zip(faults) {
            let kind = fault.as_ref().unwrap().0;
            let reason = if rank == Rank(2) { Reason::ViewChange } else { Reason::PeerFaulted };
            assert_eq!(kind, FaultKind::Aborted(reason), "{rank}: {faults:?}");
        }
    });
}

#[test]
fn rank_that_is_missing_at_the_deadline_ends_the_step() {
    let deed = |rank: Rank, _: &Engine, through: &Through| {
        let through = Arc::clone(through);
        let deed = move |layer: usize| {
            while layer == 0 && through.load(Ordering::Acquire) < 3 {
                std::thread::yield_now();
            }
        };
        (rank == Rank(1)).then(|| Box::new(deed) as Deed)
    };
    check(SHORT, deed, |faults| {
        let blames = |(kind, suspects): &(FaultKind, Vec<Rank>)| {
            *kind == FaultKind::Deadline && suspects.contains(&Rank(1))
        };
        assert!(faults.iter().flatten().any(blames), "{faults:?}");
    });
}

#[test]
fn rank_that_goes_in_a_step_ends_it_for_the_others() {
    let deed = |rank: Rank, _: &Engine, _: &Through| {
        let deed = |layer: usize| {
            if layer == 1 {
                // As a panic, but without a word.
                resume_unwind(Box::new(()));
            }
        };
        (rank == Rank(3)).then(|| Box::new(deed) as Deed)
    };
    check(LONG, deed, |faults| {
        assert_eq!(faults[3], None, "it is gone");
        let closed = (FaultKind::PeerClosed, vec![Rank(3)]);
        assert!(faults.contains(&Some(closed)), "{faults:?}");
    });
}
