//! Which ranks have gone silent. While a step runs, every rank sends a beat every [`BEAT`]; a rank that
//! misses too many of them is frozen or cut off, and waiting for it helps nobody.
//!
//! How many are too many follows from how late beats have been lately, so that a busy machine is not
//! taken for a dead one. Time is counted in the router's own ticks: if the router is short of time
//! itself, its ticks are late too, and nobody is blamed for that.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Between beats of a rank, and between the router's ticks.
pub(super) const BEAT: Duration = proto::BEAT;

/// Fewest missed beats that make a suspect. Where much more than the processors can do begins at once, a
/// thread that wants to run waits for half of it at times; and to leave an innocent worker behind costs more
/// than to wait this long for a dead one.
const MISSED_MIN: f32 = 8.0;
/// A rank that is silent for longer is suspect, however late beats usually are.
const MISSED_MAX: f32 = 50.0;
/// A suspect has missed this many times as many beats as anybody lately.
const FACTOR: f32 = 3.0;
/// What is left of the memory of late beats after a tick: a half of it after 2 s.
const FADE: f32 = 0.9965;
/// So much longer the next suspect is waited for, should the last one have been innocent. A worker that is
/// left behind is kept out for a while, too, so this need not be much.
const PATIENCE: f32 = 2.0;
/// Before anything is known, beats are taken to be late: a cluster that starts is a busy one.
const USUAL_FIRST: f32 = 15.0;
/// A rank that has answered.
const ANSWERED: u32 = u32::MAX;

/// Signs of life of the ranks during one step.
#[derive(Debug)]
pub(super) struct Signs {
    /// Beats missed in a row, by rank.
    missed: Vec<AtomicU32>,
    /// Most beats missed in a row by a rank that was heard again, since the last tick.
    late: AtomicU32,
    /// A rank that does not hear others, and which: the last one that said so.
    unheard: Mutex<Option<(usize, Vec<u32>)>>,
}

impl Signs {
    pub(super) fn new(ranks: usize) -> Self {
        let missed = (0..ranks).map(|_| AtomicU32::new(0)).collect();
        Self { missed, late: AtomicU32::new(0), unheard: Mutex::new(None) }
    }

    /// A message came, if only a beat.
    pub(super) fn heard(&self, rank: usize) {
        let missed = self.missed[rank].swap(0, Ordering::Relaxed);
        self.late.fetch_max(missed, Ordering::Relaxed);
    }

    /// The rank says whom it does not hear, or that it hears all.
    pub(super) fn misses(&self, rank: usize, unheard: Vec<u32>) {
        let mut told = self.unheard.lock().unwrap_or_else(PoisonError::into_inner);
        if !unheard.is_empty() {
            *told = Some((rank, unheard));
        } else if told.as_ref().is_some_and(|(by, _)| *by == rank) {
            *told = None;
        }
    }

    /// A rank that does not hear others, and which, if one has said so since this was asked last.
    pub(super) fn unheard(&self) -> Option<(usize, Vec<u32>)> {
        self.unheard.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The rank's part of the step is over.
    pub(super) fn answered(&self, rank: usize) {
        self.missed[rank].store(ANSWERED, Ordering::Relaxed);
    }
}

/// Silent ranks, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Silence {
    pub(super) ranks: Vec<usize>,
    pub(super) lasted: Duration,
}

/// How late beats are usually; outlives steps and views.
#[derive(Debug)]
pub(super) struct Suspicion {
    /// Beats missed in a row by a rank that then was heard again; fades.
    usual: f32,
}

impl Suspicion {
    pub(super) fn new() -> Self {
        Self { usual: USUAL_FIRST }
    }

