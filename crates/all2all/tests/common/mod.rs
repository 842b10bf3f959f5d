//! A network of meshes for the suite, and an allocator that counts.

use all2all::conformance::Network;
use all2all::tcp::{Identity, Mesh, Options, Peer, Tcp};
use all2all::{ExchangeError, View};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Mutex;
use std::time::Duration;

/// The meshes of a cluster, made when a rank first joins.
pub(crate) struct Meshes {
    meshes: Mutex<Vec<Mesh>>,
    /// The machine of a rank.
    host: fn(usize) -> String,
}

impl Meshes {
    /// Every rank believes that it has a machine of its own.
    pub(crate) fn apart() -> Self {
        Self { meshes: Mutex::default(), host: |rank| format!("host {rank}") }
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
            meshes.push(Mesh::listen(any, identity, Options::default()).unwrap());
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

/// Counts what the threads allocate, each for itself: the test harness has threads of its own.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

pub(crate) fn allocations() -> u64 {
    ALLOCATIONS.get()
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[allow(unsafe_code, reason = "the only way to see an allocation")]
// SAFETY: every call goes to `System` as it came; the counter is a `Cell` without a destructor, so
// touching it never allocates.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the duties of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the duties of `dealloc`; the pointer came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the duties of `realloc`; the pointer came from `System`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}
