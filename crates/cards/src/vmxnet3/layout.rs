//! What a driver shares with the card (struct Vmxnet3_DriverShared), and the table of its queues.

use std::sync::atomic::Ordering::{Acquire, Release};

use tetrarch_memory::{GuestMemory, GuestPhys, MemoryError, Window};

use super::rings::Place;
use super::rss::{self, Rss};
use super::{MAX_RX, MAX_TX};

const SHARED_BYTES: usize = 720;
const MAGIC: u32 = 3_133_079_265;

// Where fields are.
const UPT_FEATURES: usize = 24;
const QUEUE_TABLE: usize = 40;
const QUEUE_TABLE_BYTES: usize = 52;
const MTU: usize = 56;
const MAX_SCATTER_AND_COUNTS: usize = 60;
const AUTO_MASK_AND_EVENT: usize = 80;
const RX_MODE: usize = 120;
const MULTICAST_BYTES: usize = 124;
const MULTICAST_TABLE: usize = 128;
const VLANS: usize = 136;
const RSS_BYTES: usize = 652;
const RSS_ADDRESS: usize = 656;
const EVENTS: usize = 696;

// Of a queue in the table, the same for both kinds.
const QUEUE: usize = 256;
const BASES: [usize; 3] = [16, 24, 32];
const SIZES: [usize; 3] = [56, 60, 64];
const INTERRUPT: usize = 72;
const THRESHOLD: usize = 4;
/// updateRxProd of a receive queue.
const WANTS_ROOM: usize = 0;
const STOPPED: usize = 80;
const STATISTICS: usize = 88;
const TABLE_ALIGNMENT: u64 = 128;

const MIN_MTU: u32 = 60;
const MAX_MTU: u32 = 9000;

/// VMXNET3_GET_... features (upt1_defs.h).
pub const RX_CHECKSUM: u64 = 1;
pub const RSS: u64 = 2;
pub const STRIP_VLAN: u64 = 4;
pub const LRO: u64 = 8;

/// Buffers of a frame where the driver names no number: what Linux can take (1 + MAX_SKB_FRAGS).
const SCATTER: u32 = 18;

/// Why a card cannot be activated.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    #[error("what it shares, or a ring, is not in RAM: {0}")]
    Memory(#[from] MemoryError),
    #[error("what it shares is not of this card")]
    Magic,
    #[error("{tx} queues to send and {rx} to receive")]
    Queues { tx: usize, rx: usize },
    #[error("an MTU of {0}")]
    Mtu(u32),
    #[error("a ring of {0} descriptors")]
    Size(u32),
    #[error("a structure at {0:#x}, which is not where one can be")]
    Alignment(u64),
    #[error("the card has not the bus")]
    Bus,
}

/// One queue, as its driver has set it up: rings, and its interrupt.
///
/// Rings to send are that of frames and that of completions; to receive two of buffers, of which the
/// second may be none, and that of completions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueSetup {
    pub places: [Place; 3],
    pub interrupt: u8,
}

/// Of all queues.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Setup {
    pub shared: u64,
    pub table: u64,
    pub features: u64,
    pub scatter: u32,
    pub auto_mask: bool,
    pub event_interrupt: u8,
    /// Revision 2: completions say how many segments a frame is of.
    pub tells_segments: bool,
    pub tx: Vec<QueueSetup>,
    pub rx: Vec<QueueSetup>,
}

/// The memory that a card and its driver share.
pub struct Shared {
    window: Window,
    table: Window,
    tx: usize,
}

impl Setup {
    pub fn read(
        memory: &GuestMemory,
        shared: u64,
        tells_segments: bool,
    ) -> Result<Self, ActivateError> {
        let window = shared_window(memory, shared)?;
        let word = |at| window.load_u32(at, Acquire);
        let wide = |at| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        if word(0) != MAGIC {
            return Err(ActivateError::Magic);
        }
        let [scatter, scatter_high, tx, rx] = word(MAX_SCATTER_AND_COUNTS).to_le_bytes();
        let (tx, rx) = (usize::from(tx), usize::from(rx));
        let bytes = (tx + rx) * QUEUE;
        let counts = (1..=MAX_TX).contains(&tx) && (1..=MAX_RX).contains(&rx);
        if !counts || (word(QUEUE_TABLE_BYTES) as usize) < bytes {
            return Err(ActivateError::Queues { tx, rx });
        }
        let mtu = word(MTU);
        if !(MIN_MTU..=MAX_MTU).contains(&mtu) {
            return Err(ActivateError::Mtu(mtu));
        }
        let table = wide(QUEUE_TABLE);
        let queues = table_window(memory, table, tx + rx)?;
        let word = |at| queues.load_u32(at, Acquire);
        let queue = |index: usize| {
            let at = index * QUEUE;
            let base =
                |from: usize| u64::from(word(at + from)) | u64::from(word(at + from + 4)) << 32;
            let place =
                |(from, size): (&usize, &usize)| Place { base: base(*from), size: word(at + size) };
            let mut places = BASES.iter().zip(&SIZES).map(place);
            let places = [(); 3].map(|()| places.next().unwrap_or_default());
            QueueSetup { places, interrupt: word(at + INTERRUPT) as u8 }
        };
        let [auto_mask, _, event_interrupt, _] =
            window.load_u32(AUTO_MASK_AND_EVENT, Acquire).to_le_bytes();
        let scatter = u32::from(u16::from_le_bytes([scatter, scatter_high]));
        Ok(Self {
            shared,
            table,
            features: u64::from(window.load_u32(UPT_FEATURES, Acquire)),
            scatter: if scatter == 0 { SCATTER } else { scatter },
            auto_mask: auto_mask != 0,
            event_interrupt,
            tells_segments,
            tx: (0..tx).map(queue).collect(),
            rx: (tx..tx + rx).map(queue).collect(),
        })
    }
}

