//! Messages as they are on the socket: a header of three numbers, and what follows it.

use std::fmt;

pub const HEADER: usize = 12;

/// Flags of a header: the version, and which way the message goes.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
/// Of a request: it is to be answered, whatever it is (REPLY_ACK).
const NEED_REPLY: u32 = 1 << 3;

/// What a front end asks: those that are used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    GetConfig = 24,
}

impl fmt::Display for Request {
    /// As the specification spells it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GetFeatures => "GET_FEATURES",
            Self::SetFeatures => "SET_FEATURES",
            Self::SetOwner => "SET_OWNER",
            Self::SetMemTable => "SET_MEM_TABLE",
            Self::SetVringNum => "SET_VRING_NUM",
            Self::SetVringAddr => "SET_VRING_ADDR",
            Self::SetVringBase => "SET_VRING_BASE",
            Self::GetVringBase => "GET_VRING_BASE",
            Self::SetVringKick => "SET_VRING_KICK",
            Self::SetVringCall => "SET_VRING_CALL",
            Self::GetProtocolFeatures => "GET_PROTOCOL_FEATURES",
            Self::SetProtocolFeatures => "SET_PROTOCOL_FEATURES",
            Self::GetQueueNum => "GET_QUEUE_NUM",
            Self::SetVringEnable => "SET_VRING_ENABLE",
            Self::GetConfig => "GET_CONFIG",
        })
    }
}

/// A request with its header.
pub fn encode(request: Request, need_reply: bool, payload: &[u8]) -> Vec<u8> {
    let flags = VERSION | if need_reply { NEED_REPLY } else { 0 };
    let words = [request as u32, flags, payload.len() as u32];
    let mut message = Vec::with_capacity(HEADER + payload.len());
    words.iter().for_each(|word| message.extend(word.to_ne_bytes()));
    message.extend(payload);
    message
}

/// Whether a header is that of the answer to a request, with so many bytes behind it.
pub fn answers(header: &[u8; HEADER], request: Request, length: usize) -> bool {
    let word = |at: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&header[at..at + 4]);
        u32::from_ne_bytes(bytes)
    };
    word(0) == request as u32
        && word(4) & (VERSION_MASK | REPLY) == VERSION | REPLY
        && word(8) as usize == length
}

/// Numbers of 64 bits, in the host's order as all of the protocol.
pub fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

/// Two numbers of 32 bits: a queue, and something of it (struct vhost_vring_state).
pub fn state(index: usize, value: u32) -> Vec<u8> {
    [index as u32, value].iter().flat_map(|value| value.to_ne_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_as_the_specification_has_it() {
        let message = encode(Request::SetVringNum, true, &state(2, 256));
        assert_eq!(
            message,
            [8, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0],
            "request, flags, size; index, number"
        );
    }

    /// Of all headers that differ from the one answer in a few bits none is taken for it.
    #[test]
    fn noise_is_no_answer() {
        let right = [1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0];
        assert!(answers(&right, Request::GetFeatures, 8));
        // Other flags than version and direction mean nothing.
        let ignored = [0xF8, 0xFF, 0xFF, 0xFF];
        for bit in 0..8 * HEADER {
            let mut header = right;
            header[bit / 8] ^= 1 << (bit % 8);
            let counts = !(4..8).contains(&(bit / 8)) || ignored[bit / 8 - 4] >> (bit % 8) & 1 == 0;
            assert_eq!(!answers(&header, Request::GetFeatures, 8), counts, "bit {bit}");
        }
    }
}
