//! Bytes that are not ours, or not as they were sent: they close their connection and harm nothing else.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

#[path = "common/steps.rs"]
mod steps;

use all2all::FaultKind;
use all2all::tcp::{Identity, Mesh, Options, Peer};
use ids::{Epoch, Rank};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use steps::{step, view};

const LONG: Duration = Duration::from_secs(20);
/// Bytes of a greeting, and of the answer to it.
const HELLO: usize = 512;
const WELCOME: usize = 32;

fn mesh(name: &str) -> Mesh {
    let identity =
        Identity { cluster: "strangers".into(), incarnation: name.into(), host: name.into() };
    Mesh::listen("127.0.0.1:0".parse().unwrap(), identity, Options::default()).unwrap()
}

fn peer(name: &str, address: SocketAddr) -> Peer {
    Peer { address, incarnation: name.into() }
}

/// Numbers of a seed.
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(self.0 >> 33).unwrap() % limit
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        (0..=self.below(most)).map(|_| self.below(256).to_le_bytes()[0]).collect()
    }
}

/// The greetings of a process that is no member, as it would send them to `to`.
fn greetings(to: &str) -> [Vec<u8>; 2] {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stranger = mesh("0 stranger");
    stranger.prepare(Epoch(1), &[peer(to, listener.local_addr().unwrap())]);
    // Both stay open until both are read: the stranger gives up a pair that has lost one.
    let pair = [(); 2].map(|()| listener.accept().unwrap().0);
    pair.each_ref().map(|mut stream| {
        let mut hello = vec![0; HELLO];
        stream.read_exact(&mut hello).unwrap();
        hello
    })
}

/// Whatever is thrown at the port of a rank, its steps go on and stay right.
#[test]
fn strangers_disturb_no_step() {
    let meshes = [mesh("1"), mesh("2"), mesh("3")];
    let addresses = meshes.each_ref().map(Mesh::address);
    let peers: Vec<Peer> =
        ["1", "2", "3"].into_iter().zip(addresses).map(|(n, a)| peer(n, a)).collect();
    let greetings = greetings("2");
    let over = AtomicBool::new(false);
    let (steps, attacks) = std::thread::scope(|scope| {
        let attack = scope.spawn(|| {
            let mut chance = Chance(7);
            let mut attacks = [0_u32; 4];
            while !over.load(Ordering::Acquire) {
                let kind = chance.below(4);
                attacks[kind] += u32::from(attack(kind, addresses[1], &greetings, &mut chance));
            }
            attacks
        });
        let rank = |me: usize| {
            let mut end = meshes[me].join(view(1, me, &[true; 3]), &peers).unwrap();
            (0..150).map(|id| step(&mut end, id, 3, LONG)).find(Result::is_err)
        };
        let ranks: Vec<_> = (0..3).map(|me| scope.spawn(move || rank(me))).collect();
        let steps: Vec<_> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
        over.store(true, Ordering::Release);
        (steps, attack.join().unwrap())
    });
    assert_eq!(steps, [None, None, None]);
    assert!(attacks.iter().all(|count| 3 < *count), "vacuous: {attacks:?}");
}

/// Whether it came to something.
fn attack(kind: usize, to: SocketAddr, greetings: &[Vec<u8>; 2], chance: &mut Chance) -> bool {
    let open = || TcpStream::connect(to).unwrap();
    // The mesh may close while we still write.
    let say = |stream: &mut TcpStream, bytes: &[u8]| stream.write_all(bytes).is_ok();
    match kind {
        // Noise, and nothing at all.
        0 => say(&mut open(), &chance.bytes(2000)),
        1 => {
            let _silent = open();
            true
        }
        // A greeting with a changed bit.
        2 => {
            let mut hello = greetings[chance.below(2)].clone();
            let index = chance.below(HELLO);
            hello[index] ^= 1 << chance.below(8);
            let mut stream = open();
            stream.set_read_timeout(Some(LONG)).unwrap();
            assert!(say(&mut stream, &hello), "it is read to its end");
            // Answered by no or by the end of the connection.
            let mut answer = Vec::new();
            match stream.read_to_end(&mut answer) {
                Ok(length) => assert!(length == 0 || answer[5] != 0, "welcome"),
                Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
            }
            true
        }
        // A stranger that is let in, and then talks nonsense on both connections.
        _ => {
            let mut pair = [open(), open()];
            for (stream, hello) in pair.iter_mut().zip(greetings) {
                say(stream, hello);
                stream.set_read_timeout(Some(LONG)).unwrap();
            }
            let mut welcome = [0; WELCOME];
            let welcomed = pair[0].read_exact(&mut welcome).is_ok() && welcome[5] == 0;
            for stream in &mut pair {
                say(stream, &chance.bytes(3000));
            }
            welcomed
        }
    }
}

