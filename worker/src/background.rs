//! Threads for what is not urgent: loading experts and moving them between workers. They let the threads
//! of steps, and those that say that this worker lives, have the processor first.

use tokio::runtime::{Builder, Handle, Runtime};

/// How far they give way: they get a tenth of the time that a step's thread gets.
const NICE: i32 = 10;
/// Threads of a [`Background`]: they fill a fast network, and leave cores to the steps.
const THREADS_MAX: usize = 4;

/// Lets the steps' threads have the processor first. What a thread inherits does not add up.
fn give_way() {
    // On Linux a thread's own priority; the process's number names its first thread, which never gives way.
    // If it is refused, steps wait a little longer while experts are loaded.
    let usual = rustix::process::getpriority_process(Some(rustix::process::getpid()));
    let _refused = usual.and_then(|n| rustix::process::setpriority_process(None, n + NICE));
}

/// Runs what waits, or computes for long, on a thread that gives way to the steps.
///
/// # Errors
///
/// If there is no thread to be had.
pub(crate) fn beside_steps(
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> std::io::Result<()> {
    let body = move || {
        give_way();
        work();
    };
    std::thread::Builder::new().name(name.into()).spawn(body).map(drop)
}

/// Threads that read checkpoints; none if there are none to be had.
pub(crate) fn loaders() -> Option<rayon::ThreadPool> {
    rayon::ThreadPoolBuilder::new()
        .thread_name(|index| format!("load-{index}"))
        .start_handler(|_| give_way())
        .build()
        .ok()
}

/// A runtime of its own for connections that carry many bytes: beats must not queue behind those.
/// Dropping it ends what runs there.
pub(crate) struct Background(Option<Runtime>);

impl Background {
    /// # Errors
    ///
    /// If there are no threads to be had.
    pub(crate) fn start() -> std::io::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let runtime = Builder::new_multi_thread()
            .worker_threads(cores.min(THREADS_MAX))
            .thread_name("background")
            .on_thread_start(give_way)
            .enable_all()
            .build()?;
        Ok(Self(Some(runtime)))
    }

    /// Where to spawn what shall run there.
    pub(crate) fn handle(&self) -> Handle {
        let runtime = self.0.as_ref().expect("only dropping takes it");
        runtime.handle().clone()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // Waiting for the threads would hold up the runtime that drops this one.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
