//! Rules 6 to 8: one result per row, in order and bit for bit; no allocation on the way.

use super::rig::{LONG, Part, finish, join, on_every, well};
use super::rng::Rng;
use super::scene::{Place, Routing, Scene};
use super::{HostExchange, Network};
use crate::{ExchangeError, HostRows, LayerKey};
use ids::{Epoch, ExpertId, Rank, StepId};
use std::sync::Arc;
use std::time::Instant;

/// What a set of scenes has contained.
#[derive(Clone, Copy, Default, Debug)]
struct Seen {
    local: usize,
    remote: usize,
    replicated: usize,
    empty: usize,
    all_to_one_rank: usize,
}

impl Seen {
    fn note(&mut self, scene: &Scene, place: Place, source: Rank) {
        let experts = scene.experts(place, source);
        let target =
            |(row, &expert): (usize, &u16)| scene.target(place, ExpertId(expert), (source, row));
        let targets: Vec<Rank> = experts.iter().enumerate().map(target).collect();
        let local = targets.iter().filter(|target| **target == source).count();
        self.local += local;
        self.remote += experts.len() - local;
        let holders = |expert: &u16| {
            let holds = |rank: &Rank| scene.held(place.layer, *rank).contains(&ExpertId(*expert));
            scene.active_ranks().filter(holds).count()
        };
        self.replicated += experts.iter().filter(|expert| 1 < holders(expert)).count();
        self.empty += usize::from(experts.is_empty());
        let one = experts.len() == usize::from(scene.rows_max)
            && targets.iter().all(|target| *target == targets[0]);
        self.all_to_one_rank += usize::from(one);
    }

    fn note_steps(&mut self, scene: &Scene, steps: u64) {
        for (step, layer) in (0..steps).flat_map(|s| (0..scene.layers).map(move |l| (s, l))) {
            let place = Place { epoch: Epoch(1), step: StepId(step), layer };
            scene.active_ranks().for_each(|source| self.note(scene, place, source));
        }
    }

    #[track_caller]
    fn everything(self) {
        let Self { local, remote, replicated, empty, all_to_one_rank } = self;
        let least = [local, remote, replicated, empty, all_to_one_rank].into_iter().min();
        assert!(Some(0) < least, "the check is vacuous: {self:?}");
    }
}

/// Random placements with replicas, random routings: no row is lost, doubled or swapped, arrivals are in
/// their order.
pub fn check_every_row_comes_back_once<N: Network>(new: &dyn Fn() -> N) {
    let mut seen = Seen::default();
    for seed in 0..60 {
        let ranks = 1 + u16::try_from(seed % 6).expect("a small number");
        let network = Arc::new(new());
        let scene = Arc::new(Scene::new(seed, ranks));
        seen.note_steps(&scene, 6);
        let ends = join(&network, &scene, Epoch(1));
        run_steps(ends, &scene, 6, None);
    }
    seen.everything();
}

/// Sources share their rows anew among the ranks that hold the expert, each before another step, and nobody else is told.
pub fn check_rows_may_be_shared_anew<N: Network>(new: &dyn Fn() -> N) {
    let mut moved = 0;
    for seed in 200..220 {
        let ranks = 2 + u16::try_from(seed % 5).expect("a small number");
        let network = Arc::new(new());
        let before = Scene::new(seed, ranks);
        let scene = Arc::new(before.clone().shared_anew(8));
        for (step, source) in (0..8).flat_map(|step| scene.active_ranks().map(move |r| (step, r))) {
            let place = Place { epoch: Epoch(1), step: StepId(step), layer: 0 };
            let target = |scene: &Scene, (row, expert): (usize, &u16)| {
                scene.target(place, ExpertId(*expert), (source, row))
            };
            let experts = scene.experts(place, source);
            let differs = |row: &(usize, &u16)| target(&before, *row) != target(&scene, *row);
            moved += experts.iter().enumerate().filter(differs).count();
        }
        let ends = join(&network, &scene, Epoch(1));
        run_steps(ends, &scene, 8, None);
    }
    assert!(100 < moved, "the check is vacuous: {moved} rows go elsewhere");
}

/// Rows of any width, with the bytes of NaNs, zeros of both signs and denormals; local rows as remote.
pub fn check_rows_keep_every_bit<N: Network>(new: &dyn Fn() -> N) {
    let mut seen = Seen::default();
    for (seed, row_bytes) in (100..).zip([1, 2, 3, 4, 7, 64, 1024, 10_240]) {
        let network = Arc::new(new());
        let scene = Arc::new(Scene::new(seed, 2 + u16::from(seed % 2 == 0)).wide(row_bytes));
        seen.note_steps(&scene, 8);
        let ends = join(&network, &scene, Epoch(1));
        run_steps(ends, &scene, 8, None);
    }
    seen.everything();
}

