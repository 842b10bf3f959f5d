//! `herd bench exchange`: how fast ranks that are processes of this machine exchange rows.
//!
//! One exchange is a dispatch in which every rank has the same number of bytes for every rank, itself
//! included, as in an all-to-all of other libraries. Its time is that of the slowest rank. Every rank writes its
//! rows anew before each round, as an engine does, so that a reader finds them in another core's cache. Who is done
//! waits for the others at a gate: the way back, which is not timed, would take cores from those that still work.

use all2all::tcp::{Buffer, Identity, Mesh, Options, Peer, Tcp};
use all2all::{AllToAll, HostRows, LayerKey, Routes, StepOutcome, View};
use anyhow::{Context, bail, ensure};
use ids::{Epoch, ExpertId, Rank, StepId};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Lines, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How rows get from one process to another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// Over connections, as between machines.
    Tcp,
    /// Through shared memory.
    Shm,
}

impl Transport {
    /// As it stands in results.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Shm => "shm",
        }
    }
}

/// One point of the measurement.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub transport: Transport,
    pub ranks: u16,
    /// Bytes from every rank to every rank.
    pub pair_bytes: usize,
    /// About how long the timed rounds take together.
    pub seconds: f64,
}

/// Rounds before the clock starts.
const WARM_ROUNDS: usize = 5;
/// Nothing on one machine takes so long.
const DEADLINE: Duration = Duration::from_secs(60);
/// Bytes of a row, as in Maverick: 5120 values of two bytes.
const ROW_BYTES: usize = 10_240;
/// A MoE layer without rows brings the ranks to the same point, the next one is timed.
const LAYERS: [u16; 2] = [0, 1];

impl Case {
    /// Enough for a median and not more than the time allows, at 4 GB/s and 35 microseconds per rank: as
    /// often as its rivals are measured.
    fn rounds(&self) -> usize {
        let ranks = f64::from(self.ranks);
        let pair_bytes = u32::try_from(self.pair_bytes).map_or(f64::MAX, f64::from);
        let round = ranks * (ranks * pair_bytes / 4e9 + 35e-6);
        (15..4000).find(|&rounds| self.seconds <= f64::from(rounds) * round).unwrap_or(4000)
            as usize
    }
}

/// Measures a case with processes of this program, started with the arguments that `arguments` gives for
/// a rank and the number of rounds.
///
/// # Errors
///
/// If a process cannot be started or an exchange fails.
pub fn run(case: Case, arguments: impl Fn(u16, usize) -> Vec<String>) -> anyhow::Result<Value> {
    let rounds = case.rounds();
    let ranks = (0..case.ranks).map(|me| Process::start(&arguments(me, rounds)));
    let mut ranks = ranks.collect::<anyhow::Result<Vec<_>>>()?;
    let addresses = ranks.iter_mut().map(Process::line).collect::<anyhow::Result<Vec<_>>>()?;
    for rank in &mut ranks {
        let input = rank.child.stdin.as_mut().context("the standard input is piped")?;
        writeln!(input, "{}", addresses.join(" "))?;
    }
    let mut slowest = vec![0.0_f64; rounds];
    for rank in &mut ranks {
        let seconds: Vec<f64> = serde_json::from_str(&rank.line()?)?;
        ensure!(seconds.len() == rounds, "a rank has measured {} rounds", seconds.len());
        for (slowest, seconds) in slowest.iter_mut().zip(seconds) {
            *slowest = slowest.max(seconds);
        }
    }
    slowest.sort_by(f64::total_cmp);
    let median = slowest[rounds / 2];
    let crossing = usize::from(case.ranks) * usize::from(case.ranks - 1) * case.pair_bytes;
    let crossing = u32::try_from(crossing).map_or(f64::MAX, f64::from);
    Ok(json!({
        "transport": case.transport.name(),
        "procs": case.ranks,
        "pair_bytes": case.pair_bytes,
        "iters": rounds,
        "us_best": tenths(slowest[0] * 1e6),
        "us_median": tenths(median * 1e6),
        "us_p90": tenths(slowest[rounds * 9 / 10] * 1e6),
        "GBs_cross_median": (crossing / median / 1e6).round() / 1e3,
    }))
}

