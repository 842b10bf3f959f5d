//! Rows that their receiver copies right out of the sender's memory, so that they are copied once.
//!
//! The sender of a large frame puts only the places of its rows into the ring, see [`inbound`](super::inbound)
//! and [`outbound`](super::outbound). Rows may move while the frame is under way: what the caller lends no longer is
//! staged. So the sender says in a word where the frame's rows are, and changes it before the old place may be
//! written; the receiver looks at it behind every copy and forgets what it copied while the word changed.
//!
//! ```text
//!   lent ──▶ staged ──▶ void          of every frame, in this order; then the next one's
//! ```
//!
//! Each side tries at first whether it may read the other's memory, and only then the other side lends. A secret
//! word is copied with every piece: a process that got the number of one that has died does not know it.

use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind};

use super::socket::PIECES;

/// Frames with fewer bytes of rows go through the ring, if only the kernel can read them: it copies a third as fast
/// as a process does, so the ring's second copy, which finds them in the cache, costs less.
pub(super) const LENT_MIN: u64 = 1024 * 1024;

/// The same for rows in an [`arena`](super::arena), which are copied with plain loads.
pub(super) const SEEN_MIN: u64 = 32 * 1024;

/// The receiver looks after so many bytes whether they were still lent; more than enough to hide the call.
pub(super) const PIECE_BYTES: usize = 512 * 1024;

/// Where the rows of the frame under way are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Where {
    /// Where its list of places says.
    Lent,
    /// From this byte of the rows on, at this address.
    Staged { from: u64, address: u64 },
    /// Nowhere: its step has failed.
    Void,
}

/// How to reach the memory of a process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Reach {
    pub(super) process: u32,
    /// Where the secret is, and what it is.
    pub(super) address: u64,
    pub(super) secret: u64,
}

/// A word by which this process is known.
pub(super) struct Secret(Box<u64>);

impl Secret {
    pub(super) fn new() -> Self {
        // Seeded by the system; the process is hashed since any value will do.
        Self(Box::new(RandomState::new().hash_one(std::process::id())))
    }

    pub(super) fn reach(&self) -> Reach {
        let address = std::ptr::from_ref(&*self.0) as u64;
        Reach { process: std::process::id(), address, secret: *self.0 }
    }
}

impl Reach {
    /// Whether this process may read the memory of that one.
    pub(super) fn works(&self) -> bool {
        self.copy(&[], &mut [], &[]).is_ok()
    }

    /// Copies pieces of that process's memory (address, length) into the pieces of `rows` (offset, length), as
    /// many bytes as both hold. Returns the number of bytes copied, which may be fewer.
    ///
    /// # Panics
    ///
    /// If a piece lies outside of `rows`.
    pub(super) fn copy(
        &self,
        from: &[(usize, usize)],
        rows: &mut [u8],
        pieces: &[(usize, usize)],
    ) -> io::Result<usize> {
        let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let (mut there, mut here) = ([nothing; PIECES + 1], [nothing; PIECES + 1]);
        let mut secret = 0_u64;
        let secret_bytes = size_of_val(&secret);
        here[0] = libc::iovec { iov_base: (&raw mut secret).cast(), iov_len: secret_bytes };
        let address = usize::try_from(self.address).map_err(|_| ErrorKind::InvalidData)?;
        there[0] = remote(address, secret_bytes);
        for (entry, &(address, bytes)) in there[1..].iter_mut().zip(from) {
            *entry = remote(address, bytes);
        }
        let (length, base) = (rows.len(), rows.as_mut_ptr());
        for (entry, &(offset, bytes)) in here[1..].iter_mut().zip(pieces) {
            assert!(bytes <= length && offset <= length - bytes, "a piece lies within the rows");
            *entry = libc::iovec { iov_base: base.wrapping_add(offset).cast(), iov_len: bytes };
        }
        let process = self.process.try_into().map_err(|_| ErrorKind::InvalidData)?;
        let (pieces, from) = (entries(pieces.len())?, entries(from.len())?);
        #[allow(unsafe_code, reason = "no safe function reads another process's memory")]
        // SAFETY: the local entries are `secret` and pieces of `rows`, as asserted; both are borrowed mutably until
        // the call returns, and any bytes are values of theirs. They may overlap each other, which mixes bytes and
        // no more. The other process's memory is only read, and by the kernel, which refuses what is not there.
        let copied = unsafe {
            libc::process_vm_readv(process, here.as_ptr(), pieces, there.as_ptr(), from, 0)
        };
        let copied = usize::try_from(copied).map_err(|_| failure())?;
        if copied < secret_bytes || secret != self.secret {
            return Err(ErrorKind::NotFound.into());
        }
        Ok(copied - secret_bytes)
    }
}

fn remote(address: usize, bytes: usize) -> libc::iovec {
    libc::iovec { iov_base: std::ptr::without_provenance_mut(address), iov_len: bytes }
}

/// Why a copy failed; a process that is no more is not found.
fn failure() -> io::Error {
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ESRCH) { ErrorKind::NotFound.into() } else { error }
}

/// Entries of a list, with that of the secret.
fn entries(pieces: usize) -> io::Result<libc::c_ulong> {
    assert!(pieces <= PIECES, "a list has so many pieces at most");
    (pieces + 1).try_into().map_err(|_| ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_copied_only_from_who_knows_the_secret() {
        let (secret, source) = (Secret::new(), [7_u8; 100]);
        let reach = secret.reach();
        assert!(reach.works());
        let mut rows = [0; 100];
        let at = source.as_ptr() as usize;
        let copied = reach.copy(&[(at, 10), (at + 50, 30)], &mut rows, &[(60, 25), (0, 15)]);
        assert_eq!(copied.unwrap(), 40);
        assert_eq!((&rows[..15], &rows[15..60]), (&[7; 15][..], &[0; 45][..]));
        assert_eq!((&rows[60..85], &rows[85..]), (&[7; 25][..], &[0; 15][..]));
        let other = Reach { secret: !reach.secret, ..reach };
        assert_eq!(other.copy(&[], &mut [], &[]).unwrap_err().kind(), ErrorKind::NotFound);
        assert!(!Reach { address: 8, ..reach }.works());
    }
}
