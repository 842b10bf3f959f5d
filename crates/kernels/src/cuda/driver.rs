//! What the device's host side needs of CUDA, from a real GPU or from the emulator.

use super::args::Launch;
#[cfg(feature = "emulated")]
use super::emulated::Emulated;
use super::image_cache::ImageCache;
use super::real::Gpu;
use std::sync::OnceLock;
#[cfg(feature = "emulated")]
use std::sync::atomic::{AtomicU64, Ordering};

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
        "the NVRTC that was found first is of CUDA {}.{}, herd needs {}.{} or newer: put the folder of a newer one first on          LD_LIBRARY_PATH, and no libnvrtc.so of another before it",
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
    /// CUDA failed. Most failures of a kernel spoil the context for good.
    #[error("CUDA: {what}: {error}")]
    Failed { what: &'static str, error: String },
}

/// A device and its stream.
pub struct Driver {
    kind: Kind,
    /// The first failure; most spoil the device for the whole process.
    failed: OnceLock<CudaError>,
    /// Times that the host has waited for what it copies.
    #[cfg(feature = "emulated")]
    reads: AtomicU64,
}

enum Kind {
    Gpu(Gpu),
    #[cfg(feature = "emulated")]
    Emulated(Emulated),
}

impl Driver {
    /// Opens device `cuda:ordinal` and loads the kernels, from the cache if they are there.
    ///
    /// # Errors
    ///
    /// [`CudaError`] with what is missing and what to do about it.
    pub fn open(ordinal: u32, cache: Option<&ImageCache>) -> Result<Self, CudaError> {
        Ok(Self::of(Kind::Gpu(Gpu::open(ordinal, cache)?)))
    }

    /// A device without a GPU: the kernels run on the CPU, slowly.
    ///
    /// # Errors
    ///
    /// [`CudaError::Failed`] if the kernels cannot be compiled.
    #[cfg(feature = "emulated")]
    pub fn emulated() -> Result<Self, CudaError> {
        Ok(Self::of(Kind::Emulated(Emulated::open()?)))
    }

    /// How often something was copied to the host so far. For tests.
    #[cfg(feature = "emulated")]
    #[must_use]
    pub fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    fn of(kind: Kind) -> Self {
        Self {
            kind,
            failed: OnceLock::new(),
            #[cfg(feature = "emulated")]
            reads: AtomicU64::new(0),
        }
    }

    /// What the device is, for people and for numeric profiles: its architecture, and its name.
    #[must_use]
    pub fn identity(&self) -> (&str, &str) {
        match &self.kind {
            Kind::Gpu(gpu) => (gpu.arch(), gpu.name()),
            #[cfg(feature = "emulated")]
            Kind::Emulated(_) => ("emulated", "no GPU: kernels run on the CPU"),
        }
    }

    /// Bytes of shared memory that a block may have.
    pub(crate) fn shared_max(&self) -> u32 {
        match &self.kind {
            Kind::Gpu(gpu) => gpu.shared_max(),
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

    pub(crate) fn allocate(&self, what: &'static str, bytes: usize) -> Result<u64, CudaError> {
        match &self.kind {
            Kind::Gpu(gpu) => gpu.allocate(what, bytes),
            #[cfg(feature = "emulated")]
            Kind::Emulated(emulated) => emulated.allocate(what, bytes),
        }
    }

    /// Frees what `allocate` gave.
    pub(crate) fn free(&self, address: u64) {
        match &self.kind {
            Kind::Gpu(gpu) => gpu.free(address),
            #[cfg(feature = "emulated")]
            Kind::Emulated(emulated) => emulated.free(address),
        }
    }

    /// Copies to the device. `content` may change once this returns.
    pub(crate) fn write(&self, address: u64, content: &[u8]) -> Result<(), CudaError> {
        match &self.kind {
            Kind::Gpu(gpu) => gpu.write(address, content),
            #[cfg(feature = "emulated")]
            Kind::Emulated(emulated) => {
                emulated.write(address, content);
                Ok(())
            }
        }
    }

    /// Waits for all that was enqueued, and copies to the host.
    pub(crate) fn read(&self, address: u64, out: &mut [u8]) -> Result<(), CudaError> {
        #[cfg(feature = "emulated")]
        self.reads.fetch_add(1, Ordering::Relaxed);
        match &self.kind {
            Kind::Gpu(gpu) => gpu.read(address, out),
            #[cfg(feature = "emulated")]
            Kind::Emulated(emulated) => {
                emulated.read(address, out);
                Ok(())
            }
        }
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
        match &self.kind {
            // SAFETY: the caller's promise.
            Kind::Gpu(gpu) => unsafe { gpu.launch(launch, args) },
            #[cfg(feature = "emulated")]
            Kind::Emulated(emulated) => {
                // SAFETY: the caller's promise.
                unsafe { emulated.launch(launch, args) };
                Ok(())
            }
        }
    }
}
