//! Pages of configuration, of which drivers ask one: that of the controller.

use super::MAX_TARGETS;

pub const CONTROLLER_PAGE: u32 = 0x1958;
/// What is asked about, in the high half of a page's address.
pub const CONTROLLER_ADDRESS: u32 = 0x2120;

/// Number, words of 32 bits, and that all went well; a name in the world, of which there is
/// none; who made it; serial number, versions of ROM, hardware and firmware; how many targets
/// there can be.
pub fn controller() -> Vec<u8> {
    const TEXTS: [(&str, usize); 5] = [("Tetrarch", 64), ("", 64), ("", 32), ("1.0", 32), ("", 32)];
    let mut page = CONTROLLER_PAGE.to_le_bytes().to_vec();
    page.resize(16 + 8, 0);
    for (text, characters) in TEXTS {
        let end = page.len() + 2 * characters;
        text.encode_utf16().for_each(|unit| page.extend(unit.to_le_bytes()));
        page.resize(end, 0);
    }
    page.extend((MAX_TARGETS as u32).to_le_bytes());
    page.extend([0; 4]);
    let words = (page.len() / 4) as u16;
    page[4..6].copy_from_slice(&words.to_le_bytes());
    page
}
