//! How fast this machine's memory can be read: the bound of a decode step.

use crate::DeviceError;
use crate::lines::{LINE_BYTES, Lines};
use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;

/// Larger than any cache: what is read from it comes from memory.
const BYTES: usize = 1 << 30;
/// The best of so many passes counts.
const PASSES: usize = 7;

/// Bytes per second that `threads` threads read from memory of the kind that weights lie in.
///
/// # Errors
///
/// [`DeviceError`] if 1 GiB of memory or the threads are refused.
pub fn read_bandwidth(threads: usize) -> Result<f64, DeviceError> {
    let refused =
        |source| DeviceError::Memory { what: "bandwidth measurement", bytes: BYTES, source };
    let mut lines = Lines::zeroed(BYTES / LINE_BYTES).map_err(refused)?;
    // Pages exist once they are written.
    lines.as_mut_slice().fill(1);
    let words: &[u64] = bytemuck::cast_slice(lines.as_slice());
    let threads = threads.max(1);
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|e| DeviceError::Threads { threads, reason: e.to_string() })?;
    let part = words.len().div_ceil(threads);
    let pass = || {
        let started = Instant::now();
        let total =
            pool.install(|| words.par_chunks(part).map(sum).reduce(|| 0, u64::wrapping_add));
        black_box(total);
        BYTES as f64 / started.elapsed().as_secs_f64()
    };
    Ok((0..PASSES).map(|_| pass()).fold(0.0, f64::max))
}

/// Several independent sums, so that loads and not additions are the limit.
fn sum(part: &[u64]) -> u64 {
    let mut sums = [0_u64; 16];
    for values in part.chunks_exact(16) {
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum = sum.wrapping_add(*value);
        }
    }
    sums.iter().fold(0, |a, b| a.wrapping_add(*b))
}
