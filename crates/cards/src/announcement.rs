//! What tells switches where a guest is now, in its place: drivers of cards that have no word for it
//! are not asked to.

use crate::MacAddress;

/// A request of nobody (RFC 903).
pub fn announcement(mac: MacAddress) -> [u8; 60] {
    let mut frame = [0; 60];
    frame[..6].fill(0xFF);
    frame[6..12].copy_from_slice(&mac);
    frame[12..22].copy_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    frame[22..28].copy_from_slice(&mac);
    frame[32..38].copy_from_slice(&mac);
    frame
}
