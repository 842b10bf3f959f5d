//! Steps that repeat themselves: launches are collected, and of a list of them that comes a second time a graph of CUDA's
//! is made, which the host enqueues in one call and the device runs with smaller gaps.
//!
//! A list is known again by all that is in it, kernels, grids and parameters, so nobody has to say what changes from
//! step to step: what does is in device memory, where the parameters point. While as many sequences decode, their steps
//! are one list, also when a view brings other experts (`tables.rs`). Prompts come in other sizes each time, and are
//! enqueued kernel by kernel.

use super::args::Launch;
use super::driver::CudaError;
use std::collections::{BTreeMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

/// Shorter lists gain little: a step that travels through the host is many of them.
const LAUNCHES_MIN: usize = 32;

/// Launches of all graphs that are kept: some 60 steps of a large model.
const LAUNCHES_KEPT: usize = 64 << 10;

/// So many lists that came once are remembered.
const SEEN_MAX: usize = 256;

/// Launches in their order, with their parameters.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct List {
    /// With the end of their parameters in `args`.
    launches: Vec<(Launch, usize)>,
    args: Vec<u64>,
}

impl List {
    pub(super) fn push(&mut self, launch: Launch, args: &[u64]) {
        self.args.extend_from_slice(args);
        self.launches.push((launch, self.args.len()));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.launches.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.launches.clear();
        self.args.clear();
    }

    /// Every launch with its parameters.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Launch, &[u64])> {
        let mut begin = 0;
        self.launches.iter().map(move |&(launch, end)| {
            let args = &self.args[begin..end];
            begin = end;
            (launch, args)
        })
    }

    fn key(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

/// A device that runs lists.
pub(super) trait Runner {
    type Graph;

    /// Enqueues launch by launch.
    ///
    /// # Safety
    ///
    /// As for `Driver::launch`, of every launch.
    unsafe fn enqueue(&self, list: &List) -> Result<(), CudaError>;

    /// Makes a graph of a list; nothing runs yet.
    fn instantiate(&self, list: &List) -> Result<Self::Graph, CudaError>;

    /// Enqueues a graph.
    ///
    /// # Safety
    ///
    /// As for `Driver::launch`, of every launch of its list.
    unsafe fn replay(&self, graph: &Self::Graph) -> Result<(), CudaError>;

    /// Gives a graph back, which may be running.
    fn discard(&self, graph: Self::Graph);
}

/// The lists that a device has run lately.
pub(super) struct Graphs<G> {
    /// Hashes of those that came once, the newest last.
    seen: VecDeque<u64>,
    /// Those that came again, by their hash.
    known: BTreeMap<u64, Known<G>>,
    /// Counts lists that were run.
    time: u64,
    figures: GraphFigures,
}

struct Known<G> {
    list: List,
    graph: G,
    /// When it was run last.
    last: u64,
}

/// How often steps were the same as before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GraphFigures {
    /// Graphs that were made.
    pub made: u64,
    /// Lists that were enqueued as a graph.
    pub replayed: u64,
    /// Long lists that were enqueued kernel by kernel.
    pub enqueued: u64,
    /// Why CUDA refuses graphs; none is made any more then.
    pub refused: Option<String>,
}

impl<G> Default for Graphs<G> {
    fn default() -> Self {
        let (seen, known) = (VecDeque::new(), BTreeMap::new());
        Self { seen, known, time: 0, figures: GraphFigures::default() }
    }
}

impl<G> Graphs<G> {
    pub(super) fn figures(&self) -> GraphFigures {
        self.figures.clone()
    }

