//! What the device's host side needs of CUDA, from a real GPU or from the emulator.

use super::args::Launch;
#[cfg(feature = "emulated")]
use super::emulated::Emulated;
use super::graphs::{GraphFigures, List};
use super::image_cache::ImageCache;
use super::real::Gpu;
use super::timing::KernelTime;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// Why a GPU cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CudaError {
    /// No driver on this machine.
    #[error(
        "no CUDA driver (libcuda.so.1) on this machine: install NVIDIA's driver, or use --device cpu"
    )]
    NoDriver,
    /// The driver is older than the kernels' compiler.
    #[error(
        "the CUDA driver supports CUDA {}.{}, herd needs {}.{} or newer: update NVIDIA's driver",
        found / 1000, found % 1000 / 10, needed / 1000, needed % 1000 / 10
    )]
    OldDriver { found: i32, needed: i32 },
    /// A driver, and nothing for it.
    #[error(
        "CUDA's driver sees no GPU: `nvidia-smi -L` should name one; a container must be given it (--gpus), and \
         CUDA_VISIBLE_DEVICES must not hide it"
    )]
    NoGpu,
    /// There are fewer devices.
    #[error("no device cuda:{ordinal}: this machine has {count}")]
    NoDevice { ordinal: u32, count: u32 },
    /// The architecture lacks what the kernels need.
    #[error("cuda:{ordinal} has compute capability {major}.{minor}, herd needs 8.0 or newer")]
    OldDevice { ordinal: u32, major: i32, minor: i32 },
    /// Its blocks have too little shared memory.
    #[error(
        "cuda:{ordinal} gives a block {shared} bytes of shared memory, herd needs {needed}: A100, H100, H200 and B200 have it"
    )]
    SmallDevice { ordinal: u32, shared: u32, needed: u32 },
    /// The kernels' compiler is missing.
    #[error(
        "no NVRTC (libnvrtc.so.13) on this machine: install the CUDA toolkit, or `pip install nvidia-cuda-nvrtc` and put \
         its lib folder on LD_LIBRARY_PATH"
    )]
    NoCompiler,
    /// The kernels' compiler is too old.
    #[error(
        "the NVRTC that was found first is of CUDA {}.{}, herd needs {}.{} or newer: put the folder of a newer one first on LD_LIBRARY_PATH, and no libnvrtc.so of another before it",
        found.0, found.1, needed.0, needed.1
    )]
    OldCompiler { found: (i32, i32), needed: (i32, i32) },
    /// FP8 weights hold what is no number.
    #[error("a weight in FP8 is not a number; `herd logits --verify` names the tensors")]
    NotFinite,
    /// A kernel was not compiled.
    #[error("{kernel}.cu does not compile for {arch}: {log}")]
    Compile { kernel: &'static str, arch: String, log: String },
    /// The memory is used up.
    #[error("no device memory for the {what}: {bytes} bytes asked for, {free} of {total} are free")]
    Memory { what: &'static str, bytes: usize, free: usize, total: usize },
    /// The device does not come to an end.
    #[error(
        "{device} has not finished within {limit_s} s what it was given: a kernel hangs, or the GPU does; start this process \
         again, and if that does not help reset the GPU (nvidia-smi --gpu-reset); --gpu-limit-s gives steps more time"
    )]
    Hangs { device: String, limit_s: f64 },
    /// Ranks do not agree on who has which expert.
    #[error("row {row} of the step wants an expert that no rank has: the placement is broken")]
    Unserved { row: u32 },
    /// CUDA failed. Most failures of a kernel spoil the context for good.
    #[error("CUDA: {what}: {error}")]
    Failed { what: &'static str, error: String },
}

impl CudaError {
    /// Whether it ends a step, and leaves the device as it was.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Self::Memory { .. } | Self::Unserved { .. } | Self::NotFinite => true,
            Self::NoDriver
            | Self::NoGpu
            | Self::OldDriver { .. }
            | Self::NoDevice { .. }
            | Self::OldDevice { .. }
            | Self::SmallDevice { .. }
            | Self::NoCompiler
            | Self::OldCompiler { .. }
            | Self::Compile { .. }
            | Self::Hangs { .. }
            | Self::Failed { .. } => false,
        }
    }
}

/// How a device is opened.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where compiled kernels are kept, if they are.
    pub cache: Option<ImageCache>,
    /// Longest that whoever waits for the device waits.
    pub wait_max: Duration,
}

/// What was taken of a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// That are held now, as the allocator deals them out.
    pub bytes: u64,
    /// Since the device was opened.
    pub allocations: u64,
}

