//! How a rank moves its frames along and waits for those of its peers.
//!
//! It goes round all connections, writing and reading what they take and give. When a round moves nothing
//! it looks a few more times, lets another thread run, and then sleeps until a connection is ready, the
//! mesh has news, or the deadline passes.

use super::Tcp;
use super::inbound::{SUM_BYTES, Trouble};
use super::lanes::{Lane, Wire};
use super::link::Told;
use super::outbound::Share;
use super::ring::{Room, Wants};
use super::socket::poll;
use crate::error::{FaultKind, Reason};
use crate::{View, active_ranks};
use ids::Rank;
use std::time::{Duration, Instant};

/// What went wrong, and whose doing it may be.
pub(super) type Blame = (FaultKind, Vec<Rank>);

/// Times a rank gives its core away before it sleeps: some 50 microseconds if nobody wants the core, in
/// which a peer that runs has written a small frame; going to sleep and being woken takes half as long. A
/// rank never looks again without giving its core away first: where other work runs, the peer may need
/// this very core (2 ranks on a core and a half: 42 us for a small layer over TCP, and 74 us with 64 looks).
const YIELDS: u32 = 100;

/// Bytes that a core copies per nanosecond, about. Waiting for a connection for as long as copying what it
/// does not take would last costs at most twice the better choice.
const COPY_BYTES_PER_NS: u64 = 8;

/// Whoever gave its core away for so long gave it to somebody, most likely to a peer that copies: that time is not
/// lost, and staging would only have kept the peer from it. Nobody else there: half a microsecond.
const GIVEN_AWAY: Duration = Duration::from_micros(5);

/// Within a machine frames with so many bytes of rows go over connections to one peer after the other, beginning with
/// the next rank, so that every rank receives one at a time, too. Sent all at once they pile up in all sockets and have
/// left the caches when they are read (8 ranks on 2 cores, 1.25 MiB per pair: 20.3 ms instead of 26.3 ms; 4 ranks:
/// 3.9 ms instead of 4.6 ms). Smaller ones fit into what the connections hold.
const PAIRED_MIN: usize = 256 * 1024;

/// So many connections are read without asking whether there is anything. On 2 cores, with 10 KiB per pair, asking gains
/// nothing where 4 ranks wait for 3 peers, and 3 % of the time where 8 wait for 7.
const TRIED_MAX: usize = 3;

/// An entry that the system passes over.
const TRY: libc::pollfd = libc::pollfd { fd: -1, events: 0, revents: 0 };

/// What a rank waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Goal {
    /// The rows for the experts of this rank, in this MoE layer.
    Arrived(u16),
    /// The results of its rows.
    Returned,
}

/// Buffers and bookkeeping of waiting.
pub(super) struct Waiting {
    entries: Vec<libc::pollfd>,
    /// What is to be read, of every other rank.
    looks: Vec<libc::pollfd>,
    /// The news that have been looked at.
    seen: Option<u64>,
    /// Rounds in a row that have sent nothing. From `YIELDS` on, which is before any sleep, all peers are sent to at
    /// once: nobody may miss rows, or be suspected, because another one takes none.
    stuck: u32,
}

impl Waiting {
    pub(super) fn new(view: &View) -> Self {
        let [entries, looks] = [(); 2].map(|()| Vec::with_capacity(usize::from(view.ranks) + 1));
        Self { entries, looks, seen: None, stuck: 0 }
    }
}

impl Tcp {
    /// Waits until all active peers are connected.
    pub(super) fn connect(&mut self, deadline: Instant) -> Result<(), Blame> {
        loop {
            let seen = self.core.news();
            // Between steps of an epoch all are, and nothing is looked up.
            if self.pick_up()? {
                return Ok(());
            }
            self.deserted()?;
            let missing =
                |rank: &Rank| *rank != self.view.me && self.lanes[rank.index()].wire.is_none();
            let now = Instant::now();
            if deadline <= now {
                let missing = active_ranks(&self.view).filter(missing).collect();
                return Err((FaultKind::Deadline, missing));
            }
            if self.core.news() == seen {
                self.waiting.entries.clear();
                self.waiting.entries.push(self.core.rank.entry());
                poll(&mut self.waiting.entries, Some(deadline - now));
                self.core.rank.hush();
            }
        }
    }