    /// Enqueues a list, as a graph if there is one.
    ///
    /// # Safety
    ///
    /// As for `Driver::launch`, of every launch.
    pub(super) unsafe fn run<R: Runner<Graph = G>>(
        &mut self,
        runner: &R,
        list: &List,
    ) -> Result<(), CudaError> {
        if list.launches.len() < LAUNCHES_MIN {
            // SAFETY: the caller's promise.
            return unsafe { runner.enqueue(list) };
        }
        self.time += 1;
        let key = list.key();
        if let Some(known) = self.known.get_mut(&key).filter(|known| known.list == *list) {
            known.last = self.time;
            // SAFETY: the caller's promise, since the graph is of the same list.
            match unsafe { runner.replay(&known.graph) } {
                Ok(()) => {
                    self.figures.replayed += 1;
                    return Ok(());
                }
                // Nothing of it runs. Kernel by kernel the device may do it, or say again what is wrong.
                Err(error) => self.figures.refused = Some(error.to_string()),
            }
            self.forget(runner, key);
        }
        self.figures.enqueued += 1;
        // SAFETY: the caller's promise.
        unsafe { runner.enqueue(list) }?;
        // Meanwhile the device works.
        match self.seen.iter().position(|&seen| seen == key) {
            Some(at) => {
                self.seen.remove(at);
                self.make(runner, key, list);
            }
            None => {
                self.seen.push_back(key);
                if SEEN_MAX < self.seen.len() {
                    self.seen.pop_front();
                }
            }
        }
        Ok(())
    }

    /// Makes a graph for the next time; those that were not run for the longest time make room.
    fn make<R: Runner<Graph = G>>(&mut self, runner: &R, key: u64, list: &List) {
        if self.figures.refused.is_some() {
            return;
        }
        // Another list of the same hash.
        self.forget(runner, key);
        let launches = |known: &Known<G>| known.list.launches.len();
        while LAUNCHES_KEPT < self.known.values().map(launches).sum::<usize>() + list.launches.len()
            && let Some(oldest) = self.known.iter().min_by_key(|(_, known)| known.last)
        {
            let oldest = *oldest.0;
            self.forget(runner, oldest);
        }
        match runner.instantiate(list) {
            Ok(graph) => {
                self.figures.made += 1;
                self.known.insert(key, Known { list: list.clone(), graph, last: self.time });
            }
            Err(error) => self.figures.refused = Some(error.to_string()),
        }
    }

    fn forget<R: Runner<Graph = G>>(&mut self, runner: &R, key: u64) {
        if let Some(known) = self.known.remove(&key) {
            runner.discard(known.graph);
        }
    }

    /// Gives all graphs back.
    pub(super) fn clear<R: Runner<Graph = G>>(&mut self, runner: &R) {
        let known = std::mem::take(&mut self.known).into_values();
        known.for_each(|known| runner.discard(known.graph));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};

    /// Notes what is asked of it.
    #[derive(Default)]
    struct Notes {
        all: RefCell<Vec<String>>,
        refuses_to_make: bool,
        refuses_to_run: Cell<bool>,
    }

    impl Notes {
        fn note(&self, text: String) {
            self.all.borrow_mut().push(text);
        }

        fn take(&self) -> Vec<String> {
            self.all.take()
        }
    }

    const NO: CudaError = CudaError::Failed { what: "a graph", error: String::new() };

    impl Runner for Notes {
        type Graph = u64;

        unsafe fn enqueue(&self, list: &List) -> Result<(), CudaError> {
            self.note(format!("enqueue {}", list.launches.len()));
            Ok(())
        }

        fn instantiate(&self, list: &List) -> Result<u64, CudaError> {
            if self.refuses_to_make {
                return Err(NO);
            }
            self.note(format!("make {}", list.args[0]));
            Ok(list.args[0])
        }

        unsafe fn replay(&self, graph: &u64) -> Result<(), CudaError> {
            if self.refuses_to_run.get() {
                return Err(NO);
            }
            self.note(format!("replay {graph}"));
            Ok(())
        }

        fn discard(&self, graph: u64) {
            self.note(format!("discard {graph}"));
        }
    }

    /// As many launches, of which the first has this parameter.
    fn list(launches: usize, parameter: u64) -> List {
        let mut list = List::default();
        for i in 0..launches as u64 {
            let launch = Launch { kernel: "herd_add", grid: [1, 1, 1], block: 32, shared: 0 };
            list.push(launch, &[if i == 0 { parameter } else { i }, 7]);
        }
        list
    }

