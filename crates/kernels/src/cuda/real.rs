//! A GPU: its context, one stream, and the kernels.

mod graph;

use super::args::Launch;
use super::compile::{self, compile};
use super::driver::{CudaError, Options};
use super::graphs::{GraphFigures, Graphs, List};
use super::image_cache::{ImageCache, Key};
use super::queue::Queue;
use super::sources::{SOURCES, Source};
use super::timing::{KernelTime, Timed};
use super::wait::Patience;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use graph::Graph;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_void};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

/// CUDA 13.0: the kernels' compiler makes nothing that older drivers load.
const VERSION_MIN: i32 = 13_000;

/// What the kernels of routed experts take, which have no smaller form: A100 and later GPUs for datacenters have it.
const SHARED_NEEDED: u32 = 112 * 1024;

/// Copies beside the steps at once: enough for all that PCI Express carries, and with the steps' queue fewer than a device
/// keeps apart without being told to (8).
const LANES: usize = 4;

/// Shared memory that a kernel may use without asking.
const SHARED_FREE: u32 = 48 * 1024;

/// An open device.
pub(super) struct Gpu {
    /// The steps'.
    queue: Queue,
    /// Queues for copies beside the steps, as far as nobody has taken them.
    lanes: Mutex<Vec<Queue>>,
    lane_is_free: Condvar,
    kernels: BTreeMap<&'static str, Kernel>,
    patience: Arc<Patience>,
    /// While kernels are measured.
    timed: Mutex<Option<Timed>>,
    graphs: Mutex<Graphs<Graph>>,
    // Dropped last.
    attached: Attached,
}

// SAFETY: CUDA's handles may be used from any thread, as long as the context is current there: every method sees
// to that.
unsafe impl Send for Gpu {}
// SAFETY: as above; the driver locks what it needs to.
unsafe impl Sync for Gpu {}

/// A kernel, and the shared memory that its launches may ask for so far.
struct Kernel {
    function: sys::CUfunction,
    granted: Mutex<u32>,
}

/// A device that will do, without kernels and stream.
struct Attached {
    device: sys::CUdevice,
    context: sys::CUcontext,
    /// What `herd status` shows.
    name: String,
    /// Where it is, for NVML.
    bus: Option<String>,
    arch: String,
    shared_max: u32,
}

impl Attached {
    fn new(ordinal: u32) -> Result<Self, CudaError> {
        probe()?;
        let count = result::device::get_count().map_err(failed("cuDeviceGetCount"))?;
        let index = i32::try_from(ordinal).ok().filter(|index| *index < count);
        let count = count.cast_unsigned();
        let index = index.ok_or(CudaError::NoDevice { ordinal, count })?;
        let device = result::device::get(index).map_err(failed("cuDeviceGet"))?;
        let (major, minor) = capability(device)?;
        if major < 8 {
            return Err(CudaError::OldDevice { ordinal, major, minor });
        }
        let shared_max = shared_max(device)?;
        if shared_max < SHARED_NEEDED {
            let (shared, needed) = (shared_max, SHARED_NEEDED);
            return Err(CudaError::SmallDevice { ordinal, shared, needed });
        }
        let name = result::device::get_name(device).map_err(failed("cuDeviceGetName"))?;
        // SAFETY: the device exists; the context is released in `release`.
        let context = unsafe { result::primary_ctx::retain(device) }
            .map_err(failed("cuDevicePrimaryCtxRetain"))?;
        let (bus, arch) = (bus(device), arch(major, minor));
        Ok(Self { device, context, name, bus, arch, shared_max })
    }

    /// Makes the context current in this thread.
    fn enter(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained until `release`.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("cuCtxSetCurrent"))
    }

    /// Gives the context back. That waits for all that runs there, without a limit.
    fn release(&self) {
        // SAFETY: retained in `new`, and nobody uses it any more. What fails here has failed before.
        let _failed = unsafe { result::primary_ctx::release(self.device) };
    }
}

