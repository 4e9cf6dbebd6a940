//! Frames: Ethernet without preamble and check sequence, and what was left to the device.

use libc::iovec;
use smallvec::SmallVec;
use tetrarch_memory::ScatterList;

use crate::Offload;

/// Two addresses and a type.
pub const MIN_FRAME: usize = 14;
/// The largest IP packet behind the header and two VLAN tags.
pub const MAX_FRAME: usize = 65_535 + MIN_FRAME + 8;

/// Bytes of a frame that a guest sends, or of one that is ours.
#[derive(Clone, Copy, Debug)]
pub enum Payload<'a> {
    /// In guest RAM, where the guest may change them at any moment.
    Guest(&'a ScatterList),
    Bytes(&'a [u8]),
    /// Headers that were made anew, and behind them what the guest has.
    Headed(&'a [u8], &'a ScatterList),
}

/// A frame on its way out, and the work that its sender left.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    pub offload: Offload,
    pub payload: Payload<'a>,
}

impl<'a> Packet<'a> {
    pub fn plain(bytes: &'a [u8]) -> Self {
        Self { offload: Offload::default(), payload: Payload::Bytes(bytes) }
    }

    pub fn len(&self) -> usize {
        match self.payload {
            Payload::Guest(list) => list.len() as usize,
            Payload::Bytes(bytes) => bytes.len(),
            Payload::Headed(head, rest) => head.len() + rest.len() as usize,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it is a frame at all, with metadata that fit it.
    pub fn is_sound(&self) -> bool {
        (MIN_FRAME..=MAX_FRAME).contains(&self.len()) && self.offload.fits(self.len())
    }

    /// Sets `bytes` to those of the frame: to be looked at, they must be ours.
    pub fn copy_to(&self, bytes: &mut Vec<u8>) {
        bytes.clear();
        match self.payload {
            Payload::Guest(list) => {
                bytes.resize(list.len() as usize, 0);
                list.read_at(0, bytes);
            }
            Payload::Bytes(own) => bytes.extend_from_slice(own),
            Payload::Headed(head, rest) => {
                bytes.extend_from_slice(head);
                bytes.resize(head.len() + rest.len() as usize, 0);
                rest.read_at(0, &mut bytes[head.len()..]);
            }
        }
    }

    /// For a system call that reads them: `first`, then the frame. They are good as long as
    /// `first` and the packet are.
    pub(crate) fn iovecs(&self, first: &'a [u8], pieces: &mut SmallVec<[iovec; 8]>) {
        let of = |bytes: &[u8]| iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        pieces.clear();
        pieces.push(of(first));
        match self.payload {
            Payload::Guest(list) => pieces.extend_from_slice(list.iovecs()),
            Payload::Bytes(bytes) => pieces.push(of(bytes)),
            Payload::Headed(head, rest) => {
                pieces.push(of(head));
                pieces.extend_from_slice(rest.iovecs());
            }
        }
    }
}

/// A frame that came, with room for the next.
#[derive(Clone, Debug, Default)]
pub struct Frame {
    pub offload: Offload,
    /// What lies before `start` is a back end's own header.
    pub(crate) data: Vec<u8>,
    pub(crate) start: usize,
}

impl Frame {
    pub fn bytes(&self) -> &[u8] {
        self.data.get(self.start..).unwrap_or_default()
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.data.get_mut(self.start..).unwrap_or_default()
    }

    pub fn packet(&self) -> Packet<'_> {
        Packet { offload: self.offload, payload: Payload::Bytes(self.bytes()) }
    }

    pub fn set(&mut self, offload: Offload, bytes: &[u8]) {
        self.offload = offload;
        self.start = 0;
        self.data.clear();
        self.data.extend_from_slice(bytes);
    }
}
