//! Offload metadata: what of a frame's making was left to others.
//!
//! Their form is the virtio-net header (virtio 1.2, 5.1.6), which tap devices have too.

/// Bytes of the header, with the number of buffers.
pub const HEADER: usize = 12;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// What of the checksum was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// It is as any other byte of the frame.
    #[default]
    Unknown,
    /// Whoever has it last has verified it.
    Verified,
    /// It covers the pseudo header alone. That of all bytes from `start` on goes to `offset`
    /// behind it.
    Partial { start: u16, offset: u16 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

/// A TCP segment that is to be divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    pub family: Family,
    /// Bytes of data in each but the last.
    pub size: u16,
    /// CWR is set, which the first has alone.
    pub ecn: bool,
    /// Bytes of all headers, as the sender says; a hint.
    pub header: u16,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    pub checksum: Checksum,
    pub segments: Option<Segments>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MalformedHeader;

impl Offload {
    /// From the header of a frame; the number of buffers is no part of it.
    pub fn decode(header: &[u8; HEADER]) -> Result<Self, MalformedHeader> {
        let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let checksum = match header[0] {
            flags if flags & NEEDS_CSUM != 0 => {
                Checksum::Partial { start: word(6), offset: word(8) }
            }
            flags if flags & DATA_VALID != 0 => Checksum::Verified,
            _ => Checksum::Unknown,
        };
        let family = match header[1] & !GSO_ECN {
            GSO_NONE => None,
            GSO_TCPV4 => Some(Family::V4),
            GSO_TCPV6 => Some(Family::V6),
            _ => return Err(MalformedHeader),
        };
        let segments = family.map(|family| Segments {
            family,
            size: word(4),
            ecn: header[1] & GSO_ECN != 0,
            header: word(2),
        });
        // 5.1.6.2.1: what is to be divided has a partial checksum.
        let partial = matches!(checksum, Checksum::Partial { .. });
        if segments.is_some_and(|segments| segments.size == 0 || !partial) {
            return Err(MalformedHeader);
        }
        Ok(Self { checksum, segments })
    }

    pub fn encode(&self, buffers: u16) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        let mut word = |at: usize, value: u16| {
            header[at..at + 2].copy_from_slice(&value.to_le_bytes());
        };
        let flags = match self.checksum {
            Checksum::Unknown => 0,
            Checksum::Verified => DATA_VALID,
            Checksum::Partial { start, offset } => {
                word(6, start);
                word(8, offset);
                NEEDS_CSUM
            }
        };
        let mut kind = GSO_NONE;
        if let Some(segments) = self.segments {
            word(2, segments.header);
            word(4, segments.size);
            kind = match segments.family {
                Family::V4 => GSO_TCPV4,
                Family::V6 => GSO_TCPV6,
            } | if segments.ecn { GSO_ECN } else { 0 };
        }
        word(10, buffers);
        header[0] = flags;
        header[1] = kind;
        header
    }

    /// Whether what it refers to is in a frame of `length` bytes.
    pub fn fits(&self, length: usize) -> bool {
        match self.checksum {
            Checksum::Partial { start, offset } => {
                usize::from(start) + usize::from(offset) + 2 <= length
            }
            _ => self.segments.is_none(),
        }
    }
}

/// What one side leaves to the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    pub checksum: bool,
    pub tcp4: bool,
    pub tcp6: bool,
    /// Segments with CWR among them.
    pub ecn: bool,
}

impl Offloads {
    pub const NONE: Self = Self { checksum: false, tcp4: false, tcp6: false, ecn: false };
    pub const ALL: Self = Self { checksum: true, tcp4: true, tcp6: true, ecn: true };

    pub fn takes(&self, offload: &Offload) -> bool {
        let checksum = self.checksum || !matches!(offload.checksum, Checksum::Partial { .. });
        checksum
            && offload.segments.is_none_or(|segments| {
                let family = match segments.family {
                    Family::V4 => self.tcp4,
                    Family::V6 => self.tcp6,
                };
                family && (self.ecn || !segments.ecn)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_they_are_written() {
        let partial = Checksum::Partial { start: 34, offset: 16 };
        let tcp = Segments { family: Family::V4, size: 1448, ecn: false, header: 66 };
        for offload in [
            Offload::default(),
            Offload { checksum: Checksum::Verified, segments: None },
            Offload { checksum: partial, segments: None },
            Offload { checksum: partial, segments: Some(tcp) },
            Offload {
                checksum: partial,
                segments: Some(Segments { family: Family::V6, ecn: true, ..tcp }),
            },
        ] {
            assert_eq!(Offload::decode(&offload.encode(1)), Ok(offload));
        }
        let header = Offload { checksum: partial, segments: Some(tcp) }.encode(0x0102);
        assert_eq!(header, [1, 1, 66, 0, 0xA8, 5, 34, 0, 16, 0, 2, 1]);
    }

    #[test]
    fn headers_that_no_driver_may_write_are_malformed() {
        let tcp = [1, 1, 66, 0, 0xA8, 5, 34, 0, 16, 0, 0, 0];
        assert!(Offload::decode(&tcp).is_ok());
        let with = |at: usize, value: u8| {
            let mut header = tcp;
            header[at] = value;
            header[5] = if at == 4 { 0 } else { header[5] };
            Offload::decode(&header)
        };
        assert_eq!(with(0, 0), Err(MalformedHeader), "segments without a checksum");
        assert_eq!(with(1, 2), Err(MalformedHeader), "a kind that there is not");
        assert_eq!(with(1, 3), Err(MalformedHeader), "UDP fragments were not negotiated");
        assert_eq!(with(4, 0), Err(MalformedHeader), "segments of nothing");
    }

    #[test]
    fn checksum_must_lie_in_the_frame() {
        let partial = |start, offset| Offload {
            checksum: Checksum::Partial { start, offset },
            segments: None,
        };
        assert!(partial(34, 16).fits(52));
        assert!(!partial(34, 16).fits(51));
        assert!(!partial(u16::MAX, u16::MAX).fits(crate::MAX_FRAME));
    }
}
