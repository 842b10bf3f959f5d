//! Reads every weight once and looks for values that are not finite.
//!
//! The bound is the disk: pieces are read by all threads of the pool, and the test of a piece is
//! one pass of masks that the compiler turns into vector instructions. Only a piece that holds a
//! bad value is looked at again, element by element.

use super::{Checkpoint, CheckpointError, Dtype, NonFinite, TensorInfo};
use rayon::prelude::*;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Large enough for a disk's full speed, small enough to stay in the second-level cache.
const PIECE_BYTES: u64 = 2 << 20;

impl Checkpoint {
    /// Reads all tensors of the text model with the threads of the current rayon pool.
    ///
    /// * `progress`: called from any thread with the bytes done and in all.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::NonFinite`] with every tensor that holds NaN or an infinity, by name;
    /// [`CheckpointError::Io`] if a file cannot be read to its end.
    ///
    /// # Panics
    ///
    /// If another thread of the pool panicked meanwhile.
    pub fn verify(&self, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<(), CheckpointError> {
        let (total, done) = (self.bytes(), AtomicU64::new(0));
        let bad: Mutex<Vec<(usize, u64, u64)>> = Mutex::default();
        let tensors: Vec<&TensorInfo> = self.tensors().collect();
        let pieces: Vec<(usize, u64)> = (0..tensors.len())
            .flat_map(|tensor| {
                let pieces = tensors[tensor].bytes.div_ceil(PIECE_BYTES);
                (0..pieces).map(move |piece| (tensor, piece * PIECE_BYTES))
            })
            .collect();
        pieces.par_iter().try_for_each_init(Vec::new, |buffer: &mut Vec<u8>, &(tensor, at)| {
            let info = tensors[tensor];
            let length = PIECE_BYTES.min(info.bytes - at);
            buffer.resize(usize::try_from(length).expect("a piece fits in memory"), 0);
            self.read_at(info, at, buffer)?;
            if let Some((count, first)) = scan(info.dtype, buffer) {
                let first = first + at / info.dtype.bytes() as u64;
                bad.lock().expect("no thread panics with the lock").push((tensor, first, count));
            }
            progress(done.fetch_add(length, Ordering::Relaxed) + length, total);
            Ok(())
        })?;
        let mut bad = bad.into_inner().expect("no thread panics with the lock");
        if bad.is_empty() {
            return Ok(());
        }
        // By tensor, then by place: threads finish in any order.
        bad.sort_unstable();
        let merged = bad.chunk_by(|a, b| a.0 == b.0).map(|pieces| {
            let (tensor, first, _) = pieces[0];
            NonFinite {
                file: self.file_name(tensors[tensor]),
                tensor: tensors[tensor].name.clone(),
                count: pieces.iter().map(|piece| piece.2).sum(),
                first,
            }
        });
        Err(CheckpointError::NonFinite(merged.collect()))
    }
}

/// Count of the elements that are not finite and index of the first, or `None` if all are finite.
pub(super) fn scan(dtype: Dtype, bytes: &[u8]) -> Option<(u64, u64)> {
    match dtype {
        Dtype::F32 => scan_with::<4>(bytes, |b| u32::from_le_bytes(b) & 0x7F80_0000 == 0x7F80_0000),
        Dtype::Bf16 => scan_with::<2>(bytes, |b| u16::from_le_bytes(b) & 0x7F80 == 0x7F80),
        Dtype::F16 => scan_with::<2>(bytes, |b| u16::from_le_bytes(b) & 0x7C00 == 0x7C00),
        Dtype::F8E4M3 => scan_with::<1>(bytes, |[b]| b & 0x7F == 0x7F),
    }
}

fn scan_with<const SIZE: usize>(
    bytes: &[u8],
    bad: impl Fn([u8; SIZE]) -> bool,
) -> Option<(u64, u64)> {
    let (elements, rest) = bytes.as_chunks::<SIZE>();
    assert!(rest.is_empty(), "pieces hold whole elements");
    // No early exit: it would keep the loop from being vectorised.
    if !elements.iter().fold(false, |any, &element| any | bad(element)) {
        return None;
    }
    let places = || elements.iter().enumerate().filter(|&(_, &element)| bad(element));
    let first = places().next().expect("a bad element was seen").0;
    Some((places().count() as u64, first as u64))
}
