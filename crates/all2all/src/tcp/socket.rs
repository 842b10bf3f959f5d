//! System calls of the transport, each behind a safe function.
//!
//! Every socket is non-blocking; who has nothing to do waits in [`poll`].

use rustix::event::EventfdFlags;
use rustix::net::{self, AddressFamily, SendAncillaryBuffer, SendFlags, SocketFlags, SocketType};
use rustix::net::{RecvFlags, sockopt};
use std::io::{self, ErrorKind, IoSlice};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use super::Options;
use super::pacing::{self, Pacing};

/// Pieces of memory in one call; the kernel's limit is 1024, and this many fit on the stack.
pub(super) const PIECES: usize = 64;

/// Where connections wait in the kernel until the mesh's thread comes by.
pub(super) struct Listener {
    listener: TcpListener,
    pacing: Pacing,
}

impl Listener {
    pub(super) fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let pacing = Pacing::taken_off(&listener);
        Ok(Self { listener, pacing })
    }

    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The next connection that waits.
    pub(super) fn accept(&self) -> io::Result<TcpStream> {
        let (stream, _) = self.listener.accept()?;
        self.pacing.accepted(&stream);
        Ok(stream)
    }

    pub(super) fn entry(&self) -> libc::pollfd {
        watch(&self.listener, libc::POLLIN)
    }
}

/// Begins to connect, from the address that this process listens on if it is a certain one: on a host with
/// several networks the peer then sees the address it knows.
pub(super) fn connect(address: SocketAddr, from: IpAddr) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = net::socket_with(family, SocketType::STREAM, flags, None)?;
    pacing::keep_off(&socket, (from, address));
    if !from.is_unspecified() && from.is_ipv4() == address.is_ipv4() {
        net::bind(&socket, &SocketAddr::new(from, 0))?;
    }
    match net::connect(&socket, &address) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(TcpStream::from(socket)),
        Err(error) => Err(error.into()),
    }
}

/// What the kernel holds per connection and direction, of which it doubles each: a few hundred microseconds of a fast
/// network. Left to itself it lets much more pile up, memory that is cold when it is read; with these, 4 ranks on 2
/// cores exchange 1.25 MiB per pair in 4.0 ms instead of 5.6 ms. Any system allows this much for sending.
const SEND_BYTES: usize = 208 * 1024;
const RECEIVE_BYTES: usize = 1024 * 1024;

/// Largest receive buffer that the system gives on request.
const RECEIVE_LIMIT: &str = "/proc/sys/net/core/rmem_max";

/// The receive buffer to ask for. Where the system would cut it short, the kernel's own choice is better.
fn receive_bytes() -> Option<usize> {
    let limit: usize = std::fs::read_to_string(RECEIVE_LIMIT).ok()?.trim().parse().ok()?;
    (RECEIVE_BYTES <= limit).then_some(RECEIVE_BYTES)
}

/// Small frames leave at once; a peer whose kernel answers no more is given up.
pub(super) fn tune(stream: &TcpStream, options: &Options) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    let gone_ms = u32::try_from(options.unanswered.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(stream, gone_ms)?;
    let send = options.buffer_bytes.unwrap_or(SEND_BYTES);
    sockopt::set_socket_send_buffer_size(stream, send)?;
    if let Some(bytes) = options.buffer_bytes.or_else(receive_bytes) {
        sockopt::set_socket_recv_buffer_size(stream, bytes)?;
    }
    Ok(())
}

/// Whether a connection certainly does not leave this machine: both ends have the same address, or one for that.
pub(super) fn is_near(stream: &TcpStream) -> bool {
    let ends = (stream.local_addr(), stream.peer_addr());
    let (Ok(here), Ok(there)) = ends else { return false };
    // A socket for both families says IPv4 addresses in the form of IPv6.
    let (here, there) = (here.ip().to_canonical(), there.ip().to_canonical());
    here == there || there.is_loopback()
}

/// Sends what fits; `None` if nothing does.
pub(super) fn send(stream: &TcpStream, pieces: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
    let mut nothing = SendAncillaryBuffer::default();
    // Without a signal where the peer is gone.
    later(net::sendmsg(stream, pieces, &mut nothing, SendFlags::NOSIGNAL).map_err(io::Error::from))
}

/// Receives into a buffer; `None` if nothing is there, 0 at the end.
pub(super) fn receive(stream: &TcpStream, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    later(net::recv(stream, buffer, RecvFlags::empty()).map(|(read, _)| read).map_err(Into::into))
}

