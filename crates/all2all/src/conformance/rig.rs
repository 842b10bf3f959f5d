//! Ranks as threads, steps whose contents are checked, and a watchdog for what must not hang.

use super::rng::Rng;
use super::scene::{Place, Scene};
use super::{HostExchange, Network};
use crate::{ExchangeError, Fault, HostRows, LayerKey, StepOutcome};
use ids::{Epoch, Rank, StepId};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// A deadline that no check reaches.
pub(super) const LONG: Duration = Duration::from_secs(120);

/// Whoever is not back by then hangs: below [`LONG`], so that waiting for the deadline counts as hanging.
const WATCHDOG: Duration = Duration::from_secs(60);

/// A rank that leaves a step does so before this call.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Point {
    Begin,
    DispatchSend,
    DispatchRecv,
    CombineSend,
    CombineRecv,
    /// After the last call of the layer.
    Next,
}

pub(super) const POINTS: [Point; 6] = [
    Point::Begin,
    Point::DispatchSend,
    Point::DispatchRecv,
    Point::CombineSend,
    Point::CombineRecv,
    Point::Next,
];

/// Ends of an epoch, by rank; a rank that takes no part has none.
pub(super) type Ends<N> = Vec<(Rank, <N as Network>::End)>;

/// Runs `body` on every end in a thread of its own and hands the ends back, by rank.
#[track_caller]
pub(super) fn on_each<S: Send + 'static, T: Send + 'static, R: Send + 'static>(
    ends: Vec<(Rank, S)>,
    body: impl Fn(Rank, S) -> (T, R) + Send + Sync + 'static,
) -> (Vec<(Rank, T)>, Vec<R>) {
    let (done, results) = mpsc::channel();
    let body = Arc::new(body);
    let mut threads: Vec<_> = Vec::new();
    for (rank, end) in ends {
        let (done, body) = (done.clone(), Arc::clone(&body));
        threads.push(std::thread::spawn(move || {
            let (end, result) = body(rank, end);
            let _watched = done.send((rank, end, result));
        }));
    }
    drop(done);
    let mut back = Vec::new();
    let until = Instant::now() + WATCHDOG;
    while back.len() < threads.len() {
        match results.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(result) => back.push(result),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let back: Vec<Rank> = back.iter().map(|(rank, ..)| *rank).collect();
                panic!("hangs: of {} ranks only {back:?} are back", threads.len());
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                for thread in threads {
                    if let Err(panic) = thread.join() {
                        std::panic::resume_unwind(panic);
                    }
                }
                unreachable!("a rank that does not report has panicked");
            }
        }
    }
    back.sort_by_key(|(rank, ..)| *rank);
    back.into_iter().map(|(rank, end, result)| ((rank, end), result)).unzip()
}

/// What a thread returns.
#[track_caller]
pub(super) fn in_time<T>(thread: std::thread::JoinHandle<T>) -> T {
    let until = Instant::now() + WATCHDOG;
    while !thread.is_finished() {
        assert!(Instant::now() < until, "hangs");
        std::thread::yield_now();
    }
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// As [`on_each`], for a body that keeps its end.
#[track_caller]
pub(super) fn on_every<E: Send + 'static, R: Send + 'static>(
    ends: Vec<(Rank, E)>,
    body: impl Fn(Rank, &mut E) -> R + Send + Sync + 'static,
) -> (Vec<(Rank, E)>, Vec<R>) {
    on_each(ends, move |rank, mut end| {
        let result = body(rank, &mut end);
        (end, result)
    })
}

/// Joins the active ranks of a scene.
#[track_caller]
pub(super) fn join<N: Network>(network: &Arc<N>, scene: &Arc<Scene>, epoch: Epoch) -> Ends<N> {
    let (network, views) = (Arc::clone(network), Arc::clone(scene));
    let ranks = scene.active_ranks().map(|rank| (rank, ())).collect();
    on_each(ranks, move |rank, ()| (network.join(views.view(epoch, rank)).expect("joins"), ())).0
}

/// Moves ends to the next epoch, all at the same time.
#[track_caller]
pub(super) fn reconfigure<E: HostExchange + 'static>(
    ends: Vec<(Rank, E)>,
    scene: &Arc<Scene>,
    epoch: Epoch,
) -> Vec<(Rank, E)> {
    let scene = Arc::clone(scene);
    let (ends, _) = on_each(ends, move |rank, mut end| {
        end.reconfigure(scene.view(epoch, rank), LONG).expect("moves to the next view");
        (end, ())
    });
    ends
}

/// One rank's part of a step.
pub(super) struct Part<'a> {
    pub(super) scene: &'a Scene,
    pub(super) step: StepId,
    pub(super) within: Duration,
    /// Holds the rank up between calls.
    pub(super) pace: Option<Rng>,
}

impl<'a> Part<'a> {
    pub(super) fn new(scene: &'a Scene, step: u64) -> Self {
        Self { scene, step: StepId(step), within: LONG, pace: None }
    }