impl Gpu {
    /// Opens a device and loads the kernels.
    pub(super) fn open(ordinal: u32, options: &Options) -> Result<Self, CudaError> {
        // A machine without a GPU lacks the driver first.
        probe()?;
        compile::version()?;
        let attached = Attached::new(ordinal)?;
        attached.enter()?;
        let patience = Arc::new(Patience::new(format!("cuda:{ordinal}"), options.wait_max));
        let queue = Queue::new(Arc::clone(&patience))?;
        let lanes = (0..LANES).map(|_| Queue::beside(Arc::clone(&patience)));
        let lanes = Mutex::new(lanes.collect::<Result<_, _>>()?);
        let (kernels, lane_is_free) = (BTreeMap::new(), Condvar::new());
        let (timed, graphs) = (Mutex::default(), Mutex::default());
        let mut gpu =
            Self { queue, lanes, lane_is_free, kernels, patience, timed, graphs, attached };
        gpu.load(options.cache.as_ref())?;
        Ok(gpu)
    }

    /// As NVIDIA names it.
    #[must_use]
    pub(super) fn name(&self) -> &str {
        &self.attached.name
    }

    /// Its place on the PCI bus.
    pub(super) fn bus(&self) -> Option<&str> {
        self.attached.bus.as_deref()
    }

    /// What the kernels were compiled for.
    #[must_use]
    pub(super) fn arch(&self) -> &str {
        &self.attached.arch
    }

    pub(super) fn shared_max(&self) -> u32 {
        self.attached.shared_max
    }

    /// Loads the kernels; compiles those that are not in the cache.
    fn load(&mut self, cache: Option<&ImageCache>) -> Result<(), CudaError> {
        for source in SOURCES {
            let module = self.module(*source, cache)?;
            for kernel in source.kernels() {
                let name = CString::new(kernel).expect("names hold no zero");
                // SAFETY: the module was loaded above.
                let function = unsafe { result::module::get_function(module, name) }
                    .map_err(failed("cuModuleGetFunction"))?;
                let granted = Mutex::new(SHARED_FREE);
                self.kernels.insert(kernel, Kernel { function, granted });
            }
        }
        Ok(())
    }

    /// Loads a file of kernels.
    fn module(
        &self,
        source: Source,
        cache: Option<&ImageCache>,
    ) -> Result<sys::CUmodule, CudaError> {
        let (text, arch) = (source.text(), &self.attached.arch);
        let compiler = compile::version()?;
        let key = Key { name: source.name, text: &text, arch, compiler };
        let load = |image: &[u8]| {
            // SAFETY: the image was made by the compiler for this device, or kept by whoever owns the cache; the
            // driver checks its form. Modules live as long as the context.
            unsafe { result::module::load_data(image.as_ptr().cast()) }
        };
        if let Some(module) = cache.and_then(|cache| load(&cache.get(key)?).ok()) {
            return Ok(module);
        }
        let compiled = compile(source, arch)?;
        if let Some(cache) = cache {
            cache.put(key, &compiled.image);
        }
        load(&compiled.image).map_err(failed("cuModuleLoadData"))
    }

