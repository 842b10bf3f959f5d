//! What goes over a connection: greetings, frames of rows, and notices.
//!
//! Everything is little-endian and of fixed size but the rows. A frame of rows is
//!
//! ```text
//!   head, 64 bytes, with a checksum of its own │ slot of every row, 2 bytes each (dispatch only)
//!                                              │ rows │ checksum of slots and rows, 4 bytes
//! ```
//!
//! Between processes that share memory, a frame of lent rows has their places in the sender's memory instead of
//! the rows: address and length of every run, 8 bytes each, and no checksum.
//!
//! The head is checked before its lengths are believed. The checksum of the rows comes behind them, so
//! that neither side has to pass over the rows before it moves them.

use super::ring::Found;
use crate::LayerKey;
use crate::error::Phase;
use crc_fast::CrcAlgorithm::Crc32Iscsi;
use ids::{Epoch, Rank, StepId};

/// Opens everything; another version of the format gets another one.
const MAGIC: u32 = u32::from_le_bytes(*b"hrd2");
/// Bytes of a frame's head.
pub(super) const HEAD: usize = 64;
/// Bytes of the checksum behind the rows.
pub(super) const TRAILER: usize = 4;
/// Bytes of the place of lent rows.
pub(super) const PLACE: usize = 16;
/// Bytes of a greeting.
pub(super) const HELLO: usize = 512;
/// Bytes of the answer to it.
pub(super) const WELCOME: usize = 32;
/// Bytes of a notice.
pub(super) const NOTICE: usize = 32;
/// Longest name in a greeting: a uuid has 36 bytes, a machine id 32.
pub(super) const NAME_MAX: usize = 100;
/// Slots and rows of a frame may take so many bytes: 16 times the largest prefill chunk in use.
const PAYLOAD_MAX: u64 = 1 << 31;

/// CRC-32C, for which processors have instructions.
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// A checksum of bytes that come in pieces.
#[derive(Clone, Copy)]
pub(super) struct Sum(crc_fast::Digest);

impl Default for Sum {
    fn default() -> Self {
        Self(crc_fast::Digest::new(Crc32Iscsi))
    }
}

impl Sum {
    pub(super) fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(super) fn trailer(&self) -> [u8; TRAILER] {
        u32::try_from(self.0.finalize()).expect("CRC-32C has 32 bits").to_le_bytes()
    }
}

/// The head of a frame of rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Head {
    pub(super) epoch: Epoch,
    pub(super) key: LayerKey,
    pub(super) phase: Phase,
    pub(super) from: Rank,
    pub(super) to: Rank,
    pub(super) rows: u32,
    pub(super) row_bytes: u32,
    /// Runs of rows that are lent; none if the rows themselves follow.
    pub(super) lent: u32,
    /// Counts the frames of a connection and direction.
    pub(super) sequence: u64,
}

impl Head {
    /// Bytes of the slots.
    pub(super) fn slot_bytes(&self) -> u64 {
        match self.phase {
            Phase::Dispatch => 2 * u64::from(self.rows),
            Phase::Combine => 0,
        }
    }

    /// Bytes of the rows.
    pub(super) fn rows_bytes(&self) -> u64 {
        u64::from(self.rows) * u64::from(self.row_bytes)
    }

    /// Bytes of the places of lent rows.
    pub(super) fn lent_bytes(&self) -> u64 {
        u64::from(self.lent) * PLACE as u64
    }

    /// All bytes that follow the head.
    pub(super) fn following(&self) -> u64 {
        let inline = self.rows_bytes() + TRAILER as u64;
        self.slot_bytes() + if self.lent == 0 { inline } else { self.lent_bytes() }
    }

    pub(super) fn encode(&self) -> [u8; HEAD] {
        let mut bytes = [0; HEAD];
        let mut write = Writer(&mut bytes);
        write.put(&MAGIC.to_le_bytes());
        write.put(&[Kind::Rows as u8, self.phase as u8]);
        write.put(&self.key.layer.to_le_bytes());
        write.put(&self.epoch.0.to_le_bytes());
        write.put(&self.key.step.0.to_le_bytes());
        write.put(&self.from.0.to_le_bytes());
        write.put(&self.to.0.to_le_bytes());
        write.put(&self.rows.to_le_bytes());
        write.put(&self.row_bytes.to_le_bytes());
        write.put(&(self.slot_bytes() + self.rows_bytes()).to_le_bytes());
        write.put(&self.sequence.to_le_bytes());
        write.put(&self.lent.to_le_bytes());
        seal(&mut bytes);
        bytes
    }

