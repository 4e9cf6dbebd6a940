//! Headers as cards see them whose drivers leave metadata of other forms than virtio's.

use crate::layers::{Layers, TCP, UDP, be16};
use crate::{Checksum, Family, MIN_FRAME, MalformedHeader, Offload, Segments, checksum};

const CWR: u8 = 0x80;
/// Where TCP has its checksum.
const TCP_CHECKSUM: u16 = 16;

/// Makes of the headers of a TCP segment that is to be divided what back ends take: lengths, the
/// checksum of IPv4, and the sum of the pseudo header are right.
///
/// `head` has all headers of a frame of `total` bytes, which is to become parts of `size` bytes of data.
pub fn prepare_tcp(head: &mut [u8], total: usize, size: u16) -> Result<Offload, MalformedHeader> {
    let network = Layers::network(head).ok_or(MalformedHeader)?.1;
    let length = total.checked_sub(network).ok_or(MalformedHeader)?;
    let version = head.get(network).ok_or(MalformedHeader)? >> 4;
    let (field, length) =
        if version == 4 { (2, Some(length)) } else { (4, length.checked_sub(40)) };
    let length = length.and_then(|length| u16::try_from(length).ok()).ok_or(MalformedHeader)?;
    let field = head.get_mut(network + field..network + field + 2).ok_or(MalformedHeader)?;
    field.copy_from_slice(&length.to_be_bytes());
    let layers = Layers::within(head, total).ok_or(MalformedHeader)?;
    let tcp = head.get(layers.transport..).ok_or(MalformedHeader)?;
    let header = usize::from(*tcp.get(12).ok_or(MalformedHeader)? >> 4) * 4;
    let sound = layers.protocol == TCP && layers.fragment.is_none() && size > 0;
    if !sound || header < 20 || header > tcp.len() || tcp.len() < 20 {
        return Err(MalformedHeader);
    }
    let ecn = tcp[13] & CWR != 0;
    let sum = checksum::of_pseudo(layers.addresses(head), TCP, layers.end - layers.transport);
    if layers.family == Family::V4 {
        let ip = &mut head[layers.network..layers.transport];
        ip[10..12].fill(0);
        let value = checksum::of(ip);
        ip[10..12].copy_from_slice(&value.to_be_bytes());
    }
    let at = layers.transport + usize::from(TCP_CHECKSUM);
    head[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    let header = (layers.transport + header) as u16;
    let partial = Checksum::Partial { start: layers.transport as u16, offset: TCP_CHECKSUM };
    Ok(Offload {
        checksum: partial,
        segments: Some(Segments { family: layers.family, size, ecn, header }),
    })
}

/// What is in a frame that came, as cards tell their drivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contents {
    pub layers: Layers,
    /// The checksum of IPv4's header is right; IPv6 has none.
    pub ip_right: bool,
}

impl Contents {
    /// None for what is no IP packet.
    pub fn of(frame: &[u8]) -> Option<Self> {
        let layers = Layers::of(frame)?;
        let ip_right = match layers.family {
            Family::V4 => checksum::of(frame.get(layers.network..layers.transport)?) == 0,
            Family::V6 => true,
        };
        Some(Self { layers, ip_right })
    }

    pub fn is_tcp(&self) -> bool {
        self.layers.protocol == TCP && self.layers.fragment.is_none()
    }

    pub fn is_udp(&self) -> bool {
        self.layers.protocol == UDP && self.layers.fragment.is_none()
    }

    /// Behind the Ethernet header follows a tag.
    pub fn is_tagged(&self) -> bool {
        self.layers.network > MIN_FRAME
    }

    /// Ports of source and destination, as they are in a packet of TCP or UDP.
    pub fn ports<'a>(&self, frame: &'a [u8]) -> Option<&'a [u8]> {
        be16(frame, self.layers.transport + 2)?;
        frame.get(self.layers.transport..self.layers.transport + 4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::divide;
    use crate::testing::{tcp4, tcp6, udp6};

    #[test]
    fn headers_of_any_lengths_and_sums_become_right_ones() {
        for (whole, start, family) in
            [(tcp4(3000, 0x10), 34, Family::V4), (tcp6(3000, 0x10), 54, Family::V6)]
        {
            let header = start + 20;
            let mut head = whole[..header].to_vec();
            let lengths = if family == Family::V4 { 16..18 } else { 18..20 };
            head[lengths].fill(0);
            head[start + 16..start + 18].fill(0xEE);
            if family == Family::V4 {
                head[24..26].fill(0xEE);
            }
            let offload = prepare_tcp(&mut head, whole.len(), 1400).unwrap();
            assert_eq!(head, whole[..header]);
            let partial = Checksum::Partial { start: start as u16, offset: 16 };
            assert_eq!(offload.checksum, partial);
            let segments = offload.segments.unwrap();
            assert_eq!((segments.family, segments.size, segments.ecn), (family, 1400, false));
            let frame = [&head[..], &whole[header..]].concat();
            let mut parts = 0;
            divide(&frame, &segments, &mut Vec::new(), |_| parts += 1).unwrap();
            assert_eq!(parts, 3);
        }
    }

    #[test]
    fn what_is_no_tcp_or_cut_is_malformed() {
        let whole = tcp4(3000, 0x10);
        for length in 0..54 {
            assert!(
                prepare_tcp(&mut whole[..length].to_vec(), whole.len(), 1400).is_err(),
                "{length}"
            );
        }
        let head = || whole[..54].to_vec();
        assert!(prepare_tcp(&mut head(), 33, 1400).is_err());
        assert!(prepare_tcp(&mut head(), 70_000, 1400).is_err());
        assert!(prepare_tcp(&mut head(), whole.len(), 0).is_err());
        for (at, value) in [(12, 9), (14, 0x55), (20, 0x20), (23, 17), (46, 0x40), (46, 0xF0)] {
            let mut head = head();
            head[at] = value;
            assert!(prepare_tcp(&mut head, whole.len(), 1400).is_err(), "{at}: {value:#x}");
        }
        assert!(prepare_tcp(&mut udp6(&[0; 99])[..62].to_vec(), 161, 90).is_err());
    }

    #[test]
    fn contents_are_those_of_the_frame() {
        let mut frame = tcp4(10, 0x10);
        let contents = Contents::of(&frame).unwrap();
        assert!(contents.is_tcp() && !contents.is_udp() && !contents.is_tagged());
        assert!(contents.ip_right);
        assert_eq!(contents.ports(&frame), Some(&[0x10, 0, 0x20, 0][..]));
        frame[24] ^= 1;
        assert!(!Contents::of(&frame).unwrap().ip_right);
        assert!(Contents::of(&udp6(&[1])).unwrap().is_udp());
        assert_eq!(Contents::of(&frame[..30]), None);
    }
}