    /// Sends rows while the caller lends them; stages what is left.
    pub(super) fn lend(&mut self, goal: Goal, rows: &[u8], deadline: Instant) -> Result<(), Blame> {
        let result = self.lent(goal, rows, deadline);
        let me = self.view.me;
        for rank in active_ranks(&self.view) {
            let lane = &mut self.lanes[rank.index()];
            if self.layer.kept {
                // They stay where they are.
            } else if let Some(wire) = &mut lane.wire {
                let runs = sending(goal, &lane.own, &lane.theirs);
                wire.outbound.stage(&wire.link.data, (rows, runs));
            } else if rank == me && goal != Goal::Returned {
                self.layer.stage_own(rows, lane);
            }
        }
        result
    }

    fn lent(&mut self, goal: Goal, rows: &[u8], deadline: Instant) -> Result<(), Blame> {
        (self.waiting.seen, self.waiting.stuck) = (None, 0);
        self.stopped()?;
        let news = self.core.news();
        let (mut moved, mut lost) = (Instant::now(), Duration::ZERO);
        loop {
            let looked = Instant::now();
            if self.round(goal, rows, &mut [])? {
                (moved, lost) = (looked, Duration::ZERO);
            }
            let staging = self.staging(goal);
            if staging == 0 || goal == Goal::Returned {
                return Ok(());
            }
            let now = Instant::now();
            let patience = Duration::from_nanos(staging as u64 / COPY_BYTES_PER_NS);
            // All ranks may share this core, and each has as much to copy.
            let longest = patience * u32::from(self.view.ranks);
            let waited = patience <= lost || longest <= now.duration_since(moved);
            if waited || deadline <= now || self.core.news() != news {
                return Ok(());
            }
            std::thread::yield_now();
            let away = Some(now.elapsed()).filter(|away| *away < GIVEN_AWAY);
            lost += now.duration_since(looked) + away.unwrap_or_default();
        }
    }

    /// Bytes that would have to be staged now.
    fn staging(&self, goal: Goal) -> usize {
        let own = match goal {
            Goal::Arrived(_) => self.layer.own_left(&self.lanes[self.view.me.index()]),
            Goal::Returned => 0,
        };
        let unsent = |lane: &Lane| {
            let wire = lane.wire.as_ref();
            wire.map_or(0, |w| w.outbound.unsent(sending(goal, &lane.own, &lane.theirs)))
        };
        own + self.lanes.iter().map(unsent).sum::<usize>()
    }

    /// Waits until everything is sent and everything is here.
    pub(super) fn finish(
        &mut self,
        goal: Goal,
        out: &mut [u8],
        deadline: Instant,
    ) -> Result<(), Blame> {
        let mut idle = 0;
        self.waiting.seen = None;
        // An own abort ends even a step whose rows are here: the control plane wants it over.
        self.stopped()?;
        loop {
            if self.round(goal, &[], out)? {
                (idle, self.waiting.seen) = (0, None);
            }
            if self.reached(goal) {
                return Ok(());
            }
            let now = Instant::now();
            if deadline <= now {
                return Err((FaultKind::Deadline, self.missing(goal)));
            }
            let news = self.core.news();
            if self.waiting.seen != Some(news) {
                self.stopped()?;
                if let Err(blame) = self.hopeless(goal) {
                    // What the peer sent before it ended may have come since this looked.
                    match self.round(goal, &[], out) {
                        Ok(true) => continue,
                        Ok(false) | Err(_) => return Err(blame),
                    }
                }
                self.waiting.seen = Some(news);
                continue;
            }
            idle += 1;
            if idle <= YIELDS {
                std::thread::yield_now();
            } else {
                self.sleep(goal, deadline - now);
            }
        }
    }