    pub(super) fn allocate(&self, what: &'static str, bytes: usize) -> Result<u64, CudaError> {
        self.patience.check()?;
        self.attached.enter()?;
        // SAFETY: the memory has no content, and nobody reads it before something is written.
        match unsafe { result::malloc_sync(bytes) } {
            Ok(address) => Ok(address),
            Err(DriverError(sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let (free, total) = result::mem_get_info().unwrap_or_default();
                Err(CudaError::Memory { what, bytes, free, total })
            }
            Err(error) => Err(failed("cuMemAlloc")(error)),
        }
    }

    /// Frees what `allocate` gave, once the device is through with what was enqueued.
    pub(super) fn free(&self, address: u64) -> Result<(), CudaError> {
        self.attached.enter()?;
        self.queue.wait()?;
        // SAFETY: `allocate` gave it, the buffer that had it is gone, and no kernel uses it any more.
        unsafe { result::free_sync(address) }.map_err(failed("cuMemFree"))
    }

    pub(super) fn write(&self, address: u64, content: &[u8]) -> Result<(), CudaError> {
        if content.is_empty() {
            return Ok(());
        }
        self.attached.enter()?;
        self.queue.write(address, content)
    }

    pub(super) fn read(&self, address: u64, out: &mut [u8]) -> Result<(), CudaError> {
        self.attached.enter()?;
        self.queue.read(address, out)
    }

    pub(super) fn time_kernels(&self) {
        *lock(&self.timed) = Some(Timed::default());
    }

    pub(super) fn kernel_times(&self) -> Result<Vec<KernelTime>, CudaError> {
        self.attached.enter()?;
        let timed = lock(&self.timed).take();
        self.queue.wait()?;
        timed.map_or(Ok(Vec::new()), |timed| timed.read())
    }

    /// Copies to the device beside the steps, and waits until it is there.
    pub(super) fn bring(&self, address: u64, content: &[u8]) -> Result<(), CudaError> {
        if content.is_empty() {
            return Ok(());
        }
        self.on_a_lane(|lane| {
            lane.write(address, content)?;
            lane.wait()
        })
    }

    /// Copies to the host beside the steps.
    pub(super) fn fetch(&self, address: u64, out: &mut [u8]) -> Result<(), CudaError> {
        self.on_a_lane(|lane| lane.read(address, out))
    }

    fn on_a_lane(
        &self,
        copy: impl FnOnce(&Queue) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        self.attached.enter()?;
        let lane = loop {
            let mut lanes = lock(&self.lanes);
            if let Some(lane) = lanes.pop() {
                break lane;
            }
            // Whoever has one waits no longer than the limit.
            drop(self.lane_is_free.wait(lanes).unwrap_or_else(PoisonError::into_inner));
        };
        let result = self.patience.check().and_then(|()| copy(&lane));
        lock(&self.lanes).push(lane);
        self.lane_is_free.notify_one();
        result
    }

    /// Enqueues a kernel.
    ///
    /// # Safety
    ///
    /// As for `Driver::launch`.
    pub(super) unsafe fn launch(&self, launch: Launch, args: &[u64]) -> Result<(), CudaError> {
        self.patience.check()?;
        self.attached.enter()?;
        let stream = self.queue.stream();
        let mut timed = lock(&self.timed);
        let before = timed.as_ref().map(|_| Timed::event(stream)).transpose()?;
        // SAFETY: the caller's promise.
        unsafe { self.launch_on(stream, launch, args) }?;
        if let Some((timed, before)) = timed.as_mut().zip(before) {
            timed.note(launch.kernel, [before, Timed::event(stream)?]);
            // The events.
            self.queue.enqueued()?;
            self.queue.enqueued()?;
        }
        drop(timed);
        self.queue.enqueued()
    }

    /// # Safety
    ///
    /// As for `Driver::launch`.
    unsafe fn launch_on(
        &self,
        stream: sys::CUstream,
        Launch { kernel, grid: [x, y, z], block, shared }: Launch,
        args: &[u64],
    ) -> Result<(), CudaError> {
        let Kernel { function, granted } =
            self.kernels.get(kernel).expect("every kernel was loaded");
        let mut pointers: Vec<*mut c_void> =
            args.iter().map(|arg| std::ptr::from_ref(arg).cast_mut().cast()).collect();
        let attribute =
            sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let (grid, block) = ((x, y, z), (block, 1, 1));
        // SAFETY: the caller's promise; the driver copies the parameters before it returns.
        unsafe {
            let mut granted = lock(granted);
            if *granted < shared {
                let bytes = shared.cast_signed();
                result::function::set_function_attribute(*function, attribute, bytes)
                    .map_err(failed(kernel))?;
                *granted = shared;
            }
            drop(granted);
            result::launch_kernel(*function, grid, block, shared, stream, &mut pointers)
                .map_err(failed(kernel))
        }
    }

    /// Enqueues launches, as a graph if they have come before.
    ///
    /// # Safety
    ///
    /// As for `Driver::launch`, of every launch.
    pub(super) unsafe fn run(&self, list: &List) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { lock(&self.graphs).run(self, list) }
    }

    pub(super) fn graphs(&self) -> GraphFigures {
        lock(&self.graphs).figures()
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // What fails here has failed before.
        let _failed = self.attached.enter();
        let mut graphs = std::mem::take(&mut *lock(&self.graphs));
        graphs.clear(self);
        self.queue.close();
        let lanes = self.lanes.get_mut().unwrap_or_else(PoisonError::into_inner);
        lanes.iter().for_each(Queue::close);
        if self.patience.check().is_ok() {
            self.attached.release();
        }
    }
}

/// Bytes of a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    pub free: u64,
    pub total: u64,
}