fn tenths(number: f64) -> f64 {
    (number * 10.0).round() / 10.0
}

/// A rank in a process of its own.
struct Process {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Process {
    fn start(arguments: &[String]) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().context("the output is piped")?).lines();
        Ok(Self { child, lines })
    }

    fn line(&mut self) -> anyhow::Result<String> {
        match self.lines.next() {
            Some(line) => Ok(line?),
            None => bail!("a rank has ended early: {}", self.child.wait()?),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It ends by itself unless something went wrong.
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _over = self.child.kill();
        }
        let _over = self.child.wait();
    }
}

/// Binds this process to a processor: ranks take those that the process may use in turn.
///
/// # Errors
///
/// If the system refuses.
pub fn bind(me: u16) -> anyhow::Result<()> {
    let allowed = sched_getaffinity(None).context("cannot read the processors to bind to")?;
    let turn = usize::from(me) % usize::try_from(allowed.count())?.max(1);
    let processor = (0..CpuSet::MAX_CPU).filter(|&processor| allowed.is_set(processor)).nth(turn);
    let mut one = CpuSet::new();
    one.set(processor.context("this process may use no processor")?);
    sched_setaffinity(None, &one).context("cannot bind the process to a processor")
}

/// What a rank does: prints its address, reads those of all, and prints the seconds of every round.
///
/// # Errors
///
/// If an exchange fails, or brings what was not sent.
pub fn rank(
    case: Case,
    me: u16,
    rounds: usize,
    input: &mut dyn BufRead,
    output: &mut dyn Write,
) -> anyhow::Result<()> {
    let identity = Identity {
        cluster: "bench".into(),
        incarnation: me.to_string(),
        host: match case.transport {
            Transport::Tcp => me.to_string(),
            Transport::Shm => "here".into(),
        },
    };
    let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
    let listen = || Mesh::listen(anywhere, identity.clone(), Options::default());
    let meshes = [listen()?, listen()?];
    writeln!(output, "{},{}", meshes[0].address(), meshes[1].address())?;
    output.flush()?;
    let mut addresses = String::new();
    input.read_line(&mut addresses)?;
    let join = |which: usize| -> anyhow::Result<Tcp> {
        let peer = |(rank, both): (usize, &str)| -> anyhow::Result<Peer> {
            let address = both.split(',').nth(which).context("a rank has two addresses")?;
            Ok(Peer { address: address.parse()?, incarnation: rank.to_string() })
        };
        let peers = addresses.split_whitespace().enumerate().map(peer);
        let peers = peers.collect::<anyhow::Result<Vec<_>>>()?;
        Ok(meshes[which].join(view(me, case.ranks)?, &peers)?)
    };
    let mut ends = Ends { timed: join(0)?, gate: join(1)? };
    let mut work = Work::new(case, me, &meshes[0]);
    let mut seconds = Vec::with_capacity(rounds);
    for round in 0..WARM_ROUNDS + rounds {
        let took = work.round(&mut ends, StepId(u64::try_from(round)?))?;
        if WARM_ROUNDS <= round {
            seconds.push(took.as_secs_f64());
        }
    }
    writeln!(output, "{}", serde_json::to_string(&seconds)?)?;
    Ok(())
}

/// One expert on every rank.
fn view(me: u16, ranks: u16) -> anyhow::Result<View> {
    let held = LAYERS.map(|_| (0..ranks).map(|rank| vec![ExpertId(rank)]).collect::<Vec<_>>());
    let routes =
        Routes::new(Rank(me), usize::from(ranks), &held, |_, expert| vec![Rank(expert.0)])?;
    let active = vec![true; usize::from(ranks)];
    Ok(View { epoch: Epoch(1), me: Rank(me), ranks, active, routes: Arc::new(routes) })
}

