//! Rows as they travel.

use std::ops::DerefMut;
use std::sync::Arc;

/// Where the bytes of rows come from: at least as many as are asked for. An exchange may have memory from which
/// rows go out with fewer copies.
pub type RowMemory = Arc<dyn Fn(usize) -> Box<dyn DerefMut<Target = [u8]> + Send> + Send + Sync>;

/// Rows as they travel: f32 or bf16, by the profile.
#[derive(Default)]
pub struct Wire {
    memory: Option<RowMemory>,
    bytes: Option<Box<dyn DerefMut<Target = [u8]> + Send>>,
    len: usize,
}

impl Wire {
    /// No rows yet; `None`: they will be anywhere.
    pub(super) fn new(memory: Option<RowMemory>) -> Self {
        Self { memory, bytes: None, len: 0 }
    }

    /// The rows' bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_ref().map_or(&[], |bytes| &bytes[..self.len])
    }

    /// Makes room for so many bytes, to be overwritten. Grows only beyond the largest step so far.
    pub fn room(&mut self, bytes: usize) -> &mut [u8] {
        if self.bytes.as_ref().map_or(0, |bytes| bytes.len()) < bytes {
            // What is in the smaller one is not needed, nor is its memory.
            self.bytes = None;
            self.bytes = Some(match &self.memory {
                Some(memory) => memory(bytes),
                None => Box::new(vec![0; bytes]),
            });
        }
        self.len = bytes;
        self.bytes.as_mut().map_or(&mut [], |all| &mut all[..bytes])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn memory_is_asked_for_when_there_is_too_little() {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let memory: RowMemory = Arc::new(move |bytes| {
            count.fetch_add(1, Ordering::Relaxed);
            Box::new(vec![7; bytes + 3])
        });
        let mut wire = Wire::new(Some(memory));
        assert_eq!(wire.bytes(), []);
        assert_eq!(wire.room(2), [7, 7]);
        wire.room(5)[4] = 1;
        assert_eq!(wire.bytes(), [7, 7, 7, 7, 1]);
        assert_eq!(wire.room(0), []);
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        assert_eq!(wire.room(9).len(), 9);
        assert_eq!(asked.load(Ordering::Relaxed), 2);
    }
}
