//! Links between processes that can be delayed, throttled and cut: a relay of bytes before each of them.
//!
//! A relay knows who is at either end of a connection and asks the rules about every piece that passes.
//! It keeps order and content, as TCP does: what cannot pass now waits, up to [`PIECES_MAX`] pieces, and
//! then the sender does. Single packets of a stream cannot be lost without spoiling it, so a link is either
//! held, as by a partition that TCP outlives, or its connections are ended.

use proto::pb;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tonic::{Request, Response, Status};

/// Everybody who is no worker.
pub const REST: &str = "rest";
/// Bytes of a piece: one read.
const PIECE_BYTES: usize = 64 * 1024;
/// Pieces under way in one direction: 16 MiB, more than a step sends between two workers.
const PIECES_MAX: usize = 256;
/// Rules at once; a scenario needs a handful for every pair of workers.
const RULES_MAX: usize = 4096;
/// Longest delay.
const DELAY_MAX_MS: u32 = 60_000;

type Rules = Arc<Vec<pb::LinkRule>>;

/// The rules of all links of a cluster.
#[derive(Debug, Clone)]
pub struct Links(watch::Sender<Rules>);

impl Default for Links {
    fn default() -> Self {
        Self(watch::channel(Rules::default()).0)
    }
}

/// Addresses that processes call from, and what they are called.
pub type Names = Arc<Mutex<Vec<(IpAddr, String)>>>;

/// Who opens the connections of a relay.
#[derive(Debug, Clone)]
pub enum Caller {
    One(String),
    /// Told by the address that they come from; whoever is not listed is the [`REST`].
    From(Names),
}

impl Links {
    /// Relays connections to `target`, whose process is called `callee`. Runs until the listener fails.
    pub async fn relay(
        self,
        listener: TcpListener,
        (caller, callee): (Caller, String),
        target: SocketAddr,
    ) {
        loop {
            let (stream, from) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::error!(%error, %target, "a relay ends");
                    return;
                }
            };
            let caller = match &caller {
                Caller::One(name) => name.clone(),
                // Names are put whole.
                Caller::From(names) => names
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .iter()
                    .find(|(ip, _)| *ip == from.ip())
                    .map_or(REST.to_owned(), |(_, name)| name.clone()),
            };
            let ends = (caller, callee.clone());
            let rules = self.0.subscribe();
            telemetry::spawn("chaos.relay", connection(stream, from, target, (ends, rules)));
        }
    }
}

/// A connection and the one behind it. Ends when either fails.
async fn connection(
    near: TcpStream,
    from: SocketAddr,
    target: SocketAddr,
    ((caller, callee), rules): ((String, String), watch::Receiver<Rules>),
) {
    let mut there = Way { from: caller.clone(), to: callee.clone(), rules: rules.clone() };
    let back = Way { from: callee, to: caller, rules };
    // Who cannot be reached does not answer the call either.
    if there.pass().await.is_err() {
        return;
    }
    let opened = async {
        let far = TcpStream::connect(target).await?;
        far.set_nodelay(true)?;
        near.set_nodelay(true)?;
        Ok::<_, std::io::Error>(far)
    };
    let far = match opened.await {
        Ok(far) => far,
        Err(error) => {
            tracing::debug!(%error, %from, %target, "nobody is behind a relay");
            return;
        }
    };
    let (near_in, near_out) = near.into_split();
    let (far_in, far_out) = far.into_split();
    // An error of one way ends the other one with it.
    let _ended = tokio::try_join!(there.carry(near_in, far_out), back.carry(far_in, near_out));
}

/// The connection is over.
struct Over;

/// One direction of a connection.
struct Way {
    from: String,
    to: String,
    rules: watch::Receiver<Rules>,
}

/// What the rules say of one direction, taken together.
#[derive(Debug, Default, PartialEq, Eq)]
struct Verdict {
    delay: Duration,
    bytes_per_s: Option<u64>,
    hold: bool,
    reset: bool,
}