/// CUDA deals out small pieces by so much ...
const SMALL_PIECE: usize = 512;
/// ... and large ones by a page of the device.
const LARGE_PIECE: usize = 2 << 20;

/// What an allocation takes.
fn dealt_out(bytes: usize) -> u64 {
    let piece = if bytes < LARGE_PIECE / 2 { SMALL_PIECE } else { LARGE_PIECE };
    bytes.next_multiple_of(piece) as u64
}

/// A device and its stream.
pub struct Driver {
    kind: Kind,
    bytes: AtomicU64,
    allocations: AtomicU64,
    /// Ranks on this device.
    ranks: AtomicU32,
    collected: Mutex<Collected>,
    /// The first failure; most spoil the device for the whole process.
    failed: OnceLock<CudaError>,
    /// Times that the host has waited for what it copies.
    #[cfg(feature = "emulated")]
    reads: AtomicU64,
}

/// What a step has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StepKind {
    /// A row of every sequence.
    Decoding,
    /// Prompts, in pieces of any size.
    Others,
}

/// Launches that are not enqueued yet.
#[derive(Default)]
struct Collected {
    /// Whether launches are collected.
    is_on: bool,
    /// Whether kernels are measured, each by itself.
    is_timed: bool,
    list: List,
    /// Memory that they may use and that nobody else has any more, and how much.
    freed: Vec<(u64, usize)>,
}

enum Kind {
    Gpu(Box<Gpu>),
    /// None: says what memory would be taken.
    Plan,
    #[cfg(feature = "emulated")]
    Emulated(Box<Emulated>),
}

impl Driver {
    /// Opens device `cuda:ordinal` and loads the kernels, from the cache if they are there.
    ///
    /// # Errors
    ///
    /// [`CudaError`] with what is missing and what to do about it.
    pub fn open(ordinal: u32, options: &Options) -> Result<Self, CudaError> {
        Ok(Self::of(Kind::Gpu(Box::new(Gpu::open(ordinal, options)?))))
    }

    fn of(kind: Kind) -> Self {
        let (bytes, allocations) = (AtomicU64::new(0), AtomicU64::new(0));
        let (ranks, collected) = (AtomicU32::new(0), Mutex::default());
        Self {
            kind,
            bytes,
            allocations,
            ranks,
            collected,
            failed: OnceLock::new(),
            #[cfg(feature = "emulated")]
            reads: AtomicU64::new(0),
        }
    }

    /// No device: [`Driver::taken`] says what would be taken of one. It computes nothing.
    #[must_use]
    pub fn plan() -> Self {
        Self::of(Kind::Plan)
    }

    /// A device without a GPU: the kernels run on the CPU, slowly.
    ///
    /// # Errors
    ///
    /// [`CudaError::Failed`] if the kernels cannot be compiled.
    #[cfg(feature = "emulated")]
    pub fn emulated() -> Result<Self, CudaError> {
        Ok(Self::of(Kind::Emulated(Box::new(Emulated::open()?))))
    }

    /// The same, but the kernel after so many never ends, and those behind it never begin; whoever waits for them
    /// waits for `wait_max`.
    ///
    /// # Errors
    ///
    /// As for [`Driver::emulated`].
    #[cfg(feature = "emulated")]
    pub fn emulated_until(kernels: u64, wait_max: Duration) -> Result<Self, CudaError> {
        Ok(Self::of(Kind::Emulated(Box::new(Emulated::open()?.hanging_after(kernels, wait_max)))))
    }

    /// How often something was copied to the host so far. For tests.
    #[cfg(feature = "emulated")]
    #[must_use]
    pub fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    /// What the device is, for people and for numeric profiles: its architecture, and its name.
    #[must_use]
    pub fn identity(&self) -> (&str, &str) {
        match &self.kind {
            Kind::Gpu(gpu) => (gpu.arch(), gpu.name()),
            Kind::Plan => ("plan", "no GPU: nothing runs"),
            #[cfg(feature = "emulated")]
            Kind::Emulated(_) => ("emulated", "no GPU: kernels run on the CPU"),
        }
    }

    /// Where a GPU is on the PCI bus, as NVML wants to know; `None` if there is none.
    #[must_use]
    pub fn bus(&self) -> Option<&str> {
        match &self.kind {
            Kind::Gpu(gpu) => gpu.bus(),
            Kind::Plan => None,
            #[cfg(feature = "emulated")]
            Kind::Emulated(_) => None,
        }
    }

