//! What a kernel is launched with.

use super::buffer::Buffer;

/// A kernel, and how many threads of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Launch {
    pub(crate) kernel: &'static str,
    /// Blocks.
    pub(crate) grid: [u32; 3],
    /// Threads of a block.
    pub(crate) block: u32,
    /// Bytes of dynamic shared memory.
    pub(crate) shared: u32,
}

/// A parameter of a kernel: a pointer or a number of at most 8 bytes.
pub(crate) trait Parameter {
    /// Its bytes, as they lie in memory on a little-endian machine.
    fn bits(self) -> u64;
}

impl Parameter for u64 {
    fn bits(self) -> u64 {
        self
    }
}

impl Parameter for u32 {
    fn bits(self) -> u64 {
        self.into()
    }
}

impl Parameter for i32 {
    fn bits(self) -> u64 {
        self.cast_unsigned().into()
    }
}

impl Parameter for f32 {
    fn bits(self) -> u64 {
        self.to_bits().into()
    }
}

/// A pointer to the start.
impl Parameter for &Buffer {
    fn bits(self) -> u64 {
        self.address()
    }
}

/// A pointer to the start, or null.
impl Parameter for Option<&Buffer> {
    fn bits(self) -> u64 {
        self.map_or(0, Buffer::address)
    }
}

/// The parameters of a launch, in order.
macro_rules! args {
    ($($arg:expr),* $(,)?) => { [$($crate::cuda::args::Parameter::bits($arg)),*] };
}
pub(crate) use args;

/// A size as kernels take it.
///
/// # Panics
///
/// If it does not fit: sizes are checked when a model is loaded and a step is uploaded.
pub(crate) fn int(size: usize) -> i32 {
    i32::try_from(size).expect("sizes of a step and of a model fit 31 bits")
}

/// A number of blocks.
///
/// # Panics
///
/// As for [`int`].
pub(crate) fn blocks(count: usize) -> u32 {
    int(count).cast_unsigned()
}
