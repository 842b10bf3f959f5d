//! The thread of a mesh: accepts and opens connections, and reads what peers tell about themselves.
//!
//! ```text
//!   accepted ──hello──▶ half a pair ──hello of the other half──▶ link ──end of control──▶ gone
//!   opened ──hello, welcome on both──────────────────────────────▶ │
//! ```
//!
//! Whoever sends anything but a greeting that fits, or takes too long for it, is closed. Nothing that comes
//! here touches a step, but the notices of the step's own peers.

use super::frame::{Channel, HELLO, Hello, NOTICE, Notice, WELCOME, Welcome};
use super::link::Link;
use super::mesh::Core;
use super::pipe::Pipe;
use super::ring::{self, Offer, Ring};
use super::socket::{self, Listener, poll, watch};
use crate::lock;
use std::io::{self, ErrorKind, IoSlice};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A greeting takes a round trip; who needs longer is not one of us, or is lost.
const GREETING: Duration = Duration::from_secs(5);

/// Connections that have not said who they are. The oldest goes first.
const CALLERS_MAX: usize = 256;

/// Links at once; a cluster has far fewer workers.
const LINKS_MAX: usize = 1024;

/// Pause before connecting again, doubled up to the longest: a peer that answers "busy" has not yet noticed
/// the end of the old pair.
const PAUSE: Duration = Duration::from_millis(5);
const PAUSE_LONGEST: Duration = Duration::from_millis(320);

/// Signs of life to every peer, so many within [`Options::silent`](super::Options).
const BEATS: u32 = 5;

/// Runs until the mesh ends.
pub(super) fn run(core: &Core, listener: &Listener) {
    let mut keeper = Keeper::new(core);
    let mut entries = Vec::new();
    while !core.quit.load(Ordering::Acquire) {
        let wake = keeper.work(listener, Instant::now());
        entries.clear();
        entries.extend([core.keeper.entry(), listener.entry()]);
        entries.extend(keeper.callers.iter().map(Talk::entry));
        entries.extend(keeper.dials.iter().flat_map(|dial| dial.talks.each_ref().map(Talk::entry)));
        entries.extend(keeper.links.iter().map(|l| watch(&l.link.control, libc::POLLIN)));
        poll(&mut entries, wake.map(|wake| wake.saturating_duration_since(Instant::now())));
        core.keeper.hush();
    }
    for heard in &keeper.links {
        heard.link.close();
    }
}

struct Keeper<'a> {
    core: &'a Core,
    /// Accepted, and to say who they are.
    callers: Vec<Talk>,
    /// Greeted with one connection of their pair.
    halves: Vec<(Hello, Talk)>,
    /// Opened, and to be welcomed.
    dials: Vec<Dial>,
    links: Vec<Heard>,
    next_beat: Instant,
}

/// A connection on which something fixed is written and read.
struct Talk {
    stream: TcpStream,
    out: Vec<u8>,
    into: Vec<u8>,
    got: usize,
    until: Instant,
}

/// The two connections to a peer, while they are opened.
struct Dial {
    peer: String,
    nonce: u64,
    /// Data, control.
    talks: [Talk; 2],
    /// Memory that the peer may share.
    offer: Option<Offer>,
}

/// A link and the notice that is being read from it.
struct Heard {
    link: Arc<Link>,
    notice: [u8; NOTICE],
    got: usize,
}

/// What to do with a greeting.
enum Verdict {
    /// Wait for the other half.
    Wait,
    /// The other half.
    Pair((Hello, Talk)),
    Refuse(Welcome),
}

impl<'a> Keeper<'a> {
    fn new(core: &'a Core) -> Self {
        let (callers, halves, dials, links) = (vec![], vec![], vec![], vec![]);
        Self { core, callers, halves, dials, links, next_beat: Instant::now() }
    }

    /// Does all that can be done now; returns when to do it again even if nothing happens.
    fn work(&mut self, listener: &Listener, now: Instant) -> Option<Instant> {
        self.accept(listener, now);
        self.greet(now);
        self.dial(now);
        self.finish_dials(now);
        self.listen_to_links();
        self.beat(now);
        let book = lock(&self.core.book);
        let again = book.wanted.values().filter_map(|wanted| wanted.next);
        let talks = self.dials.iter().flat_map(|dial| &dial.talks);
        let talks = talks.chain(&self.callers).chain(self.halves.iter().map(|(_, talk)| talk));
        talks.map(|talk| talk.until).chain(again).chain([self.next_beat]).min()
    }

    /// Tells every peer that this process lives.
    fn beat(&mut self, now: Instant) {
        if now < self.next_beat {
            return;
        }
        self.next_beat = now + self.core.options.silent / BEATS;
        for heard in &self.links {
            heard.link.tell(Notice::Beat);
        }
    }

