//! The contract between a network card and what it is connected to.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};

/// The longest frame, from the destination's address on: 64 KiB of IP, an Ethernet header
/// and a VLAN tag.
pub const MAX_FRAME: usize = 65_535 + 14 + 4;

/// What a sender left for others to do with a frame (virtio 1.2, 5.1.6; Linux's struct
/// virtio_net_hdr): offsets count from the start of the frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// [`Offload::NEEDS_CHECKSUM`], [`Offload::DATA_VALID`].
    pub flags: u8,
    /// 0: none; else how the payload is to be cut, [`Offload::TCP4`] and so on.
    pub gso: u8,
    pub header_length: u16,
    pub gso_size: u16,
    pub checksum_start: u16,
    pub checksum_offset: u16,
}

impl Offload {
    pub const NEEDS_CHECKSUM: u8 = 1;
    pub const DATA_VALID: u8 = 2;
    pub const TCP4: u8 = 1;
    pub const TCP6: u8 = 4;
    pub const ECN: u8 = 0x80;
    pub const BYTES: usize = 10;

    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0] = self.flags;
        bytes[1] = self.gso;
        for (at, word) in [
            (2, self.header_length),
            (4, self.gso_size),
            (6, self.checksum_start),
            (8, self.checksum_offset),
        ] {
            bytes[at..at + 2].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    pub fn decode(bytes: &[u8; Self::BYTES]) -> Self {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso: bytes[1],
            header_length: word(2),
            gso_size: word(4),
            checksum_start: word(6),
            checksum_offset: word(8),
        }
    }
}

/// What somebody can do of another's work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Fill in checksums.
    pub checksum: bool,
    /// Cut TCP segments over IPv4 and over IPv6.
    pub tcp4: bool,
    pub tcp6: bool,
    /// With the congestion flag set.
    pub ecn: bool,
}

impl Offloads {
    pub const ALL: Self = Self { checksum: true, tcp4: true, tcp6: true, ecn: true };
}

/// A frame that was received.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    pub offload: Offload,
    pub data: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// There is no room now: the frame is to be sent again, see [`NetBackend::want_room`].
    #[error("no room now")]
    Full,
    /// It is lost, and counted.
    #[error("{0}")]
    Lost(#[from] io::Error),
}

/// A network, as one card is connected to it. In the hands of one thread.
pub trait NetBackend: Send {
    /// Becomes readable when there are frames, and stays so while there are; also when there
    /// is room again that was wanted.
    fn event(&self) -> BorrowedFd<'_>;

    /// The next frame; false where none waits. `frame` is overwritten.
    fn receive(&mut self, frame: &mut Frame) -> io::Result<bool>;

    fn send(&mut self, offload: &Offload, data: &[u8]) -> Result<(), SendError>;

    /// Whether [`NetBackend::event`] is to tell of room for frames.
    fn want_room(&mut self, _wanted: bool) {}

    /// What the network does of a card's work.
    fn offloads(&self) -> Offloads {
        Offloads::default()
    }

    /// What the card's driver can do of the network's work: frames that need more are not
    /// received.
    fn accept(&mut self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    /// A back end around another may have frames later: called when [`NetBackend::timer`] is
    /// due.
    fn tick(&mut self) {}

    /// A descriptor that becomes readable when [`NetBackend::tick`] is due.
    fn timer(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Frames and bytes, and those that were lost, by why. Read from any thread.
#[derive(Debug, Default)]
pub struct Counts {
    pub sent: AtomicU64,
    pub sent_bytes: AtomicU64,
    pub received: AtomicU64,
    pub received_bytes: AtomicU64,
    /// The network did not take them.
    pub send_errors: AtomicU64,
    /// A frame of the guest's that is none.
    pub malformed: AtomicU64,
    /// Too long for the guest's buffers.
    pub too_long: AtomicU64,
    /// The network is gone.
    pub receive_errors: AtomicU64,
}

impl Counts {
    pub fn add(counter: &AtomicU64, by: u64) {
        // One thread counts: no lock of the bus is needed.
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
    }

    pub fn list(&self) -> [(&'static str, u64); 8] {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [
            ("sent", get(&self.sent)),
            ("sent_bytes", get(&self.sent_bytes)),
            ("received", get(&self.received)),
            ("received_bytes", get(&self.received_bytes)),
            ("send_errors", get(&self.send_errors)),
            ("malformed", get(&self.malformed)),
            ("too_long", get(&self.too_long)),
            ("receive_errors", get(&self.receive_errors)),
        ]
    }
}
