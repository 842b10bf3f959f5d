//! Where a worker exchanges rows, and its end of it in a view.

use crate::exchange::HostExchange;
use all2all::local::{Hub, Local};
use all2all::tcp::{Identity, Mesh, Options, Peer, Tcp};
use all2all::{Aborter, AllToAll, ExchangeError, View};
use ids::Epoch;
use kernels::RowMemory;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// Longest time that a transport may take to move to a prepared view.
const RECONFIGURE_MAX: Duration = Duration::from_secs(2);

/// Longest wait for the connections to the members of a coming view, while the one before serves.
const REACH_MAX: Duration = Duration::from_secs(3);
/// The same while streams wait. Between members that know each other all connections stand already.
const REACH_URGENT_MAX: Duration = Duration::from_millis(500);

/// Whether a coming view can wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Haste {
    /// The view before it serves meanwhile.
    Planned,
    /// It cannot.
    Urgent,
}

/// Where the ranks of a cluster exchange rows.
#[derive(Clone)]
pub enum Exchange {
    /// They are threads of this process.
    Local(Arc<Hub>),
    /// They are processes.
    Processes(Processes),
}

/// How a process exchanges rows with others.
#[derive(Debug, Clone, Copy)]
pub struct Processes {
    /// Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where the others reach it, if that is not where it listens.
    pub advertise: Option<SocketAddr>,
    pub within_host: WithinHost,
}

/// What carries rows between processes of one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WithinHost {
    /// Memory that both map, where that works.
    SharedMemory,
    /// Connections, with checksums, as between hosts.
    Tcp,
}

/// The transport of this process.
#[derive(Clone)]
pub(crate) enum Transport {
    Local(Arc<Hub>),
    Mesh(Arc<Mesh>, SocketAddr),
}

impl Transport {
    /// * `cluster`: what all members agree on
    /// * `incarnation`: random per process start
    pub(crate) fn open(
        exchange: &Exchange,
        cluster: &str,
        incarnation: &str,
    ) -> std::io::Result<Self> {
        match exchange {
            Exchange::Local(hub) => Ok(Self::Local(Arc::clone(hub))),
            Exchange::Processes(Processes { listen, advertise, within_host }) => {
                let identity = Identity {
                    cluster: cluster.to_owned(),
                    incarnation: incarnation.to_owned(),
                    host: host(),
                };
                let shared_memory = *within_host == WithinHost::SharedMemory;
                let options = Options { shared_memory, ..Options::default() };
                let mesh = Mesh::listen(*listen, identity, options)?;
                let address = advertise.unwrap_or(mesh.address());
                Ok(Self::Mesh(Arc::new(mesh), address))
            }
        }
    }

    /// `host:port` for the other members; empty within one process.
    pub(crate) fn address(&self) -> String {
        match self {
            Self::Local(_) => String::new(),
            Self::Mesh(_, address) => address.to_string(),
        }
    }

    /// Where rows should lie that this process sends.
    pub(crate) fn row_memory(&self) -> Option<RowMemory> {
        match self {
            Self::Local(_) => None,
            Self::Mesh(mesh, _) => {
                let mesh = Arc::clone(mesh);
                Some(Arc::new(move |bytes| Box::new(mesh.buffer(bytes))))
            }
        }
    }

    /// Begins to connect to the members of a coming view.
    pub(crate) fn prepare(&self, epoch: Epoch, peers: &[Peer]) {
        match self {
            Self::Local(_) => {}
            Self::Mesh(mesh, _) => mesh.prepare(epoch, peers),
        }
    }

    /// Members that are not reached within a while; a short one if streams wait.
    pub(crate) fn unreached(&self, peers: &[Peer], haste: Haste) -> Vec<Peer> {
        let longest = match haste {
            Haste::Planned => REACH_MAX,
            Haste::Urgent => REACH_URGENT_MAX,
        };
        match self {
            Self::Local(_) => Vec::new(),
            Self::Mesh(mesh, _) => mesh.unreached(peers, longest),
        }
    }

    /// Whether a member is heard.
    pub(crate) fn reaches(&self, incarnation: &str) -> bool {
        match self {
            Self::Local(_) => true,
            Self::Mesh(mesh, _) => mesh.reaches(incarnation),
        }
    }

    /// Whether a frame that changes on its way to another rank is noticed.
    pub(crate) fn sums(&self) -> bool {
        match self {
            Self::Local(_) => false,
            Self::Mesh(mesh, _) => mesh.sums(),
        }
    }

    pub(crate) fn join(&self, view: View, peers: &[Peer]) -> Result<Joined, ExchangeError> {
        match self {
            Self::Local(hub) => Ok(Joined::Local(hub.join(view)?)),
            Self::Mesh(mesh, _) => Ok(Joined::Tcp(mesh.join(view, peers)?)),
        }
    }
}

/// An exchange that can spoil a frame.
pub(crate) trait Plantable: HostExchange {
    /// The next frame with rows for another rank arrives changed. Only where [`Transport::sums`].
    fn corrupt_next_frame(&mut self);

    /// Not so after all; false if it has been sent.
    fn keep_next_frame(&mut self) -> bool;
}

impl Plantable for Local {
    fn corrupt_next_frame(&mut self) {}

    fn keep_next_frame(&mut self) -> bool {
        false
    }
}

impl Plantable for Tcp {
    fn corrupt_next_frame(&mut self) {
        Self::corrupt_next_frame(self);
    }

    fn keep_next_frame(&mut self) -> bool {
        Self::keep_next_frame(self)
    }
}

/// A rank's end of the exchange in a view.
pub(crate) enum Joined {
    Local(Local),
    Tcp(Tcp),
}

impl Joined {
    pub(crate) fn view(&self) -> &View {
        match self {
            Self::Local(local) => local.view(),
            Self::Tcp(tcp) => tcp.view(),
        }
    }

    pub(crate) fn aborter(&self) -> Aborter {
        match self {
            Self::Local(local) => local.aborter(),
            Self::Tcp(tcp) => tcp.aborter(),
        }
    }

    pub(crate) fn reconfigure(&mut self, view: View) -> Result<(), ExchangeError> {
        match self {
            Self::Local(local) => local.reconfigure(view, RECONFIGURE_MAX),
            Self::Tcp(tcp) => tcp.reconfigure(view, RECONFIGURE_MAX),
        }
    }
}

/// A name of this machine that no other one has: Linux's id of this boot.
fn host() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    // Without a name no two processes take each other for neighbours.
    id.map_or_else(|_| uuid::Uuid::new_v4().to_string(), |id| id.trim().to_owned())
}