    /// Writes and reads once on every connection; whether anything moved.
    fn round(&mut self, goal: Goal, rows: &[u8], out: &mut [u8]) -> Result<bool, Blame> {
        let mut moved = self.push_all(goal, rows)?;
        let (any, slots) = self.read_all(goal, out)?;
        moved |= any;
        let me = self.view.me.index();
        if let (Goal::Arrived(layer), true, false) = (goal, slots, self.layer.laid_out) {
            let local = self.view.routes.local_experts(layer);
            let laid_out = self.layer.lay_out(&self.view, local, &mut self.lanes);
            laid_out.map_err(|from| (FaultKind::Corrupt, vec![from]))?;
            self.layer.keep_staged(&self.lanes[me]);
            moved = true;
        }
        if goal != Goal::Returned && self.layer.laid_out {
            // A piece at a time, so that peers do not wait for all of it.
            moved |= self.layer.keep_own(rows, &self.lanes[me], SUM_BYTES);
        }
        Ok(moved)
    }

    /// The other ranks of the view. Every rank begins with another one, so that not all want the same memory at once.
    fn others(view: &View) -> impl Iterator<Item = Rank> {
        let me = view.me.0;
        let others = (me + 1..view.ranks).chain(0..me).map(Rank);
        others.filter(|rank| view.active[rank.index()])
    }

    /// Writes once on every connection; whether anything went out.
    fn push_all(&mut self, goal: Goal, rows: &[u8]) -> Result<bool, Blame> {
        let Self { view, lanes, layer, waiting, .. } = self;
        let (mut sent, mut taken) = (false, false);
        // Whoever takes nothing keeps the others from their rows for so long, and no longer.
        let paired = waiting.stuck < YIELDS;
        let rows = if layer.kept { &layer.rows } else { rows };
        for rank in Self::others(view) {
            let Lane { wire, own, theirs, .. } = &mut lanes[rank.index()];
            let Some(wire) = wire else { unreachable!("connected before the first frame") };
            let Wire { link, outbound, .. } = &mut *wire;
            if outbound.done() {
                continue;
            }
            let runs = sending(goal, &*own, &*theirs);
            let large = PAIRED_MIN <= runs.bytes() && link.data.is_paired();
            let share = if paired && taken && large { Share::Front } else { Share::Whole };
            match outbound.push(&link.data, (rows, runs), share) {
                Ok(any) => sent |= any,
                Err(trouble) => return Err(blame(trouble, rank, wire, view)),
            }
            taken |= large && !outbound.done();
            link.sent(outbound.frames());
        }
        if paired {
            waiting.stuck = if sent { 0 } else { waiting.stuck + 1 };
        }
        Ok(sent)
    }

    /// Reads once on every connection; whether anything came, and whether the slots of all rows are here.
    fn read_all(&mut self, goal: Goal, out: &mut [u8]) -> Result<(bool, bool), Blame> {
        self.look(goal);
        let Self { view, lanes, layer, waiting, .. } = self;
        let (mut moved, mut slots) = (false, true);
        for (rank, looked) in Self::others(view).zip(&waiting.looks) {
            let Lane { wire, own, theirs, .. } = &mut lanes[rank.index()];
            let Some(wire) = wire else { unreachable!("connected before the first frame") };
            let Wire { link, inbound, .. } = &mut *wire;
            if looked.revents != 0 {
                let read = match goal {
                    Goal::Arrived(_) if !layer.laid_out => inbound.read_slots(&link.data),
                    Goal::Arrived(_) => inbound.read_rows(&link.data, (&mut layer.rows, theirs)),
                    // Nowhere to put the results yet.
                    Goal::Returned if out.len() < own.bytes() => Ok(false),
                    Goal::Returned => inbound.read_rows(&link.data, (out, own)),
                };
                match read {
                    Ok(any) => moved |= any,
                    Err(trouble) => return Err(blame(trouble, rank, wire, view)),
                }
            }
            slots &= !wire.inbound.wants_slots();
        }
        Ok((moved, slots))
    }

