//! How fast a device's memory can be read.

use super::args::{Launch, args, blocks};
use super::buffer::Buffer;
use super::driver::{CudaError, Driver};
use std::sync::Arc;

/// As the kernel's block.
const THREADS: u32 = 256;

/// Blocks: enough for every multiprocessor of any device, several times over.
pub(super) const BLOCKS: usize = 2048;

/// Much more than any second-level cache holds ...
const BYTES: usize = 4 << 30;

/// ... and where that is not free, this part of what is, if it is still more than that. In pieces of so many bytes.
const PART: usize = 4;
const BYTES_MIN: usize = 128 << 20;
const PIECE: usize = 1 << 22;

/// Passes that are measured, after one that is not.
const PASSES: u32 = 10;

/// Bytes per second that this device reads from memory that weights lie in.
///
/// # Errors
///
/// [`CudaError`] if a quarter of the free memory is refused, too, or CUDA fails.
pub fn read_bandwidth(driver: &Arc<Driver>) -> Result<f64, CudaError> {
    let take = |bytes| Buffer::new(driver, "bandwidth measurement", bytes);
    let whole = take(BYTES);
    let memory = match whole {
        Err(CudaError::Memory { free, .. }) if BYTES_MIN <= free / PART => {
            take((free / PART).next_multiple_of(PIECE))
        }
        other => other,
    }?;
    // Pages exist, and hold something.
    let some: Vec<u8> = (0..PIECE).map(|i| i.to_le_bytes()[0]).collect();
    for at in (0..memory.bytes()).step_by(PIECE) {
        memory.bring(at, &some)?;
    }
    let out = Buffer::new(driver, "sums", BLOCKS * 4)?;
    read(driver, &memory, &out)?;
    driver.time_kernels();
    (0..PASSES).try_for_each(|_| read(driver, &memory, &out))?;
    let seconds: f64 = driver.kernel_times()?.iter().map(|time| time.seconds).sum();
    Ok(memory.bytes() as f64 * f64::from(PASSES) / seconds)
}

/// Reads all of a buffer; `out` gets the sums of its words, 4 bytes each, that the blocks have read.
///
/// # Panics
///
/// If it is not whole 16 bytes, or `out` is too small.
pub(super) fn read(driver: &Driver, memory: &Buffer, out: &Buffer) -> Result<(), CudaError> {
    assert!(memory.bytes().is_multiple_of(16) && BLOCKS * 4 <= out.bytes(), "whole vectors");
    let count = memory.bytes() as u64 / 16;
    let grid = [blocks(BLOCKS), 1, 1];
    let launch = Launch { kernel: "herd_read", grid, block: THREADS, shared: 0 };
    // SAFETY: the kernel's three parameters: memory of so many vectors, and a word per block.
    unsafe { driver.launch(launch, &args![memory, count, out]) }
}
