//! Packets of control (Linux, net/vmw_vsock/vmci_transport.h): all of a stream but its bytes.

use crate::layout::{Fields, GUEST, HOST, Handle, datagram};

/// The resource that control packets go to, and come from.
pub const RESOURCE: u32 = 1;
const VERSION: u8 = 1;
/// Of a datagram with one, without the head of all datagrams.
pub const BYTES: usize = 32;

/// How ends tell each other that they have written or read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Who waits says so, and is told (vmci_transport_notify.c).
    Asked,
    /// Who makes a queue not empty any more tells, and who makes it not full any more
    /// (vmci_transport_notify_qstate.c).
    States,
}

/// The bit of `Protocol::States` among those that a request offers.
pub const STATES: u16 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Invalid,
    Request,
    Negotiate,
    Offer,
    Attach,
    Wrote,
    Read,
    Reset,
    Shutdown,
    WaitingWrite,
    WaitingRead,
    Request2,
    Negotiate2,
}

impl Kind {
    fn of(number: u8) -> Option<Self> {
        use Kind::*;
        let all = [
            Invalid,
            Request,
            Negotiate,
            Offer,
            Attach,
            Wrote,
            Read,
            Reset,
            Shutdown,
            WaitingWrite,
            WaitingRead,
            Request2,
            Negotiate2,
        ];
        all.get(usize::from(number)).copied()
    }
}

/// One between a port of the host and one of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// `None` for one that is not known.
    pub kind: Option<Kind>,
    pub protocol: u16,
    pub host: u32,
    pub guest: u32,
    /// A size, a mode, a handle, or two numbers of what is waited for.
    pub words: [u64; 2],
}

impl Packet {
    pub fn new(kind: Kind, (host, guest): (u32, u32)) -> Self {
        Self { kind: Some(kind), protocol: 0, host, guest, words: [0; 2] }
    }

    pub fn is_request(&self) -> bool {
        matches!(self.kind, Some(Kind::Request | Kind::Request2))
    }

    /// From the guest: what follows the head of the datagram.
    pub fn decode(payload: &[u8]) -> Option<Self> {
        let mut fields = Fields(payload);
        let _version = fields.u8()?;
        let kind = Kind::of(fields.u8()?);
        let protocol = fields.u16()?;
        let (guest, host, _) = (fields.u32()?, fields.u32()?, fields.u32()?);
        Some(Self { kind, protocol, host, guest, words: [fields.u64()?, fields.u64()?] })
    }

    /// To the guest, as a datagram.
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(BYTES);
        payload.extend([VERSION, self.kind.unwrap_or(Kind::Invalid) as u8]);
        payload.extend(self.protocol.to_le_bytes());
        for number in [self.host, self.guest, 0] {
            payload.extend(number.to_le_bytes());
        }
        for word in self.words {
            payload.extend(word.to_le_bytes());
        }
        let [to, from] = [GUEST, HOST].map(|context| Handle { context, resource: RESOURCE });
        datagram(to, from, &payload)
    }
}
