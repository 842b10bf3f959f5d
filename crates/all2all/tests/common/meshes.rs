//! A network of meshes for the suite.

use all2all::conformance::Network;
use all2all::tcp::{Identity, Mesh, Options, Peer, Tcp};
use all2all::{ExchangeError, View};
use std::sync::Mutex;
use std::time::Duration;

/// The meshes of a cluster, made when a rank first joins.
pub(crate) struct Meshes {
    meshes: Mutex<Vec<Mesh>>,
    pub(crate) options: Options,
    /// The machine of a rank.
    host: fn(usize) -> String,
}

impl Meshes {
    /// All ranks share memory.
    pub(crate) fn together() -> Self {
        Self { host: |_| "host".into(), ..Self::apart() }
    }

    /// Two ranks on each machine.
    pub(crate) fn mixed() -> Self {
        Self { host: |rank| format!("host {}", rank / 2), ..Self::apart() }
    }

    /// Every rank believes that it has a machine of its own.
    pub(crate) fn apart() -> Self {
        let options = Options::default();
        Self { meshes: Mutex::default(), options, host: |rank| format!("host {rank}") }
    }
}

impl Network for Meshes {
    type End = Tcp;

    fn grace(&self) -> Duration {
        Duration::from_secs(5)
    }

    fn join(&self, view: View) -> Result<Tcp, ExchangeError> {
        let mut meshes = self.meshes.lock().unwrap();
        for rank in meshes.len()..usize::from(view.ranks) {
            let identity = Identity {
                cluster: "suite".into(),
                incarnation: incarnation(rank),
                host: (self.host)(rank),
            };
            let any = "127.0.0.1:0".parse().unwrap();
            meshes.push(Mesh::listen(any, identity, self.options).unwrap());
        }
        let peer = |(rank, mesh): (usize, &Mesh)| Peer {
            address: mesh.address(),
            incarnation: incarnation(rank),
        };
        let peers: Vec<Peer> = meshes.iter().enumerate().map(peer).collect();
        meshes[view.me.index()].join(view, &peers)
    }
}

/// Not in the order of the ranks, so that either side of a pair connects.
fn incarnation(rank: usize) -> String {
    format!("{}-{rank}", rank * 7 % 5)
}
