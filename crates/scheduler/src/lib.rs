//! Which tokens run next, and where their KV cache lives.
//!
//! The scheduler owns the *meaning* of the KV memory of all attention ranks: which sequence runs on
//! which rank, and which block holds which of its positions. It decides, step by step, what every
//! rank computes. It never samples, never ends a sequence by itself (the router does, with
//! [`Scheduler::cancel`]; only the limit of its tokens is enforced here) and does no I/O.
//!
//! ```text
//! submit ─▶ queued ── room on a rank ──▶ running ── commit ──▶ running … ── cancel, or the limit ─▶ gone
//!              ▲                            │
//!              └── preempted: pool empty ───┘   (to the front; prefilled again from its tokens)
//! ```
//!
//! At most one step is in flight: `plan`, then `commit` or `abort`. Policies:
//!
//! * A new sequence goes to the rank that holds the fewest positions, if it has room for one more.
//! * Decodes come first. Prefills share what remains of the budget: equally between requests, then
//!   equally between the sequences of a request, and what one cannot use goes to the others.
//! * Who decodes waits for the prefills of the same step; so they take no longer than a limit then, by
//!   the times that [`Scheduler::time`] was told, if each gets on at all.
//! * After a step that failed comes one without prefill, if anything decodes: that has waited already.
//! * A sequence that has begun, and lost what was computed of it, is prefilled before those that have not,
//!   and four times as much of it: somebody is in the middle of its text.
//! * If a pool runs out, the youngest sequence of that rank gives its blocks back.
//! * Every sequence has a *backup*: a copy of its KV rows in the memory of another rank, as far as there is
//!   room for it. Its rank sends rows after each step; the other one says what it has. A sequence that loses
//!   its rank goes on where its copy is, and computes only what that lacks.

mod backup;
mod machine;
mod pace;
mod pool;
mod rank;
mod sequence;
mod share;
#[cfg(test)]
mod tests;

pub use machine::Scheduler;

use ids::{BlockId, Rank, SeqId, StepId};
use std::time::Duration;

/// Capacity of the two KV pools of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvPools {
    /// Positions per block, in both pools.
    pub block_tokens: u32,
    /// Blocks of the layers that attend to every earlier position.
    pub full_blocks: u32,
    /// Blocks of the layers that attend within their chunk; unused if there are none.
    pub chunked_blocks: u32,
    /// Positions per chunk. `None`: no layer is chunked.
    pub chunk_tokens: Option<u32>,
}

impl KvPools {
    /// Blocks that hold positions `0..tokens`.
    fn blocks(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_tokens)
    }

    /// Most blocks that one chunk can touch; a chunk need not start at a block's start.
    fn window_blocks(&self) -> u32 {
        match self.chunk_tokens {
            None => 0,
            Some(chunk) if chunk.is_multiple_of(self.block_tokens) => chunk / self.block_tokens,
            Some(chunk) => (chunk - 1).div_ceil(self.block_tokens) + 1,
        }
    }

    /// The number of the block with the start of the chunk of a position; 0 without chunks.
    fn first_of_chunk(&self, position: u32) -> u32 {
        self.chunk_tokens.map_or(0, |chunk| position / chunk * chunk / self.block_tokens)
    }

    /// Positions that one sequence alone on the rank can hold.
    fn capacity_tokens(&self) -> u32 {
        let full = self.full_blocks.saturating_mul(self.block_tokens);
        match self.chunk_tokens {
            Some(chunk) if self.chunked_blocks < self.window_blocks() => {
                // The first chunk fits as far as the pool goes; a later one might not fit at all.
                full.min(self.chunked_blocks.saturating_mul(self.block_tokens)).min(chunk)
            }
            Some(_) | None => full,
        }
    }
}

/// What a scheduler works with. Immutable: a new view gets a new scheduler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Per attention rank.
    pub pools: Vec<KvPools>,
    /// Token budget per rank and step. At least `sequences_max`, so that every running sequence
    /// can move on in every step.
    pub step_tokens: u32,
    /// Longest that prefill of new sequences holds up a step of others that wait for their next token. More
    /// is allowed if the step takes half as long without it, four times as much to sequences that lost their KV memory,
    /// and 16 tokens to every rank.
    pub prefill_max: Duration,
    /// Running sequences per rank.
    pub sequences_max: u32,
    /// Waiting sequences. Preempted ones count, and may exceed it: they are never refused.
    pub queue_max: u32,
    /// Longest sequence that the model serves, prompt and output.
    pub context_tokens: u32,
    /// Per rank: positions of other ranks' sequences of which it can keep a copy. Empty: no rank can.
    pub backup_tokens: Vec<u32>,
}

