//! BBR, which spreads what is sent over time, kept off connections between processes at the same address.
//!
//! Some systems choose BBR for all connections. Within a machine there is no congestion that it could avoid, and its
//! timers hold up large frames (2 ranks on 2 cores, 10 MiB per pair: 6.0 ms, and 3.7 ms without). Once a connection is
//! paced it stays so, whatever is chosen for it later: the choice falls before it is established (4 ranks, 10 MiB per
//! pair: 29 ms, and 39 ms if chosen later).
//!
//! Any other choice than BBR is left alone, and so is every other connection. Two addresses of one machine, or containers
//! with networks of their own, count as machines.

use super::socket::is_near;
use rustix::net::sockopt::{set_tcp_congestion, tcp_congestion};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;

/// All versions of BBR are called so.
const PACED: &str = "bbr";
/// Is in every kernel, and any process may choose it.
const UNPACED: &str = "reno";

/// What was taken off a listener, for those of its connections that shall have it.
pub(super) struct Pacing(Option<String>);

impl Pacing {
    /// Takes pacing off the connections that the listener will accept.
    pub(super) fn taken_off(listener: &TcpListener) -> Self {
        Self(paced(listener).filter(|_| set_tcp_congestion(listener, UNPACED).is_ok()))
    }

    /// Gives it back to a connection from elsewhere, unless its route chose something else.
    pub(super) fn accepted(&self, stream: &TcpStream) {
        let Some(paced) = &self.0 else { return };
        if !is_near(stream) && tcp_congestion(stream).is_ok_and(|now| now == UNPACED) {
            // It is the system's own choice, which every process may make; if not, the connection works without.
            let _unpaced = set_tcp_congestion(stream, paced);
        }
    }
}

/// Keeps pacing off a connection that is to be opened between these addresses, if they are the same.
pub(super) fn keep_off(socket: &impl AsFd, (from, to): (IpAddr, SocketAddr)) {
    if paced(socket).is_some() && (from == to.ip() || is_here(to)) {
        // It only takes longer if not.
        let _paced = set_tcp_congestion(socket, UNPACED);
    }
}

/// The kind of pacing that the system chose.
fn paced(socket: &impl AsFd) -> Option<String> {
    tcp_congestion(socket).ok().filter(|name| name.starts_with(PACED))
}

/// Whether the system would send from the address to itself, so that this machine has it. Nothing is sent.
fn is_here(to: SocketAddr) -> bool {
    let anywhere = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let from = || {
        let socket = UdpSocket::bind(anywhere)?;
        socket.connect(to)?;
        socket.local_addr()
    };
    to.ip().is_loopback() || from().is_ok_and(|from| from.ip() == to.ip())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tcp::socket;

    /// An address of this machine that others see, if it has one. Nothing is sent.
    fn outside() -> Option<IpAddr> {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        // An address for documentation, which no machine has.
        socket.connect("192.0.2.1:9").ok()?;
        Some(socket.local_addr().unwrap().ip())
    }

    #[test]
    fn listener_gives_pacing_back_to_who_calls_from_elsewhere() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let Some(outside) = outside() else {
            println!("skipped: no network");
            return;
        };
        if let Err(error) = set_tcp_congestion(&listener, PACED) {
            println!("skipped: no BBR to be had ({error})");
            return;
        }
        let pacing = Pacing::taken_off(&listener);
        let here = listener.local_addr().unwrap();
        let called = |from: IpAddr| {
            let _caller = socket::connect(here, from).unwrap();
            let (stream, _) = listener.accept().unwrap();
            stream
        };
        let near = called(here.ip());
        pacing.accepted(&near);
        assert_eq!(tcp_congestion(&near).unwrap(), UNPACED);
        // Not from the same address, so for all that is known from another machine.
        let far = called(outside);
        assert_eq!(tcp_congestion(&far).unwrap(), UNPACED);
        pacing.accepted(&far);
        assert_eq!(tcp_congestion(&far).unwrap(), PACED);
    }

    #[test]
    fn pacing_is_kept_off_by_the_addresses() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let here = socket.local_addr().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        if let Err(error) = set_tcp_congestion(&listener, PACED) {
            println!("skipped: no BBR to be had ({error})");
            return;
        }
        let far = SocketAddr::from(([192, 0, 2, 1], 9));
        let any = IpAddr::from([0, 0, 0, 0]);
        keep_off(&listener, (any, far));
        keep_off(&listener, (here.ip(), far));
        assert_eq!(tcp_congestion(&listener).unwrap(), PACED);
        keep_off(&listener, (far.ip(), far));
        assert_eq!(tcp_congestion(&listener).unwrap(), UNPACED);
        set_tcp_congestion(&listener, PACED).unwrap();
        keep_off(&listener, (any, here));
        assert_eq!(tcp_congestion(&listener).unwrap(), UNPACED);
    }

    #[test]
    fn other_choices_are_kept() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        set_tcp_congestion(&listener, UNPACED).unwrap();
        assert_eq!(Pacing::taken_off(&listener).0, None);
        assert_eq!(tcp_congestion(&listener).unwrap(), UNPACED);
    }

    #[test]
    fn own_addresses_are_here() {
        assert!(is_here(SocketAddr::from(([127, 0, 0, 9], 1))));
        assert!(!is_here(SocketAddr::from(([192, 0, 2, 1], 9))));
        assert!(outside().is_none_or(|outside| is_here(SocketAddr::new(outside, 9))));
    }
}