    /// `None` if these bytes are no head.
    pub(super) fn decode(bytes: &[u8; HEAD]) -> Option<Self> {
        let mut read = open(bytes, Kind::Rows)?;
        let phase = match read.take::<1>()[0] {
            0 => Phase::Dispatch,
            1 => Phase::Combine,
            2.. => return None,
        };
        let layer = u16::from_le_bytes(read.take());
        let epoch = Epoch(u64::from_le_bytes(read.take()));
        let step = StepId(u64::from_le_bytes(read.take()));
        let head = Self {
            epoch,
            key: LayerKey { step, layer },
            phase,
            from: Rank(u16::from_le_bytes(read.take())),
            to: Rank(u16::from_le_bytes(read.take())),
            rows: u32::from_le_bytes(read.take()),
            row_bytes: u32::from_le_bytes(read.take()),
            sequence: {
                let payload = u64::from_le_bytes(read.take());
                if PAYLOAD_MAX < payload {
                    return None;
                }
                u64::from_le_bytes(read.take())
            },
            lent: u32::from_le_bytes(read.take()),
        };
        // Anything else, such as another payload length, is not what `encode` writes. A run has a row at least.
        (head.encode() == *bytes && head.lent <= head.rows).then_some(head)
    }
}

/// What a connection is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Channel {
    Data,
    Control,
}

/// The first bytes of a connection, from the side that opened it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Hello {
    pub(super) channel: Channel,
    /// Joins the two connections of a pair.
    pub(super) nonce: u64,
    pub(super) cluster: String,
    pub(super) from: String,
    /// Whom the caller wants to reach.
    pub(super) to: String,
    /// The caller's machine.
    pub(super) host: String,
    /// Memory that the caller offers to share.
    pub(super) offer: Option<Found>,
}

impl Hello {
    pub(super) fn encode(&self) -> [u8; HELLO] {
        let mut bytes = [0; HELLO];
        let mut write = Writer(&mut bytes);
        write.put(&MAGIC.to_le_bytes());
        write.put(&[Kind::Hello as u8, self.channel as u8]);
        write.put(&self.nonce.to_le_bytes());
        // No process has the number 0.
        let Found { process, file } = self.offer.unwrap_or(Found { process: 0, file: 0 });
        write.put(&process.to_le_bytes());
        write.put(&file.to_le_bytes());
        for name in [&self.cluster, &self.from, &self.to, &self.host] {
            write.put(&[u8::try_from(name.len()).expect("names are short")]);
            write.put(name.as_bytes());
        }
        seal(&mut bytes);
        bytes
    }

    /// `None` if these bytes are no greeting.
    pub(super) fn decode(bytes: &[u8; HELLO]) -> Option<Self> {
        let mut read = open(bytes, Kind::Hello)?;
        let channel = match read.take::<1>()[0] {
            0 => Channel::Data,
            1 => Channel::Control,
            2.. => return None,
        };
        let nonce = u64::from_le_bytes(read.take());
        let (process, file) = (u32::from_le_bytes(read.take()), u32::from_le_bytes(read.take()));
        let offer = (process != 0).then_some(Found { process, file });
        let (cluster, from, to, host) = (read.name()?, read.name()?, read.name()?, read.name()?);
        Some(Self { channel, nonce, cluster, from, to, host, offer })
    }
}

/// The answer to a greeting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Welcome {
    /// Both connections of the pair are there.
    Yes,
    /// The same, and the offered memory is shared.
    Shared,
    /// Not now: an older pair still stands.
    Busy,
    /// Never: another cluster, or not the one that was asked for.
    No,
}

impl Welcome {
    pub(super) fn encode(self, nonce: u64) -> [u8; WELCOME] {
        let mut bytes = [0; WELCOME];
        let mut write = Writer(&mut bytes);
        write.put(&MAGIC.to_le_bytes());
        write.put(&[Kind::Welcome as u8, self as u8]);
        write.put(&nonce.to_le_bytes());
        seal(&mut bytes);
        bytes
    }

    /// `None` if these bytes do not answer the greeting with this nonce.
    pub(super) fn decode(bytes: &[u8; WELCOME], nonce: u64) -> Option<Self> {
        let mut read = open(bytes, Kind::Welcome)?;
        let welcome = match read.take::<1>()[0] {
            0 => Self::Yes,
            1 => Self::Shared,
            2 => Self::Busy,
            3 => Self::No,
            4.. => return None,
        };
        (u64::from_le_bytes(read.take()) == nonce).then_some(welcome)
    }
}

/// What a rank tells its peers on the control connection.
///
/// `frames` are those that it has sent whole on the data connection: what is missing behind them never
/// comes, what is missing before them is on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Notice {
    /// The step of this epoch has failed.
    Faulted { epoch: Epoch, frames: u64 },
    /// All epochs before this one are left.
    Over { before: Epoch, frames: u64 },
    /// The process lives, and its bytes arrive.
    Beat,
}

impl Notice {
    pub(super) fn encode(self) -> [u8; NOTICE] {
        let (which, epoch, frames) = match self {
            Self::Faulted { epoch, frames } => (0, epoch, frames),
            Self::Over { before, frames } => (1, before, frames),
            Self::Beat => (2, Epoch(0), 0),
        };
        let mut bytes = [0; NOTICE];
        let mut write = Writer(&mut bytes);
        write.put(&MAGIC.to_le_bytes());
        write.put(&[Kind::Notice as u8, which]);
        write.put(&epoch.0.to_le_bytes());
        write.put(&frames.to_le_bytes());
        seal(&mut bytes);
        bytes
    }