    /// Finds out which connections have something to read: by one call, where trying each of them would take more.
    fn look(&mut self, goal: Goal) {
        let Self { view, lanes, layer, waiting, .. } = self;
        waiting.looks.clear();
        let mut unknown = 0;
        for rank in Self::others(view) {
            let wire = lanes[rank.index()].wire.as_ref();
            let wants = wire.filter(|wire| match goal {
                Goal::Arrived(_) if !layer.laid_out => wire.inbound.wants_slots(),
                Goal::Arrived(_) | Goal::Returned => !wire.inbound.done(),
            });
            let ahead = wants.is_some_and(|wire| wire.inbound.is_ahead());
            let entry = wants.filter(|_| !ahead).and_then(|wire| wire.link.data.readable());
            unknown += usize::from(entry.is_some());
            waiting.looks.push(entry.unwrap_or(TRY));
        }
        if TRIED_MAX < unknown {
            poll(&mut waiting.looks, Some(Duration::ZERO));
        }
        for entry in &mut waiting.looks {
            if entry.fd < 0 || unknown <= TRIED_MAX {
                entry.revents = libc::POLLIN;
            }
        }
    }

    fn reached(&self, goal: Goal) -> bool {
        let laid_out = goal == Goal::Returned || self.layer.laid_out;
        laid_out && self.wires().all(|(_, wire)| wire.inbound.done() && wire.outbound.done())
    }

    fn wires(&self) -> impl Iterator<Item = (Rank, &Wire)> {
        let wire = |rank: Rank| Some((rank, self.lanes[rank.index()].wire.as_ref()?));
        active_ranks(&self.view).filter_map(wire)
    }

    /// Who is waited for: first for its slots, then for its rows, then to take what is sent to it. A peer
    /// that waits for the slots of another one takes no rows either, and is innocent.
    fn missing(&self, goal: Goal) -> Vec<Rank> {
        let slots = |wire: &Wire| goal != Goal::Returned && wire.inbound.wants_slots();
        let rows = |wire: &Wire| !wire.inbound.done();
        let sent = |wire: &Wire| !wire.outbound.done();
        let which = |is: &dyn Fn(&Wire) -> bool| -> Vec<Rank> {
            self.wires().filter(|(_, wire)| is(wire)).map(|(rank, _)| rank).collect()
        };
        let all = [which(&slots), which(&rows), which(&sent)];
        all.into_iter().find(|ranks| !ranks.is_empty()).unwrap_or_default()
    }

    /// Whether this process was told to stop.
    fn stopped(&self) -> Result<(), Blame> {
        match self.core.stop.reason(self.view.epoch) {
            Some(reason) => Err((FaultKind::Aborted(reason), vec![])),
            None => Ok(()),
        }
    }

    /// Why no step of this epoch can be begun.
    pub(super) fn over(&self) -> Option<Blame> {
        let failed = |(rank, wire): (Rank, &Wire)| {
            let faulted = wire.link.told().faulted;
            faulted.is_some_and(|(epoch, _)| epoch == self.view.epoch).then_some(rank)
        };
        let told = |by| (FaultKind::Aborted(Reason::PeerFaulted), vec![by]);
        self.stopped().err().or_else(|| self.wires().find_map(failed).map(told))
    }

    /// Whether a peer has failed or left before this rank could begin.
    fn deserted(&self) -> Result<(), Blame> {
        if let Some(blame) = self.over() {
            return Err(blame);
        }
        let left =
            |wire: &Wire| wire.link.told().over.is_some_and(|(before, _)| self.view.epoch < before);
        match self.wires().find(|(_, wire)| left(wire)) {
            Some((rank, _)) => Err((FaultKind::PeerClosed, vec![rank])),
            None => Ok(()),
        }
    }

