//! The answer to a challenge of VNC's authentication (RFC 6143, 7.2.2).

use des::Des;
use des::cipher::{BlockEncrypt, KeyInit};

/// `challenge` encrypted with the first 8 bytes of the password. As all viewers have it, each byte
/// of the key has its bits the other way round (RFC 6143 errata, 4951).
pub fn answer(password: &[u8], challenge: [u8; 16]) -> [u8; 16] {
    let mut key = [0; 8];
    for (place, byte) in key.iter_mut().zip(password) {
        *place = byte.reverse_bits();
    }
    let cipher = Des::new(&key.into());
    let mut blocks = challenge;
    for block in blocks.chunks_exact_mut(8) {
        cipher.encrypt_block(block.into());
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_the_password_with_its_bits_reversed() {
        // FIPS 81, table B1: the first two blocks of the ECB example.
        let key = 0x0123_4567_89AB_CDEF_u64.to_be_bytes().map(u8::reverse_bits);
        let challenge = *b"Now is the time ";
        let mut want = [0; 16];
        want[..8].copy_from_slice(&0x3FA4_0E8A_984D_4815_u64.to_be_bytes());
        want[8..].copy_from_slice(&0x6A27_1787_AB88_83F9_u64.to_be_bytes());
        assert_eq!(answer(&key, challenge), want);
        let longer = [&key[..], b"more"].concat();
        assert_eq!(answer(&longer, challenge), want);
        assert_ne!(answer(b"", challenge), want);
    }
}