/// More ranks than cores, each held up at random.
pub fn check_many_steps_under_random_delays<N: Network>(new: &dyn Fn() -> N) {
    for (seed, ranks) in [(1, 2), (2, 3), (3, 5), (4, 8)] {
        let network = Arc::new(new());
        let scene = Arc::new(Scene::deep(seed, ranks));
        let ends = join(&network, &scene, Epoch(1));
        run_steps(ends, &scene, 150, Some(seed));
    }
}

#[track_caller]
fn run_steps<E: HostExchange + 'static>(
    ends: Vec<(Rank, E)>,
    scene: &Arc<Scene>,
    steps: u64,
    pace: Option<u64>,
) {
    let told = Arc::clone(scene);
    let (ends, _) = on_every(ends, move |rank, end| {
        for step in 0..steps {
            let pace = pace.map(|seed| Rng::of(&[seed, step, u64::from(rank.0)]));
            let result = Part { pace, ..Part::new(&told, step) }.run(end);
            assert_eq!(result, Ok(()), "{rank} in step {step} of {told:?}");
        }
    });
    well(ends, scene, steps);
}

/// Once the buffers have seen the largest step, also while a rank waits for a slow one.
pub fn check_hot_path_allocates_nothing<N: Network>(new: &dyn Fn() -> N, allocations: fn() -> u64) {
    let before = allocations();
    drop(std::hint::black_box(Vec::<u8>::with_capacity(100)));
    assert_eq!(allocations(), before + 1, "the counter does not count");

    let network = Arc::new(new());
    let scene = Arc::new(Scene::deep(31, 3).routed(Routing::One));
    let mixed = Arc::new((*scene).clone().routed(Routing::Mixed));
    let ends = join(&network, &scene, Epoch(1));
    let (_, counts) = on_every(ends, move |rank, end| {
        // Every rank has sent everything to every expert, several times.
        let warm = 4 * u64::from(scene.experts);
        let mut work = Prepared::new(&scene, 0..warm, rank);
        work.run(end).expect("a complete step");
        let mut work = Prepared::new(&mixed, warm..warm + 100, rank);
        let before = allocations();
        work.run(end).expect("a complete step");
        allocations() - before
    });
    assert_eq!(counts, [0; 3], "allocations per rank in 100 steps");
}

/// Steps with all they need, so that only the exchange could allocate.
struct Prepared {
    row_bytes: usize,
    /// Key, rows and experts of every layer of every step.
    layers: Vec<(LayerKey, Vec<u8>, Vec<u16>)>,
    last_layer: u16,
    results: Vec<u8>,
    out: Vec<u8>,
    pace: Rng,
}

impl Prepared {
    fn new(scene: &Scene, steps: std::ops::Range<u64>, me: Rank) -> Self {
        let mut layers = Vec::new();
        for (step, layer) in steps.flat_map(|s| (0..scene.layers).map(move |l| (StepId(s), l))) {
            let place = Place { epoch: Epoch(1), step, layer };
            layers.push((
                LayerKey { step, layer },
                scene.rows(place, me),
                scene.experts(place, me),
            ));
        }
        let most = usize::from(scene.rows_max) * usize::from(scene.ranks) * scene.row_bytes;
        Self {
            row_bytes: scene.row_bytes,
            layers,
            last_layer: scene.layers - 1,
            results: vec![0; most],
            out: vec![0; most],
            pace: Rng::of(&[u64::from(me.0)]),
        }
    }

    fn run<E: HostExchange>(&mut self, end: &mut E) -> Result<(), ExchangeError> {
        let row_bytes = self.row_bytes;
        for (key, rows, experts) in &self.layers {
            if key.layer == 0 {
                end.begin_step(end.view().epoch, key.step, Instant::now() + LONG)?;
            }
            // Long enough for the others to fall asleep.
            (0..5).for_each(|_| self.pace.dawdle());
            let sent = end.dispatch_send(*key, HostRows { bytes: rows, row_bytes }, experts)?;
            let arrived = end.dispatch_recv(sent)?;
            let (here, _) = end.arrived(&arrived);
            let results = &mut self.results[..here.bytes.len()];
            results.copy_from_slice(here.bytes);
            let pending = end.combine_send(arrived, HostRows { bytes: results, row_bytes })?;
            let out = &mut self.out[..rows.len()];
            end.combine_recv(pending, out)?;
            assert!(out == &rows[..], "rows come back as they were");
            if key.layer == self.last_layer {
                finish(end)?;
            }
        }
        Ok(())
    }
}