    /// Why the layer will never be complete. Masked ranks are not looked at, whatever they say.
    ///
    /// What a failing peer sent before it failed is whole, so frames that it has sent are waited for. A peer
    /// that failed and then moved on is not a suspect.
    fn hopeless(&self, goal: Goal) -> Result<(), Blame> {
        let (mut gone, mut faulted) = (Vec::new(), Vec::new());
        for (rank, wire) in self.wires() {
            match lost(wire, goal, &self.view) {
                Some(FaultKind::PeerClosed) => gone.push(rank),
                Some(_) => faulted.push(rank),
                None => {}
            }
        }
        if !gone.is_empty() {
            Err((FaultKind::PeerClosed, gone))
        } else if !faulted.is_empty() {
            Err((FaultKind::Aborted(Reason::PeerFaulted), faulted))
        } else {
            Ok(())
        }
    }

    /// Sleeps until there is something to do.
    fn sleep(&mut self, goal: Goal, at_most: Duration) {
        let Self { core, view, lanes, layer, waiting, .. } = self;
        waiting.entries.clear();
        waiting.entries.push(core.rank.entry());
        let mut ready = core.news() != waiting.seen.unwrap_or_default();
        for rank in active_ranks(view) {
            let Some(wire) = &lanes[rank.index()].wire else { continue };
            let reads = match goal {
                Goal::Arrived(_) if !layer.laid_out => wire.inbound.wants_slots(),
                Goal::Arrived(_) | Goal::Returned => !wire.inbound.done(),
            };
            let wants = Wants { reads, writes: wire.outbound.room() };
            if wants.reads || wants.writes != Room::Enough {
                match wire.link.data.fall_asleep(wants) {
                    Some(entry) => waiting.entries.push(entry),
                    None => ready = true,
                }
            }
        }
        if !ready {
            poll(&mut waiting.entries, Some(at_most));
        }
        core.rank.hush();
        for lane in lanes {
            if let Some(wire) = &lane.wire
                && !wire.link.data.wake_up()
            {
                wire.link.ended();
                core.announce();
            }
        }
    }
}

/// What a rank sends towards a goal.
fn sending<'a, T>(goal: Goal, own: &'a T, theirs: &'a T) -> &'a T {
    match goal {
        Goal::Arrived(_) => own,
        Goal::Returned => theirs,
    }
}

/// Why what the layer needs of a peer does not come, if so.
fn lost(wire: &Wire, goal: Goal, view: &View) -> Option<FaultKind> {
    let here = u64::from(wire.inbound.done());
    // Rows, and then results.
    let needed = match goal {
        Goal::Arrived(_) => 2 - here,
        Goal::Returned => 1 - here,
    };
    // What the peer took before it told or died is seen behind this.
    let (Told { faulted, over }, dead) = (wire.link.told(), wire.link.dead());
    let taken = wire.outbound.is_taken(&wire.link.data);
    // Rows that were copied right out of the peer's memory are here before it knows.
    let here = wire.inbound.frames;
    let short = |frames: u64| wire.inbound.is_void() || frames.max(here) < here + needed;
    // Nor can be waited for what it would have to take: it may do so in its next epoch, or never.
    let short = |frames: u64| short(frames) || !taken;
    let failed = faulted.filter(|&(epoch, _)| view.epoch <= epoch);
    let left = over.filter(|&(before, _)| view.epoch < before);
    match (failed, left) {
        (Some((_, frames)), _) => short(frames).then_some(FaultKind::Aborted(Reason::PeerFaulted)),
        (None, Some((_, frames))) => short(frames).then_some(FaultKind::PeerClosed),
        (None, None) => {
            let waits = 0 < needed || !taken;
            (waits && dead).then_some(FaultKind::PeerClosed)
        }
    }
}

/// What trouble on a connection means for the step.
fn blame(trouble: Trouble, rank: Rank, wire: &Wire, view: &View) -> Blame {
    let kind = match trouble {
        Trouble::Closed | Trouble::Moved => {
            let failed = wire.link.told().faulted.is_some_and(|(epoch, _)| view.epoch <= epoch);
            if failed { FaultKind::Aborted(Reason::PeerFaulted) } else { FaultKind::PeerClosed }
        }
        Trouble::Corrupt => FaultKind::Corrupt,
        Trouble::Garbled => {
            wire.link.close();
            FaultKind::Corrupt
        }
    };
    (kind, vec![rank])
}
