//! The stream of a GPU: what is enqueued runs in that order, and whoever waits for it has a limit.
//!
//! CUDA's driver waits without one where it is least expected: in copies from and to memory that is not pinned, in
//! launches when too many are enqueued, and when memory, streams and contexts are given back.

use super::driver::CudaError;
use super::pinned::{PINNED_BYTES, Pinned};
use super::real::failed;
use super::wait::{Patience, SPIN};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// After so many calls the host waits until the device is through with those up to so many calls ago. The driver's
/// queue holds some thousand, and in a call that finds it full nobody can give up. The device has work all the time.
const FENCE_EVERY: u32 = 256;

/// Up to so many bytes the driver takes a copy of what is to be written before it returns, and waits for nothing.
const STAGED_MAX: usize = 64 << 10;

/// A copy of one piece takes some 0.1 ms.
const SPIN_BESIDE: Duration = Duration::from_micros(20);

/// A stream; the context of its device is current wherever one of its methods is called.
pub(super) struct Queue {
    stream: sys::CUstream,
    patience: Arc<Patience>,
    /// How long whoever waits does nothing but ask.
    spin: Duration,
    /// Events that nobody waits for.
    events: Mutex<Vec<sys::CUevent>>,
    /// Calls since the fence was made anew.
    calls: AtomicU32,
    fence: Mutex<sys::CUevent>,
    /// For reading.
    landing: Mutex<Pinned>,
    /// For writing, and what the device has passed when it has taken the last piece.
    leaving: Mutex<(Pinned, sys::CUevent)>,
}

// SAFETY: CUDA's handles may be used from any thread whose current context is theirs.
unsafe impl Send for Queue {}
// SAFETY: as above; the driver locks what it needs to.
unsafe impl Sync for Queue {}

impl Queue {
    /// For steps: whoever waits spins, lest a token comes later.
    pub(super) fn new(patience: Arc<Patience>) -> Result<Self, CudaError> {
        Self::spinning(patience, SPIN)
    }

    /// For copies beside the steps: whoever waits leaves the processor to those who prepare the next ones.
    pub(super) fn beside(patience: Arc<Patience>) -> Result<Self, CudaError> {
        Self::spinning(patience, SPIN_BESIDE)
    }

    fn spinning(patience: Arc<Patience>, spin: Duration) -> Result<Self, CudaError> {
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(failed("cuStreamCreate"))?;
        let pinned = || Pinned::new().map_err(failed("cuMemHostAlloc"));
        Ok(Self {
            stream,
            patience,
            spin,
            events: Mutex::default(),
            calls: AtomicU32::new(0),
            // An event that was never recorded counts as passed.
            fence: Mutex::new(event()?),
            landing: Mutex::new(pinned()?),
            leaving: Mutex::new((pinned()?, event()?)),
        })
    }

    /// For launches, which [`Queue::enqueued`] follows.
    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Counts a call, and waits if too many are enqueued.
    pub(super) fn enqueued(&self) -> Result<(), CudaError> {
        let calls = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        if !calls.is_multiple_of(FENCE_EVERY) {
            return Ok(());
        }
        let fence = lock(&self.fence);
        self.passed(*fence)?;
        self.record(*fence)
    }

    /// Copies to the device. `content` may change once this returns.
    pub(super) fn write(&self, address: u64, content: &[u8]) -> Result<(), CudaError> {
        self.patience.check()?;
        if content.len() <= STAGED_MAX {
            // SAFETY: the caller's buffer is large enough; the driver has taken the content before it returns.
            unsafe { result::memcpy_htod_async(address, content, self.stream) }
                .map_err(failed("cuMemcpyHtoD"))?;
            return self.enqueued();
        }
        for (piece, at) in content.chunks(PINNED_BYTES).zip((address..).step_by(PINNED_BYTES)) {
            let mut leaving = lock(&self.leaving);
            let (pinned, taken) = &mut *leaving;
            self.passed(*taken)?;
            // SAFETY: the device has passed the copy that read this memory last.
            unsafe { pinned.put(piece) };
            let (from, bytes) = (pinned.address().cast_const(), piece.len());
            // SAFETY: as above; the piece stays where it is until the event that follows has passed.
            unsafe { sys::cuMemcpyHtoDAsync_v2(at, from, bytes, self.stream) }
                .result()
                .map_err(failed("cuMemcpyHtoD"))?;
            self.record(*taken)?;
            drop(leaving);
            self.enqueued()?;
        }
        Ok(())
    }

    /// Waits for what was enqueued, and copies to the host.
    pub(super) fn read(&self, address: u64, out: &mut [u8]) -> Result<(), CudaError> {
        if out.is_empty() {
            return self.wait();
        }
        for (piece, at) in out.chunks_mut(PINNED_BYTES).zip((address..).step_by(PINNED_BYTES)) {
            let landing = lock(&self.landing);
            self.patience.check()?;
            // SAFETY: the caller's buffer is large enough, and nobody else uses the pinned memory: whoever did has
            // waited for the device, or it hangs.
            unsafe { sys::cuMemcpyDtoHAsync_v2(landing.address(), at, piece.len(), self.stream) }
                .result()
                .map_err(failed("cuMemcpyDtoH"))?;
            self.wait()?;
            // SAFETY: the device has passed the copy.
            unsafe { landing.take(piece) };
        }
        Ok(())
    }

    /// Waits for what was enqueued.
    pub(super) fn wait(&self) -> Result<(), CudaError> {
        self.patience.check()?;
        let spare = lock(&self.events).pop();
        let event = spare.map_or_else(event, Ok)?;
        self.record(event)?;
        self.passed(event)?;
        lock(&self.events).push(event);
        Ok(())
    }

    fn record(&self, event: sys::CUevent) -> Result<(), CudaError> {
        // SAFETY: both were made in this context.
        unsafe { result::event::record(event, self.stream) }.map_err(failed("cuEventRecord"))
    }

    /// Waits until the device has passed the event.
    fn passed(&self, event: sys::CUevent) -> Result<(), CudaError> {
        self.patience.wait(self.spin, || {
            // SAFETY: the event was made in this context.
            match unsafe { result::event::query(event) } {
                Ok(()) => Ok(true),
                Err(DriverError(sys::cudaError_enum::CUDA_ERROR_NOT_READY)) => Ok(false),
                Err(error) => Err(failed("a kernel")(error)),
            }
        })
    }

    /// Gives everything back, unless the device hangs: then nothing of it ever returns, and the process ends.
    pub(super) fn close(&self) {
        if self.wait().is_err() && self.patience.check().is_err() {
            return;
        }
        // What fails here has failed before.
        lock(&self.landing).free();
        let mut leaving = lock(&self.leaving);
        leaving.0.free();
        let events = std::mem::take(&mut *lock(&self.events));
        for event in events.into_iter().chain([*lock(&self.fence), leaving.1]) {
            // SAFETY: made in `event`, and nobody uses it any more.
            let _failed = unsafe { result::event::destroy(event) };
        }
        // SAFETY: made in `new`, and nobody uses it any more.
        let _failed = unsafe { result::stream::destroy(self.stream) };
    }
}

fn event() -> Result<sys::CUevent, CudaError> {
    result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
        .map_err(failed("cuEventCreate"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What they guard is of one piece.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
