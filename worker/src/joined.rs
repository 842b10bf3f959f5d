//! Where a worker exchanges rows, and its end of it in a view.

use all2all::local::{Hub, Lending, Local};
use all2all::tcp::{Identity, Mesh, Options, Peer, Tcp};
use all2all::{Aborter, AllToAll, ExchangeError, Routes, View};
use ids::Epoch;
use kernels::{RowMemory, Staged};
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
    /// Where experts are sent from, at the address of the service; 0 takes a free port.
    pub experts_port: u16,
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
            Exchange::Processes(Processes { listen, advertise, within_host, .. }) => {
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

    pub(crate) fn join<D: Staged>(
        &self,
        view: View,
        peers: &[Peer],
    ) -> Result<Joined<D>, ExchangeError> {
        match self {
            Self::Local(hub) if D::LENDERS_MAX == 0 => Ok(Joined::Local(hub.join(view)?)),
            Self::Local(hub) => Ok(Joined::Lending(hub.lend(few_enough::<D>(view)?)?)),
            Self::Mesh(mesh, _) => {
                Ok(Joined::Tcp(Box::new(mesh.join(view.clone(), peers)?), lone::<D>(view)?))
            }
        }
    }
}

/// The view, if its ranks can share a device.
fn few_enough<D: Staged>(view: View) -> Result<View, ExchangeError> {
    if view.ranks <= D::LENDERS_MAX {
        return Ok(view);
    }
    let reason = "more ranks than can share a device; give some of them a process of their own";
    Err(ExchangeError::Join { rank: view.me, epoch: view.epoch, reason })
}

/// What a rank that is alone in its view lends its rows to: itself, where a device can.
fn lone<D: Staged>(view: View) -> Result<Option<Lending<D::Lent>>, ExchangeError> {
    (view.ranks == 1 && 0 < D::LENDERS_MAX).then(|| Hub::new().lend(view)).transpose()
}

/// A rank's end of the exchange in a view.
pub(crate) enum Joined<D: Staged> {
    Local(Local),
    /// Within one process, on one device.
    Lending(Lending<D::Lent>),
    /// Between processes; with where a rank has its rows that is alone.
    Tcp(Box<Tcp>, Option<Lending<D::Lent>>),
}

impl<D: Staged> Joined<D> {
    pub(crate) fn view(&self) -> &View {
        match self {
            Self::Local(local) => local.view(),
            Self::Lending(lending) => lending.view(),
            Self::Tcp(tcp, _) => tcp.view(),
        }
    }

    pub(crate) fn aborter(&self) -> Aborter {
        match self {
            Self::Local(local) => local.aborter(),
            Self::Lending(lending) => lending.aborter(),
            Self::Tcp(tcp, _) => tcp.aborter(),
        }
    }

    pub(crate) fn reroute(&mut self, routes: Arc<Routes>) {
        match self {
            Self::Local(local) => local.reroute(routes),
            Self::Lending(lending) => lending.reroute(routes),
            Self::Tcp(tcp, lone) => {
                if let Some(lone) = lone {
                    lone.reroute(Arc::clone(&routes));
                }
                tcp.reroute(routes);
            }
        }
    }

    pub(crate) fn reconfigure(&mut self, view: View) -> Result<(), ExchangeError> {
        match self {
            Self::Local(local) => local.reconfigure(view, RECONFIGURE_MAX),
            Self::Lending(lending) => lending.reconfigure(few_enough::<D>(view)?, RECONFIGURE_MAX),
            Self::Tcp(tcp, was_lone) => {
                let lone = lone::<D>(view.clone())?;
                tcp.reconfigure(view, RECONFIGURE_MAX)?;
                *was_lone = lone;
                Ok(())
            }
        }
    }
}

/// A name of this machine that no other one has: Linux's id of this boot.
fn host() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    // Without a name no two processes take each other for neighbours.
    id.map_or_else(|_| uuid::Uuid::new_v4().to_string(), |id| id.trim().to_owned())
}
