//! The wire: generated messages and services, and the only conversions between wire and core.
//!
//! A conversion checks what the wire cannot say (ranks in order, known experts), so that code
//! behind it never meets a view that cannot be.

mod shares;
mod step;
mod view;

use std::time::Duration;
use tonic::transport::Endpoint;

pub use shares::{shares_from_wire, shares_to_wire};
pub use step::{held_from_wire, slice_to_wire};
pub use view::{pools_from_wire, pools_to_wire, view_from_wire, view_to_wire};

/// Messages, clients and servers of `herd/v1/herd.proto`.
#[allow(clippy::all, clippy::pedantic, clippy::restriction, unreachable_pub, reason = "generated")]
pub mod pb {
    tonic::include_proto!("herd.v1");
}

/// Largest message a herd service accepts, in bytes. A step of 8192 prompt tokens with block tables
/// is below 1 MiB; full logits never travel.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Between the signs of life that a worker sends on its step stream while a step may be running: an
/// answer with the epoch 0, which is no view's.
pub const BEAT: Duration = Duration::from_millis(10);

/// Longest wait for a TCP connection inside a cluster.
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// A peer that answers no ping for this long is gone, even if TCP has not noticed.
const PING: Duration = Duration::from_secs(5);

/// A service to which a stream stands for long, `http://host:port`.
///
/// # Errors
///
/// If the text is no URL.
pub fn standing(url: String) -> Result<Endpoint, tonic::transport::Error> {
    Ok(Endpoint::from_shared(url)?
        .connect_timeout(CONNECT_MAX)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING)
        .keep_alive_timeout(PING)
        .keep_alive_while_idle(true))
}

/// Connections of a service, each with `TCP_NODELAY`: without it the first answer of a stream waits
/// for the peer's delayed acknowledgement, 40 ms, in the middle of a failover.
#[must_use]
pub fn incoming(listener: tokio::net::TcpListener) -> tonic::transport::server::TcpIncoming {
    tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true))
}

/// Ranks that somebody speaks of. Numbers that no rank can have are left out: they name nobody.
#[must_use]
pub fn ranks_from_wire(ranks: &[u32]) -> Vec<ids::Rank> {
    ranks.iter().filter_map(|&rank| u16::try_from(rank).ok().map(ids::Rank)).collect()
}

/// A message that does not describe a possible state of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A required field is missing.
    #[error("message lacks the field {field}")]
    Missing { field: &'static str },
    /// A number does not fit its type in the core.
    #[error("field {field} is {value}, more than {max}")]
    TooLarge { field: &'static str, value: u64, max: u64 },
    /// Members must come in the order of their ranks, without a gap.
    #[error("member {index} of the view carries rank {rank}")]
    RankOrder { index: usize, rank: u32 },
    /// The placement is impossible; the text says why.
    #[error("placement in the view: {0}")]
    Placement(String),
    /// They are no parts of a whole; the text says which.
    #[error("shares: {0}")]
    Shares(String),
}

/// Narrows a wire number to a 16-bit id.
fn narrow(field: &'static str, value: u32) -> Result<u16, WireError> {
    u16::try_from(value).map_err(|_| WireError::TooLarge {
        field,
        value: u64::from(value),
        max: u64::from(u16::MAX),
    })
}
