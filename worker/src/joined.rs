//! Where a worker exchanges rows, and its end of it in a view.

use all2all::local::{Hub, Local};
use all2all::tcp::{Identity, Mesh, Options, Peer, Tcp};
use all2all::{Aborter, AllToAll, ExchangeError, View};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// Longest time that a transport may take to move to a prepared view.
const RECONFIGURE_MAX: Duration = Duration::from_secs(2);

/// Where the ranks of a cluster exchange rows.
#[derive(Clone)]
pub enum Exchange {
    /// They are threads of this process.
    Local(Arc<Hub>),
    /// They are processes, which reach this one under this address.
    Processes(IpAddr),
}

/// The transport of this process.
#[derive(Clone)]
pub(crate) enum Transport {
    Local(Arc<Hub>),
    Mesh(Arc<Mesh>),
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
            Exchange::Processes(ip) => {
                let identity = Identity {
                    cluster: cluster.to_owned(),
                    incarnation: incarnation.to_owned(),
                    host: host(),
                };
                let mesh = Mesh::listen(SocketAddr::new(*ip, 0), identity, Options::default())?;
                Ok(Self::Mesh(Arc::new(mesh)))
            }
        }
    }

    /// `host:port` for the other members; empty within one process.
    pub(crate) fn address(&self) -> String {
        match self {
            Self::Local(_) => String::new(),
            Self::Mesh(mesh) => mesh.address().to_string(),
        }
    }

    /// Begins to connect to the members of a coming view.
    pub(crate) fn prepare(&self, view: &View, peers: &[Peer]) {
        match self {
            Self::Local(_) => {}
            Self::Mesh(mesh) => mesh.prepare(view.epoch, peers),
        }
    }

    pub(crate) fn join(&self, view: View, peers: &[Peer]) -> Result<Joined, ExchangeError> {
        match self {
            Self::Local(hub) => Ok(Joined::Local(hub.join(view)?)),
            Self::Mesh(mesh) => Ok(Joined::Tcp(mesh.join(view, peers)?)),
        }
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