    /// Bytes of shared memory that a block may have.
    pub(crate) fn shared_max(&self) -> u32 {
        match &self.kind {
            Kind::Gpu(gpu) => gpu.shared_max(),
            Kind::Plan => 0,
            // As Hopper.
            #[cfg(feature = "emulated")]
            Kind::Emulated(_) => 227 << 10,
        }
    }

    /// Remembers a failure: whatever comes after it means nothing.
    pub(crate) fn fail(&self, error: CudaError) {
        let _first_counts = self.failed.set(error);
    }

    /// The first failure.
    #[must_use]
    pub fn failure(&self) -> Option<&CudaError> {
        self.failed.get()
    }

    /// What was taken of its memory.
    pub fn taken(&self) -> Taken {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Taken { bytes: of(&self.bytes), allocations: of(&self.allocations) }
    }

    pub(crate) fn allocate(&self, what: &'static str, bytes: usize) -> Result<u64, CudaError> {
        let address = match &self.kind {
            Kind::Gpu(gpu) => gpu.allocate(what, bytes),
            // Nobody looks there.
            Kind::Plan => Ok(1),
            #[cfg(feature = "emulated")]
            Kind::Emulated(emulated) => emulated.allocate(what, bytes),
        }?;
        self.bytes.fetch_add(dealt_out(bytes), Ordering::Relaxed);
        self.allocations.fetch_add(1, Ordering::Relaxed);
        Ok(address)
    }

    /// A device that hangs, or whose context is spoilt, has failed, whoever noticed it.
    fn noted<T>(&self, result: Result<T, CudaError>) -> Result<T, CudaError> {
        if let Err(error @ (CudaError::Hangs { .. } | CudaError::Failed { .. })) = &result {
            self.fail(error.clone());
        }
        result
    }

    /// A rank comes to this device.
    pub(crate) fn enter(&self) {
        self.ranks.fetch_add(1, Ordering::Relaxed);
    }

    /// A rank leaves it.
    pub(crate) fn leave(&self) {
        self.ranks.fetch_sub(1, Ordering::Relaxed);
    }

    /// A step begins: if it may be as one before, its launches are collected, and enqueued together when somebody waits for
    /// them. Not where several ranks share the stream, whose launches come in another order each time.
    pub(crate) fn begin_step(&self, kind: StepKind) -> Result<(), CudaError> {
        let mut collected = self.collected();
        self.enqueue_collected(&mut collected)?;
        collected.is_on = kind == StepKind::Decoding
            && !collected.is_timed
            && self.ranks.load(Ordering::Relaxed) == 1;
        Ok(())
    }

    fn collected(&self) -> MutexGuard<'_, Collected> {
        self.collected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enqueues what was collected.
    fn flush(&self) -> Result<(), CudaError> {
        self.enqueue_collected(&mut self.collected())
    }

    #[allow(unsafe_code, reason = "kernels write where they are told to")]
    fn enqueue_collected(&self, collected: &mut Collected) -> Result<(), CudaError> {
        if collected.list.is_empty() {
            return Ok(());
        }
        let list = &collected.list;
        let result = self.noted(match &self.kind {
            // SAFETY: the promise of whoever launched: memory is freed after what was collected is enqueued.
            Kind::Gpu(gpu) => unsafe { gpu.run(list) },
            Kind::Plan => Ok(()),
            #[cfg(feature = "emulated")]
            // SAFETY: as above.
            Kind::Emulated(emulated) => unsafe { emulated.run(list) },
        });
        collected.list.clear();
        for (address, bytes) in std::mem::take(&mut collected.freed) {
            self.free_now(address, bytes);
        }
        result
    }

    /// How often steps were the same as before.
    #[must_use]
    pub fn graphs(&self) -> GraphFigures {
        match &self.kind {
            Kind::Gpu(gpu) => gpu.graphs(),
            Kind::Plan => GraphFigures::default(),
            #[cfg(feature = "emulated")]
            Kind::Emulated(emulated) => emulated.graphs(),
        }
    }

    /// Frees what `allocate` gave for so many bytes. On a device that hangs it stays.
    pub(crate) fn free(&self, address: u64, bytes: usize) {
        let mut collected = self.collected();
        if !collected.list.is_empty() {
            // What was collected may use it.
            collected.freed.push((address, bytes));
            return;
        }
        drop(collected);
        self.free_now(address, bytes);
    }

    fn free_now(&self, address: u64, bytes: usize) {
        self.bytes.fetch_sub(dealt_out(bytes), Ordering::Relaxed);
        // A context that has failed has freed everything.
        let _failed = self.noted(match &self.kind {
            Kind::Gpu(gpu) => gpu.free(address),
            Kind::Plan => Ok(()),
            #[cfg(feature = "emulated")]
            Kind::Emulated(emulated) => emulated.free(address),
        });
    }