/// A mesh of another cluster, or another life of a peer, is refused: the step does not wait for it.
#[test]
fn other_clusters_and_lives_are_refused() {
    let (ours, theirs) = (mesh("1"), mesh("3"));
    let peers = [peer("1", ours.address()), peer("2", theirs.address())];
    let mut end = ours.join(view(1, 0, &[true; 2]), &peers).unwrap();
    let fault = step(&mut end, 0, 1, LONG).unwrap_err();
    assert_eq!((fault.kind, fault.suspects), (FaultKind::PeerClosed, vec![Rank(1)]));
}

/// Passes bytes on, and changes one of those that the caller sends on its data connection.
struct Middle {
    address: SocketAddr,
    threads: JoinHandle<()>,
}

impl Middle {
    fn new(to: SocketAddr, index: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let threads = std::thread::spawn(move || {
            let pass = |channel: TcpStream| {
                let onwards = TcpStream::connect(to).unwrap();
                let back = (onwards.try_clone().unwrap(), channel.try_clone().unwrap());
                [
                    std::thread::spawn(move || forward(channel, onwards, Some(index))),
                    std::thread::spawn(move || forward(back.0, back.1, None)),
                ]
            };
            let threads = [(); 2].map(|()| pass(listener.accept().unwrap().0));
            threads.into_iter().flatten().for_each(|thread| thread.join().unwrap());
        });
        Self { address, threads }
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, change: Option<usize>) {
    let (mut buffer, mut passed, mut data) = (vec![0; 65_536], 0, false);
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        if passed == 0 {
            data = change.is_some() && buffer[5] == 0;
        }
        let index = change.and_then(|change| change.checked_sub(passed));
        if let Some(index) = index.filter(|index| data && *index < read) {
            buffer[index] ^= 0x10;
        }
        passed += read;
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    let _gone = to.shutdown(Shutdown::Both);
    let _gone = from.shutdown(Shutdown::Both);
}

/// One byte is changed on its way, in a head, among the slots, in the rows and in the checksum.
#[test]
fn changed_byte_is_corrupt() {
    let (slots, rows) = (3 * 2, 3 * steps::ROW_BYTES);
    let indices = [0, 9, 20, 40, 63, 64, 64 + slots - 1, 64 + slots + 5000, 64 + slots + rows + 3];
    for index in indices {
        let meshes = [mesh("1"), mesh("2")];
        let middle = Middle::new(meshes[1].address(), HELLO + index);
        let peers = [peer("1", meshes[0].address()), peer("2", middle.address)];
        let faults = std::thread::scope(|scope| {
            let rank = |me: usize| {
                let mut end = meshes[me].join(view(1, me, &[true; 2]), &peers).unwrap();
                step(&mut end, 0, 3, LONG).unwrap_err()
            };
            let ranks = [0, 1].map(|me| scope.spawn(move || rank(me)));
            ranks.map(|rank| rank.join().unwrap())
        });
        let fault = &faults[1];
        let seen = (fault.kind, &fault.suspects[..]);
        assert_eq!(seen, (FaultKind::Corrupt, &[Rank(0)][..]), "byte {index}");
        drop(meshes);
        middle.threads.join().unwrap();
    }
}
