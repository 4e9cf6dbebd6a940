//! The Internet checksum (RFC 1071): sums of 16-bit words in one's complement.

use crate::layers::{Layers, TCP, UDP};

/// The sum of the words of some bytes, before it is folded.
///
/// It is the same in any byte order (RFC 1071, 2B), and words of 32 bits are two of 16.
fn sum(bytes: &[u8]) -> u64 {
    let mut total = 0_u64;
    let words = bytes.chunks_exact(4);
    let rest = words.remainder();
    for word in words {
        total += u64::from(u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
    }
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    total + u64::from(u32::from_ne_bytes(last))
}

fn fold(mut total: u64) -> u16 {
    while total > 0xFFFF {
        total = (total >> 16) + (total & 0xFFFF);
    }
    u16::from_be(total as u16)
}

/// The sum of the pseudo header of TCP or UDP.
fn pseudo(addresses: &[u8], protocol: u8, length: usize) -> u64 {
    let word = |value: u16| u64::from(value.to_be());
    // Lengths of IPv6 have 32 bits, those of frames here do not need them.
    sum(addresses) + word(u16::from(protocol)) + word(length as u16) + word((length >> 16) as u16)
}

/// The checksum of bytes (RFC 1071).
pub fn of(bytes: &[u8]) -> u16 {
    !fold(sum(bytes))
}

/// The checksum of a TCP or UDP packet with its pseudo header.
pub fn of_transport(addresses: &[u8], protocol: u8, bytes: &[u8]) -> u16 {
    !fold(pseudo(addresses, protocol, bytes.len()) + sum(bytes))
}

/// The sum of the pseudo header alone, as it stands where the rest was left to others.
pub fn of_pseudo(addresses: &[u8], protocol: u8, length: usize) -> u16 {
    fold(pseudo(addresses, protocol, length))
}

/// Writes a checksum that its sender left: of all from `start` on, where the sum of the
/// pseudo header is already. What does not fit the frame is left alone.
pub fn complete(frame: &mut [u8], start: usize, offset: usize) {
    let Some(bytes) = frame.get_mut(start..) else { return };
    let value = of(bytes);
    // Of UDP 0 means none (RFC 768), and for TCP both are 0.
    let value = if value == 0 { 0xFFFF } else { value };
    if let Some(field) = bytes.get_mut(offset..offset + 2) {
        field.copy_from_slice(&value.to_be_bytes());
    }
}

/// Whether the checksum of a TCP or UDP packet was verified; false for anything else.
pub fn verify(frame: &[u8]) -> bool {
    let Some(layers) = Layers::of(frame) else { return false };
    let Some(bytes) = frame.get(layers.transport..layers.end) else { return false };
    let field = match layers.protocol {
        TCP => 16,
        UDP => 6,
        _ => return false,
    };
    let Some(value) = bytes.get(field..field + 2) else { return false };
    // UDP's 0 is no checksum.
    let none = layers.protocol == UDP && value == [0, 0];
    layers.fragment.is_none()
        && !none
        && of_transport(layers.addresses(frame), layers.protocol, bytes) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{tcp4, udp6};

    /// RFC 1071, 4.1, word by word.
    fn slow(bytes: &[u8]) -> u16 {
        let mut total = 0_u32;
        for pair in bytes.chunks(2) {
            total += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
            total = (total & 0xFFFF) + (total >> 16);
        }
        !(total as u16)
    }

    #[test]
    fn sums_are_those_of_the_rfc() {
        // Its example, section 3.
        assert_eq!(of(&[0x00, 0x01, 0xF2, 0x03, 0xF4, 0xF5, 0xF6, 0xF7]), !0xDDF2);
        let bytes: Vec<u8> = (0..70_000_u32).map(|at| (at * 31 % 255) as u8).collect();
        for length in (0..40).chain([1499, 1500, 65_535, 65_536, 70_000]) {
            assert_eq!(of(&bytes[..length]), slow(&bytes[..length]), "{length} bytes");
        }
        assert_eq!(of(&vec![0xFF; 70_000]), slow(&vec![0xFF; 70_000]));
    }

    #[test]
    fn checksum_that_was_left_is_verified_once_it_is_completed() {
        for (mut frame, start, offset) in
            [(tcp4(1001, 0x10), 34, 16), (udp6(&[7; 333]), 54, 6), (udp6(&[]), 54, 6)]
        {
            assert!(!verify(&frame), "only of the pseudo header");
            complete(&mut frame, start, offset);
            assert!(verify(&frame));
            frame.extend_from_slice(&[0xAA; 7]);
            assert!(verify(&frame), "padding is no part of it");
            frame[start + 1] ^= 1;
            assert!(!verify(&frame));
        }
    }

    #[test]
    fn nothing_outside_the_frame_is_touched() {
        let frame = tcp4(10, 0x10);
        for (start, offset) in [(frame.len(), 0), (frame.len() - 1, 0), (9_999, 0), (34, 65_535)] {
            let mut copy = frame.clone();
            complete(&mut copy, start, offset);
            assert_eq!(copy, frame);
        }
        for length in 0..frame.len() {
            assert!(!verify(&frame[..length]));
        }
    }
}