    /// `None` if these bytes are no notice.
    pub(super) fn decode(bytes: &[u8; NOTICE]) -> Option<Self> {
        let mut read = open(bytes, Kind::Notice)?;
        let which = read.take::<1>()[0];
        let epoch = Epoch(u64::from_le_bytes(read.take()));
        let frames = u64::from_le_bytes(read.take());
        match which {
            0 => Some(Self::Faulted { epoch, frames }),
            1 => Some(Self::Over { before: epoch, frames }),
            2 => Some(Self::Beat),
            3.. => None,
        }
    }
}

/// Keeps one kind of message from being taken for another.
#[derive(Clone, Copy)]
enum Kind {
    Hello,
    Welcome,
    Notice,
    Rows,
}

/// Writes the checksum of a message into its last four bytes.
fn seal(bytes: &mut [u8]) {
    let (body, sum) = bytes.split_at_mut(bytes.len() - 4);
    sum.copy_from_slice(&checksum(body).to_le_bytes());
}

/// Reads on behind magic and kind, if these and the checksum are right.
fn open(bytes: &[u8], kind: Kind) -> Option<Reader<'_>> {
    let (body, sum) = bytes.split_at(bytes.len() - 4);
    let mut read = Reader(body);
    let ours = read.take() == MAGIC.to_le_bytes()
        && read.take() == [kind as u8]
        && checksum(body).to_le_bytes() == sum;
    ours.then_some(read)
}

struct Writer<'a>(&'a mut [u8]);

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) {
        let (here, rest) = std::mem::take(&mut self.0).split_at_mut(bytes.len());
        here.copy_from_slice(bytes);
        self.0 = rest;
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (here, rest) = self.0.split_first_chunk().expect("messages have fixed lengths");
        self.0 = rest;
        *here
    }

    fn name(&mut self) -> Option<String> {
        let length = usize::from(self.take::<1>()[0]);
        let (here, rest) = self.0.split_at_checked(length).filter(|_| length <= NAME_MAX)?;
        self.0 = rest;
        String::from_utf8(here.to_vec()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD_OF_ROWS: Head = Head {
        epoch: Epoch(3),
        key: LayerKey { step: StepId(9), layer: 23 },
        phase: Phase::Dispatch,
        from: Rank(2),
        to: Rank(7),
        rows: 5,
        row_bytes: 10_240,
        lent: 0,
        sequence: 1 << 40,
    };

    /// What is written can be read, and with any bit changed it cannot.
    #[track_caller]
    fn check<const N: usize, T: PartialEq + std::fmt::Debug>(
        (message, bytes): (T, [u8; N]),
        decode: impl Fn(&[u8; N]) -> Option<T>,
    ) {
        assert_eq!(decode(&bytes), Some(message));
        for bit in 0..8 * N {
            let mut changed = bytes;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&changed), None, "bit {bit}");
        }
    }

    #[test]
    fn messages_are_read_as_written_or_not_at_all() {
        check((HEAD_OF_ROWS, HEAD_OF_ROWS.encode()), Head::decode);
        let lent = Head { lent: 3, ..HEAD_OF_ROWS };
        check((lent, lent.encode()), Head::decode);
        let (cluster, from, to) = ("maverick".into(), "a".repeat(NAME_MAX), String::new());
        let (host, offer) = ("here".into(), Some(Found { process: 77, file: 3 }));
        let hello = Hello { channel: Channel::Control, nonce: 7, cluster, from, to, host, offer };
        check((hello.clone(), hello.encode()), Hello::decode);
        for welcome in [Welcome::Yes, Welcome::Shared, Welcome::Busy, Welcome::No] {
            check((welcome, welcome.encode(5)), |bytes| Welcome::decode(bytes, 5));
            assert_eq!(Welcome::decode(&welcome.encode(5), 6), None);
        }
        let over = Notice::Over { before: Epoch(8), frames: 77 };
        check((over, over.encode()), Notice::decode);
        check((Notice::Beat, Notice::Beat.encode()), Notice::decode);
    }

    #[test]
    fn frame_beyond_the_limit_is_no_frame() {
        let head = Head { rows: u32::MAX, ..HEAD_OF_ROWS };
        assert_eq!(Head::decode(&head.encode()), None);
        let head = Head { lent: 6, ..HEAD_OF_ROWS };
        assert_eq!(Head::decode(&head.encode()), None);
    }

    /// RFC 3720, appendix B.4.
    #[test]
    fn checksum_is_crc32c() {
        assert_eq!(checksum(&[0; 32]), 0x8a91_36aa);
        assert_eq!(checksum(&[0xff; 32]), 0x62a8_ab43);
        let mut sum = Sum::default();
        sum.add(&[0; 5]);
        sum.add(&[0; 27]);
        assert_eq!(sum.trailer(), 0x8a91_36aa_u32.to_le_bytes());
    }
}
