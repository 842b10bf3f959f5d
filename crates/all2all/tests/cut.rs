//! A network that loses everything between two processes which live on: each misses the other, long
//! before the step's deadline, and the step ends well once it heals.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

#[path = "common/steps.rs"]
mod steps;

use all2all::tcp::{Identity, Mesh, Options, Peer};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use steps::{step, view};

const SILENT: Duration = Duration::from_millis(500);
/// Far beyond what the test waits for.
const LONG: Duration = Duration::from_secs(50);

fn mesh(name: &str) -> Mesh {
    let identity = Identity { cluster: "cut".into(), incarnation: name.into(), host: name.into() };
    let options = Options { silent: SILENT, ..Options::default() };
    Mesh::listen("127.0.0.1:0".parse().unwrap(), identity, options).unwrap()
}

/// Passes bytes on in both directions, but none while it is cut.
fn relay(to: SocketAddr, cut: &Arc<AtomicBool>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let cut = Arc::clone(cut);
    std::thread::spawn(move || {
        for near in listener.incoming() {
            let (near, far) = (near.unwrap(), TcpStream::connect(to).unwrap());
            for (from, into) in [(&near, &far), (&far, &near)] {
                from.set_nodelay(true).unwrap();
                let (from, into) = (from.try_clone().unwrap(), into.try_clone().unwrap());
                let cut = Arc::clone(&cut);
                std::thread::spawn(move || pass(from, into, &cut));
            }
        }
    });
    address
}

fn pass(mut from: TcpStream, mut into: TcpStream, cut: &AtomicBool) {
    from.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    let mut bytes = [0; 4096];
    loop {
        while cut.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(5));
        }
        match from.read(&mut bytes) {
            Ok(0) => return,
            Ok(read) if into.write_all(&bytes[..read]).is_ok() => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Ok(_) | Err(_) => return,
        }
    }
}

#[test]
fn peers_that_are_cut_off_name_each_other_and_meet_again() {
    let cut = Arc::new(AtomicBool::new(false));
    let meshes = [mesh("1"), mesh("2")];
    // The smaller name connects, so all goes through the relay.
    let addresses = [meshes[0].address(), relay(meshes[1].address(), &cut)];
    let peers: Vec<Peer> = ["1", "2"]
        .into_iter()
        .zip(addresses)
        .map(|(name, address)| Peer { address, incarnation: name.into() })
        .collect();
    let mut ends: Vec<_> =
        (0..2).map(|me| meshes[me].join(view(1, me, &[true; 2]), &peers).unwrap()).collect();
    let run = |ends: &mut Vec<all2all::tcp::Tcp>, steps: std::ops::Range<u64>| {
        std::thread::scope(|scope| {
            let ranks: Vec<_> = ends
                .iter_mut()
                .map(|end| {
                    let steps = steps.clone();
                    scope.spawn(move || steps.map(|id| step(end, id, 3, LONG)).find(Result::is_err))
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
        })
    };
    assert_eq!(run(&mut ends, 0..50), [None, None]);
    for mesh in &meshes {
        assert_eq!(mesh.unreached(&peers, Duration::ZERO), []);
    }
    cut.store(true, Ordering::Release);
    let start = Instant::now();
    // The step that is cut waits, for longer than it takes to be noticed.
    let noticed = std::thread::scope(|scope| {
        let watching = scope.spawn(|| {
            while meshes[0].reaches("2") || meshes[1].reaches("1") {
                assert!(start.elapsed() < LONG / 2, "the cut is not noticed");
                std::thread::sleep(Duration::from_millis(1));
            }
            let noticed = start.elapsed();
            for (mesh, other) in meshes.iter().zip(["2", "1"]) {
                let missing = mesh.unreached(&peers, Duration::ZERO);
                assert_eq!(
                    missing.iter().map(|peer| &peer.incarnation).collect::<Vec<_>>(),
                    [other]
                );
            }
            cut.store(false, Ordering::Release);
            for mesh in &meshes {
                assert_eq!(mesh.unreached(&peers, LONG), []);
            }
            noticed
        });
        assert_eq!(run(&mut ends, 50..5000), [None, None]);
        watching.join().unwrap()
    });
    assert!(SILENT / 2 < noticed, "{noticed:?}");
}