/// Receives into the pieces of `rows` (offset, length) and then into `rest`.
///
/// # Panics
///
/// If a piece lies outside of `rows`.
pub(super) fn receive_pieces(
    stream: &TcpStream,
    rows: &mut [u8],
    pieces: &[(usize, usize)],
    rest: &mut [u8],
) -> io::Result<Option<usize>> {
    let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
    let mut list = [nothing; PIECES + 1];
    let mut count = 0;
    let (length, base) = (rows.len(), rows.as_mut_ptr());
    for (entry, &(offset, bytes)) in list.iter_mut().zip(&pieces[..pieces.len().min(PIECES)]) {
        assert!(bytes <= length && offset <= length - bytes, "a piece lies within the rows");
        *entry = libc::iovec { iov_base: base.wrapping_add(offset).cast(), iov_len: bytes };
        count += 1;
    }
    list[count] = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
    let count = i32::try_from(count + 1).expect("few pieces");
    #[allow(unsafe_code, reason = "safe vectors of buffers cannot overlap, not even in theory")]
    // SAFETY: the first `count` entries are set. Every one but the last lies within `rows`, as asserted,
    // the last is `rest`; both are borrowed mutably until the call returns. The kernel only writes bytes.
    let read = unsafe { libc::readv(stream.as_raw_fd(), list.as_ptr(), count) };
    later(usize::try_from(read).map_err(|_| io::Error::last_os_error()))
}

/// Separates "nothing now" from what is wrong.
fn later(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&error.kind()) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// A counter that wakes whoever polls it.
pub(super) struct Bell(OwnedFd);

impl Bell {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?))
    }

    /// Wakes. A counter that is full already has.
    pub(super) fn ring(&self) {
        let _full = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Falls silent until the next ring.
    pub(super) fn hush(&self) {
        let _silent = rustix::io::read(&self.0, &mut [0; 8]);
    }

    pub(super) fn entry(&self) -> libc::pollfd {
        watch(&self.0, libc::POLLIN)
    }
}

/// What to look for at a descriptor.
pub(super) fn watch(fd: &impl AsRawFd, events: i16) -> libc::pollfd {
    libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 }
}

/// Waits until something is ready, or for so long; forever if `None`.
pub(super) fn poll(entries: &mut [libc::pollfd], at_most: Option<Duration>) {
    let timeout = at_most.map(|at_most| libc::timespec {
        tv_sec: libc::time_t::try_from(at_most.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: at_most.subsec_nanos().into(),
    });
    let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let count = entries.len().try_into().expect("few descriptors");
    #[allow(unsafe_code, reason = "a list that is kept across calls cannot borrow descriptors")]
    // SAFETY: pointer and length are those of the slice, which is borrowed mutably; a null timeout means
    // forever, any other points to the value above. A descriptor that is closed meanwhile only makes the
    // kernel say so. A failed call has waited for nothing, and callers look for themselves.
    let _ready = unsafe { libc::ppoll(entries.as_mut_ptr(), count, timeout, std::ptr::null()) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::sockopt::tcp_congestion;

    /// Both ends of a connection to a listener at `at`, from `from`.
    fn ends(at: IpAddr, to: IpAddr, from: IpAddr) -> [TcpStream; 2] {
        let listener = Listener::bind(SocketAddr::new(at, 0)).unwrap();
        let port = listener.address().unwrap().port();
        let here = connect(SocketAddr::new(to, port), from).unwrap();
        poll(&mut [listener.entry()], None);
        let there = listener.accept().unwrap();
        poll(&mut [watch(&here, libc::POLLOUT)], None);
        [here, there]
    }

    #[test]
    fn connections_to_the_own_address_are_near_and_not_paced() {
        let v4 = IpAddr::from([127, 0, 0, 1]);
        let every = "::".parse().unwrap();
        let (other, v6) = (IpAddr::from([127, 0, 0, 9]), "::1".parse().unwrap());
        for (at, to) in [(v4, v4), (every, v4), (every, other), (every, v6)] {
            if at == every && TcpListener::bind((at, 0)).is_err() {
                println!("skipped: no IPv6");
                continue;
            }
            for stream in ends(at, to, every) {
                assert!(is_near(&stream), "{at} {to}");
                assert_eq!(tcp_congestion(&stream).unwrap().find("bbr"), None, "{at} {to}");
            }
        }
    }
}