    fn run(graphs: &mut Graphs<u64>, notes: &Notes, list: &List) {
        // SAFETY: nothing is launched.
        unsafe { graphs.run(notes, list) }.unwrap();
    }

    #[test]
    fn list_that_comes_again_is_a_graph() {
        let (mut graphs, notes) = (Graphs::default(), Notes::default());
        for _ in 0..4 {
            run(&mut graphs, &notes, &list(40, 1));
        }
        assert_eq!(notes.take(), ["enqueue 40", "enqueue 40", "make 1", "replay 1", "replay 1"]);
        run(&mut graphs, &notes, &list(40, 2));
        run(&mut graphs, &notes, &list(41, 1));
        assert_eq!(notes.take(), ["enqueue 40", "enqueue 41"], "other parameters, other kernels");
        run(&mut graphs, &notes, &list(40, 1));
        assert_eq!(notes.take(), ["replay 1"]);
        let figures = GraphFigures { made: 1, replayed: 3, enqueued: 4, refused: None };
        assert_eq!(graphs.figures(), figures);
    }

    #[test]
    fn short_lists_are_enqueued() {
        let (mut graphs, notes) = (Graphs::default(), Notes::default());
        for _ in 0..3 {
            run(&mut graphs, &notes, &list(LAUNCHES_MIN - 1, 1));
        }
        assert_eq!(notes.take(), ["enqueue 31"; 3]);
    }

    #[test]
    fn lists_that_come_once_drive_no_graph_out() {
        let (mut graphs, notes) = (Graphs::default(), Notes::default());
        for _ in 0..2 {
            run(&mut graphs, &notes, &list(32, 0));
        }
        for parameter in 1..1000 {
            run(&mut graphs, &notes, &list(1000, parameter));
        }
        notes.take();
        run(&mut graphs, &notes, &list(32, 0));
        assert_eq!(notes.take(), ["replay 0"]);
    }

    #[test]
    fn oldest_graphs_make_room() {
        let (mut graphs, notes) = (Graphs::default(), Notes::default());
        let quarter = LAUNCHES_KEPT / 4;
        for parameter in [0, 0, 1, 1, 2, 2, 3, 3, 0] {
            run(&mut graphs, &notes, &list(quarter, parameter));
        }
        notes.take();
        for _ in 0..2 {
            run(&mut graphs, &notes, &list(quarter + 1, 4));
        }
        let enqueued = format!("enqueue {}", quarter + 1);
        // 0 was run later.
        assert_eq!(notes.take(), [&enqueued, &enqueued, "discard 1", "discard 2", "make 4"]);
        graphs.clear(&notes);
        assert_eq!(notes.take().len(), 3);
    }

    #[test]
    fn device_without_graphs_runs_all_the_same_and_is_asked_once() {
        let refused = Some("CUDA: a graph: ".to_owned());
        let mut graphs = Graphs::default();
        let notes = Notes { refuses_to_make: true, ..Notes::default() };
        for _ in 0..4 {
            run(&mut graphs, &notes, &list(32, 1));
        }
        assert_eq!(notes.take(), ["enqueue 32"; 4]);
        let figures = GraphFigures { made: 0, replayed: 0, enqueued: 4, refused: refused.clone() };
        assert_eq!(graphs.figures(), figures);
        // It made one, and cannot run it.
        let (mut graphs, notes) = (Graphs::default(), Notes::default());
        for _ in 0..2 {
            run(&mut graphs, &notes, &list(32, 1));
        }
        notes.refuses_to_run.set(true);
        notes.take();
        for _ in 0..3 {
            run(&mut graphs, &notes, &list(32, 1));
        }
        let want = ["discard 1", "enqueue 32", "enqueue 32", "enqueue 32"];
        assert_eq!(
            (notes.take(), graphs.figures().refused),
            (want.map(String::from).to_vec(), refused)
        );
    }

    #[test]
    fn launches_come_out_as_they_went_in() {
        let list = list(3, 9);
        let args: Vec<&[u64]> = list.iter().map(|(_, args)| args).collect();
        assert_eq!(args, [[9, 7], [1, 7], [2, 7]]);
    }
}