impl Verdict {
    fn of(rules: &[pb::LinkRule], from: &str, to: &str) -> Self {
        let mut verdict = Self::default();
        let is = |side: &str, name: &str| side == "*" || side == name;
        for rule in rules.iter().filter(|rule| is(&rule.from, from) && is(&rule.to, to)) {
            verdict.delay += Duration::from_millis(rule.delay_ms.into());
            if 0 < rule.bytes_per_s {
                let slowest = verdict.bytes_per_s.unwrap_or(u64::MAX).min(rule.bytes_per_s);
                verdict.bytes_per_s = Some(slowest);
            }
            match rule.cut() {
                pb::link_rule::Cut::None => {}
                pb::link_rule::Cut::Hold => verdict.hold = true,
                pb::link_rule::Cut::Reset => verdict.reset = true,
            }
        }
        verdict
    }
}

impl Way {
    fn verdict(&mut self) -> Verdict {
        Verdict::of(&self.rules.borrow_and_update(), &self.from, &self.to)
    }

    /// Waits until something may pass now; says how.
    async fn pass(&mut self) -> Result<Verdict, Over> {
        loop {
            let verdict = self.verdict();
            if verdict.reset {
                return Err(Over);
            }
            if !verdict.hold {
                return Ok(verdict);
            }
            self.rules.changed().await.map_err(|_| Over)?;
        }
    }

    async fn carry(mut self, from: OwnedReadHalf, to: OwnedWriteHalf) -> Result<(), Over> {
        let (pieces, queue) = mpsc::channel(PIECES_MAX);
        let reading = async {
            read(from, pieces).await;
            Ok(())
        };
        tokio::try_join!(reading, self.write(queue, to)).map(|_| ())
    }

    /// Delivers in order; the end of the stream comes as late as its bytes.
    async fn write(
        &mut self,
        mut queue: mpsc::Receiver<(Instant, Vec<u8>)>,
        mut to: OwnedWriteHalf,
    ) -> Result<(), Over> {
        loop {
            let next = tokio::select! {
                next = queue.recv() => next,
                // An idle connection is ended, too.
                changed = self.rules.changed() => match changed {
                    Ok(()) if !self.verdict().reset => continue,
                    Ok(()) | Err(_) => return Err(Over),
                },
            };
            let verdict = self.pass().await?;
            let Some((read_at, piece)) = next else {
                tokio::time::sleep(verdict.delay).await;
                return to.shutdown().await.map_err(|_| Over);
            };
            tokio::time::sleep_until(read_at + verdict.delay).await;
            if let Some(rate) = verdict.bytes_per_s {
                let seconds = piece.len() as f64 / rate as f64;
                tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
            }
            // It may have been cut while the piece was on its way.
            self.pass().await?;
            to.write_all(&piece).await.map_err(|_| Over)?;
        }
    }
}

/// Reads until the end; a broken connection has ended, too.
async fn read(mut from: OwnedReadHalf, pieces: mpsc::Sender<(Instant, Vec<u8>)>) {
    let mut buffer = vec![0; PIECE_BYTES];
    while let Ok(bytes @ 1..) = from.read(&mut buffer).await {
        if pieces.send((Instant::now(), buffer[..bytes].to_vec())).await.is_err() {
            return;
        }
    }
}

