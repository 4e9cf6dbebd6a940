//! Points as a viewer wants them (RFC 6143, 7.4).

use crate::{POINT, Part};

#[derive(Debug, thiserror::Error, PartialEq)]
pub enum FormatError {
    #[error("a point of {0} bits")]
    Bits(u8),
    #[error("a colour of 0 to {max}, shifted by {shift}, in a point of {bits} bits")]
    Channel { bits: u8, max: u16, shift: u8 },
}

/// Where a colour is in a point.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Channel {
    /// One less than a power of 2.
    pub max: u16,
    pub shift: u8,
}

/// A viewer's format, with what each colour becomes in it.
pub struct PixelFormat {
    bytes: usize,
    big_endian: bool,
    /// Which bytes of a point ZRLE sends (7.7.5): of 4, where three have all colours, those.
    compressed: std::ops::Range<usize>,
    red: Table,
    green: Table,
    blue: Table,
}

type Table = [u32; 256];

impl PixelFormat {
    pub fn new(bits: u8, big_endian: bool, rgb: [Channel; 3]) -> Result<Self, FormatError> {
        if !matches!(bits, 8 | 16 | 32) {
            return Err(FormatError::Bits(bits));
        }
        let [red, green, blue] = rgb.map(|channel| table(bits, channel));
        let (red, green, blue) = (red?, green?, blue?);
        let bytes = usize::from(bits / 8);
        let used = red[255] | green[255] | blue[255];
        // In the order of a number's bytes as they are sent.
        let compressed = match (bytes, used & 0xFF00_0000, used & 0xFF) {
            (4, 0, _) if big_endian => 1..4,
            (4, 0, _) => 0..3,
            (4, _, 0) if big_endian => 0..3,
            (4, _, 0) => 1..4,
            _ => 0..bytes,
        };
        Ok(Self { bytes, big_endian, compressed, red, green, blue })
    }

    /// The number of a point.
    #[inline]
    pub(crate) fn value(&self, [blue, green, red, _]: [u8; POINT]) -> u32 {
        self.red[usize::from(red)] | self.green[usize::from(green)] | self.blue[usize::from(blue)]
    }

    #[inline]
    fn bytes(&self, value: u32) -> [u8; 4] {
        match (self.big_endian, self.bytes) {
            (false, _) => value.to_le_bytes(),
            (true, 4) => value.to_be_bytes(),
            (true, 2) => (value << 16).to_be_bytes(),
            (true, _) => (value << 24).to_be_bytes(),
        }
    }

    /// As ZRLE has it.
    #[inline]
    pub(crate) fn push_compressed(&self, value: u32, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.bytes(value)[self.compressed.clone()]);
    }

    pub(crate) fn compressed_len(&self) -> usize {
        self.compressed.len()
    }

    /// The points of a part, line by line (7.7.1).
    pub fn raw(&self, part: &Part<'_>) -> Vec<u8> {
        let mut out = Vec::with_capacity(part.w * part.h * self.bytes);
        for point in part.points() {
            out.extend_from_slice(&self.bytes(self.value(point))[..self.bytes]);
        }
        out
    }
}

fn table(bits: u8, channel: Channel) -> Result<Table, FormatError> {
    let Channel { max, shift } = channel;
    let fits = u64::from(max) << shift.min(48) < 1 << bits;
    if max == 0 || max & max.wrapping_add(1) != 0 || !fits {
        return Err(FormatError::Channel { bits, max, shift });
    }
    let scaled = |sample: usize| (sample as u32 * u32::from(max) + 127) / 255;
    Ok(std::array::from_fn(|sample| scaled(sample) << shift))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn channel(max: u16, shift: u8) -> Channel {
        Channel { max, shift }
    }

    const RGB: [Channel; 3] = [channel(255, 16), channel(255, 8), channel(255, 0)];
    const RGB_565: [Channel; 3] = [channel(31, 11), channel(63, 5), channel(31, 0)];

    fn sent(bits: u8, big_endian: bool, rgb: [Channel; 3]) -> Vec<u8> {
        let format = PixelFormat::new(bits, big_endian, rgb).unwrap();
        let frame = [0x10, 0x80, 0xFF, 0x77];
        format.raw(&Part::new(&frame, 1, [0, 0, 1, 1]).unwrap())
    }

    #[test]
    fn points_are_sent_in_each_order() {
        assert_eq!(sent(32, false, RGB), [0x10, 0x80, 0xFF, 0]);
        assert_eq!(sent(32, true, RGB), [0, 0xFF, 0x80, 0x10]);
        assert_eq!(sent(16, false, RGB_565), (31u16 << 11 | 32 << 5 | 2).to_le_bytes());
        assert_eq!(sent(16, true, RGB_565), (31u16 << 11 | 32 << 5 | 2).to_be_bytes());
        let bgr = [channel(7, 0), channel(7, 3), channel(3, 6)];
        for big_endian in [false, true] {
            assert_eq!(sent(8, big_endian, bgr), [7 | 4 << 3]);
        }
    }

    #[test]
    fn compressed_points_leave_out_the_byte_without_a_colour() {
        let compressed = |big_endian, rgb| {
            let format = PixelFormat::new(32, big_endian, rgb).unwrap();
            let mut out = Vec::new();
            format.push_compressed(format.value([0x10, 0x80, 0xFF, 0]), &mut out);
            out
        };
        let high = RGB.map(|Channel { max, shift }| Channel { max, shift: shift + 8 });
        assert_eq!(compressed(false, RGB), [0x10, 0x80, 0xFF]);
        assert_eq!(compressed(true, RGB), [0xFF, 0x80, 0x10]);
        assert_eq!(compressed(false, high), [0x10, 0x80, 0xFF]);
        assert_eq!(compressed(true, high), [0xFF, 0x80, 0x10]);
    }

    #[test]
    fn what_is_no_format_is_refused() {
        assert_eq!(PixelFormat::new(24, false, RGB).err(), Some(FormatError::Bits(24)));
        for (bits, max, shift) in
            [(32, 0, 0), (32, 254, 0), (32, 255, 25), (16, 31, 12), (8, 255, 1), (32, 65535, 255)]
        {
            let mut rgb = RGB_565;
            rgb[0] = Channel { max, shift };
            let refused = Some(FormatError::Channel { bits, max, shift });
            if bits == 8 {
                rgb = [rgb[0]; 3];
            }
            assert_eq!(PixelFormat::new(bits, false, rgb).err(), refused);
        }
        assert!(PixelFormat::new(32, false, [Channel { max: 65535, shift: 16 }; 3]).is_ok());
    }

    #[test]
    fn parts_lie_within_their_frame() {
        let frame = [0; 4 * 6];
        assert!(Part::new(&frame, 3, [1, 1, 2, 1]).is_some());
        for place in [[2, 0, 2, 1], [0, 2, 1, 1], [0, 1, 1, 2], [usize::MAX, 0, 1, 1]] {
            assert!(Part::new(&frame, 3, place).is_none());
        }
    }
}