    /// Copies to the device. `content` may change once this returns.
    pub(crate) fn write(&self, address: u64, content: &[u8]) -> Result<(), CudaError> {
        self.flush()?;
        self.noted(match &self.kind {
            Kind::Gpu(gpu) => gpu.write(address, content),
            Kind::Plan => Ok(()),
            #[cfg(feature = "emulated")]
            Kind::Emulated(emulated) => emulated.write(address, content),
        })
    }

    /// Waits for all that was enqueued, and copies to the host.
    pub(crate) fn read(&self, address: u64, out: &mut [u8]) -> Result<(), CudaError> {
        #[cfg(feature = "emulated")]
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.flush()?;
        self.noted(match &self.kind {
            Kind::Gpu(gpu) => gpu.read(address, out),
            Kind::Plan => unreachable!("a plan has no values"),
            #[cfg(feature = "emulated")]
            Kind::Emulated(emulated) => emulated.read(address, out),
        })
    }

    /// Measures all kernels from now on, until [`Driver::kernel_times`].
    pub fn time_kernels(&self) {
        // What comes now is enqueued kernel by kernel.
        let mut collected = self.collected();
        if let Err(error) = self.enqueue_collected(&mut collected) {
            self.fail(error);
        }
        collected.is_timed = true;
        collected.is_on = false;
        drop(collected);
        match &self.kind {
            Kind::Gpu(gpu) => gpu.time_kernels(),
            Kind::Plan => {}
            #[cfg(feature = "emulated")]
            Kind::Emulated(emulated) => emulated.time_kernels(),
        }
    }

    /// What every kernel has taken since, the longest first; measures no more. What the host needs to launch one counts
    /// where the device has nothing else to do: kernels of less than some 10 us look slower than they are.
    ///
    /// # Errors
    ///
    /// [`CudaError`] if CUDA fails.
    pub fn kernel_times(&self) -> Result<Vec<KernelTime>, CudaError> {
        self.collected().is_timed = false;
        self.noted(match &self.kind {
            Kind::Gpu(gpu) => gpu.kernel_times(),
            Kind::Plan => Ok(Vec::new()),
            #[cfg(feature = "emulated")]
            Kind::Emulated(emulated) => Ok(emulated.kernel_times()),
        })
    }

    /// Copies to the device beside what is enqueued, and waits until it is there.
    pub(crate) fn bring(&self, address: u64, content: &[u8]) -> Result<(), CudaError> {
        self.noted(match &self.kind {
            Kind::Gpu(gpu) => gpu.bring(address, content),
            Kind::Plan => Ok(()),
            #[cfg(feature = "emulated")]
            Kind::Emulated(emulated) => emulated.write(address, content),
        })
    }

    /// Copies to the host beside what is enqueued.
    pub(crate) fn fetch(&self, address: u64, out: &mut [u8]) -> Result<(), CudaError> {
        self.noted(match &self.kind {
            Kind::Gpu(gpu) => gpu.fetch(address, out),
            Kind::Plan => unreachable!("a plan has no values"),
            #[cfg(feature = "emulated")]
            Kind::Emulated(emulated) => emulated.fetch(address, out),
        })
    }

    /// Enqueues a kernel.
    ///
    /// # Panics
    ///
    /// If there is none of this name.
    ///
    /// # Safety
    ///
    /// The parameters are those of the kernel, in number, order and type, and whatever it reads and writes
    /// through them is memory of this device that lives until the stream has passed the kernel.
    #[allow(unsafe_code, reason = "a kernel writes where it is told to")]
    pub(crate) unsafe fn launch(&self, launch: Launch, args: &[u64]) -> Result<(), CudaError> {
        if launch.grid.contains(&0) {
            // Nothing to do, and an error in CUDA.
            return Ok(());
        }
        let mut collected = self.collected();
        if collected.is_on {
            collected.list.push(launch, args);
            return Ok(());
        }
        drop(collected);
        self.noted(match &self.kind {
            // SAFETY: the caller's promise.
            Kind::Gpu(gpu) => unsafe { gpu.launch(launch, args) },
            Kind::Plan => unreachable!("a plan runs nothing"),
            #[cfg(feature = "emulated")]
            // SAFETY: the caller's promise.
            Kind::Emulated(emulated) => unsafe { emulated.launch(launch, args) },
        })
    }
}
