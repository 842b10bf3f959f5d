//! What NVIDIA's management library tells of a GPU, for whoever looks after a cluster: nothing here decides anything.
//!
//! The library comes with the driver and is loaded at run time. What it, or the GPU, does not tell is absent. Every
//! call may wait for a GPU in trouble: none belongs on a thread that others wait for.

use libloading::Library;
use std::ffi::{CString, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Its name, for [`Nvml::open`].
pub const LIBRARY: &str = "libnvidia-ml.so.1";

type Device = *mut c_void;
type EventSet = *mut c_void;

// Values of nvml.h.
const SUCCESS: c_int = 0;
const CLOCK_SM: c_uint = 1;
const CLOCK_MEMORY: c_uint = 2;
const SENSOR_GPU: c_uint = 0;
const ECC_UNCORRECTED: c_uint = 1;
const ECC_VOLATILE: c_uint = 0;
const EVENT_XID: c_ulonglong = 8;

/// `nvmlClocksEventReasons`: why clocks are lower than they might be. Bit 0 only says that there is no work.
const THROTTLES: [(u64, &str); 8] = [
    (0x2, "application_clocks"),
    (0x4, "power_cap"),
    (0x8, "hardware_slowdown"),
    (0x10, "sync_boost"),
    (0x20, "thermal"),
    (0x40, "hardware_thermal"),
    (0x80, "power_brake"),
    (0x100, "display_clock"),
];
const IDLE: u64 = 0x1;

/// Xids that are taken in at once; more wait for the next look.
const EVENTS_MAX: usize = 64;

/// Why there are no figures.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NvmlError {
    #[error("{library} cannot be loaded, it comes with NVIDIA's driver: {error}")]
    Library { library: String, error: String },
    #[error("NVML: {function} is missing: update NVIDIA's driver")]
    Missing { function: &'static str },
    #[error("NVML: {function} returned {code}")]
    Failed { function: &'static str, code: i32 },
}

/// How a GPU is; what it does not tell is absent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GpuHealth {
    /// Bytes.
    pub memory_used: Option<u64>,
    pub memory_total: Option<u64>,
    pub sm_mhz: Option<u32>,
    pub memory_mhz: Option<u32>,
    pub temperature_c: Option<u32>,
    /// Errors that ECC could not correct, since the driver was loaded.
    pub ecc_uncorrected: Option<u64>,
    /// The last error that the driver has reported since this process looks.
    pub last_xid: Option<u64>,
    /// Why its clocks are low; empty if they are not, or nobody knows.
    pub throttle: Vec<String>,
}

/// A GPU as the library sees it.
pub struct Nvml {
    library: Library,
    device: Device,
    /// `None` where Xids are not told.
    events: Option<EventSet>,
    last_xid: Mutex<Option<u64>>,
}

// SAFETY: NVML may be called from any thread, and its handles are valid in all of them.
unsafe impl Send for Nvml {}
// SAFETY: as above; it locks what it needs to.
unsafe impl Sync for Nvml {}

/// `nvmlMemory_t`
#[repr(C)]
#[derive(Default)]
struct Memory {
    total: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

/// `nvmlEventData_t` of the second version; the first ends before `gpu_instance`.
#[repr(C)]
struct Event {
    device: Device,
    kind: c_ulonglong,
    data: c_ulonglong,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

impl Nvml {
    /// The GPU on this PCI bus, as CUDA names it: both number GPUs, but not alike.
    ///
    /// # Errors
    ///
    /// [`NvmlError`] if the library cannot be used, or does not know the GPU.
    pub fn open(library: &Path, bus: &str) -> Result<Self, NvmlError> {
        let failed =
            |error: String| NvmlError::Library { library: library.display().to_string(), error };
        let bus_id = CString::new(bus).map_err(|error| failed(error.to_string()))?;
        // SAFETY: NVIDIA's library has no effect when it is loaded.
        let loaded = unsafe { Library::new(library) }.map_err(|error| failed(error.to_string()))?;
        type Init = unsafe extern "C" fn() -> c_int;
        type Find = unsafe extern "C" fn(*const c_char, *mut Device) -> c_int;
        let (init, find) = ("nvmlInit_v2", "nvmlDeviceGetHandleByPciBusId_v2");
        // SAFETY: as nvml.h declares them.
        let (start, by_bus) =
            unsafe { (symbol::<Init>(&loaded, init), symbol::<Find>(&loaded, find)) };
        let start = start.ok_or(NvmlError::Missing { function: init })?;
        let by_bus = by_bus.ok_or(NvmlError::Missing { function: find })?;
        // SAFETY: it needs nothing.
        succeeded(init, unsafe { start() })?;
        let mut device = std::ptr::null_mut();
        let mut nvml = Self { library: loaded, device, events: None, last_xid: Mutex::default() };
        // SAFETY: NVML has been initialised, the text ends with a zero, and there is room for the handle.
        succeeded(find, unsafe { by_bus(bus_id.as_ptr(), &raw mut device) })?;
        nvml.device = device;
        nvml.events = nvml.watch();
        Ok(nvml)
    }

    /// A set of events that holds the Xids of the GPU.
    fn watch(&self) -> Option<EventSet> {
        type Create = unsafe extern "C" fn(*mut EventSet) -> c_int;
        type Register = unsafe extern "C" fn(Device, c_ulonglong, EventSet) -> c_int;
        let mut set = std::ptr::null_mut();
        // SAFETY: as nvml.h declares them.
        let (create, register) = unsafe {
            (
                symbol::<Create>(&self.library, "nvmlEventSetCreate")?,
                symbol::<Register>(&self.library, "nvmlDeviceRegisterEvents")?,
            )
        };
        // SAFETY: there is room for the handle.
        if unsafe { create(&raw mut set) } != SUCCESS {
            return None;
        }
        // SAFETY: both handles are NVML's.
        if unsafe { register(self.device, EVENT_XID, set) } != SUCCESS {
            self.forget(set);
            return None;
        }
        Some(set)
    }

    fn forget(&self, set: EventSet) {
        type Free = unsafe extern "C" fn(EventSet) -> c_int;
        // SAFETY: as nvml.h declares it.
        if let Some(free) = unsafe { symbol::<Free>(&self.library, "nvmlEventSetFree") } {
            // SAFETY: NVML made the set, and nobody uses it any more.
            let _failed = unsafe { free(set) };
        }
    }

    /// How the GPU is now.
    #[must_use]
    pub fn health(&self) -> GpuHealth {
        let memory = self.memory();
        GpuHealth {
            memory_used: memory.as_ref().map(|memory| memory.used),
            memory_total: memory.as_ref().map(|memory| memory.total),
            sm_mhz: self.number("nvmlDeviceGetClockInfo", CLOCK_SM),
            memory_mhz: self.number("nvmlDeviceGetClockInfo", CLOCK_MEMORY),
            temperature_c: self.number("nvmlDeviceGetTemperature", SENSOR_GPU),
            ecc_uncorrected: self.ecc_uncorrected(),
            last_xid: self.last_xid(),
            throttle: self.throttle().map(throttles).unwrap_or_default(),
        }
    }

    fn memory(&self) -> Option<Memory> {
        type Get = unsafe extern "C" fn(Device, *mut Memory) -> c_int;
        // SAFETY: as nvml.h declares it.
        let get = unsafe { symbol::<Get>(&self.library, "nvmlDeviceGetMemoryInfo") }?;
        let mut memory = Memory::default();
        // SAFETY: the handle is NVML's, and there is room for the answer.
        (unsafe { get(self.device, &raw mut memory) } == SUCCESS).then_some(memory)
    }

    /// A figure of 32 bits: a clock of some kind, or a sensor's value.
    fn number(&self, name: &str, kind: c_uint) -> Option<u32> {
        type Get = unsafe extern "C" fn(Device, c_uint, *mut c_uint) -> c_int;
        // SAFETY: as nvml.h declares the functions that this is asked for.
        let get = unsafe { symbol::<Get>(&self.library, name) }?;
        let mut number = 0;
        // SAFETY: the handle is NVML's, and there is room for the answer.
        (unsafe { get(self.device, kind, &raw mut number) } == SUCCESS).then_some(number)
    }

    fn ecc_uncorrected(&self) -> Option<u64> {
        type Get = unsafe extern "C" fn(Device, c_uint, c_uint, *mut c_ulonglong) -> c_int;
        // SAFETY: as nvml.h declares it.
        let get = unsafe { symbol::<Get>(&self.library, "nvmlDeviceGetTotalEccErrors") }?;
        let mut errors = 0;
        // SAFETY: the handle is NVML's, and there is room for the answer.
        let code = unsafe { get(self.device, ECC_UNCORRECTED, ECC_VOLATILE, &raw mut errors) };
        (code == SUCCESS).then_some(errors)
    }

    fn throttle(&self) -> Option<u64> {
        type Get = unsafe extern "C" fn(Device, *mut c_ulonglong) -> c_int;
        let names =
            ["nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"];
        // SAFETY: as nvml.h declares them; the second is the first's former name.
        let found = |name| unsafe { symbol::<Get>(&self.library, name) };
        let get = names.into_iter().find_map(found)?;
        let mut reasons = 0;
        // SAFETY: the handle is NVML's, and there is room for the answer.
        (unsafe { get(self.device, &raw mut reasons) } == SUCCESS).then_some(reasons)
    }

    /// Takes in what was reported since the last look.
    fn last_xid(&self) -> Option<u64> {
        type Wait = unsafe extern "C" fn(EventSet, *mut Event, c_uint) -> c_int;
        let mut last = self.last_xid.lock().unwrap_or_else(PoisonError::into_inner);
        let set = self.events?;
        // SAFETY: as nvml.h declares them; the first version writes the beginning of the event.
        let found = |name| unsafe { symbol::<Wait>(&self.library, name) };
        let wait = ["nvmlEventSetWait_v2", "nvmlEventSetWait"].into_iter().find_map(found)?;
        for _ in 0..EVENTS_MAX {
            let (device, gpu_instance, compute_instance) = (std::ptr::null_mut(), 0, 0);
            let mut event = Event { device, kind: 0, data: 0, gpu_instance, compute_instance };
            // SAFETY: the set is NVML's, and there is room for the event. It waits for nothing.
            if unsafe { wait(set, &raw mut event, 0) } != SUCCESS {
                break;
            }
            if event.kind == EVENT_XID && event.device == self.device {
                *last = Some(event.data);
            }
        }
        *last
    }
}

impl Drop for Nvml {
    fn drop(&mut self) {
        if let Some(set) = self.events.take() {
            self.forget(set);
        }
        type Shutdown = unsafe extern "C" fn() -> c_int;
        // SAFETY: as nvml.h declares it.
        if let Some(shutdown) = unsafe { symbol::<Shutdown>(&self.library, "nvmlShutdown") } {
            // SAFETY: NVML counts who has initialised it, which `open` did.
            let _failed = unsafe { shutdown() };
        }
    }
}

/// # Safety
///
/// The function, if it is there, is of this type; it is not called once the library is gone.
unsafe fn symbol<F: Copy>(library: &Library, name: &str) -> Option<F> {
    // SAFETY: the caller's promise.
    unsafe { library.get::<F>(name) }.ok().map(|symbol| *symbol)
}

fn succeeded(function: &'static str, code: c_int) -> Result<(), NvmlError> {
    if code == SUCCESS { Ok(()) } else { Err(NvmlError::Failed { function, code }) }
}

/// Names of the reasons; those that have none here are numbers.
fn throttles(reasons: u64) -> Vec<String> {
    let known = THROTTLES.iter().filter(|(bit, _)| reasons & bit != 0);
    let mut names: Vec<String> = known.map(|(_, name)| (*name).to_owned()).collect();
    let others = THROTTLES.iter().fold(reasons & !IDLE, |left, (bit, _)| left & !bit);
    if others != 0 {
        names.push(format!("{others:#x}"));
    }
    names
}
