//! Ranks that are processes: killed and frozen in the middle of steps.
//!
//! The test binary starts itself again, with [`ROLE`] set, for every rank. A child prints where it listens,
//! reads where all listen, and runs steps; every line that it prints for the parent begins with `@`.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

#[path = "common/steps.rs"]
mod steps;

use all2all::AllToAll;
use all2all::tcp::{Identity, Mesh, Options, Peer};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use steps::{step, view};

/// Set for children: rank, ranks, host, and the milliseconds that a step may take.
const ROLE: &str = "ALL2ALL_TEST_ROLE";

/// How long a test waits for a line.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a rank does in a child process; in the parent nothing.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let role: Vec<&str> = role.split_whitespace().collect();
    let (me, ranks) = (role[0].parse::<usize>().unwrap(), role[1].parse::<usize>().unwrap());
    let within = Duration::from_millis(role[3].parse().unwrap());
    let identity = Identity {
        cluster: "processes".into(),
        incarnation: me.to_string(),
        host: role[2].replace("own", role[0]),
    };
    let any = "127.0.0.1:0".parse().unwrap();
    let mesh = Mesh::listen(any, identity, Options::default()).unwrap();
    println!("\n@{}", mesh.address());
    let mut lines = std::io::stdin().lines().map(Result::unwrap);
    let addresses = lines.next().unwrap();
    let peer = |(rank, address): (usize, &str)| Peer {
        address: address.parse().unwrap(),
        incarnation: rank.to_string(),
    };
    let peers: Vec<Peer> = addresses.split_whitespace().enumerate().map(peer).collect();
    let mut end = mesh.join(view(1, me, &vec![true; ranks]), &peers).unwrap();
    let mut id = 0;
    let fault = loop {
        // The first steps wait for processes that start.
        let within = if id == 0 { PATIENCE } else { within };
        match step(&mut end, id, 24, within) {
            Ok(()) if id == 5 => println!("@runs"),
            Ok(()) => {}
            Err(fault) => break fault,
        }
        id += 1;
    };
    println!("@{:?} {:?}", fault.kind, fault.suspects);
    // What to do next: a view with a mask, or nothing.
    for line in lines {
        let mut words = line.split_whitespace();
        let epoch = words.next().unwrap().parse().unwrap();
        let active: Vec<bool> = words.map(|word| word == "1").collect();
        end.reconfigure(view(epoch, me, &active), PATIENCE).unwrap();
        let well = (0..20).all(|id| step(&mut end, id, 24, PATIENCE).is_ok());
        println!("@well {well}");
    }
}

struct Rank {
    process: Child,
    input: ChildStdin,
    lines: Receiver<(Instant, String)>,
}

impl Rank {
    fn start(me: usize, ranks: usize, host: &str, within_ms: u32) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["child", "--exact", "--nocapture"])
            .env(ROLE, format!("{me} {ranks} {host} {within_ms}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let output = BufReader::new(process.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some(line) = line.strip_prefix('@') {
                    let _parent_is_done = sender.send((Instant::now(), line.to_owned()));
                }
            }
        });
        Self { input: process.stdin.take().unwrap(), process, lines }
    }

    fn line(&self) -> (Instant, String) {
        self.lines.recv_timeout(PATIENCE).unwrap()
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    fn signal(&self, signal: &str) {
        let id = self.process.id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // Also one that is frozen.
        let _over = self.process.kill();
        let _over = self.process.wait();
    }
}

/// Processes that run steps.
fn cluster(ranks: usize, host: &str, within_ms: u32) -> Vec<Rank> {
    let mut cluster: Vec<Rank> =
        (0..ranks).map(|me| Rank::start(me, ranks, host, within_ms)).collect();
    let addresses: Vec<String> = cluster.iter().map(|rank| rank.line().1).collect();
    for rank in &mut cluster {
        rank.tell(&addresses.join(" "));
    }
    for rank in &cluster {
        assert_eq!(rank.line().1, "runs");
    }
    cluster
}

/// The survivors of rank 1 name it in time, and go on without it.
#[track_caller]
fn survive(host: &str, signal: &str, kind: &str, within_ms: u32) {
    let mut cluster = cluster(3, host, within_ms);
    // Anywhere in a step.
    std::thread::sleep(Duration::from_micros(u64::from(std::process::id()) % 3000));
    let start = Instant::now();
    cluster[1].signal(signal);
    let faults: Vec<(Instant, String)> = [0, 2].map(|rank| cluster[rank].line()).to_vec();
    let named = format!("{kind} [r1]");
    let told = |fault: &String| fault.starts_with("Aborted(PeerFaulted)");
    assert!(faults.iter().any(|(_, fault)| *fault == named), "{faults:?}");
    for (at, fault) in &faults {
        // Who waits for the same process may take no rows, and be suspected with it.
        let with = fault.starts_with(kind) && fault.contains("r1");
        assert!(with || told(fault), "{fault}");
        let took = at.duration_since(start);
        let limit = Duration::from_millis(u64::from(within_ms) + 500);
        let limit = if kind == "PeerClosed" { Duration::from_millis(500) } else { limit };
        assert!(took < limit, "{took:?} until {fault}");
    }
    for rank in [0, 2] {
        cluster[rank].tell("2 1 0 1");
    }
    for rank in [0, 2] {
        assert_eq!(cluster[rank].line().1, "well true");
    }
    if signal == "-STOP" {
        // It wakes in an epoch that all others have left.
        cluster[1].signal("-CONT");
        let fault = cluster[1].line().1;
        assert!(!fault.starts_with("runs"), "{fault}");
        for rank in [0, 2] {
            cluster[rank].tell("3 1 0 1");
            assert_eq!(cluster[rank ^ 2].process.try_wait().unwrap(), None);
        }
        for rank in [0, 2] {
            assert_eq!(cluster[rank].line().1, "well true");
        }
    }
}

#[test]
fn killed_process_is_named_at_once() {
    survive("own", "-KILL", "PeerClosed", 15_000);
    survive("shared", "-KILL", "PeerClosed", 15_000);
}

#[test]
fn frozen_process_is_named_at_the_deadline() {
    survive("own", "-STOP", "Deadline", 500);
    survive("shared", "-STOP", "Deadline", 500);
}
