//! Numbers and forms of include/linux/vmw_vmci_defs.h.

pub const PAGE: u64 = 4096;

// Contexts: who has a datagram, or sends it.
pub const HYPERVISOR: u32 = 0;
pub const HOST: u32 = tetrarch_vsock::HOST;
/// The guest's own number; those below are taken.
pub const GUEST: u32 = 3;
pub const INVALID_ID: u32 = u32::MAX;

/// The guest's resource that has events.
pub const EVENT_HANDLER: u32 = 0;
/// Numbers up to it are of resources that everybody knows.
pub const LAST_RESERVED: u32 = 1023;

/// Destination, source, and how many bytes follow.
pub const HEADER: usize = 24;
/// A datagram's, with its header.
pub const MAX_DATAGRAM: usize = 17 * 4096;

// Answers of the hypervisor: a number that was asked for, or
pub const SUCCESS: i32 = 0;
pub const LAST_DETACH: i32 = 3;
pub const PAIR_CREATED: i32 = 4;
pub const PAIR_ATTACHED: i32 = 5;
pub const INVALID_RESOURCE: i32 = -1;
pub const INVALID_ARGS: i32 = -2;
pub const NO_ACCESS: i32 = -7;
pub const DST_UNREACHABLE: i32 = -10;
pub const PAYLOAD_TOO_LARGE: i32 = -11;
pub const NO_RESOURCES: i32 = -19;
pub const UNAVAILABLE: i32 = -20;
pub const NOT_FOUND: i32 = -21;
pub const ALREADY_EXISTS: i32 = -22;
pub const INVALID_SIZE: i32 = -24;
pub const EVENT_UNKNOWN: i32 = -29;
pub const PAIR_MISMATCH: i32 = -31;

/// Who is asked, or who has a queue pair: a context, and a number of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Handle {
    pub context: u32,
    pub resource: u32,
}

impl Handle {
    pub const INVALID: Self = Self { context: INVALID_ID, resource: INVALID_ID };

    pub fn word(self) -> u64 {
        u64::from(self.context) | u64::from(self.resource) << 32
    }

    pub fn of(word: u64) -> Self {
        Self { context: word as u32, resource: (word >> 32) as u32 }
    }
}

/// The numbers of a datagram, one after the other.
pub struct Fields<'a>(pub &'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (&bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(bytes)
    }

    pub fn u8(&mut self) -> Option<u8> {
        self.take().map(u8::from_le_bytes)
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    pub fn handle(&mut self) -> Option<Handle> {
        self.u64().map(Handle::of)
    }
}

/// A datagram as it is sent.
pub fn datagram(to: Handle, from: Handle, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    for word in [to.word(), from.word(), payload.len() as u64] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(payload);
    bytes
}

/// What the hypervisor tells the guest by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The machine goes on from a saved one: who was at the other ends is gone.
    PairsResumed,
    /// The host's end of a queue pair is there.
    Attached(Handle),
    Detached(Handle),
}

impl Event {
    const CONTEXT_UPDATE: u32 = 0;
    const CONTEXT_REMOVED: u32 = 1;
    const RESUMED: u32 = 2;
    const PEER_ATTACH: u32 = 3;
    const PEER_DETACH: u32 = 4;

    /// Whether a guest may want to hear of events of a number.
    pub fn is_known(number: u32) -> bool {
        [
            Self::CONTEXT_UPDATE,
            Self::CONTEXT_REMOVED,
            Self::RESUMED,
            Self::PEER_ATTACH,
            Self::PEER_DETACH,
        ]
        .contains(&number)
    }

    pub fn datagram(self) -> Vec<u8> {
        let (number, handle) = match self {
            Self::PairsResumed => (Self::RESUMED, None),
            Self::Attached(handle) => (Self::PEER_ATTACH, Some(handle)),
            Self::Detached(handle) => (Self::PEER_DETACH, Some(handle)),
        };
        let mut payload = u64::from(number).to_le_bytes().to_vec();
        match handle {
            Some(handle) => {
                payload.extend(handle.word().to_le_bytes());
                payload.extend(u64::from(HOST).to_le_bytes());
            }
            None => payload.extend(u64::from(GUEST).to_le_bytes()),
        }
        let to = Handle { context: GUEST, resource: EVENT_HANDLER };
        datagram(to, Handle { context: HYPERVISOR, resource: 0 }, &payload)
    }
}
