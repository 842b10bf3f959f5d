//! The free blocks of one KV pool of one rank.

use ids::BlockId;

/// A stack: the block given back last is handed out first, while it may still be in a cache.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq))]
pub(crate) struct Pool {
    free: Vec<BlockId>,
}

impl Pool {
    /// A pool of which every block is free; the lowest is handed out first.
    pub(crate) fn new(blocks: u32) -> Self {
        Self { free: (0..blocks).rev().map(BlockId).collect() }
    }

    pub(crate) fn free_blocks(&self) -> u32 {
        u32::try_from(self.free.len()).expect("blocks are numbered in 32 bits")
    }

    pub(crate) fn take(&mut self) -> Option<BlockId> {
        self.free.pop()
    }

    pub(crate) fn give(&mut self, block: BlockId) {
        self.free.push(block);
    }

    /// Gives back a whole table, so that it is handed out again in the same order.
    pub(crate) fn give_all(&mut self, blocks: &mut Vec<BlockId>) {
        self.free.extend(blocks.drain(..).rev());
    }
}
