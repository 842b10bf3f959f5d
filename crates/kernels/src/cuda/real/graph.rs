//! Graphs of a GPU.

use super::{Gpu, failed};
use crate::cuda::driver::CudaError;
use crate::cuda::graphs::{List, Runner};
use cudarc::driver::result;
use cudarc::driver::sys;

/// A graph that was captured.
struct Captured(sys::CUgraph);

impl Drop for Captured {
    fn drop(&mut self) {
        // SAFETY: nobody else has it; what is made of it is of its own.
        let _failed = unsafe { result::graph::destroy(self.0) };
    }
}

/// A graph that can be launched.
pub(in crate::cuda) struct Graph(sys::CUgraphExec);

// SAFETY: CUDA's handles may be used from any thread; it is used by one at a time.
unsafe impl Send for Graph {}

impl Runner for Gpu {
    type Graph = Graph;

    unsafe fn enqueue(&self, list: &List) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        list.iter().try_for_each(|(launch, args)| unsafe { self.launch(launch, args) })
    }

    fn instantiate(&self, list: &List) -> Result<Graph, CudaError> {
        self.patience.check()?;
        self.attached.enter()?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(failed("cuStreamCreate"))?;
        // Nothing runs there, and other threads may do what they like meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream was just made, and is destroyed here. Of the launches only the parameters are taken now.
        let captured = unsafe {
            let captured = result::stream::begin_capture(stream, mode)
                .map_err(failed("cuStreamBeginCapture"))
                .and_then(|()| {
                    let launched = list
                        .iter()
                        .try_for_each(|(launch, args)| self.launch_on(stream, launch, args));
                    let graph = result::stream::end_capture(stream);
                    let graph = graph.map(Captured).map_err(failed("cuStreamEndCapture"));
                    launched.and(graph)
                });
            let _failed = result::stream::destroy(stream);
            captured?
        };
        let flags = sys::CUgraphInstantiate_flags_enum(0);
        // SAFETY: the graph is valid, and nobody else has it. The memory that it needs is taken now, where a refusal does
        // no harm, and not when it is launched first.
        unsafe {
            let graph = result::graph::instantiate(captured.0, flags);
            let graph = graph.map(Graph).map_err(failed("cuGraphInstantiate"))?;
            match result::graph::upload(graph.0, self.queue.stream()) {
                Ok(()) => Ok(graph),
                Err(error) => {
                    self.discard(graph);
                    Err(failed("cuGraphUpload")(error))
                }
            }
        }
    }

    unsafe fn replay(&self, graph: &Graph) -> Result<(), CudaError> {
        self.patience.check()?;
        self.attached.enter()?;
        // SAFETY: the caller's promise for what it launches; it is destroyed in `discard` only.
        unsafe { result::graph::launch(graph.0, self.queue.stream()) }
            .map_err(failed("cuGraphLaunch"))?;
        self.queue.enqueued()
    }

    fn discard(&self, graph: Graph) {
        let well = self.attached.enter().and_then(|()| self.patience.check());
        if well.is_ok() {
            // SAFETY: nobody else has it. One that runs is freed when it is through.
            let _failed = unsafe { result::graph::exec_destroy(graph.0) };
        }
    }
}