    /// All layers and the end. A complete step has been checked row by row.
    #[track_caller]
    pub(super) fn run<E: HostExchange>(mut self, end: &mut E) -> Result<(), ExchangeError> {
        let (epoch, me) = (end.view().epoch, end.view().me);
        if let Some((_, routes)) =
            self.scene.anew.get(me.index()).filter(|(from, _)| *from == self.step)
        {
            end.reroute(Arc::clone(routes));
        }
        self.dawdle();
        let begun = end.begin_step(epoch, self.step, Instant::now() + self.within);
        if begun == Err(ExchangeError::Poisoned { epoch }) {
            // A peer was quicker. The fault can still be asked for.
            return Err(ExchangeError::Faulted(fault(finish(end))));
        }
        begun?;
        let mut wrong = None;
        for layer in 0..self.scene.layers {
            // A fault stands, so `end_step` repeats it.
            match self.layer(end, layer, Point::Next) {
                Ok(difference) => wrong = wrong.or(difference),
                Err(_) => break,
            }
        }
        self.dawdle();
        finish(end)?;
        if let Some(wrong) = wrong {
            panic!("a complete step is wrong: {wrong}; {:?} of {:?}", self.step, self.scene);
        }
        Ok(())
    }

    /// The first layer up to a point, without the end.
    pub(super) fn run_until<E: HostExchange>(
        mut self,
        end: &mut E,
        until: Point,
    ) -> Result<(), ExchangeError> {
        if until == Point::Begin {
            return Ok(());
        }
        let epoch = end.view().epoch;
        end.begin_step(epoch, self.step, Instant::now() + self.within)?;
        self.layer(end, 0, until).map(|_| ())
    }

    /// One layer up to a point. What it says is wrong is wrong if the step is complete in the end.
    fn layer<E: HostExchange>(
        &mut self,
        end: &mut E,
        layer: u16,
        until: Point,
    ) -> Result<Option<String>, ExchangeError> {
        let (me, scene) = (end.view().me, self.scene);
        let place = Place { epoch: end.view().epoch, step: self.step, layer };
        let key = LayerKey { step: self.step, layer };
        let row_bytes = scene.row_bytes;
        let (rows, experts) = (scene.rows(place, me), scene.experts(place, me));
        if until <= Point::DispatchSend {
            return Ok(None);
        }
        self.dawdle();
        let sent = end.dispatch_send(key, HostRows { bytes: &rows, row_bytes }, &experts)?;
        if until <= Point::DispatchRecv {
            return Ok(None);
        }
        self.dawdle();
        let arrived = end.dispatch_recv(sent)?;
        let (here, offsets) = end.arrived(&arrived);
        let expected = scene.arrivals(place, me);
        let mut wrong = (here.bytes != expected.0 || *offsets != expected.1)
            .then(|| format!("arrivals at {me} in {place:?}: {offsets:?}, not {:?}", expected.1));
        let mut results = here.bytes.to_vec();
        for (held, range) in scene.held(layer, me).iter().zip(offsets.windows(2)) {
            let range = range[0] as usize * row_bytes..range[1] as usize * row_bytes;
            for row in results.get_mut(range).unwrap_or_default().chunks_mut(row_bytes) {
                Scene::answer(row, layer, held.0);
            }
        }
        if until <= Point::CombineSend {
            return Ok(wrong);
        }
        self.dawdle();
        let pending = end.combine_send(arrived, HostRows { bytes: &results, row_bytes })?;
        if until <= Point::CombineRecv {
            return Ok(wrong);
        }
        self.dawdle();
        let mut out = vec![0xaa; rows.len()];
        end.combine_recv(pending, &mut out)?;
        if out != scene.answers(place, me) {
            wrong.get_or_insert_with(|| format!("results of {me} in {place:?}"));
        }
        Ok(wrong)
    }

    fn dawdle(&mut self) {
        if let Some(pace) = &mut self.pace {
            pace.dawdle();
        }
    }
}

/// Ends the step.
pub(super) fn finish<E: HostExchange>(end: &mut E) -> Result<(), ExchangeError> {
    match end.end_step() {
        StepOutcome::Complete => Ok(()),
        StepOutcome::Faulted(fault) => Err(ExchangeError::Faulted(fault)),
    }
}

/// The fault of a result that must be one.
#[track_caller]
pub(super) fn fault(result: Result<(), ExchangeError>) -> Fault {
    match result {
        Err(ExchangeError::Faulted(fault)) => fault,
        other => panic!("expected a fault, got {other:?}"),
    }
}

/// A complete step on all ranks: the cluster is well.
#[track_caller]
pub(super) fn well<E: HostExchange + 'static>(
    ends: Vec<(Rank, E)>,
    scene: &Arc<Scene>,
    step: u64,
) -> Vec<(Rank, E)> {
    let scene = Arc::clone(scene);
    let (ends, results) = on_every(ends, move |_, end| Part::new(&scene, step).run(end));
    for (result, (rank, _)) in results.into_iter().zip(&ends) {
        assert_eq!(result, Ok(()), "{rank} in step {step}");
    }
    ends
}
