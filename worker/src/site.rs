//! Where a worker's experts are sent from: a port of their own, or the worker's.

use std::net::{IpAddr, SocketAddr, TcpListener};

/// Where a worker is.
pub(crate) struct Site<'a> {
    /// Where it listens.
    pub(crate) address: IpAddr,
    /// `host:port` under which the others reach it.
    pub(crate) reached: &'a str,
    /// The port that experts shall have; 0 takes a free one, if a port of this address can be reached.
    pub(crate) port: u16,
}

impl Site<'_> {
    /// Listens for those who want experts, if they reach a port here.
    ///
    /// # Errors
    ///
    /// If the port is taken, or refused.
    pub(crate) fn listen(&self) -> std::io::Result<Option<TcpListener>> {
        if self.port == 0 && !self.is_direct() {
            return Ok(None);
        }
        let address = SocketAddr::new(self.address, self.port);
        let listener = TcpListener::bind(address).map_err(|error| {
            let text = format!(
                "cannot listen on {address} for experts: {error}; give another --experts-port"
            );
            std::io::Error::new(error.kind(), text)
        })?;
        listener.set_nonblocking(true)?;
        Ok(Some(listener))
    }

    /// Whether the others reach any port of the address: not if they reach the worker at another host's, a proxy's.
    fn is_direct(&self) -> bool {
        let reached = self.reached.parse();
        let other = reached.is_ok_and(|reached: SocketAddr| reached.ip() != self.address);
        self.address.is_unspecified() || !other
    }
}

/// Where a peer sends experts: at the port that it names, or where it answers if that is out of reach.
pub(crate) fn senders(address: &str, port: u32) -> Vec<String> {
    let own = address.rsplit_once(':').filter(|_| port != 0);
    let own = own.map(|(host, _)| format!("{host}:{port}"));
    own.into_iter().chain([address.to_owned()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_come_from_their_port_first() {
        assert_eq!(senders("10.0.0.2:7070", 4000), ["10.0.0.2:4000", "10.0.0.2:7070"]);
        assert_eq!(senders("[::1]:7070", 4000), ["[::1]:4000", "[::1]:7070"]);
        assert_eq!(senders("10.0.0.2:7070", 0), ["10.0.0.2:7070"]);
    }

    #[test]
    fn behind_a_proxy_only_a_given_port_is_listened_at() {
        // Nobody else takes a free port of this address.
        let site = |reached, port| Site { address: [127, 0, 0, 3].into(), reached, port };
        assert!(site("10.0.0.2:7070", 0).listen().unwrap().is_none());
        for reached in ["127.0.0.3:7070", "worker-2:7070"] {
            let listener = site(reached, 0).listen().unwrap().unwrap();
            let port = listener.local_addr().unwrap().port();
            let taken = site(reached, port).listen().unwrap_err().to_string();
            assert!(taken.contains(&format!("127.0.0.3:{port} for experts")), "{taken}");
            drop(listener);
            assert!(site("10.0.0.2:7070", port).listen().unwrap().is_some());
        }
        let refused = Site { address: [192, 0, 2, 1].into(), reached: "", port: 1 }.listen();
        assert!(refused.unwrap_err().to_string().contains("--experts-port"));
        let every = Site { address: [0, 0, 0, 0].into(), reached: "10.0.0.2:7070", port: 0 };
        assert!(every.is_direct());
    }
}
