//! What must hold, whatever happens.

use crate::router::Request;
use crate::store::Store;
use crate::worker::{Worker, next_token};
use ids::{Epoch, ExpertId, Rank, SeqId};
use placement::{Aim, View};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Fails the law, unless it holds.
macro_rules! ensure {
    ($holds:expr, $($text:tt)*) => {
        if !$holds {
            return Err(format!($($text)*));
        }
    };
}

/// A worker's part in a view or a step: its incarnation, and the view as it sees it.
type Part = (String, Arc<View>);

fn experts(view: &View) -> impl Iterator<Item = (usize, ExpertId)> {
    let experts = u16::try_from(view.placement.experts()).expect("experts are few");
    let of_layer = move |layer| (0..experts).map(move |expert| (layer, ExpertId(expert)));
    (0..view.placement.moe_layers()).flat_map(of_layer)
}

/// The incarnations that hold an expert.
fn holders(view: &View, layer: usize, expert: ExpertId) -> BTreeSet<&str> {
    let incarnation = |rank: &Rank| view.members[rank.index()].incarnation.as_str();
    view.placement.replicas(layer, expert).iter().map(incarnation).collect()
}

fn fewest_copies(view: &View) -> usize {
    let copies = |(layer, expert)| view.placement.replicas(layer, expert).len();
    experts(view).map(copies).min().unwrap_or(usize::MAX)
}

/// What a sequence yields alone: its tokens, and the token that stops it.
pub(crate) fn alone(request: &Request) -> (Vec<u32>, Option<u32>) {
    let (mut history, mut tokens) = (request.prompt.clone(), Vec::new());
    loop {
        let token = next_token(&history, request.seed);
        if token == request.stop {
            return (tokens, Some(token));
        }
        history.push(token);
        tokens.push(token);
        if tokens.len() == request.tokens_max as usize {
            return (tokens, None);
        }
    }
}

/// A stream that a client waits for.
#[derive(Debug)]
struct Stream {
    want: (Vec<u32>, Option<u32>),
    got: usize,
}

/// What was seen so far, as far as a law needs it.
#[derive(Debug, Default)]
pub(crate) struct Laws {
    redundancy: usize,
    /// Views that stood in the store, by epoch.
    stored: BTreeMap<Epoch, Arc<View>>,
    /// Incarnations that prepared a view.
    prepared: BTreeMap<Epoch, Vec<Part>>,
    /// Incarnations that computed a step, with the view that they served.
    computed: BTreeMap<(Epoch, u64), Vec<Part>>,
    last_commit: Option<(Epoch, u64)>,
    streams: BTreeMap<SeqId, Stream>,
    pub(crate) tokens: u64,
    pub(crate) ended: u64,
    pub(crate) commits: u64,
    /// The first law that was broken.
    pub(crate) broken: Option<String>,
}

impl Laws {
    pub(crate) fn new(redundancy: u16) -> Self {
        Self { redundancy: usize::from(redundancy), ..Self::default() }
    }

    fn require(&mut self, holds: impl FnOnce() -> Result<(), String>) {
        if self.broken.is_none() {
            self.broken = holds().err();
        }
    }

    /// A view is planned: every expert has the copies that redundancy asks for, on distinct ranks. While
    /// streams wait one copy does, and nobody loads what a member of the last view that stays holds.
    /// `serving`: the last view that counted.
    pub(crate) fn planned(&mut self, view: &View, aim: Aim, serving: Option<&View>) {
        let copies = match aim {
            Aim::Level => (self.redundancy + 1).min(view.members.len()),
            Aim::Survive => 1,
        };
        let fewest = fewest_copies(view);
        self.require(|| {
            ensure!(
                copies <= fewest,
                "{}: an expert has {fewest} copies, not {copies}",
                view.epoch
            );
            let Some(serving) = serving.filter(|_| aim == Aim::Survive) else { return Ok(()) };
            for (layer, expert) in experts(view) {
                let had = holders(serving, layer, expert);
                let has = holders(view, layer, expert);
                let stays = |who: &&&str| view.members.iter().any(|m| m.incarnation == ***who);
                let left: BTreeSet<&str> = had.iter().filter(stays).copied().collect();
                ensure!(
                    left.is_empty() || has == left,
                    "{}: {expert} is held by {left:?} and planned for {has:?} while streams wait",
                    view.epoch
                );
            }
            Ok(())
        });
    }

    /// Whether every expert has the copies that redundancy asks for.
    pub(crate) fn is_whole(&self, view: &View) -> bool {
        (self.redundancy + 1).min(view.members.len()) <= fewest_copies(view)
    }

    /// A member says that it can serve its rank of a view.
    pub(crate) fn prepared(&mut self, incarnation: &str, view: &Arc<View>) {
        let prepared = self.prepared.entry(view.epoch).or_default();
        prepared.push((incarnation.to_owned(), Arc::clone(view)));
    }

