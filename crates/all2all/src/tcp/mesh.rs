//! A process's place among the others: it listens, and keeps connections to its peers across epochs.
//!
//! Of two processes the one with the smaller incarnation connects, so that no pair is connected twice.
//! A thread of the mesh ([`keeper`](super::keeper)) does all of this in the background.

use super::arena::{Arena, Buffer};
use super::frame::{NAME_MAX, Notice};
use super::keeper;
use super::link::Link;
use super::socket::{Bell, Listener};
use super::{Identity, Options, Peer, Tcp};
use crate::error::{ExchangeError, Reason};
use crate::{View, lock};
use ids::Epoch;
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Views that are prepared and not yet entered. The control plane prepares one at a time.
const PREPARED_MAX: usize = 8;

/// Between looks at whether the peers are there; nobody is in a hurry who waits for them.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// One process's end of all connections.
pub struct Mesh {
    pub(super) core: Arc<Core>,
    thread: Option<JoinHandle<()>>,
}

impl Mesh {
    /// Listens for peers; port 0 takes any that is free.
    ///
    /// # Errors
    ///
    /// What the system says to the address, and names of more than 100 bytes.
    pub fn listen(address: SocketAddr, identity: Identity, options: Options) -> io::Result<Self> {
        for name in [&identity.cluster, &identity.incarnation, &identity.host] {
            if NAME_MAX < name.len() {
                let text = format!("a name of more than {NAME_MAX} bytes: {name}");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
        }
        let listener = Listener::bind(address)?;
        // Without one, rows are copied once more.
        let arena = options.shared_memory.then(|| Arena::new().ok()).flatten().map(Arc::new);
        let core = Arc::new(Core {
            identity,
            options,
            arena,
            address: listener.address()?,
            book: Mutex::default(),
            news: AtomicU64::new(0),
            rank: Bell::new()?,
            keeper: Bell::new()?,
            quit: AtomicBool::new(false),
            stop: Stop::default(),
        });
        let told = Arc::clone(&core);
        let keep = move || keeper::run(&told, &listener);
        let thread = std::thread::Builder::new().name("exchange".into()).spawn(keep)?;
        Ok(Self { core, thread: Some(thread) })
    }

    /// Where peers reach this process.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.core.address
    }

    /// Whether frames between processes are always summed: they never go through shared memory.
    #[must_use]
    pub fn sums(&self) -> bool {
        !self.core.options.shared_memory
    }

    /// Bytes for rows that are to be sent: processes of the same host copy them right from there, instead of having
    /// them copied twice. They are 0 or what an earlier buffer left, and may outlive the exchange.
    #[must_use]
    pub fn buffer(&self, bytes: usize) -> Buffer {
        Buffer::new(self.core.arena.as_ref(), bytes)
    }

    /// Begins to connect to the members of a coming view, `[ranks]`, without disturbing the present one.
    /// [`reconfigure`](crate::AllToAll::reconfigure) to an epoch that was not prepared keeps the members.
    pub fn prepare(&self, epoch: Epoch, peers: &[Peer]) {
        let mut book = lock(&self.core.book);
        book.prepared.insert(epoch, peers.to_vec());
        while PREPARED_MAX < book.prepared.len() {
            book.prepared.pop_first();
        }
        self.core.want(&mut book, peers.iter());
    }

