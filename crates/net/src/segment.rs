//! TCP segmentation in software, for peers that take frames alone.

use crate::layers::{Layers, TCP, be16};
use crate::{Family, MalformedHeader, Segments, checksum};

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// Divides a TCP segment as its metadata say, and calls `each` with every frame, complete
/// with checksums. `buffer` is for our use.
///
/// Headers are read from the frame itself: those who wrote it may be wrong about them. Of
/// a guest's frame of 64 KiB there are as many frames as it has bytes at most.
pub fn divide(
    frame: &[u8],
    segments: &Segments,
    buffer: &mut Vec<u8>,
    mut each: impl FnMut(&[u8]),
) -> Result<(), MalformedHeader> {
    let layers = Layers::of(frame).ok_or(MalformedHeader)?;
    let sound = layers.family == segments.family
        && layers.protocol == TCP
        && layers.fragment.is_none()
        && segments.size > 0;
    let transport = frame.get(layers.transport..layers.end).ok_or(MalformedHeader)?;
    let header = usize::from(*transport.get(12).ok_or(MalformedHeader)? >> 4) * 4;
    let (Some(data), true) = (transport.get(header..), sound && header >= 20) else {
        return Err(MalformedHeader);
    };
    let Some(sequence) = transport.get(4..8) else { return Err(MalformedHeader) };
    let sequence = u32::from_be_bytes([sequence[0], sequence[1], sequence[2], sequence[3]]);
    let identification = be16(frame, layers.network + 4).ok_or(MalformedHeader)?;
    let flags = transport[13];
    let size = usize::from(segments.size);
    let count = data.len().div_ceil(size).max(1);
    for index in 0..count {
        let part = &data[(index * size).min(data.len())..((index + 1) * size).min(data.len())];
        buffer.clear();
        buffer.extend_from_slice(&frame[..layers.transport + header]);
        buffer.extend_from_slice(part);
        let length = buffer.len() - layers.network;
        match layers.family {
            Family::V4 => {
                let ip = &mut buffer[layers.network..layers.transport];
                ip[2..4].copy_from_slice(&(length as u16).to_be_bytes());
                let own = identification.wrapping_add(index as u16);
                ip[4..6].copy_from_slice(&own.to_be_bytes());
                ip[10..12].fill(0);
                let value = checksum::of(ip);
                ip[10..12].copy_from_slice(&value.to_be_bytes());
            }
            Family::V6 => {
                let payload = (length - 40) as u16;
                buffer[layers.network + 4..][..2].copy_from_slice(&payload.to_be_bytes());
            }
        }
        let tcp = &mut buffer[layers.transport..];
        let own = sequence.wrapping_add((index * size) as u32);
        tcp[4..8].copy_from_slice(&own.to_be_bytes());
        tcp[13] = flags;
        if index + 1 < count {
            tcp[13] &= !(FIN | PSH);
        }
        if index > 0 {
            tcp[13] &= !CWR;
        }
        tcp[16..18].fill(0);
        let value = checksum::of_transport(layers.addresses(frame), TCP, tcp);
        tcp[16..18].copy_from_slice(&value.to_be_bytes());
        each(buffer);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{tcp4, tcp6};

    fn divided(frame: &[u8], family: Family, size: u16) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let segments = Segments { family, size, ecn: false, header: 0 };
        divide(frame, &segments, &mut Vec::new(), |part| frames.push(part.to_vec())).unwrap();
        frames
    }

    #[test]
    fn data_come_in_order_with_the_headers_of_each_part() {
        for (whole, family, header) in [
            (tcp4(5000, CWR | PSH | FIN | 0x10), Family::V4, 54),
            (tcp6(5000, CWR | PSH | FIN | 0x10), Family::V6, 74),
        ] {
            let frames = divided(&whole, family, 1448);
            let lengths: Vec<usize> = frames.iter().map(|frame| frame.len() - header).collect();
            assert_eq!(lengths, [1448, 1448, 1448, 656]);
            let data: Vec<u8> = frames.iter().flat_map(|frame| frame[header..].to_vec()).collect();
            assert_eq!(data, whole[header..]);
            let tcp = header - 20;
            for (index, frame) in frames.iter().enumerate() {
                assert!(checksum::verify(frame));
                assert_eq!(Layers::of(frame).unwrap().end, frame.len());
                let sequence = u32::from_be_bytes(frame[tcp + 4..tcp + 8].try_into().unwrap());
                assert_eq!(sequence, 0xFFFF_FF00_u32.wrapping_add(1448 * index as u32));
                if family == Family::V4 {
                    assert_eq!(checksum::of(&frame[14..34]), 0);
                    assert_eq!(be16(frame, 18), Some(0xFFFE_u16.wrapping_add(index as u16)));
                }
            }
            let flags: Vec<u8> = frames.iter().map(|frame| frame[tcp + 13]).collect();
            assert_eq!(flags, [CWR | 0x10, 0x10, 0x10, PSH | FIN | 0x10]);
        }
    }

    #[test]
    fn segment_that_is_small_enough_is_one_frame() {
        assert_eq!(divided(&tcp4(0, 0x10), Family::V4, 1448).len(), 1);
        assert_eq!(divided(&tcp4(1448, 0x10), Family::V4, 1448).len(), 1);
        assert_eq!(divided(&tcp4(1449, 0x10), Family::V4, 1448).len(), 2);
    }

    #[test]
    fn what_is_not_as_its_metadata_say_is_malformed() {
        let whole = tcp4(500, 0x10);
        let refused = |frame: &[u8], family| {
            let segments = Segments { family, size: 100, ecn: false, header: 0 };
            divide(frame, &segments, &mut Vec::new(), |_| panic!("a frame")).is_err()
        };
        assert!(refused(&whole, Family::V6));
        for length in 0..whole.len() {
            assert!(refused(&whole[..length], Family::V4));
        }
        for (at, value) in [(13, 6), (14, 0x44), (14, 0x4F), (23, 17), (20, 0x20), (46, 0x40)] {
            let mut frame = whole.clone();
            frame[at] = value;
            // A longer IP header leaves other bytes for TCP's.
            assert!(at == 14 && value == 0x4F || refused(&frame, Family::V4), "{at}: {value:#x}");
        }
    }
}