    /// The store holds a view now. Only the leader may have written it, and epochs rise.
    pub(crate) fn stored(&mut self, view: &Arc<View>, writer: u32, store: &Store) {
        let last = self.stored.last_key_value().map(|(&epoch, _)| epoch);
        self.require(|| {
            let leads = writer == store.leader;
            ensure!(leads, "{} was written by a leader of the past", view.epoch);
            ensure!(
                last.is_none_or(|last| last < view.epoch),
                "{} was stored after {last:?}",
                view.epoch,
            );
            Ok(())
        });
        self.stored.insert(view.epoch, Arc::clone(view));
    }

    /// A view counts: it stands in the store, and each of its members has prepared it.
    pub(crate) fn published(&mut self, view: &Arc<View>) {
        let stored = self.stored.get(&view.epoch).cloned();
        let prepared = self.prepared.get(&view.epoch).cloned().unwrap_or_default();
        self.require(|| {
            ensure!(stored.as_ref() == Some(view), "{} was published but not stored", view.epoch);
            for member in &view.members {
                let is_prepared = prepared
                    .iter()
                    .any(|(incarnation, of)| *incarnation == member.incarnation && of == view);
                ensure!(
                    is_prepared,
                    "{} counts, and {} has not prepared it",
                    view.epoch,
                    member.worker
                );
            }
            Ok(())
        });
    }

    /// A worker serves a step in this view: it is the one that counts, not another with its epoch.
    pub(crate) fn served(&mut self, incarnation: &str, view: &Arc<View>) {
        let stored = self.stored.get(&view.epoch).cloned();
        self.require(|| {
            let counts = stored.as_ref() == Some(view);
            ensure!(counts, "{incarnation} serves another {} than the one that counts", view.epoch);
            Ok(())
        });
    }

    /// A worker completes its part of a step: it holds what the view says it holds.
    pub(crate) fn computed(&mut self, incarnation: &str, worker: &Worker, step: u64) {
        let Some(seat) = &worker.seat else { return };
        self.require(|| {
            let needs = Worker::needs(&seat.view, seat.rank);
            let missing = needs.difference(&worker.experts).next().copied();
            ensure!(missing.is_none(), "{} of {} lacks {missing:?}", seat.rank, seat.view.epoch);
            Ok(())
        });
        let parts = self.computed.entry((seat.view.epoch, step)).or_default();
        parts.push((incarnation.to_owned(), Arc::clone(&seat.view)));
    }

    /// A step counts: every member of its epoch took part, under this very view, and neither epochs
    /// nor steps go back.
    pub(crate) fn committed(&mut self, view: &Arc<View>, step: u64) {
        let parts = self.computed.remove(&(view.epoch, step)).unwrap_or_default();
        let last = self.last_commit.replace((view.epoch, step));
        self.commits += 1;
        self.require(|| {
            for member in &view.members {
                let took_part =
                    parts.iter().any(|(who, of)| *who == member.incarnation && of == view);
                ensure!(
                    took_part,
                    "step {step} of {} counts without {}",
                    view.epoch,
                    member.worker
                );
            }
            let rises = last.is_none_or(|(epoch, last)| epoch <= view.epoch && last < step);
            ensure!(rises, "step {step} of {} counts after {last:?}", view.epoch);
            Ok(())
        });
        let current = (view.epoch, 0);
        self.computed = self.computed.split_off(&current);
    }

    pub(crate) fn submitted(&mut self, id: SeqId, request: &Request) {
        self.streams.insert(id, Stream { want: alone(request), got: 0 });
    }

    pub(crate) fn left(&mut self, id: SeqId) {
        self.streams.remove(&id);
    }

    /// A client gets a token: the one that comes next if the sequence runs alone.
    pub(crate) fn token(&mut self, id: SeqId, token: u32) {
        self.tokens += 1;
        let Some(stream) = self.streams.get_mut(&id) else {
            return self.require(|| Err(format!("{id} has ended and gets token {token}")));
        };
        let (at, want) = (stream.got, stream.want.0.get(stream.got).copied());
        stream.got += 1;
        self.require(|| {
            ensure!(want == Some(token), "{id} gets {token} as token {at}, alone it gets {want:?}");
            Ok(())
        });
    }

    pub(crate) fn end(&mut self, id: SeqId, stop: Option<u32>) {
        self.ended += 1;
        let Some(stream) = self.streams.remove(&id) else {
            return self.require(|| Err(format!("{id} ends twice")));
        };
        self.require(|| {
            ensure!(
                stream.got == stream.want.0.len() && stop == stream.want.1,
                "{id} ends after {} tokens with {stop:?}: {:?}",
                stream.got,
                stream.want
            );
            Ok(())
        });
    }

    /// Streams that have not ended.
    pub(crate) fn waiting(&self) -> BTreeSet<SeqId> {
        self.streams.keys().copied().collect()
    }
}