#[tonic::async_trait]
impl pb::links_server::Links for Links {
    async fn impair(
        &self,
        request: Request<pb::ImpairRequest>,
    ) -> Result<Response<pb::ImpairResponse>, Status> {
        let rules = request.into_inner().rules;
        if RULES_MAX < rules.len() {
            let text = format!("{} rules are more than {RULES_MAX}", rules.len());
            return Err(Status::invalid_argument(text));
        }
        for rule in &rules {
            if rule.from.is_empty() || rule.to.is_empty() {
                return Err(Status::invalid_argument("a rule lacks one of its sides"));
            }
            if DELAY_MAX_MS < rule.delay_ms {
                return Err(Status::invalid_argument("a delay is longer than a minute"));
            }
        }
        tracing::warn!(rules = rules.len(), "the links have new rules");
        self.0.send_replace(Arc::new(rules));
        Ok(Response::new(pb::ImpairResponse {}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pb::link_rule::Cut;
    use pb::links_server::Links as _;

    fn rule(from: &str, to: &str, cut: Cut) -> pb::LinkRule {
        let (from, to) = (from.into(), to.into());
        pb::LinkRule { from, to, cut: cut.into(), ..Default::default() }
    }

    async fn set(links: &Links, rules: Vec<pb::LinkRule>) {
        links.impair(Request::new(pb::ImpairRequest { rules })).await.unwrap();
    }

    #[test]
    fn rules_have_a_direction_and_add_up() {
        let late = |delay_ms, bytes_per_s| {
            let rule = rule("a", "*", Cut::None);
            pb::LinkRule { delay_ms, bytes_per_s, ..rule }
        };
        let rules = [late(3, 900), late(4, 700), rule("b", "a", Cut::Hold)];
        let there = Verdict::of(&rules, "a", "b");
        assert_eq!(there.delay, Duration::from_millis(7));
        assert_eq!((there.bytes_per_s, there.hold), (Some(700), false));
        assert!(Verdict::of(&rules, "b", "a").hold);
        assert_eq!(Verdict::of(&rules, "b", "c"), Verdict::default());
    }

    /// A relay before a process that answers every byte with the next one.
    async fn relayed() -> (Links, TcpStream) {
        let echo = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let relay = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (target, address) = (echo.local_addr().unwrap(), relay.local_addr().unwrap());
        let links = Links::default();
        let ends = (Caller::One("a".into()), "b".to_owned());
        telemetry::spawn("relay", links.clone().relay(relay, ends, target));
        let stream = TcpStream::connect(address).await.unwrap();
        let (mut served, _) = echo.accept().await.unwrap();
        telemetry::spawn("echo", async move {
            while let Ok(byte) = served.read_u8().await {
                if served.write_u8(byte + 1).await.is_err() {
                    return;
                }
            }
        });
        (links, stream)
    }

    #[tokio::test]
    async fn held_bytes_arrive_when_the_link_heals_and_not_before() {
        let (links, mut stream) = relayed().await;
        stream.write_u8(1).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), 2);
        for cut in [rule("a", "b", Cut::Hold), rule("b", "a", Cut::Hold)] {
            set(&links, vec![cut]).await;
            stream.write_u8(7).await.unwrap();
            let early = tokio::time::timeout(Duration::from_millis(50), stream.read_u8()).await;
            assert!(early.is_err(), "{early:?}");
            set(&links, vec![]).await;
            assert_eq!(stream.read_u8().await.unwrap(), 8);
        }
    }

    #[tokio::test]
    async fn delayed_bytes_come_late_and_in_order() {
        let (links, mut stream) = relayed().await;
        let late = pb::LinkRule { delay_ms: 40, ..rule("a", "b", Cut::None) };
        set(&links, vec![late]).await;
        let start = Instant::now();
        stream.write_all(&[1, 2, 3]).await.unwrap();
        let mut answer = [0; 3];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer, [2, 3, 4]);
        assert!(Duration::from_millis(40) <= start.elapsed());
    }

    #[tokio::test]
    async fn reset_ends_an_idle_connection() {
        let (links, mut stream) = relayed().await;
        stream.write_u8(1).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), 2);
        set(&links, vec![rule("b", "a", Cut::Reset)]).await;
        assert!(stream.read_u8().await.is_err());
    }

    #[tokio::test]
    async fn rules_without_sides_are_refused() {
        let rules = vec![rule("", "a", Cut::Hold)];
        let refused = Links::default().impair(Request::new(pb::ImpairRequest { rules })).await;
        assert!(refused.unwrap_err().message().contains("lacks one of its sides"));
    }
}
