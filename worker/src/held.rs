//! A routed expert in the memory of its platform: as ranks use it, and as other processes get a copy of it.
//!
//! A copy has four parts: weights and scales of gate and up, then those of down. It is the same on all processes of one
//! numeric profile.

use kernels::cuda::weights::ExpertOnDevice;
use kernels::{DeviceError, ExpertWeights};
use std::sync::Arc;

/// One that is complete.
#[derive(Clone)]
pub(crate) enum Held {
    Cpu(Arc<ExpertWeights>),
    Cuda(Arc<ExpertOnDevice>),
}

/// One whose parts are still to come.
pub(crate) enum Blank {
    Cpu(ExpertWeights),
    Cuda(ExpertOnDevice),
}

impl Held {
    /// Whether somebody uses it besides the process's list of them.
    pub(crate) fn is_used(&self) -> bool {
        let count = match self {
            Self::Cpu(weights) => Arc::strong_count(weights),
            Self::Cuda(expert) => Arc::strong_count(expert),
        };
        1 < count
    }

    /// Bytes of the parts; a part that there is not has none.
    pub(crate) fn part_bytes(&self) -> [usize; 4] {
        match self {
            Self::Cpu(weights) => weights.image().map(<[u8]>::len),
            Self::Cuda(expert) => expert.part_bytes(),
        }
    }

    /// Copies what is at byte `at` of a part.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] if its device has failed.
    ///
    /// # Panics
    ///
    /// If that lies outside.
    pub(crate) fn read(&self, part: usize, at: usize, out: &mut [u8]) -> Result<(), DeviceError> {
        match self {
            Self::Cpu(weights) => out.copy_from_slice(&weights.image()[part][at..][..out.len()]),
            Self::Cuda(expert) => expert.fetch(part, at, out)?,
        }
        Ok(())
    }
}

impl Blank {
    /// Bytes of the parts.
    pub(crate) fn part_bytes(&self) -> [usize; 4] {
        match self {
            Self::Cpu(weights) => weights.image().map(<[u8]>::len),
            Self::Cuda(expert) => expert.part_bytes(),
        }
    }

    /// Puts bytes at `at` of a part.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] if its device has failed.
    ///
    /// # Panics
    ///
    /// If that lies outside.
    pub(crate) fn put(&mut self, part: usize, at: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        match self {
            Self::Cpu(weights) => {
                weights.image_mut()[part][at..][..bytes.len()].copy_from_slice(bytes);
            }
            Self::Cuda(expert) => expert.put(part, at, bytes)?,
        }
        Ok(())
    }

    /// All parts are there.
    pub(crate) fn complete(self) -> Held {
        match self {
            Self::Cpu(weights) => Held::Cpu(Arc::new(weights)),
            Self::Cuda(expert) => Held::Cuda(Arc::new(expert)),
        }
    }
}