    /// Waits until the processes are connected and heard; those that are not after `longest`.
    #[must_use]
    pub fn unreached(&self, peers: &[Peer], longest: Duration) -> Vec<Peer> {
        let until = Instant::now() + longest;
        loop {
            let is_missing = |peer: &&Peer| !self.core.reaches(&peer.incarnation);
            let missing: Vec<Peer> = peers.iter().filter(is_missing).cloned().collect();
            if missing.is_empty() || until <= Instant::now() {
                return missing;
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Whether this process is connected to another one, and has heard it within [`Options::silent`]. A step
    /// waits for a peer that it does not hear until its deadline: whether the peer is to be given up, others
    /// know better.
    #[must_use]
    pub fn reaches(&self, incarnation: &str) -> bool {
        self.core.reaches(incarnation)
    }

    /// Joins the exchange of a view, whose `peers` are `[ranks]`. Does not wait for them: the first step
    /// does.
    ///
    /// # Errors
    ///
    /// [`ExchangeError::Join`] if the view has a [defect](View::defect) or other ranks than `peers`, this
    /// mesh serves an exchange already, or the epoch is over here.
    pub fn join(&self, view: View, peers: &[Peer]) -> Result<Tcp, ExchangeError> {
        self.core.admit(&view, peers)?;
        let mut book = lock(&self.core.book);
        let reason = match () {
            () if book.serving => Some("the rank is taken"),
            () if Some(view.epoch) < book.before => Some("a newer epoch has begun"),
            () => None,
        };
        if let Some(reason) = reason {
            return Err(ExchangeError::Join { rank: view.me, epoch: view.epoch, reason });
        }
        book.serving = true;
        drop(book);
        self.core.enter(&view, peers.to_vec());
        Ok(Tcp::new(Arc::clone(&self.core), view))
    }
}

impl Drop for Mesh {
    /// Ends all connections, also those of an exchange that is still there.
    fn drop(&mut self) {
        self.core.quit.store(true, Ordering::Release);
        self.core.keeper.ring();
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed, and nothing is left to save.
            let _panic = thread.join();
        }
    }
}

/// What a rank, its aborters and the mesh's thread share.
pub(super) struct Core {
    pub(super) identity: Identity,
    pub(super) options: Options,
    /// Memory that peers on this host can read.
    pub(super) arena: Option<Arc<Arena>>,
    pub(super) address: SocketAddr,
    pub(super) book: Mutex<Book>,
    /// Counts what a waiting rank should look at.
    news: AtomicU64,
    /// Wakes the rank.
    pub(super) rank: Bell,
    /// Wakes the mesh's thread.
    pub(super) keeper: Bell,
    pub(super) quit: AtomicBool,
    pub(super) stop: Stop,
}

/// Who is connected and who should be. Nothing of it is needed while a step runs well.
#[derive(Default)]
pub(super) struct Book {
    /// By incarnation; also strangers, which may be members of a view to come.
    pub(super) links: BTreeMap<String, Arc<Link>>,
    /// Peers to connect to, by incarnation.
    pub(super) wanted: BTreeMap<String, Wanted>,
    prepared: BTreeMap<Epoch, Vec<Peer>>,
    /// `[ranks]` of the present view.
    members: Vec<Peer>,
    /// An exchange is alive.
    serving: bool,
    /// All epochs before this one are left.
    before: Option<Epoch>,
    faulted: Option<Epoch>,
}

/// A peer that should be connected and is not.
pub(super) struct Wanted {
    pub(super) address: SocketAddr,
    /// When to try again; `None` while it is tried.
    pub(super) next: Option<Instant>,
    pub(super) tries: u32,
    /// It does not exist any more, or wants nothing to do with this process.
    pub(super) refused: bool,
}

/// A member that will not be connected.
pub(super) struct Refused;

impl Core {
    /// Whether a view and its members fit together and to this process.
    fn admit(&self, view: &View, peers: &[Peer]) -> Result<(), ExchangeError> {
        let me = peers.get(view.me.index()).map(|peer| &peer.incarnation);
        let reason = match view.defect() {
            Some(defect) => defect,
            None if peers.len() != usize::from(view.ranks) => {
                "its members have another number of ranks"
            }
            None if me != Some(&self.identity.incarnation) => "this process is not the member",
            None => return Ok(()),
        };
        Err(ExchangeError::Join { rank: view.me, epoch: view.epoch, reason })
    }

    /// The members of the next view: those that were prepared for it, or the present ones.
    pub(super) fn members(&self, next: &View) -> Result<Vec<Peer>, ExchangeError> {
        let book = lock(&self.book);
        let peers = book.prepared.get(&next.epoch).unwrap_or(&book.members).clone();
        drop(book);
        self.admit(next, &peers)?;
        Ok(peers)
    }

    /// Leaves all epochs before that of the view, and wants to be connected to its active members.
    pub(super) fn enter(&self, view: &View, peers: Vec<Peer>) {
        let mut book = lock(&self.book);
        book.prepared.retain(|&epoch, _| view.epoch < epoch);
        book.faulted = None;
        self.leave(&mut book, view.epoch);
        let active = || peers.iter().zip(&view.active).filter(|(_, active)| **active);
        let coming: Vec<&Peer> = book.prepared.values().flatten().collect();
        let needed = |name: &String| {
            active()
                .map(|(peer, _)| peer)
                .chain(coming.iter().copied())
                .any(|p| p.incarnation == *name)
        };
        let unneeded: Vec<String> = book
            .wanted
            .iter()
            .filter(|(name, w)| w.refused || !needed(name))
            .map(|(n, _)| n.clone())
            .collect();
        for name in unneeded {
            book.wanted.remove(&name);
        }
        self.want(&mut book, active().map(|(peer, _)| peer));
        book.members = peers;
    }

    /// Ends the exchange of this process.
    pub(super) fn finish(&self, epoch: Epoch) {
        let mut book = lock(&self.book);
        book.serving = false;
        self.leave(&mut book, Epoch(epoch.0.saturating_add(1)));
    }

    fn leave(&self, book: &mut Book, before: Epoch) {
        book.before = book.before.max(Some(before));
        for link in book.links.values().filter(|link| !link.dead()) {
            link.tell(Notice::Over { before, frames: link.frames() });
        }
    }

    /// Tells every peer that the step of this epoch has failed.
    pub(super) fn tell_fault(&self, epoch: Epoch) {
        let mut book = lock(&self.book);
        book.faulted = Some(epoch);
        for link in book.links.values().filter(|link| !link.dead()) {
            link.tell(Notice::Faulted { epoch, frames: link.frames() });
        }
    }

    /// Has the mesh's thread connect to those who are not connected and whose part it is not.
    fn want<'a>(&self, book: &mut Book, peers: impl Iterator<Item = &'a Peer>) {
        for Peer { address, incarnation } in peers {
            let linked = book.links.get(incarnation).is_some_and(|link| !link.dead());
            if !linked && self.identity.incarnation < *incarnation {
                book.wanted.entry(incarnation.clone()).or_insert_with(|| Wanted {
                    address: *address,
                    next: Some(Instant::now()),
                    tries: 0,
                    refused: false,
                });
            }
        }
        self.keeper.ring();
    }

    /// The connections to a member, if they stand; an error if they never will.
    pub(super) fn link(&self, rank: ids::Rank) -> Result<Option<Arc<Link>>, Refused> {
        let book = lock(&self.book);
        let Some(Peer { incarnation, .. }) = book.members.get(rank.index()) else {
            return Err(Refused);
        };
        match book.links.get(incarnation).filter(|link| !link.dead()) {
            Some(link) => Ok(Some(Arc::clone(link))),
            None if book.wanted.get(incarnation).is_some_and(|wanted| wanted.refused) => {
                Err(Refused)
            }
            None => Ok(None),
        }
    }

    /// Whether a process is connected, and has been heard lately.
    fn reaches(&self, incarnation: &str) -> bool {
        let is_heard =
            |link: &Arc<Link>| !link.dead() && link.last_heard().elapsed() < self.options.silent;
        incarnation == self.identity.incarnation
            || lock(&self.book).links.get(incarnation).is_some_and(is_heard)
    }

    /// A new pair of connections stands: the peer learns what it has missed.
    pub(super) fn connected(&self, link: Arc<Link>) {
        let (mut book, frames) = (lock(&self.book), 0);
        if let Some(before) = book.before {
            link.tell(Notice::Over { before, frames });
        }
        if let Some(epoch) = book.faulted {
            link.tell(Notice::Faulted { epoch, frames });
        }
        book.wanted.remove(&link.peer);
        book.links.insert(link.peer.clone(), link);
        drop(book);
        self.announce();
    }

    /// Has the rank look up.
    pub(super) fn announce(&self) {
        self.news.fetch_add(1, Ordering::Release);
        self.rank.ring();
    }

    pub(super) fn news(&self) -> u64 {
        self.news.load(Ordering::Acquire)
    }
}

/// The aborts of a process, across all of its epochs.
#[derive(Default)]
pub(super) struct Stop {
    /// One more than the newest epoch that is over; looked at before the reason, without a lock.
    over: AtomicU64,
    reason: Mutex<Option<(Epoch, Reason)>>,
}

impl Stop {
    /// Why `epoch` is over, if it is.
    pub(super) fn reason(&self, epoch: Epoch) -> Option<Reason> {
        if self.over.load(Ordering::Acquire) <= epoch.0 {
            return None;
        }
        lock(&self.reason).filter(|&(through, _)| epoch <= through).map(|(_, reason)| reason)
    }

    /// Ends `epoch`. The first reason for an epoch stands.
    pub(super) fn abort(&self, epoch: Epoch, reason: Reason) {
        let mut newest = lock(&self.reason);
        if newest.is_none_or(|(through, _)| through < epoch) {
            *newest = Some((epoch, reason));
            self.over.store(epoch.0.saturating_add(1), Ordering::Release);
        }
    }
}