fn aligned(address: u64, alignment: u64) -> Result<GuestPhys, ActivateError> {
    let sound = address.is_multiple_of(alignment) && address != 0;
    if sound { Ok(GuestPhys(address)) } else { Err(ActivateError::Alignment(address)) }
}

fn shared_window(memory: &GuestMemory, address: u64) -> Result<Window, ActivateError> {
    Ok(Window::new(&memory.snapshot(), aligned(address, 8)?, SHARED_BYTES)?)
}

fn table_window(
    memory: &GuestMemory,
    address: u64,
    queues: usize,
) -> Result<Window, ActivateError> {
    let start = aligned(address, TABLE_ALIGNMENT)?;
    Ok(Window::new(&memory.snapshot(), start, queues * QUEUE)?)
}

impl Shared {
    pub fn new(memory: &GuestMemory, setup: &Setup) -> Result<Self, ActivateError> {
        Ok(Self {
            window: shared_window(memory, setup.shared)?,
            table: table_window(memory, setup.table, setup.tx.len() + setup.rx.len())?,
            tx: setup.tx.len(),
        })
    }

    fn word(&self, at: usize) -> u32 {
        self.window.load_u32(at, Acquire)
    }

    fn wide(&self, at: usize) -> u64 {
        u64::from(self.word(at)) | u64::from(self.word(at + 4)) << 32
    }

    pub fn features(&self) -> u64 {
        self.word(UPT_FEATURES).into()
    }

    pub fn rx_mode(&self) -> u32 {
        self.word(RX_MODE)
    }

    pub fn vlans(&self, vlans: &mut [u8]) {
        let (words, _) = vlans.as_chunks_mut::<4>();
        for (index, word) in words.iter_mut().enumerate() {
            *word = self.word(VLANS + 4 * index).to_le_bytes();
        }
    }

    /// The table of multicast addresses; empty where it is not in RAM.
    pub fn multicast(&self, memory: &GuestMemory) -> Vec<u8> {
        let length = self.word(MULTICAST_BYTES) & 0xFFFF;
        let mut bytes = vec![0; length as usize];
        let read = memory.read(GuestPhys(self.wide(MULTICAST_TABLE)), &mut bytes);
        if read.is_ok() { bytes } else { Vec::new() }
    }

    pub fn rss(&self, memory: &GuestMemory) -> Option<Rss> {
        let mut bytes = [0; rss::BYTES];
        if (self.word(RSS_BYTES) as usize) < bytes.len() {
            return None;
        }
        memory.read(GuestPhys(self.wide(RSS_ADDRESS)), &mut bytes).ok()?;
        Rss::new(bytes)
    }

    pub fn set_events(&self, events: u32) {
        self.window.store_u32(EVENTS, events, Release);
    }

    /// Drivers ring for so many frames that they have put into a ring.
    pub fn set_threshold(&self, tx: usize, frames: u32) {
        self.table.store_u32(tx * QUEUE + THRESHOLD, frames, Release);
    }

    /// Whether a driver is to ring for buffers.
    pub fn set_wants_room(&self, rx: usize, wants: bool) {
        self.table.store_u32((self.tx + rx) * QUEUE + WANTS_ROOM, wants.into(), Release);
    }

    /// Queues count on: those to send first.
    pub fn set_status(&self, queue: usize, error: u32) {
        self.table.store_u32(queue * QUEUE + STOPPED, u32::from(error != 0), Release);
        self.table.store_u32(queue * QUEUE + STOPPED + 4, error, Release);
    }

    pub fn set_statistics(&self, queue: usize, statistics: &[u64]) {
        for (index, value) in statistics.iter().enumerate() {
            self.table.write(queue * QUEUE + STATISTICS + 8 * index, value.to_le());
        }
    }
}
