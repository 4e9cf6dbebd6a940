//! Which conversation a frame belongs to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Addresses, protocol and ports of an IP packet, from its sender's side. Ports are 0 where
/// the protocol has none, or the packet is a later fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    pub source: IpAddr,
    pub destination: IpAddr,
    /// IANA's number: 6 TCP, 17 UDP, 1 and 58 ICMP.
    pub protocol: u8,
    pub source_port: u16,
    pub destination_port: u16,
}

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86DD;
const VLAN: u16 = 0x8100;
const TCP: u8 = 6;
const UDP: u8 = 17;

impl Flow {
    /// `None` for what is no IP packet, as ARP, or is cut short.
    pub fn of(frame: &[u8]) -> Option<Self> {
        let (mut kind, mut packet) = (word(frame, 12)?, frame.get(14..)?);
        if kind == VLAN {
            (kind, packet) = (word(packet, 2)?, packet.get(4..)?);
        }
        match kind {
            IPV4 => Self::of_v4(packet),
            IPV6 => Self::of_v6(packet),
            _ => None,
        }
    }

    fn of_v4(packet: &[u8]) -> Option<Self> {
        let header = usize::from(packet.first()? & 0xF) * 4;
        let address = |at: usize| {
            let bytes: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
            Some(IpAddr::V4(Ipv4Addr::from(bytes)))
        };
        let later_fragment = word(packet, 6)? & 0x1FFF != 0;
        let body = if later_fragment { &[] } else { packet.get(header..)? };
        Some(Self::with_ports(address(12)?, address(16)?, *packet.get(9)?, body))
    }

    /// Extension headers are not looked behind: a flow of their protocol is one too.
    fn of_v6(packet: &[u8]) -> Option<Self> {
        let address = |at: usize| {
            let bytes: [u8; 16] = packet.get(at..at + 16)?.try_into().ok()?;
            Some(IpAddr::V6(Ipv6Addr::from(bytes)))
        };
        Some(Self::with_ports(address(8)?, address(24)?, *packet.get(6)?, packet.get(40..)?))
    }

    fn with_ports(source: IpAddr, destination: IpAddr, protocol: u8, body: &[u8]) -> Self {
        let port = |at| if matches!(protocol, TCP | UDP) { word(body, at) } else { None };
        Self {
            source,
            destination,
            protocol,
            source_port: port(0).unwrap_or(0),
            destination_port: port(2).unwrap_or(0),
        }
    }

    /// The same conversation from the other side.
    #[must_use]
    pub fn reversed(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            ..self
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A UDP packet of IPv4 from 10.0.0.1:4660 to 10.0.0.2:53.
    fn udp() -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend(IPV4.to_be_bytes());
        frame.extend([0x45, 0, 0, 28, 0, 0, 0, 0, 64, UDP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0x12, 0x34, 0, 53, 0, 8, 0, 0]);
        frame
    }

    #[test]
    fn flow_is_read_and_reversed() {
        let flow = Flow::of(&udp()).unwrap();
        assert_eq!((flow.source_port, flow.destination_port, flow.protocol), (0x1234, 53, UDP));
        assert_eq!(flow.source.to_string(), "10.0.0.1");
        assert_eq!(flow.reversed().reversed(), flow);
        assert_eq!(flow.reversed().source_port, 53);
        let mut tagged = udp();
        tagged.splice(12..12, [0x81, 0, 0, 5]);
        assert_eq!(Flow::of(&tagged), Some(flow));
    }

    #[test]
    fn frames_cut_anywhere_are_none_or_have_no_ports() {
        let frame = udp();
        for length in 0..frame.len() - 4 {
            let found = Flow::of(&frame[..length]);
            assert!(found.is_none_or(|flow| flow.destination_port == 0), "{length}");
        }
        let mut fragment = frame.clone();
        fragment[14 + 7] = 5;
        assert_eq!(Flow::of(&fragment).unwrap().destination_port, 0);
        let mut options = frame;
        options[14] = 0x4F; // a header longer than the packet
        assert!(Flow::of(&options).is_none());
    }
}
