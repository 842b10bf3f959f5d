//! The kernels on a CPU: compiled by the machine's C++ compiler into a library that runs them thread by thread.
//!
//! Buffers end where a page without rights begins, so most accesses past their end are noticed.

use super::args::Launch;
use super::driver::CudaError;
use super::emulator;
use super::graphs::{GraphFigures, Graphs, List, Runner};
use super::timing::{KernelTime, summed};
use super::wait::{Patience, SPIN};
use libloading::Library;
use std::collections::BTreeMap;
use std::ffi::{CString, c_char, c_void};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Buffers are aligned to this, so up to so many bytes past an end go unnoticed.
const ALIGNMENT: usize = 16;

/// What the device is called in messages.
const NAME: &str = "the emulated device";

type Run = unsafe extern "C" fn(
    name: *const c_char,
    grid: *const u32,
    block: *const u32,
    shared: u32,
    args: *mut *mut c_void,
) -> i32;

/// The emulated device.
pub(super) struct Emulated {
    run: Run,
    /// Mappings, by the address of their buffer: start and length.
    memory: Mutex<BTreeMap<u64, (usize, usize)>>,
    /// Kernels up to and with the one that never ends.
    kernels_left: AtomicU64,
    patience: Patience,
    /// What kernels took, while they are measured.
    timed: Mutex<Option<Vec<(&'static str, f64)>>>,
    graphs: Mutex<Graphs<List>>,
}

impl Emulated {
    pub(super) fn open() -> Result<Self, CudaError> {
        static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
        let failed = |error: &str| CudaError::Failed { what: "the emulator", error: error.into() };
        let library =
            LIBRARY.get_or_init(emulator::load).as_ref().map_err(|error| failed(error))?;
        // SAFETY: the function has this type in emulator.cpp. The library is never unloaded.
        let run = unsafe { library.get::<Run>(b"herd_emulator_launch\0") };
        Ok(Self {
            run: *run.map_err(|error| failed(&error.to_string()))?,
            memory: Mutex::default(),
            kernels_left: AtomicU64::new(u64::MAX),
            patience: Patience::new(NAME.into(), Duration::MAX),
            timed: Mutex::default(),
            graphs: Mutex::default(),
        })
    }

    /// It hangs after so many kernels; whoever waits for it then gives up after `wait_max`.
    pub(super) fn hanging_after(self, kernels: u64, wait_max: Duration) -> Self {
        let patience = Patience::new(NAME.into(), wait_max);
        Self { kernels_left: AtomicU64::new(kernels.saturating_add(1)), patience, ..self }
    }

    /// Waits for what was enqueued: all of it has run, or will never do.
    fn wait(&self) -> Result<(), CudaError> {
        self.patience.wait(SPIN, || Ok(0 < self.kernels_left.load(Ordering::Relaxed)))
    }

    pub(super) fn allocate(&self, what: &'static str, bytes: usize) -> Result<u64, CudaError> {
        self.patience.check()?;
        let page = 4096;
        let length = bytes.next_multiple_of(page) + page;
        // SAFETY: a new anonymous mapping touches nothing that exists; its last page loses its rights.
        let start = unsafe {
            let (rights, flags) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let start = libc::mmap(std::ptr::null_mut(), length, rights, flags, -1, 0);
            if start == libc::MAP_FAILED {
                return Err(CudaError::Memory { what, bytes, free: 0, total: 0 });
            }
            libc::mprotect(start.byte_add(length - page), page, libc::PROT_NONE);
            // What was never written is no number.
            std::ptr::write_bytes(start.cast::<u8>(), 0xff, length - page);
            start
        };
        let address = start.addr() + length - page - bytes.next_multiple_of(ALIGNMENT);
        self.lock().insert(address as u64, (start.addr(), length));
        Ok(address as u64)
    }

    pub(super) fn free(&self, address: u64) -> Result<(), CudaError> {
        self.wait()?;
        let (start, length) = self.lock().remove(&address).expect("freed once");
        // SAFETY: the mapping of this buffer, which nobody has any more.
        unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(start), length) };
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, (usize, usize)>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self, address: u64, content: &[u8]) -> Result<(), CudaError> {
        self.patience.check()?;
        let to =
            std::ptr::with_exposed_provenance_mut(usize::try_from(address).expect("an address"));
        // SAFETY: `Buffer` has checked that this lies within; kernels run while `launch` is called, not now.
        unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), to, content.len()) };
        Ok(())
    }

    pub(super) fn read(&self, address: u64, out: &mut [u8]) -> Result<(), CudaError> {
        self.wait()?;
        self.fetch(address, out)
    }

    /// Reads without waiting for kernels.
    pub(super) fn fetch(&self, address: u64, out: &mut [u8]) -> Result<(), CudaError> {
        self.patience.check()?;
        let from = std::ptr::with_exposed_provenance(usize::try_from(address).expect("an address"));
        // SAFETY: as for `write`.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    pub(super) fn time_kernels(&self) {
        *self.timed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
    }

    pub(super) fn kernel_times(&self) -> Vec<KernelTime> {
        let timed = self.timed.lock().unwrap_or_else(PoisonError::into_inner).take();
        summed(timed.unwrap_or_default().into_iter())
    }

    /// Runs a kernel to its end.
    ///
    /// # Safety
    ///
    /// As for `Driver::launch`.
    pub(super) unsafe fn launch(&self, launch: Launch, args: &[u64]) -> Result<(), CudaError> {
        self.patience.check()?;
        let one_less = |left: u64| (left != u64::MAX).then(|| left.saturating_sub(1));
        let left = self.kernels_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less);
        if matches!(left, Ok(0 | 1)) {
            return Ok(());
        }
        let mut pointers: Vec<*mut c_void> =
            args.iter().map(|arg| std::ptr::from_ref(arg).cast_mut().cast()).collect();
        let name = CString::new(launch.kernel).expect("a name");
        let block = [launch.block, 1, 1];
        let started = Instant::now();
        // SAFETY: the caller's promise; the numbers live until the call returns.
        let code = unsafe {
            (self.run)(
                name.as_ptr(),
                launch.grid.as_ptr(),
                block.as_ptr(),
                launch.shared,
                pointers.as_mut_ptr(),
            )
        };
        assert_eq!(code, 0, "no kernel {}", launch.kernel);
        if let Some(timed) = &mut *self.timed.lock().unwrap_or_else(PoisonError::into_inner) {
            timed.push((launch.kernel, started.elapsed().as_secs_f64()));
        }
        Ok(())
    }
}

impl Emulated {
    /// Runs launches, as the list that was kept if they have come before.
    ///
    /// # Safety
    ///
    /// As for `Driver::launch`, of every launch.
    pub(super) unsafe fn run(&self, list: &List) -> Result<(), CudaError> {
        let mut graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the caller's promise.
        unsafe { graphs.run(self, list) }
    }

    pub(super) fn graphs(&self) -> GraphFigures {
        self.graphs.lock().unwrap_or_else(PoisonError::into_inner).figures()
    }
}

impl Runner for Emulated {
    type Graph = List;

    unsafe fn enqueue(&self, list: &List) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        list.iter().try_for_each(|(launch, args)| unsafe { self.launch(launch, args) })
    }

    fn instantiate(&self, list: &List) -> Result<List, CudaError> {
        Ok(list.clone())
    }

    unsafe fn replay(&self, graph: &List) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.enqueue(graph) }
    }

    fn discard(&self, _: List) {}
}