/// A sequence to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSequence {
    pub id: SeqId,
    /// Everything before the first token to sample.
    pub prompt: Vec<u32>,
    /// New tokens at most; at least one.
    pub tokens_max: u32,
    /// Sequences of the same request share one fair share of the prefill budget.
    pub group: Option<u64>,
    /// The end of the prompt was sampled before: a client waits in the middle of its text.
    pub has_begun: bool,
}

/// Consecutive tokens of one sequence, for one rank and step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    pub sequence: SeqId,
    /// Absolute position of `tokens[0]`.
    pub start: u32,
    pub tokens: Vec<u32>,
    /// `full_blocks[i]` holds positions `[i * B, (i + 1) * B)`, from 0 to the end of this slice.
    pub full_blocks: Vec<BlockId>,
    /// `chunked_blocks[i]` holds block number `chunked_first + i`: from the block with the start of
    /// the chunk of `start` to the block with this slice's last position. Empty without chunks.
    pub chunked_blocks: Vec<BlockId>,
    pub chunked_first: u32,
    /// The slice reaches the end of the sequence: sample after its last token.
    pub samples: bool,
    /// Positions `0..restored` of the blocks are to be filled from the copy that this rank keeps, before anything
    /// is computed. 0: the blocks hold what is before `start`.
    pub restored: u32,
    /// What of the sequence goes to another rank after the step.
    pub backup: Option<BackupOrder>,
}

/// Rows of a sequence that go to the rank that keeps a copy of them: those of positions `start..end`, all of them
/// computed when the step is over.
///
/// By law 1 the rows of a position depend on the tokens up to it alone. So it does not matter which attempt at a step
/// they come from, and a copy may be written over again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackupOrder {
    pub rank: Rank,
    pub start: u32,
    pub end: u32,
}

/// What a rank says of a copy that it keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    pub sequence: SeqId,
    /// It has the rows of positions `0..positions`.
    pub positions: u32,
    /// Rows have come that do not follow these: what is between must be sent again.
    pub has_gap: bool,
}

/// One step of all ranks. Meant to be reused, so that planning allocates nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub step: StepId,
    /// Per rank; a rank without slices still takes part in the step.
    pub ranks: Vec<Vec<Slice>>,
    /// Per rank: sequences of which it needs to keep no copy any more. Said until a step that says it succeeds.
    pub released: Vec<Vec<SeqId>>,
}

impl Plan {
    /// A buffer for [`Scheduler::plan`].
    #[must_use]
    pub fn new() -> Self {
        Self { step: StepId(0), ranks: Vec::new(), released: Vec::new() }
    }
}

impl Default for Plan {
    fn default() -> Self {
        Self::new()
    }
}

/// The load, for metrics and status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stats {
    /// Running sequences of all ranks.
    pub running: u32,
    /// Waiting sequences, preempted ones included.
    pub queued: u32,
    /// Preemptions since the start.
    pub preemptions: u64,
    /// Most tokens of new prompts in a step in which somebody waits, per rank.
    pub prompt_tokens: u32,
    /// Per rank.
    pub ranks: Vec<RankStats>,
}

/// The load of one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankStats {
    pub running: u32,
    pub full_free_blocks: u32,
    pub chunked_free_blocks: u32,
    /// Positions of others' sequences of which it has a copy, as far as it has said so.
    pub backup_tokens: u64,
}

/// A configuration under which sequences could get stuck.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Nobody could compute.
    #[error("no attention rank")]
    NoRanks,
    /// A pool without room for a single token.
    #[error("the kv pools of rank {rank} cannot hold a token")]
    EmptyPool { rank: usize },
    /// A limit that would admit nothing.
    #[error("step_tokens, sequences_max and queue_max must be at least 1")]
    ZeroLimit,
    /// Not one entry per rank.
    #[error("backup_tokens has {entries} entries for {ranks} ranks")]
    Backups { entries: usize, ranks: usize },
    /// Some running sequences would get no token in a step.
    #[error("a step of {step_tokens} tokens cannot serve {sequences_max} sequences")]
    SmallStep { step_tokens: u32, sequences_max: u32 },
}

/// Why a sequence was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Try again later.
    #[error("{queued} sequences wait already, at most {queue_max} may")]
    QueueFull { queued: u32, queue_max: u32 },
    /// The prompt and one token exceed the context or the KV memory of a rank.
    #[error("the prompt has {prompt_tokens} tokens, the context {context_tokens}")]
    TooLong { prompt_tokens: u64, context_tokens: u32 },
    /// There is no position to sample after.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The sequence asks for no token.
    #[error("tokens_max is 0")]
    NoTokens,
}
