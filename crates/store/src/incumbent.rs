//! Who leads an election, as seen by those who wait for its end. Two things end a lead: its key goes, or
//! there is evidence that its process has died.
//!
//! The evidence is that of its system: a connection to the address that it has given breaks, and another one
//! is refused. A listener that was never reached is no evidence, so a network that lets nobody through
//! deposes nobody. The evidence may still be wrong; who is deposed alive is fenced, as by an expired lease.

use crate::{Entry, Store};
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

/// Longest wait for a connection.
const CONNECT_MAX: Duration = Duration::from_secs(1);
/// Until an address is tried again that cannot be reached.
const RETRY: Duration = Duration::from_millis(200);
/// Until an address is tried again whose connection broke after a while: a process that dies closes its listener,
/// too, and one that is started again at the same address takes longer than that.
const AGAIN: Duration = Duration::from_millis(10);

/// Follows the key of an election.
pub(crate) struct Incumbent {
    store: Arc<dyn Store>,
    states: BoxStream<'static, Option<Entry>>,
    /// Of who follows.
    own: Vec<u8>,
    leader: Option<Entry>,
    sight: Sight,
    /// What is waited for beside the next state, as `sight` says.
    pending: BoxFuture<'static, ()>,
}

/// What is known of the leader's process.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sight {
    /// Nothing speaks against it; evidence of its death is waited for.
    Alive,
    /// Its lease is being ended, or must run out.
    Dead,
}

impl Incumbent {
    /// `own`: the value that the candidate who follows would write.
    pub(crate) fn follow(store: &Arc<dyn Store>, key: &str, own: &[u8]) -> Self {
        let (store, states) = (Arc::clone(store), store.watch(key));
        let (own, sight, pending) = (own.to_vec(), Sight::Alive, never());
        Self { store, states, own, leader: None, sight, pending }
    }

    /// Who leads now, after every change; `None` if nobody does any more.
    pub(crate) async fn next(&mut self) -> Option<&Entry> {
        loop {
            tokio::select! {
                // Whoever has resigned is not dead.
                biased;
                state = self.states.next() => {
                    let entry = state.flatten()?;
                    let what = |entry: &Entry| (entry.created, entry.lease, entry.value.clone());
                    if self.leader.as_ref().map(what) != Some(what(&entry)) {
                        self.sight = Sight::Alive;
                        self.pending = death(&entry, &self.own);
                    }
                    return Some(self.leader.insert(entry));
                }
                () = &mut self.pending => {
                    self.pending = match self.sight {
                        Sight::Alive => depose(&self.store, self.leader.as_ref()),
                        Sight::Dead => never(),
                    };
                    self.sight = Sight::Dead;
                }
            }
        }
    }

    /// Who led last has died, and this candidate has seen it.
    pub(crate) fn has_died(&self) -> bool {
        self.sight == Sight::Dead
    }
}

fn never() -> BoxFuture<'static, ()> {
    std::future::pending().boxed()
}

/// Ends the leader's lease; the store's next state is that it has gone.
fn depose(store: &Arc<dyn Store>, leader: Option<&Entry>) -> BoxFuture<'static, ()> {
    let Some((lease, leader)) = leader.and_then(|leader| Some((leader.lease?, leader))) else {
        return never();
    };
    let (store, url) = (Arc::clone(store), String::from_utf8_lossy(&leader.value).into_owned());
    let revoked = async move {
        match store.revoke(lease).await {
            Ok(()) => tracing::warn!(url, "who led has died: nobody listens there any more"),
            Err(error) => tracing::warn!(url, %error, "who led has died; its lease must run out"),
        }
    };
    revoked.boxed()
}

/// Returns when the process that made the entry has died, if that shows.
fn death(entry: &Entry, own: &[u8]) -> BoxFuture<'static, ()> {
    let url = std::str::from_utf8(&entry.value).ok();
    let address = url.and_then(|url| url.strip_prefix("http://"));
    // Every host has that address, this one too.
    let is_every = |address: &&str| {
        address.parse().is_ok_and(|address: SocketAddr| address.ip().is_unspecified())
    };
    match address.filter(|address| !is_every(address)) {
        Some(address) if entry.value != own => refused_after_all(address.to_owned()).boxed(),
        Some(_) | None => never(),
    }
}

/// Returns when a connection to the address has broken and the next one is refused.
async fn refused_after_all(address: String) {
    let mut was_reached = false;
    loop {
        let pause = match tokio::time::timeout(CONNECT_MAX, connect(&address)).await {
            Ok(Ok(connection)) => {
                was_reached = true;
                let since = Instant::now();
                closed(connection).await;
                if RETRY < since.elapsed() { AGAIN } else { RETRY }
            }
            Ok(Err(error)) if was_reached && error.kind() == ErrorKind::ConnectionRefused => return,
            Ok(Err(_)) | Err(_) => RETRY,
        };
        tokio::time::sleep(pause).await;
    }
}

async fn connect(address: &str) -> std::io::Result<TcpStream> {
    let connection = TcpStream::connect(address).await?;
    // Where nobody listens at a port of this host, TCP may connect it with itself.
    if connection.local_addr()? == connection.peer_addr()? {
        return Err(ErrorKind::ConnectionRefused.into());
    }
    Ok(connection)
}

/// Waits for the connection's end.
async fn closed(mut connection: TcpStream) {
    // A server may say what it likes, for instance that it waits for a request no longer.
    let mut unread = [0; 256];
    while connection.read(&mut unread).await.is_ok_and(|bytes| 0 < bytes) {}
}
