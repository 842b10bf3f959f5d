//! Where the weights of a rank's experts lie, by MoE layer and slot: tables in device memory that keep their places, so
//! that the launches of a step stay the same when other experts come, and with them its graph.

use super::buffer::Buffer;
use super::driver::{CudaError, Driver};
use std::sync::Arc;

/// Addresses of an expert: gate and up, their scales, down, its scales.
pub(super) const WORDS: usize = 4;

/// The tables of a rank.
pub(super) struct Tables {
    buffer: Buffer,
    /// Slots of a layer.
    slots: usize,
    /// What they hold, by layer.
    held: Vec<Vec<u64>>,
}

impl Tables {
    /// For so many MoE layers of up to so many experts.
    pub(super) fn new(
        driver: &Arc<Driver>,
        (layers, slots): (usize, usize),
    ) -> Result<Self, CudaError> {
        let buffer = Buffer::new(driver, "expert tables", layers * slots * WORDS * 8)?;
        Ok(Self { buffer, slots, held: vec![Vec::new(); layers] })
    }

    /// The address of a layer's table, which holds these words afterwards. Most steps find them there.
    ///
    /// # Panics
    ///
    /// If there is no such layer, or no room.
    pub(super) fn hold(&mut self, layer: usize, words: &[u64]) -> Result<u64, CudaError> {
        assert!(words.len() <= self.slots * WORDS, "room for the experts of a layer");
        let at = layer * self.slots * WORDS * 8;
        let held = &mut self.held[layer];
        if held != words {
            self.buffer.fill(at, bytemuck::cast_slice(words))?;
            held.clear();
            held.extend_from_slice(words);
        }
        Ok(self.buffer.address() + at as u64)
    }
}
