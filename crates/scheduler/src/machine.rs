//! The scheduler itself: admission, and one step at a time over all ranks.

use crate::{
    Config, ConfigError, Held, NewSequence, Plan, Stats, SubmitError,
    backup::{Backups, Released, rank_of},
    pace::{Load, Pace},
    rank::{Budget, RankState, Room},
    sequence::Sequence,
};
use ids::{Rank, SeqId, StepId};
use std::{collections::VecDeque, time::Duration};

/// Sequences that resume may take this many times the prefill of new ones while others decode. Both are in
/// the middle of a text: what spares one a pause gives it to the other, and between the pieces of a prefill
/// there is a decode of everybody else.
const RESUMED: u32 = 4;

/// Decides what every rank computes next. See the crate's documentation.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq))]
pub struct Scheduler {
    config: Config,
    context_tokens: u32,
    ranks: Vec<RankState>,
    /// The front is next: preempted sequences, then the others in order of arrival.
    queue: VecDeque<Sequence>,
    in_flight: Option<StepId>,
    /// What the step in flight, or the last one that did not fail, holds.
    load: Load,
    pace: Pace,
    /// The last step failed, so the next one is for those who have waited for it: it only decodes.
    behind: bool,
    arrivals: u64,
    preemptions: u64,
    backups: Backups,
    // Buffers of `admit` and `commit`.
    rooms: Vec<Room>,
    sampled: Vec<(SeqId, u32)>,
}