/// A rank's ends of two exchanges.
struct Ends {
    timed: Tcp,
    /// Where the ranks wait for each other.
    gate: Tcp,
}

/// A layer without rows: no rank leaves it before all have come.
fn meet(end: &mut Tcp, key: LayerKey, row_bytes: usize) -> anyhow::Result<()> {
    let none = HostRows { bytes: &[], row_bytes };
    let sent = end.dispatch_send(key, none, &[])?;
    let arrived = end.dispatch_recv(sent)?;
    let pending = end.combine_send(arrived, none)?;
    Ok(end.combine_recv(pending, &mut [])?)
}

fn end_step(end: &mut Tcp) -> anyhow::Result<()> {
    match end.end_step() {
        StepOutcome::Complete => Ok(()),
        StepOutcome::Faulted(fault) => bail!("a step has failed: {fault}"),
    }
}

/// The buffers of a rank.
struct Work {
    me: u16,
    row_bytes: usize,
    /// Where an engine would have its rows, too.
    rows: Buffer,
    experts: Vec<u16>,
}

impl Work {
    fn new(case: Case, me: u16, mesh: &Mesh) -> Self {
        let row_bytes = ROW_BYTES.min(case.pair_bytes);
        let each = case.pair_bytes / row_bytes;
        let experts: Vec<u16> = (0..case.ranks).flat_map(|to| vec![to; each]).collect();
        let rows = mesh.buffer(experts.len() * row_bytes);
        Self { me, row_bytes, rows, experts }
    }

    /// What rank `from` sends in a step.
    fn mark(from: u16, step: StepId) -> u8 {
        (u64::from(from) * 31 + step.0).to_le_bytes()[0]
    }

    fn round(&mut self, ends: &mut Ends, step: StepId) -> anyhow::Result<Duration> {
        let Ends { timed: end, gate } = ends;
        self.rows.fill(Self::mark(self.me, step));
        for end in [&mut *gate, end] {
            end.begin_step(end.view().epoch, step, Instant::now() + DEADLINE)?;
        }
        let [before, timed] = LAYERS.map(|layer| LayerKey { step, layer });
        meet(end, before, self.row_bytes)?;

        let start = Instant::now();
        let rows = HostRows { bytes: &self.rows, row_bytes: self.row_bytes };
        let sent = end.dispatch_send(timed, rows, &self.experts)?;
        let arrived = end.dispatch_recv(sent)?;
        let took = start.elapsed();

        meet(gate, before, self.row_bytes)?;
        end_step(gate)?;
        let (here, _) = end.arrived(&arrived);
        let block = here.bytes.len() / usize::from(end.view().ranks);
        for (from, block) in (0..).zip(here.bytes.chunks(block)) {
            let mark = Self::mark(from, step);
            if [block.first(), block.last()] != [Some(&mark); 2] {
                bail!("the rows of rank {from} are wrong in {step}");
            }
        }
        // Any bytes will do as results, and they may come back to where they were sent from: buffers more would only
        // push the others out of the cache.
        let results = HostRows { bytes: &self.rows, row_bytes: self.row_bytes };
        let pending = end.combine_send(arrived, results)?;
        end.combine_recv(pending, &mut self.rows)?;
        end_step(end)?;
        Ok(took)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_bound_to_the_allowed_processors_in_turn() {
        let allowed = sched_getaffinity(None).unwrap();
        let all: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu)).collect();
        for me in 0..5 {
            // The affinity is a thread's own.
            let body = move || {
                bind(me).unwrap();
                sched_getaffinity(None).unwrap()
            };
            let bound = std::thread::spawn(body).join().unwrap();
            assert_eq!(bound.count(), 1);
            assert!(bound.is_set(all[usize::from(me) % all.len()]), "rank {me}");
        }
    }
}
