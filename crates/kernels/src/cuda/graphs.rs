//! Steps that repeat themselves: launches are collected, and a list of them that comes a second time becomes a graph of
//! CUDA's, which the host enqueues in one call and the device runs with smaller gaps.
//!
//! A list is known again by all that is in it, kernels, grids and parameters, so nobody has to say what changes from
//! step to step: what does is in device memory, where the parameters point. While as many sequences decode, their steps
//! are one list. Prompts come in other sizes each time, and are enqueued kernel by kernel.

use super::args::Launch;
use super::driver::CudaError;
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Shorter lists gain nothing.
const LAUNCHES_MIN: usize = 16;

/// Lists that are known at most. With a graph each, some 100 MB of the device's memory for a large model.
const KNOWN_MAX: usize = 64;

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
    /// By their hash.
    known: BTreeMap<u64, Known<G>>,
    /// Counts lists that were run.
    time: u64,
    figures: GraphFigures,
}

struct Known<G> {
    list: List,
    /// From the second time on.
    graph: Option<G>,
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
        Self { known: BTreeMap::new(), time: 0, figures: GraphFigures::default() }
    }
}

impl<G> Graphs<G> {
    pub(super) fn figures(&self) -> GraphFigures {
        self.figures.clone()
    }

    /// Enqueues a list, as a graph if it is known.
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
            if known.graph.is_none() && self.figures.refused.is_none() {
                match runner.instantiate(list) {
                    Ok(graph) => {
                        known.graph = Some(graph);
                        self.figures.made += 1;
                    }
                    Err(error) => self.figures.refused = Some(error.to_string()),
                }
            }
            if let Some(graph) = &known.graph {
                self.figures.replayed += 1;
                // SAFETY: the caller's promise, since the graph is of the same list.
                return unsafe { runner.replay(graph) };
            }
        } else {
            self.note(runner, key, list);
        }
        self.figures.enqueued += 1;
        // SAFETY: the caller's promise.
        unsafe { runner.enqueue(list) }
    }

    /// Knows a list, in place of the one that was not run for the longest time.
    fn note<R: Runner<Graph = G>>(&mut self, runner: &R, key: u64, list: &List) {
        if KNOWN_MAX <= self.known.len() {
            let oldest = self.known.iter().min_by_key(|(_, known)| known.last);
            if let Some(key) = oldest.map(|(&key, _)| key) {
                self.forget(runner, key);
            }
        }
        // Another list of the same hash.
        self.forget(runner, key);
        let known = Known { list: list.clone(), graph: None, last: self.time };
        self.known.insert(key, known);
    }

    fn forget<R: Runner<Graph = G>>(&mut self, runner: &R, key: u64) {
        if let Some(graph) = self.known.remove(&key).and_then(|known| known.graph) {
            runner.discard(graph);
        }
    }

    /// Gives all graphs back.
    pub(super) fn clear<R: Runner<Graph = G>>(&mut self, runner: &R) {
        let graphs = std::mem::take(&mut self.known).into_values().filter_map(|known| known.graph);
        graphs.for_each(|graph| runner.discard(graph));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// Notes what is asked of it.
    #[derive(Default)]
    struct Notes {
        all: RefCell<Vec<String>>,
        refuses: bool,
    }

    impl Notes {
        fn note(&self, text: String) {
            self.all.borrow_mut().push(text);
        }

        fn take(&self) -> Vec<String> {
            self.all.take()
        }
    }

    impl Runner for Notes {
        type Graph = u64;

        unsafe fn enqueue(&self, list: &List) -> Result<(), CudaError> {
            self.note(format!("enqueue {}", list.launches.len()));
            Ok(())
        }

        fn instantiate(&self, list: &List) -> Result<u64, CudaError> {
            if self.refuses {
                return Err(CudaError::Failed { what: "cuGraphInstantiate", error: "no".into() });
            }
            self.note(format!("make {}", list.args[0]));
            Ok(list.args[0])
        }

        unsafe fn replay(&self, graph: &u64) -> Result<(), CudaError> {
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
        for _ in 0..3 {
            run(&mut graphs, &notes, &list(20, 1));
        }
        assert_eq!(notes.take(), ["enqueue 20", "make 1", "replay 1", "replay 1"]);
        run(&mut graphs, &notes, &list(20, 2));
        run(&mut graphs, &notes, &list(21, 1));
        assert_eq!(notes.take(), ["enqueue 20", "enqueue 21"], "other parameters, other kernels");
        run(&mut graphs, &notes, &list(20, 1));
        assert_eq!(notes.take(), ["replay 1"]);
        let figures = GraphFigures { made: 1, replayed: 3, enqueued: 3, refused: None };
        assert_eq!(graphs.figures(), figures);
    }

    #[test]
    fn short_lists_are_enqueued() {
        let (mut graphs, notes) = (Graphs::default(), Notes::default());
        for _ in 0..3 {
            run(&mut graphs, &notes, &list(LAUNCHES_MIN - 1, 1));
        }
        assert_eq!(notes.take(), ["enqueue 15"; 3]);
    }

    #[test]
    fn oldest_graph_is_given_back_where_there_are_many() {
        let (mut graphs, notes) = (Graphs::default(), Notes::default());
        let most = KNOWN_MAX as u64;
        for parameter in (0..most).chain(0..most).chain([0]) {
            run(&mut graphs, &notes, &list(16, parameter));
        }
        notes.take();
        run(&mut graphs, &notes, &list(16, most));
        assert_eq!(notes.take(), ["discard 1", "enqueue 16"], "0 was run later");
        graphs.clear(&notes);
        assert_eq!(notes.take().len(), KNOWN_MAX - 1);
    }

    #[test]
    fn device_without_graphs_runs_all_the_same_and_is_asked_once() {
        let mut graphs = Graphs::default();
        let notes = Notes { refuses: true, ..Notes::default() };
        for _ in 0..3 {
            run(&mut graphs, &notes, &list(16, 1));
        }
        assert_eq!(notes.take(), ["enqueue 16"; 3]);
        let refused = Some("CUDA: cuGraphInstantiate: no".to_owned());
        assert_eq!(graphs.figures(), GraphFigures { made: 0, replayed: 0, enqueued: 3, refused });
    }

    #[test]
    fn launches_come_out_as_they_went_in() {
        let list = list(3, 9);
        let args: Vec<&[u64]> = list.iter().map(|(_, args)| args).collect();
        assert_eq!(args, [[9, 7], [1, 7], [2, 7]]);
    }
}
