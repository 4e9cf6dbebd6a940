//! Where in a frame its layers begin.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::{Family, MIN_FRAME};

const TYPE_IPV4: u16 = 0x0800;
const TYPE_IPV6: u16 = 0x86DD;
/// 802.1Q and 802.1ad.
const TYPE_VLAN: [u16; 2] = [0x8100, 0x88A8];

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

/// More extension headers (RFC 8200, 4) than any host sends.
const MAX_EXTENSIONS: usize = 8;

/// An IP packet in a frame; all offsets count from the frame's start and are inside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layers {
    pub family: Family,
    pub network: usize,
    /// TCP's, UDP's, or of whatever `protocol` is.
    pub transport: usize,
    pub protocol: u8,
    /// Behind the last byte of the packet: a frame may be padded.
    pub end: usize,
    /// Part of a packet, and whether it is the first.
    pub fragment: Option<bool>,
}

pub fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

impl Layers {
    /// None for what is no IP packet, or a damaged one.
    pub fn of(frame: &[u8]) -> Option<Self> {
        Self::within(frame, frame.len())
    }

    /// Of a frame of `length` bytes of which `frame` has at least the headers.
    pub fn within(frame: &[u8], length: usize) -> Option<Self> {
        let (kind, network) = Self::network(frame)?;
        match kind {
            TYPE_IPV4 => Self::v4(frame, network, length),
            TYPE_IPV6 => Self::v6(frame, network, length),
            _ => None,
        }
    }

    /// The Ethernet type behind tags, and where what it names begins.
    pub(crate) fn network(frame: &[u8]) -> Option<(u16, usize)> {
        let mut network = MIN_FRAME;
        let mut kind = be16(frame, 12)?;
        for _ in 0..2 {
            if TYPE_VLAN.contains(&kind) {
                kind = be16(frame, network + 2)?;
                network += 4;
            }
        }
        Some((kind, network))
    }

    fn v4(frame: &[u8], network: usize, frame_length: usize) -> Option<Self> {
        let header = frame.get(network..network + 20)?;
        let length = usize::from(header[0] & 0xF) * 4;
        let total = usize::from(be16(header, 2)?);
        let end = network + total;
        if header[0] >> 4 != 4 || length < 20 || total < length || end > frame_length {
            return None;
        }
        let parts = be16(header, 6)? & 0x3FFF;
        let fragment = (parts != 0).then_some(parts & 0x1FFF == 0);
        let transport = network + length;
        Some(Self { family: Family::V4, network, transport, protocol: header[9], end, fragment })
    }

    fn v6(frame: &[u8], network: usize, frame_length: usize) -> Option<Self> {
        let header = frame.get(network..network + 40)?;
        let end = network + 40 + usize::from(be16(header, 4)?);
        if header[0] >> 4 != 6 || end > frame_length {
            return None;
        }
        let mut protocol = header[6];
        let mut transport = network + 40;
        let mut fragment = None;
        for _ in 0..MAX_EXTENSIONS {
            let length = match protocol {
                // Hop-by-hop, routing, destination.
                0 | 43 | 60 => 8 + 8 * usize::from(*frame.get(transport + 1)?),
                44 => {
                    fragment = Some(be16(frame, transport + 2)? & 0xFFF8 == 0);
                    8
                }
                _ => break,
            };
            protocol = *frame.get(transport)?;
            transport += length;
            if fragment == Some(false) {
                break;
            }
        }
        (transport <= end).then_some(Self {
            family: Family::V6,
            network,
            transport,
            protocol,
            end,
            fragment,
        })
    }

    /// Addresses of sender and receiver, as bytes of the pseudo header.
    pub fn addresses<'a>(&self, frame: &'a [u8]) -> &'a [u8] {
        let (at, length) = match self.family {
            Family::V4 => (12, 8),
            Family::V6 => (8, 32),
        };
        frame.get(self.network + at..self.network + at + length).unwrap_or_default()
    }
}

/// Who talks to whom: what a filter decides on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    pub protocol: u8,
    pub source: IpAddr,
    pub destination: IpAddr,
    /// Of source and destination; none where the protocol has no ports, or the packet is a later
    /// fragment.
    pub ports: Option<(u16, u16)>,
}

impl Flow {
    /// None for what is no IP packet.
    pub fn of(frame: &[u8]) -> Option<Self> {
        let layers = Layers::of(frame)?;
        let addresses = layers.addresses(frame);
        let (source, destination) = match layers.family {
            Family::V4 => {
                let address = |at: usize| {
                    let bytes: [u8; 4] = addresses.get(at..at + 4)?.try_into().ok()?;
                    Some(IpAddr::from(Ipv4Addr::from(bytes)))
                };
                (address(0)?, address(4)?)
            }
            Family::V6 => {
                let address = |at: usize| {
                    let bytes: [u8; 16] = addresses.get(at..at + 16)?.try_into().ok()?;
                    Some(IpAddr::from(Ipv6Addr::from(bytes)))
                };
                (address(0)?, address(16)?)
            }
        };
        let has_ports = matches!(layers.protocol, TCP | UDP) && layers.fragment != Some(false);
        let port = |at: usize| {
            let at = layers.transport + at;
            if at + 2 <= layers.end { be16(frame, at) } else { None }
        };
        let ports = if has_ports { Some((port(0)?, port(2)?)) } else { None };
        Some(Self { protocol: layers.protocol, source, destination, ports })
    }

    /// What an answer to it is.
    #[must_use]
    pub fn reversed(&self) -> Self {
        Self {
            protocol: self.protocol,
            source: self.destination,
            destination: self.source,
            ports: self.ports.map(|(source, destination)| (destination, source)),
        }
    }
}
