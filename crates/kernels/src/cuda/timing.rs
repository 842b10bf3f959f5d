//! What the kernels of some steps take, each by itself.

use super::driver::CudaError;
use super::real::failed;
use cudarc::driver::result;
use cudarc::driver::sys;
use std::collections::BTreeMap;

/// All launches of one kernel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KernelTime {
    pub kernel: &'static str,
    pub launches: u32,
    /// Of all of them together.
    pub seconds: f64,
}

/// Adds launches up by kernel, the longest in all first.
pub(super) fn summed(launches: impl Iterator<Item = (&'static str, f64)>) -> Vec<KernelTime> {
    let mut by_kernel = BTreeMap::new();
    for (kernel, seconds) in launches {
        let sum =
            by_kernel.entry(kernel).or_insert(KernelTime { kernel, launches: 0, seconds: 0.0 });
        sum.launches += 1;
        sum.seconds += seconds;
    }
    let mut all: Vec<KernelTime> = by_kernel.into_values().collect();
    all.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    all
}

/// Launches on a GPU, each between two events of its stream.
#[derive(Default)]
pub(super) struct Timed {
    launches: Vec<(&'static str, [sys::CUevent; 2])>,
}

// SAFETY: CUDA's handles may be used from any thread whose current context is theirs.
unsafe impl Send for Timed {}

impl Timed {
    /// Puts an event into the stream, in front of a kernel or behind it.
    pub(super) fn event(stream: sys::CUstream) -> Result<sys::CUevent, CudaError> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
            .map_err(failed("cuEventCreate"))?;
        // SAFETY: both are of this context.
        unsafe { result::event::record(event, stream) }.map_err(failed("cuEventRecord"))?;
        Ok(event)
    }

    pub(super) fn note(&mut self, kernel: &'static str, around: [sys::CUevent; 2]) {
        self.launches.push((kernel, around));
    }

    /// What they took. The device has passed all of them.
    pub(super) fn read(&self) -> Result<Vec<KernelTime>, CudaError> {
        let taken = self.launches.iter().map(|&(kernel, [before, behind])| {
            // SAFETY: both were recorded, and the device has passed them.
            let milliseconds = unsafe { result::event::elapsed(before, behind) };
            Ok((kernel, f64::from(milliseconds.map_err(failed("cuEventElapsedTime"))?) / 1e3))
        });
        Ok(summed(taken.collect::<Result<Vec<_>, CudaError>>()?.into_iter()))
    }
}

impl Drop for Timed {
    fn drop(&mut self) {
        for event in self.launches.iter().flat_map(|(_, around)| around) {
            // SAFETY: nobody else has it. What fails here has failed before.
            let _failed = unsafe { result::event::destroy(*event) };
        }
    }
}