/// The memory of device `cuda:ordinal`, without opening it for good.
///
/// # Errors
///
/// [`CudaError`] with what is missing and what to do about it.
pub fn memory(ordinal: u32) -> Result<Memory, CudaError> {
    let attached = Attached::new(ordinal)?;
    let asked =
        attached.enter().and_then(|()| result::mem_get_info().map_err(failed("cuMemGetInfo")));
    attached.release();
    let (free, total) = asked?;
    Ok(Memory { free: free as u64, total: total as u64 })
}

/// Such as `0000:17:00.0`.
fn bus(device: sys::CUdevice) -> Option<String> {
    // As long as CUDA asks for, and some more.
    let mut text = [0_u8; 32];
    let bytes = i32::try_from(text.len()).ok()?;
    // SAFETY: there is room for so many bytes, and the device exists.
    let asked = unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr().cast(), bytes, device) };
    asked.result().ok()?;
    Some(CStr::from_bytes_until_nul(&text).ok()?.to_str().ok()?.to_owned())
}

/// The feature set of the kernels: that of Hopper and of datacenter Blackwell where there is one, else the plain one.
fn arch(major: i32, minor: i32) -> String {
    let own = if 9 <= major { "a" } else { "" };
    format!("sm_{major}{minor}{own}")
}

fn shared_max(device: sys::CUdevice) -> Result<u32, CudaError> {
    let attribute =
        sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    // SAFETY: the device exists.
    let bytes = unsafe { result::device::get_attribute(device, attribute) };
    Ok(bytes.map_err(failed("cuDeviceGetAttribute"))?.cast_unsigned())
}

fn capability(device: sys::CUdevice) -> Result<(i32, i32), CudaError> {
    use sys::CUdevice_attribute_enum as Attribute;
    // SAFETY: the device exists.
    let ask = |attribute| unsafe { result::device::get_attribute(device, attribute) };
    let major = ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
    let minor = ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    Ok((
        major.map_err(failed("cuDeviceGetAttribute"))?,
        minor.map_err(failed("cuDeviceGetAttribute"))?,
    ))
}

/// Whether there is a driver that will do, and a compiler; asked once.
fn probe() -> Result<(), CudaError> {
    #[derive(Clone)]
    enum Found {
        Nothing,
        NoDevice,
        Version(i32),
        Failed(String),
    }
    static FOUND: OnceLock<Found> = OnceLock::new();
    let ask = || {
        let look = || {
            // SAFETY: opens a library and closes it; NVIDIA's have no effect when they are opened.
            if !unsafe { sys::is_culib_present() } {
                return Found::Nothing;
            }
            let mut version = 0;
            // SAFETY: `version` is valid for writing.
            let asked = unsafe { sys::cuDriverGetVersion(&raw mut version) }.result();
            match asked.and_then(|()| result::init()) {
                Ok(()) => Found::Version(version),
                // An old driver cannot say it in any other way.
                Err(_) if 0 < version && version < VERSION_MIN => Found::Version(version),
                Err(DriverError(sys::cudaError_enum::CUDA_ERROR_NO_DEVICE)) => Found::NoDevice,
                Err(error) => Found::Failed(words(error)),
            }
        };
        // A library that lacks a symbol makes cudarc panic: it is too old.
        std::panic::catch_unwind(look).unwrap_or(Found::Version(0))
    };
    match FOUND.get_or_init(ask).clone() {
        Found::Nothing => Err(CudaError::NoDriver),
        Found::NoDevice => Err(CudaError::NoGpu),
        Found::Failed(error) => Err(CudaError::Failed { what: "cuInit", error }),
        Found::Version(found) if found < VERSION_MIN => {
            Err(CudaError::OldDriver { found, needed: VERSION_MIN })
        }
        Found::Version(_) => Ok(()),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What they guard is of one piece.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Names the call that failed.
pub(super) fn failed(what: &'static str) -> impl Fn(DriverError) -> CudaError {
    move |error| CudaError::Failed { what, error: words(error) }
}

/// As CUDA's driver puts it, with the name to look for.
fn words(error: DriverError) -> String {
    let text = |asked: Result<&CStr, DriverError>| {
        asked.map_or_else(|_| format!("{:?}", error.0), |text| text.to_string_lossy().into_owned())
    };
    format!("{} ({})", text(error.error_string()), text(error.error_name()))
}