    fn accept(&mut self, listener: &Listener, now: Instant) {
        while let Ok(stream) = listener.accept() {
            if socket::tune(&stream, &self.core.options).is_err() {
                continue;
            }
            if CALLERS_MAX <= self.callers.len() {
                self.callers.remove(0);
            }
            self.callers.push(Talk::new(stream, vec![], HELLO, now));
        }
    }

    /// Reads greetings; a pair of them makes a link.
    fn greet(&mut self, now: Instant) {
        self.halves.retain(|(_, half)| now < half.until);
        for mut caller in std::mem::take(&mut self.callers) {
            match caller.advance() {
                Ok(true) => {
                    let bytes = caller.into.first_chunk().expect("a greeting is this long");
                    if let Some(hello) = Hello::decode(bytes) {
                        self.answer(hello, caller, now);
                    }
                }
                Ok(false) if now < caller.until => self.callers.push(caller),
                Ok(false) | Err(_) => {}
            }
        }
    }

    fn answer(&mut self, hello: Hello, caller: Talk, now: Instant) {
        match self.judge(&hello) {
            Verdict::Refuse(welcome) => caller.say(&welcome.encode(hello.nonce)),
            Verdict::Wait => {
                if CALLERS_MAX <= self.halves.len() {
                    self.halves.remove(0);
                }
                self.halves.push((hello, Talk { until: now + GREETING, ..caller }));
            }
            Verdict::Pair((_, half)) => {
                let (data, control) = match hello.channel {
                    Channel::Data => (caller, half),
                    Channel::Control => (half, caller),
                };
                let ring = self.share(&data);
                let welcome = if ring.is_some() { Welcome::Shared } else { Welcome::Yes };
                for talk in [&data, &control] {
                    talk.say(&welcome.encode(hello.nonce));
                }
                self.link(hello.from, Pipe::new(data.stream, ring), control.stream);
            }
        }
    }

    /// Takes the memory that a caller on the same machine offers, if it can be reached from here.
    fn share(&self, data: &Talk) -> Option<Ring> {
        let bytes = data.into.first_chunk().expect("a greeting is this long");
        let hello = Hello::decode(bytes)?;
        let near = self.core.options.shared_memory && hello.host == self.core.identity.host;
        ring::accept(hello.offer.filter(|_| near)?, bytes, self.core.arena.as_ref()).ok()
    }

    fn judge(&mut self, hello: &Hello) -> Verdict {
        let us = &self.core.identity;
        let known = (&hello.cluster, &hello.to) == (&us.cluster, &us.incarnation);
        // The one with the smaller incarnation connects.
        if !known || us.incarnation <= hello.from {
            return Verdict::Refuse(Welcome::No);
        }
        let book = lock(&self.core.book);
        if book.links.contains_key(&hello.from) || LINKS_MAX <= book.links.len() {
            return Verdict::Refuse(Welcome::Busy);
        }
        let other = |(half, _): &(Hello, Talk)| {
            (half.nonce, &half.from) == (hello.nonce, &hello.from) && half.channel != hello.channel
        };
        match self.halves.iter().position(other) {
            Some(index) => Verdict::Pair(self.halves.swap_remove(index)),
            None => Verdict::Wait,
        }
    }

    /// Opens connections to those who are wanted.
    fn dial(&mut self, now: Instant) {
        let mut book = lock(&self.core.book);
        for (peer, wanted) in &mut book.wanted {
            if wanted.next.is_none_or(|next| now < next) {
                continue;
            }
            wanted.next = None;
            match Dial::new(self.core, peer, wanted.address, now) {
                Ok(dial) => self.dials.push(dial),
                Err(error) => wanted.failed(&error, now),
            }
        }
    }

    fn finish_dials(&mut self, now: Instant) {
        for mut dial in std::mem::take(&mut self.dials) {
            match dial.advance(now) {
                Ok(None) => self.dials.push(dial),
                Ok(Some(welcome @ (Welcome::Yes | Welcome::Shared))) => {
                    let [data, control] = dial.talks.map(|talk| talk.stream);
                    let offer = dial.offer.filter(|_| welcome == Welcome::Shared);
                    self.link(dial.peer, Pipe::new(data, offer.map(Offer::taken)), control);
                }
                Ok(Some(Welcome::Busy)) => self.failed(&dial, &ErrorKind::WouldBlock.into(), now),
                Ok(Some(Welcome::No)) => {
                    self.failed(&dial, &ErrorKind::ConnectionRefused.into(), now);
                }
                Err(error) => self.failed(&dial, &error, now),
            }
        }
    }

    fn failed(&self, dial: &Dial, error: &io::Error, now: Instant) {
        if let Some(wanted) = lock(&self.core.book).wanted.get_mut(&dial.peer) {
            wanted.failed(error, now);
        }
        self.core.announce();
    }

    fn link(&mut self, peer: String, data: Pipe, control: TcpStream) {
        let link = Arc::new(Link::new(peer, data, control));
        self.links.push(Heard { link: Arc::clone(&link), notice: [0; NOTICE], got: 0 });
        self.core.connected(link);
    }