    /// One beat's time has passed. Somebody is only blamed if others are heard.
    pub(super) fn tick(&mut self, signs: &Signs) -> Option<Silence> {
        let limit = (self.usual * FACTOR).clamp(MISSED_MIN, MISSED_MAX);
        // One tick without a beat is chance.
        let late = signs.late.swap(0, Ordering::Relaxed).saturating_sub(1);
        self.usual = (self.usual * FADE).max(late as f32);
        let (mut silent, mut longest, mut are_heard) = (Vec::new(), 0, false);
        for (rank, missed) in signs.missed.iter().enumerate() {
            let before = missed.load(Ordering::Relaxed);
            if before == ANSWERED {
                are_heard = true;
                continue;
            }
            missed.store(before + 1, Ordering::Relaxed);
            let now = before + 1;
            if limit <= now as f32 {
                silent.push(rank);
                longest = longest.max(now);
            } else {
                are_heard |= now <= 2;
            }
        }
        if silent.is_empty() || !are_heard {
            return None;
        }
        self.usual = limit * PATIENCE / FACTOR;
        Some(Silence { ranks: silent, lasted: BEAT * longest })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ticks until somebody is suspect; `beats[rank]`: it is heard every so many ticks, 0 for never.
    fn ticks(suspicion: &mut Suspicion, beats: &[u32], most: u32) -> Option<(u32, Vec<usize>)> {
        let signs = Signs::new(beats.len());
        for tick in 1..=most {
            for (rank, &every) in beats.iter().enumerate() {
                if every != 0 && tick % every == 0 {
                    signs.heard(rank);
                }
            }
            if let Some(silence) = suspicion.tick(&signs) {
                assert_eq!(silence.lasted, BEAT * tick);
                return Some((tick, silence.ranks));
            }
        }
        None
    }

    fn calm() -> Suspicion {
        Suspicion { usual: 0.0 }
    }

    #[test]
    fn rank_that_hears_the_others_again_is_told_of_no_more() {
        let signs = Signs::new(3);
        signs.misses(1, vec![2]);
        signs.misses(0, vec![]);
        assert_eq!(signs.unheard(), Some((1, vec![2])), "another rank hears all");
        assert_eq!(signs.unheard(), None, "asked since");
        signs.misses(1, vec![2]);
        signs.misses(1, vec![]);
        assert_eq!(signs.unheard(), None);
    }

    #[test]
    fn silent_rank_is_suspect_after_a_few_beats_where_beats_are_punctual() {
        assert_eq!(ticks(&mut calm(), &[1, 0, 1], 100), Some((8, vec![1])));
        let mut suspicion = Suspicion::new();
        assert_eq!(ticks(&mut suspicion, &[1, 1], 3000), None);
        assert_eq!(ticks(&mut suspicion, &[0, 1], 100), Some((8, vec![0])), "calm has come back");
    }

    #[test]
    fn late_beats_make_it_patient_up_to_a_limit() {
        // Everybody is heard every sixth tick only.
        let mut busy = calm();
        assert_eq!(ticks(&mut busy, &[6, 6], 30), None);
        let (tick, ranks) = ticks(&mut busy, &[6, 0], 100).unwrap();
        assert!((12..=18).contains(&tick), "{tick}");
        assert_eq!(ranks, [1]);
        let mut worst = Suspicion { usual: 1000.0 };
        assert_eq!(ticks(&mut worst, &[1, 0], 100), Some((50, vec![1])));
    }

    #[test]
    fn suspect_that_was_innocent_is_waited_for_longer() {
        let mut suspicion = calm();
        assert_eq!(ticks(&mut suspicion, &[1, 0], 100), Some((8, vec![1])));
        assert_eq!(ticks(&mut suspicion, &[1, 0], 100), Some((16, vec![1])));
    }

    #[test]
    fn nobody_is_blamed_if_nobody_is_heard() {
        assert_eq!(ticks(&mut calm(), &[0, 0], 100), None);
        let signs = Signs::new(2);
        signs.answered(0);
        let mut suspicion = calm();
        let found = (0..8).find_map(|_| suspicion.tick(&signs)).unwrap();
        assert_eq!(found.ranks, [1], "an answer is a sign of life");
    }
}
