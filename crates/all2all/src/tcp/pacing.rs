//! BBR, which spreads what is sent over time, kept off connections that do not leave the machine.
//!
//! Some systems choose BBR for all connections. Within a machine there is no congestion that it could avoid, and its
//! timers hold up large frames (on 2 cores, 10 MiB per pair, 2 ranks: 5.8 ms, and 3.7 ms without; 4 ranks: 33 ms and 28).
//! Once a connection is paced it stays so, whatever is chosen for it later: the choice falls before it is established.
//!
//! Between machines the choice stays the operator's, and so does any other one than BBR.

use super::socket::is_near;
use rustix::net::sockopt::{set_tcp_congestion, tcp_congestion};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
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

    /// Gives it back to a connection from another machine.
    pub(super) fn accepted(&self, stream: &TcpStream) {
        if !is_near(stream) {
            self.give_back(stream);
        }
    }

    fn give_back(&self, stream: &TcpStream) {
        if let Some(paced) = &self.0 {
            // It is the system's own choice, which every process may make; if not, the connection works without.
            let _unpaced = set_tcp_congestion(stream, paced);
        }
    }
}

/// Keeps pacing off a connection to this machine that is to be opened.
pub(super) fn keep_off(socket: &impl AsFd, to: SocketAddr) {
    if paced(socket).is_some() && is_here(to) {
        // It only takes longer if not.
        let _paced = set_tcp_congestion(socket, UNPACED);
    }
}

/// The kind of pacing that the system chose.
fn paced(socket: &impl AsFd) -> Option<String> {
    tcp_congestion(socket).ok().filter(|name| name.starts_with(PACED))
}

/// Whether this machine has the address: who sends there then sends from there. Nothing is sent.
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

    #[test]
    fn only_connections_within_the_machine_lose_their_pacing() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        if set_tcp_congestion(&listener, PACED).is_err() {
            println!("skipped: this kernel has no BBR");
            return;
        }
        let pacing = Pacing::taken_off(&listener);
        let _here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, _) = listener.accept().unwrap();
        pacing.accepted(&stream);
        assert_eq!(tcp_congestion(&stream).unwrap(), UNPACED);
        pacing.give_back(&stream);
        assert_eq!(tcp_congestion(&stream).unwrap(), PACED);

        let far = SocketAddr::from(([192, 0, 2, 1], 9));
        keep_off(&stream, far);
        assert_eq!(tcp_congestion(&stream).unwrap(), PACED);
        keep_off(&stream, listener.local_addr().unwrap());
        assert_eq!(tcp_congestion(&stream).unwrap(), UNPACED);
    }

    #[test]
    fn other_choices_are_kept() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        set_tcp_congestion(&listener, UNPACED).unwrap();
        assert_eq!(Pacing::taken_off(&listener).0, None);
    }

    #[test]
    fn own_addresses_are_here() {
        assert!(is_here(SocketAddr::from(([127, 0, 0, 9], 1))));
        // An address for documentation, which no machine has; without a network nobody is found behind it.
        let far = SocketAddr::from(([192, 0, 2, 1], 9));
        assert!(!is_here(far));
        let outside = UdpSocket::bind("0.0.0.0:0").unwrap();
        if outside.connect(far).is_ok() {
            assert!(is_here(outside.local_addr().unwrap()));
        }
    }
}
