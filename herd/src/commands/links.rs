//! The network of `herd up --processes --allow-chaos`: every worker behind relays of this process.
//!
//! A worker listens at an address of its own within 127/8 and advertises its relays; what it calls itself
//! leads through relays too. So all that it says and hears can be delayed or cut, and whoever connects to
//! its exchange is known by where the connection comes from.

use anyhow::Context;
use herd::chaos::links::{Caller, Links, REST};
use proto::pb::links_server::LinksServer;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;

/// A relay that is not running yet: it keeps its port.
struct Relay {
    listener: TcpListener,
    ends: (Caller, String),
    target: SocketAddr,
}

/// The relays of a cluster.
pub(super) struct Network {
    links: Links,
    relays: Vec<Relay>,
    control: TcpListener,
}

/// What a worker needs to know of its relays.
pub(super) struct Place {
    pub(super) flags: Vec<OsString>,
    /// Its coordinators, by its relays.
    pub(super) coordinators: String,
}

impl Network {
    /// Plans the relays of `workers` workers, each with its [`Place`]. `coordinators`: their URLs.
    pub(super) fn plan(workers: u16, coordinators: &str) -> anyhow::Result<(Self, Vec<Place>)> {
        let links = Links::default();
        let control = listen()?;
        let mut network = Self { links, relays: Vec::new(), control };
        let fronts = (0..workers).map(|number| Ok((own_ip(number), listen()?)));
        let fronts: Vec<(IpAddr, TcpListener)> = fronts.collect::<anyhow::Result<_>>()?;
        let name = |(ip, front): &(IpAddr, TcpListener)| Ok((*ip, front.local_addr()?.to_string()));
        let names: Vec<_> = fronts.iter().map(name).collect::<anyhow::Result<_>>()?;
        let names = Arc::new(names);
        let mut places = Vec::new();
        for ((ip, front), (_, name)) in fronts.into_iter().zip(&*names) {
            places.push(network.place(ip, (front, name), coordinators, &names)?);
        }
        Ok((network, places))
    }

    fn place(
        &mut self,
        ip: IpAddr,
        (front, name): (TcpListener, &String),
        coordinators: &str,
        names: &Arc<Vec<(IpAddr, String)>>,
    ) -> anyhow::Result<Place> {
        let (serves, exchanges) = (free_port(ip)?, free_port(ip)?);
        let exchange = listen()?;
        let reached = exchange.local_addr()?;
        self.add(front, (Caller::One(REST.into()), name.clone()), serves);
        self.add(exchange, (Caller::From(Arc::clone(names)), name.clone()), exchanges);
        let mut urls = Vec::new();
        for url in coordinators.split(',') {
            let target = url.trim_start_matches("http://");
            let target = target.parse().with_context(|| format!("{url} is no http://ip:port"))?;
            let relay = listen()?;
            urls.push(format!("http://{}", relay.local_addr()?));
            self.add(relay, (Caller::One(name.clone()), REST.into()), target);
        }
        let mut flags: Vec<OsString> = vec!["--exchange".into(), "tcp".into()];
        for (flag, value) in [
            ("--listen", serves.to_string()),
            ("--advertise", name.clone()),
            ("--exchange-listen", exchanges.to_string()),
            ("--exchange-advertise", reached.to_string()),
        ] {
            flags.extend([flag.into(), value.into()]);
        }
        flags.push("--allow-chaos".into());
        Ok(Place { flags, coordinators: urls.join(",") })
    }

    fn add(&mut self, listener: TcpListener, ends: (Caller, String), target: SocketAddr) {
        self.relays.push(Relay { listener, ends, target });
    }

    /// Runs the relays and takes rules for them; returns where, `http://host:port`.
    pub(super) fn start(self) -> anyhow::Result<String> {
        let Self { links, relays, control } = self;
        for Relay { listener, ends, target } in relays {
            telemetry::spawn("chaos.links", links.clone().relay(own(listener)?, ends, target));
        }
        let url = format!("http://{}", control.local_addr()?);
        let incoming = proto::incoming(own(control)?);
        telemetry::spawn("chaos.control", async move {
            let server = tonic::transport::Server::builder().add_service(LinksServer::new(links));
            if let Err(error) = server.serve_with_incoming(incoming).await {
                tracing::error!(%error, "the control of the links ended");
            }
        });
        Ok(url)
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