    /// Reads notices, and notices ends.
    fn listen_to_links(&mut self) {
        let core = self.core;
        self.links.retain_mut(|heard| match heard.read() {
            Ok(false) => true,
            Ok(true) => {
                core.announce();
                true
            }
            Err(_) => {
                heard.link.ended();
                lock(&core.book).links.remove(&heard.link.peer);
                core.announce();
                false
            }
        });
    }
}

impl Talk {
    fn new(stream: TcpStream, out: Vec<u8>, answer: usize, now: Instant) -> Self {
        Self { stream, out, into: vec![0; answer], got: 0, until: now + GREETING }
    }

    fn entry(&self) -> libc::pollfd {
        let writes = if self.out.is_empty() { 0 } else { libc::POLLOUT };
        watch(&self.stream, libc::POLLIN | writes)
    }

    /// Writes and reads what it can; whether all of it is there.
    fn advance(&mut self) -> io::Result<bool> {
        while !self.out.is_empty() {
            match socket::send(&self.stream, &[IoSlice::new(&self.out)])? {
                Some(sent) => drop(self.out.drain(..sent)),
                None => return Ok(false),
            }
        }
        while self.got < self.into.len() {
            match socket::receive(&self.stream, &mut self.into[self.got..])? {
                Some(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Some(read) => self.got += read,
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Sends a short answer on a fresh connection, which has room for it.
    fn say(&self, bytes: &[u8]) {
        let _gone_already = socket::send(&self.stream, &[IoSlice::new(bytes)]);
    }
}

impl Dial {
    /// Begins to connect, and offers memory to share in case the peer is near.
    fn new(core: &Core, peer: &str, address: SocketAddr, now: Instant) -> io::Result<Self> {
        let (us, nonce) = (&core.identity, nonce());
        let offer = core.options.shared_memory.then(|| Offer::new(core.arena.as_ref()));
        let offer = offer.transpose()?;
        let found = offer.as_ref().map(Offer::found).transpose()?;
        let talk = |channel| {
            let stream = socket::connect(address, core.address.ip())?;
            socket::tune(&stream, &core.options)?;
            let (cluster, from, host) =
                (us.cluster.clone(), us.incarnation.clone(), us.host.clone());
            let to = peer.to_owned();
            let hello = Hello { channel, nonce, cluster, from, to, host, offer: found }.encode();
            if let (Some(offer), Channel::Data) = (&offer, channel) {
                offer.sign(&hello);
            }
            Ok::<_, io::Error>(Talk::new(stream, hello.to_vec(), WELCOME, now))
        };
        let talks = [talk(Channel::Data)?, talk(Channel::Control)?];
        Ok(Self { peer: peer.to_owned(), nonce, talks, offer })
    }

    /// The peer's answer, once it has come on both connections; one refusal is enough.
    fn advance(&mut self, now: Instant) -> io::Result<Option<Welcome>> {
        let mut welcome = Some(Welcome::Yes);
        let mut shared = false;
        for talk in &mut self.talks {
            if talk.advance()? {
                let bytes = talk.into.first_chunk().expect("an answer is this long");
                match Welcome::decode(bytes, self.nonce).ok_or(ErrorKind::InvalidData)? {
                    Welcome::Yes => {}
                    Welcome::Shared => shared = true,
                    refusal @ (Welcome::Busy | Welcome::No) => return Ok(Some(refusal)),
                }
            } else if talk.until <= now {
                return Err(ErrorKind::TimedOut.into());
            } else {
                welcome = None;
            }
        }
        Ok(welcome.map(|yes| if shared { Welcome::Shared } else { yes }))
    }
}

impl super::mesh::Wanted {
    /// Tries again after a pause, unless nobody is there or the one who is does not want us.
    fn failed(&mut self, error: &io::Error, now: Instant) {
        self.refused = error.kind() == ErrorKind::ConnectionRefused;
        let pause = PAUSE.saturating_mul(1 << self.tries.min(10)).min(PAUSE_LONGEST);
        self.tries += 1;
        self.next = (!self.refused).then(|| now + pause);
    }
}

impl Heard {
    /// Reads what is there; whether there was something that a rank should know.
    fn read(&mut self) -> io::Result<bool> {
        let mut any = false;
        loop {
            match socket::receive(&self.link.control, &mut self.notice[self.got..])? {
                Some(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Some(read) => self.got += read,
                None => return Ok(any),
            }
            if self.got == NOTICE {
                let notice = Notice::decode(&self.notice).ok_or(ErrorKind::InvalidData)?;
                self.link.heard(notice);
                self.got = 0;
                any |= notice != Notice::Beat;
            }
        }
    }
}

/// Differs from all others of this process, which is enough: a pair is told by its caller, too.
fn nonce() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