impl Scheduler {
    /// A scheduler with nothing to do.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if sequences could get stuck under this configuration.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        if config.step_tokens == 0 || config.sequences_max == 0 || config.queue_max == 0 {
            return Err(ConfigError::ZeroLimit);
        }
        if config.step_tokens < config.sequences_max {
            return Err(ConfigError::SmallStep {
                step_tokens: config.step_tokens,
                sequences_max: config.sequences_max,
            });
        }
        if !config.backup_tokens.is_empty() && config.backup_tokens.len() != config.pools.len() {
            let (entries, ranks) = (config.backup_tokens.len(), config.pools.len());
            return Err(ConfigError::Backups { entries, ranks });
        }
        let is_empty = |kv: &crate::KvPools| {
            kv.block_tokens == 0 || kv.chunk_tokens == Some(0) || kv.capacity_tokens() == 0
        };
        if let Some(rank) = config.pools.iter().position(is_empty) {
            return Err(ConfigError::EmptyPool { rank });
        }
        // The last token of a sequence is sampled but never computed: it needs no position.
        let capacity = config.pools.iter().map(|kv| kv.capacity_tokens().saturating_add(1)).min();
        let capacity = capacity.ok_or(ConfigError::NoRanks)?;
        Ok(Self {
            context_tokens: config.context_tokens.min(capacity),
            ranks: config.pools.iter().map(|&kv| RankState::new(kv)).collect(),
            queue: VecDeque::new(),
            in_flight: None,
            load: Load::default(),
            pace: Pace::default(),
            behind: false,
            arrivals: 0,
            preemptions: 0,
            backups: Backups::new(config.backup_tokens.clone()),
            rooms: Vec::new(),
            sampled: Vec::new(),
            config,
        })
    }

    /// Moves to the ranks of another view. `kept[new]` names the old rank whose KV memory rank `new`
    /// still has, blocks, copies and all: its sequences go on where they are. Those of ranks that nobody
    /// kept wait at the front of the queue, oldest first, and go on from the copies of what was computed of them,
    /// or are computed again from their tokens.
    ///
    /// If the longest possible sequence changes, no sequence is taken over: submit them again, as
    /// far as [`Self::has`] does not know them.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] as for [`Self::new`].
    ///
    /// # Panics
    ///
    /// If a step is in flight, or `kept` does not fit the ranks.
    pub fn reconfigure(
        mut self,
        config: Config,
        kept: &[Option<usize>],
    ) -> Result<Self, ConfigError> {
        assert!(self.in_flight.is_none(), "ranks change while a step is in flight");
        assert_eq!(kept.len(), config.pools.len(), "one entry per new rank");
        let mut next = Self::new(config)?;
        next.preemptions = self.preemptions;
        next.pace = std::mem::take(&mut self.pace);
        next.behind = self.behind;
        if next.context_tokens != self.context_tokens {
            next.release_all(&self, kept);
            return Ok(next);
        }
        next.arrivals = self.arrivals;
        let mut old: Vec<Option<RankState>> = self.ranks.drain(..).map(Some).collect();
        for (rank, kept) in next.ranks.iter_mut().zip(kept) {
            let Some(kept) = kept else { continue };
            let state = old[*kept].take_if(|state| state.kv() == rank.kv());
            if let Some(state) = state {
                *rank = state;
            }
        }
        let mut homeless: Vec<Sequence> =
            old.into_iter().flatten().flat_map(RankState::into_waiting).collect();
        homeless.sort_by_key(|sequence| sequence.born);
        next.queue.extend(homeless);
        next.queue.append(&mut self.queue);
        let running = next.ranks.iter_mut().flat_map(RankState::running_mut);
        for sequence in running.chain(&mut next.queue) {
            sequence.backup.take_if(|backup| {
                let now = kept.iter().position(|kept| *kept == Some(backup.rank.index()));
                backup.rank = now.map_or(backup.rank, rank_of);
                now.is_none()
            });
        }
        Ok(next)
    }

    /// No sequence of `last` is taken over: its ranks that are still there need to keep no copies.
    fn release_all(&mut self, last: &Self, kept: &[Option<usize>]) {
        let running = last.ranks.iter().flat_map(RankState::running);
        for sequence in running.chain(&last.queue) {
            let Some(backup) = &sequence.backup else { continue };
            let now = kept.iter().position(|kept| *kept == Some(backup.rank.index()));
            if let Some(rank) = now {
                self.ranks[rank].release(sequence.id);
            }
        }
    }

    /// Ends every sequence that is not wanted any more. Only while no step is in flight.
    pub fn retain(&mut self, wanted: impl Fn(SeqId) -> bool) {
        self.drop_queued(|sequence| !wanted(sequence.id));
        for rank in &mut self.ranks {
            rank.retain(&wanted);
        }
        self.release_dropped();
    }

    /// Whether the sequence is here, running or waiting.
    #[must_use]
    pub fn has(&self, id: SeqId) -> bool {
        self.queue.iter().any(|s| s.id == id) || self.ranks.iter().any(|rank| rank.has(id))
    }

    /// The longest sequence, prompt and output: the model's context or what the smallest rank can
    /// hold. Nothing is scheduled beyond it.
    #[must_use]
    pub fn context_tokens(&self) -> u32 {
        self.context_tokens
    }

    /// Queues a sequence.
    ///
    /// # Errors
    ///
    /// [`SubmitError`]; the sequence is then unknown here.
    ///
    /// # Panics
    ///
    /// If a sequence with this id is here already.
    pub fn submit(&mut self, new: NewSequence) -> Result<(), SubmitError> {
        if new.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if new.tokens_max == 0 {
            return Err(SubmitError::NoTokens);
        }
        if u64::from(self.context_tokens) < new.prompt.len() as u64 + 1 {
            return Err(SubmitError::TooLong {
                prompt_tokens: new.prompt.len() as u64,
                context_tokens: self.context_tokens,
            });
        }
        let queued = self.queued();
        if self.config.queue_max <= queued {
            return Err(SubmitError::QueueFull { queued, queue_max: self.config.queue_max });
        }
        assert!(!self.has(new.id), "{} is here already", new.id);
        self.queue.push_back(Sequence::new(new, self.arrivals, self.context_tokens));
        self.arrivals += 1;
        Ok(())
    }

    /// Ends a sequence and frees its blocks: at once, or when the step in flight ends. Unknown
    /// sequences are ignored, so it may be called twice.
    pub fn cancel(&mut self, id: SeqId) {
        self.drop_queued(|sequence| sequence.id == id);
        for rank in &mut self.ranks {
            match self.in_flight {
                Some(_) => rank.doom(id),
                None => rank.remove(id),
            }
        }
        self.release_dropped();
    }

    /// What ranks say of the copies that they keep.
    pub fn held(&mut self, held: impl IntoIterator<Item = (Rank, Held)>) {
        let running = self.ranks.iter_mut().flat_map(RankState::running_mut);
        self.backups.told(held, running.chain(&mut self.queue));
    }

    /// The last step failed because these sequences of a rank could not go on from copies there: those that were to are
    /// computed again from their tokens.
    ///
    /// # Panics
    ///
    /// If a step is in flight.
    pub fn unrestore(&mut self, rank: Rank, ids: &[SeqId]) {
        assert!(self.in_flight.is_none(), "copies are missed while a step is in flight");
        if let Some(rank) = self.ranks.get_mut(rank.index()) {
            rank.unrestore(ids);
        }
        self.release_dropped();
    }

    /// Plans one step into `plan`, whose memory is reused. False: there is nothing to do, and no
    /// step is in flight. Otherwise [`Self::commit`] or [`Self::abort`] must follow.
    ///
    /// # Panics
    ///
    /// If a step is in flight.
    pub fn plan(&mut self, step: StepId, plan: &mut Plan) -> bool {
        assert!(self.in_flight.is_none(), "{step} planned while a step is in flight");
        self.admit();
        plan.step = step;
        plan.ranks.resize_with(self.ranks.len(), Vec::new);
        let mut slices = 0;
        for rank in &mut self.ranks {
            self.preemptions += rank.secure(&mut self.queue);
        }
        let (decodes, budget) = self.budget();
        self.load = Load { decodes, prefill_tokens: 0 };
        for rank in &mut self.ranks {
            let prefill_tokens = rank.share_budget(budget);
            self.load.prefill_tokens = self.load.prefill_tokens.max(prefill_tokens);
        }
        self.backups.plan(&mut self.ranks, &self.queue);
        plan.released.resize_with(self.ranks.len(), Vec::new);
        for (index, rank) in self.ranks.iter_mut().enumerate() {
            rank.write_slices(&mut plan.ranks[index]);
            rank.write_released(&mut plan.released[index]);
            slices += plan.ranks[index].len();
        }
        if slices == 0 {
            return false;
        }
        self.in_flight = Some(step);
        true
    }

    /// How many sequences decode, and the budget of every rank. All ranks end a step together, so those
    /// who wait on one of them wait for the prefill of each: who has waited for a step that failed does not.
    fn budget(&self) -> (u32, Budget) {
        let waiting = self.ranks.iter().map(RankState::waiting);
        let (decodes, resumed) = waiting.fold((0, 0), |sum, rank| (sum.0 + rank.0, sum.1 + rank.1));
        let step_tokens = self.config.step_tokens;
        if self.behind && decodes != 0 {
            return (decodes, Budget { step_tokens, prefill_tokens: 0, resumed_tokens: 0 });
        }
        let tokens = self.pace.tokens(self.config.prefill_max);
        let resumed_tokens = if decodes == 0 { u32::MAX } else { tokens.saturating_mul(RESUMED) };
        let prefill_tokens = match (decodes, resumed) {
            (0, 0) => u32::MAX,
            (1.., 0) if self.pace.is_stale() => 0,
            _ => tokens,
        };
        (decodes, Budget { step_tokens, prefill_tokens, resumed_tokens })
    }

    /// The step in flight took this long; to be told before its [`Self::commit`]. Optional: a scheduler
    /// that knows no times holds no prefill back.
    pub fn time(&mut self, took: Duration) {
        if self.in_flight.is_some() {
            self.pace.observe(self.load, took);
        }
    }

    /// The step in flight succeeded on all ranks. `sampled` has one token for every slice that
    /// samples, in any order; those of sequences that were cancelled meanwhile may be left out.
    ///
    /// # Panics
    ///
    /// If no step is in flight or a token is missing.
    pub fn commit(&mut self, sampled: &[(SeqId, u32)]) {
        assert!(self.in_flight.take().is_some(), "commit without a step in flight");
        self.behind = false;
        self.sampled.clear();
        self.sampled.extend_from_slice(sampled);
        self.sampled.sort_unstable_by_key(|&(id, _)| id);
        for rank in &mut self.ranks {
            rank.commit(&self.sampled);
        }
        self.sampled.clear();
        self.release_dropped();
    }

    /// The step in flight failed; nothing of it counts. Preemptions and admissions stand: the
    /// failed step may have overwritten the blocks of a preempted sequence.
    ///
    /// # Panics
    ///
    /// If no step is in flight.
    pub fn abort(&mut self) {
        assert!(self.in_flight.take().is_some(), "abort without a step in flight");
        (self.behind, self.load) = (true, Load::default());
        for rank in &mut self.ranks {
            rank.abort();
        }
        self.release_dropped();
    }

    /// The load right now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let mut ranks: Vec<_> = self.ranks.iter().map(RankState::stats).collect();
        let running = self.ranks.iter().flat_map(RankState::running);
        for backup in running.chain(&self.queue).filter_map(|sequence| sequence.backup.as_ref()) {
            ranks[backup.rank.index()].backup_tokens += u64::from(backup.held_tokens());
        }
        Stats {
            running: ranks.iter().map(|rank| rank.running).sum(),
            queued: self.queued(),
            preemptions: self.preemptions,
            prompt_tokens: self.pace.tokens(self.config.prefill_max).min(self.config.step_tokens),
            ranks,
        }
    }

    /// Moves sequences from the queue to ranks with room: one of which there is a copy to where that is, any
    /// other to the rank that holds least. All ranks end a step together, so one with more memory than the others
    /// must not do more. The front is never overtaken: a long prompt that waits for memory would otherwise wait for
    /// ever.
    fn admit(&mut self) {
        if self.queue.is_empty() {
            return;
        }
        self.rooms.clear();
        self.rooms.extend(self.ranks.iter().map(|rank| rank.room(self.config.sequences_max)));
        while let Some(front) = self.queue.front() {
            let copy = front.backup.as_ref().map(|backup| backup.rank.index());
            let restorable = copy.map_or(0, |rank| front.restorable(self.ranks[rank].kv()));
            let fitting = (0..self.ranks.len())
                .map(|rank| (rank, front.needed_blocks(self.ranks[rank].kv())))
                .filter(|&(rank, needed)| self.rooms[rank].fits(needed));
            let taken = |rank: usize| self.rooms[rank].taken(self.ranks[rank].kv());
            let is_elsewhere = |rank: usize| restorable == 0 || copy != Some(rank);
            let best = fitting.min_by_key(|&(rank, _)| (is_elsewhere(rank), taken(rank), rank));
            let Some((rank, needed)) = best else { break };
            self.rooms[rank].take(needed);
            let mut sequence = self.queue.pop_front().expect("it has a front");
            if !is_elsewhere(rank) {
                sequence.restore(restorable, self.ranks[rank].kv());
            } else if copy == Some(rank) {
                self.release_on(sequence.let_go());
            }
            self.ranks[rank].admit(sequence);
        }
        self.rooms.clear();
    }

    fn drop_queued(&mut self, leaves: impl Fn(&Sequence) -> bool) {
        let mut dropped = Vec::new();
        self.queue.retain_mut(|sequence| {
            let leaves = leaves(sequence);
            if leaves {
                dropped.extend(sequence.let_go());
            }
            !leaves
        });
        self.release_on(dropped);
    }

    /// Copies that nobody needs any more are told to those who keep them.
    fn release_on(&mut self, copies: impl IntoIterator<Item = Released>) {
        for Released { rank, sequence } in copies {
            self.ranks[rank.index()].release(sequence);
        }
    }

    fn release_dropped(&mut self) {
        for rank in 0..self.ranks.len() {
            let dropped: Vec<Released> = self.ranks[rank].take_dropped().collect();
            self.release_on(dropped);
        }
    }

    fn queued(&self) -> u32 {
        u32::try_from(self.queue.len()).expect("the queue is bounded")
    }
}
