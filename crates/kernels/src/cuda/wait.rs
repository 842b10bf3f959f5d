//! Waiting for a device, but never for ever: a kernel may not end.
//!
//! CUDA's own waits have no limit, so nothing here or around it uses them: whoever waits asks again and again whether
//! the device has come so far.

use super::driver::CudaError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long whoever waits does nothing but ask: longer than a step of a few rows takes, so that none of these is
/// later than with a wait of CUDA's, which spins for all of it.
pub(super) const SPIN: Duration = Duration::from_millis(20);

/// After that, naps of this part of what was waited: what is noticed late by that is under two percent.
const NAP_PART: u32 = 64;

/// And none is longer.
const NAP_MAX: Duration = Duration::from_millis(1);

/// Some device of this process hangs.
static HANGS: AtomicBool = AtomicBool::new(false);

/// The limit of all waits for one device.
pub(super) struct Patience {
    /// `cuda:0`
    device: String,
    limit: Duration,
    hangs: AtomicBool,
}

impl Patience {
    pub(super) fn new(device: String, limit: Duration) -> Self {
        Self { device, limit, hangs: AtomicBool::new(false) }
    }

    /// Waits until `is_done`; from `spin` on with naps.
    ///
    /// # Errors
    ///
    /// [`CudaError::Hangs`] if that takes longer than the limit, and from then on at once. Those of `is_done`.
    pub(super) fn wait(
        &self,
        spin: Duration,
        mut is_done: impl FnMut() -> Result<bool, CudaError>,
    ) -> Result<(), CudaError> {
        self.check()?;
        let start = Instant::now();
        loop {
            // Before it asks: a process that stood still meanwhile asks once more, and only then gives up.
            let waited = start.elapsed();
            if is_done()? {
                return Ok(());
            }
            if self.limit < waited {
                self.hangs.store(true, Ordering::Relaxed);
                HANGS.store(true, Ordering::Relaxed);
            }
            // Somebody else may have lost patience.
            self.check()?;
            if waited < spin {
                std::hint::spin_loop();
            } else {
                std::thread::sleep(NAP_MAX.min(waited / NAP_PART));
            }
        }
    }

    /// # Errors
    ///
    /// [`CudaError::Hangs`] if the device does: nothing that waits for it may be called any more.
    pub(super) fn check(&self) -> Result<(), CudaError> {
        if !self.hangs.load(Ordering::Relaxed) {
            return Ok(());
        }
        let (device, limit_s) = (self.device.clone(), self.limit.as_secs_f64());
        Err(CudaError::Hangs { device, limit_s })
    }
}

/// Ends the process. Where a device hangs, without what libraries want done before: CUDA's driver would wait for the
/// kernel when it takes its contexts down, and the process would never end. The operating system takes the device
/// away from a process that is gone, whatever runs there. Whoever calls this has written what shall be read.
pub fn exit(code: i32) -> ! {
    if HANGS.load(Ordering::Relaxed) {
        // SAFETY: ends the process, and nothing in it runs any more.
        unsafe { libc::_exit(code) }
    }
    std::process::exit(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patience(limit: Duration) -> Patience {
        Patience::new("cuda:3".into(), limit)
    }

    #[test]
    fn what_ends_is_waited_for_however_often_one_must_ask() {
        let mut asked = 0;
        let is_done = || {
            asked += 1;
            Ok(asked == 1000)
        };
        patience(Duration::from_secs(60)).wait(SPIN, is_done).unwrap();
        assert_eq!(asked, 1000);
        // Longer than it spins.
        let until = Instant::now() + 2 * SPIN;
        patience(Duration::from_secs(60)).wait(SPIN, || Ok(until <= Instant::now())).unwrap();
        assert!(until <= Instant::now());
    }

    #[test]
    fn what_never_ends_is_given_up_and_not_waited_for_again() {
        let patience = patience(Duration::from_millis(30));
        let text = patience.wait(SPIN, || Ok(false)).unwrap_err().to_string();
        assert!(text.starts_with("cuda:3 has not finished within 0.03 s"), "{text}");
        assert!(text.contains("--gpu-limit-s"), "{text}");
        let is_done = || panic!("nobody asks a device that hangs");
        assert_eq!(patience.wait(SPIN, is_done).unwrap_err().to_string(), text);
    }

    #[test]
    fn what_ended_while_the_process_stood_still_is_no_hang() {
        let mut asked = 0;
        let is_done = || {
            asked += 1;
            if asked == 1 {
                std::thread::sleep(Duration::from_millis(50));
            }
            Ok(asked == 2)
        };
        patience(Duration::from_millis(10)).wait(SPIN, is_done).unwrap();
    }

    /// What a process ends with that calls [`exit`] with 7, and whose libraries end it with 9 if they get to it.
    fn code_of(in_the_child: fn()) -> i32 {
        extern "C" fn library() {
            // SAFETY: ends the process.
            unsafe { libc::_exit(9) }
        }
        // SAFETY: the child calls nothing that another thread's lock could stop.
        match unsafe { libc::fork() } {
            0 => {
                // SAFETY: the handler is a function without captures; the alarm ends a child that does not end.
                unsafe {
                    libc::alarm(20);
                    libc::atexit(library);
                }
                in_the_child();
                exit(7)
            }
            child => {
                let mut status = 0;
                // SAFETY: there is room for the status.
                assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
                assert!(libc::WIFEXITED(status), "status {status}");
                libc::WEXITSTATUS(status)
            }
        }
    }

    #[test]
    fn process_with_a_device_that_hangs_leaves_without_its_libraries() {
        assert_eq!(code_of(|| HANGS.store(true, Ordering::Relaxed)), 7);
        assert_eq!(code_of(|| HANGS.store(false, Ordering::Relaxed)), 9);
    }

    #[test]
    fn failure_of_the_device_ends_the_wait() {
        let failed = || Err(CudaError::Failed { what: "a kernel", error: "gone".into() });
        let error = patience(Duration::from_secs(60)).wait(SPIN, failed).unwrap_err();
        assert_eq!(error.to_string(), "CUDA: a kernel: gone");
    }
}
