//! The network of `herd up --processes --allow-chaos`: every worker behind relays of this process.
//!
//! A worker listens at an address of its own within 127/8 and advertises its relays; what it calls itself
//! leads through relays too. So all that it says and hears can be delayed or cut, and whoever connects to
//! its exchange is known by where the connection comes from.

use anyhow::Context;
use herd::chaos::links::{Caller, Links, Names, REST};
use proto::pb::links_server::LinksServer;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::{Arc, PoisonError};

/// The relays of a cluster; they end with this process.
pub(super) struct Network {
    links: Links,
    /// Of all workers.
    names: Names,
    coordinators: String,
}

/// What a worker needs to know of its relays.
pub(super) struct Place {
    pub(super) flags: Vec<OsString>,
    /// Its coordinators, by its relays.
    pub(super) coordinators: String,
}

impl Network {
    /// A network without workers, and where it takes rules, `http://host:port`. `coordinators`: their URLs.
    pub(super) fn start(coordinators: &str) -> anyhow::Result<(Self, String)> {
        let (links, control) = (Links::default(), listen()?);
        let url = format!("http://{}", control.local_addr()?);
        let incoming = proto::incoming(own(control)?);
        let server = LinksServer::new(links.clone());
        telemetry::spawn("chaos.control", async move {
            let server = tonic::transport::Server::builder().add_service(server);
            if let Err(error) = server.serve_with_incoming(incoming).await {
                tracing::error!(%error, "the control of the links ended");
            }
        });
        Ok((Self { links, names: Names::default(), coordinators: coordinators.to_owned() }, url))
    }

    /// Starts the relays of a worker.
    pub(super) fn place(&self, number: u16) -> anyhow::Result<Place> {
        let ip = own_ip(number);
        let (serves, exchanges) = (free_port(ip)?, free_port(ip)?);
        let (front, exchange) = (listen()?, listen()?);
        let (name, reached) = (front.local_addr()?.to_string(), exchange.local_addr()?);
        self.names.lock().unwrap_or_else(PoisonError::into_inner).push((ip, name.clone()));
        self.relay(front, (Caller::One(REST.into()), name.clone()), serves)?;
        self.relay(exchange, (Caller::From(Arc::clone(&self.names)), name.clone()), exchanges)?;
        let mut urls = Vec::new();
        for url in self.coordinators.split(',') {
            let target = url.trim_start_matches("http://");
            let target = target.parse().with_context(|| format!("{url} is no http://ip:port"))?;
            let relay = listen()?;
            urls.push(format!("http://{}", relay.local_addr()?));
            self.relay(relay, (Caller::One(name.clone()), REST.into()), target)?;
        }
        let mut flags: Vec<OsString> = vec!["--exchange".into(), "tcp".into()];
        for (flag, value) in [
            ("--listen", serves.to_string()),
            ("--advertise", name),
            ("--exchange-listen", exchanges.to_string()),
            ("--exchange-advertise", reached.to_string()),
        ] {
            flags.extend([flag.into(), value.into()]);
        }
        flags.push("--allow-chaos".into());
        Ok(Place { flags, coordinators: urls.join(",") })
    }

    fn relay(
        &self,
        listener: TcpListener,
        ends: (Caller, String),
        target: SocketAddr,
    ) -> anyhow::Result<()> {
        let relay = self.links.clone().relay(own(listener)?, ends, target);
        telemetry::spawn("chaos.links", relay);
        Ok(())
    }
}

/// The loopback network has addresses enough for every worker.
fn own_ip(number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(127, 77, high, low).into()
}

fn listen() -> anyhow::Result<TcpListener> {
    TcpListener::bind("127.0.0.1:0").context("cannot listen on a loopback port")
}

fn free_port(ip: IpAddr) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind((ip, 0)).with_context(|| format!("cannot listen on {ip}"))?;
    Ok(listener.local_addr()?)
}

fn own(listener: TcpListener) -> anyhow::Result<tokio::net::TcpListener> {
    listener.set_nonblocking(true)?;
    Ok(tokio::net::TcpListener::from_std(listener)?)
}
