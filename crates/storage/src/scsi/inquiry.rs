//! INQUIRY of a disk, and its pages of vital product data (SPC-3, 6.4 and 7.6; SBC-3, 6.5).

use tetrarch_block::BlockInfo;

use super::cdb::Cdb;
use super::disk::{MAX_SAME_BLOCKS, MAX_TRANSFER_BLOCKS, MAX_UNMAP_RANGES, block_size};
use super::unit::{Step, cut};
use super::{REVISION, Sense, VENDOR};

const PRODUCT: &[u8; 16] = b"DISK            ";

/// Pages, in the order in which they are listed.
const SUPPORTED: u8 = 0x00;
const SERIAL: u8 = 0x80;
const IDENTIFICATION: u8 = 0x83;
const LIMITS: u8 = 0xB0;
const CHARACTERISTICS: u8 = 0xB1;
const PROVISIONING: u8 = 0xB2;
const PAGES: [u8; 6] = [SUPPORTED, SERIAL, IDENTIFICATION, LIMITS, CHARACTERISTICS, PROVISIONING];

/// Hosts' disks and file systems have blocks of this size, whatever they show.
pub const PHYSICAL: u64 = 4096;

pub fn inquiry(cdb: &Cdb, info: &BlockInfo, serial: &str) -> Result<Step, Sense> {
    let (vital, page) = (cdb.byte(1) & 1 != 0, cdb.byte(2));
    if !vital && page != 0 {
        return Err(Sense::INVALID_FIELD);
    }
    let data = if vital { vital_page(page, info, serial)? } else { standard() };
    cut(data, cdb.word(3).into())
}

/// A disk that stays, as SPC-4 has it, with queues.
fn standard() -> Vec<u8> {
    let mut data = vec![0, 0, 6, 0x12, 31, 0, 0, 0x02];
    data.extend(VENDOR);
    data.extend(PRODUCT);
    data.extend(REVISION);
    data
}

fn vital_page(page: u8, info: &BlockInfo, serial: &str) -> Result<Vec<u8>, Sense> {
    let body = match page {
        SUPPORTED => PAGES.to_vec(),
        SERIAL => ascii(serial),
        IDENTIFICATION => {
            // In ASCII, by the vendor's name (7.6.3.4).
            let mut name = VENDOR.to_vec();
            name.extend(ascii(serial));
            name.truncate(255);
            let mut body = vec![2, 1, 0, name.len() as u8];
            body.append(&mut name);
            body
        }
        LIMITS => limits(info),
        CHARACTERISTICS => {
            let mut body = vec![0; 60];
            body[1] = 1; // nothing turns
            body
        }
        PROVISIONING => {
            // Thin where space goes back: by UNMAP, and by WRITE SAME (16) and (10).
            if info.discards { vec![0, 0b1110_0000, 2, 0] } else { vec![0; 4] }
        }
        _ => return Err(Sense::INVALID_FIELD),
    };
    let mut data = vec![0, page];
    data.extend((body.len() as u16).to_be_bytes());
    data.extend(body);
    Ok(data)
}

/// SBC-3, 6.5.3; offsets here are less the header's 4.
fn limits(info: &BlockInfo) -> Vec<u8> {
    let block = block_size(info);
    let mut body = vec![0; 60];
    let mut put = |at: usize, value: u32| body[at..at + 4].copy_from_slice(&value.to_be_bytes());
    // WRITE SAME has blocks; granularity of transfers in the low half.
    put(0, 1 << 24 | (PHYSICAL / block).max(1) as u32);
    put(4, MAX_TRANSFER_BLOCKS as u32);
    if info.discards {
        put(16, u32::MAX);
        put(20, MAX_UNMAP_RANGES as u32);
        put(24, (u64::from(info.discard_granularity) / block).max(1) as u32);
        put(28, 1 << 31);
    }
    body[32..40].copy_from_slice(&MAX_SAME_BLOCKS.to_be_bytes());
    body
}

fn ascii(text: &str) -> Vec<u8> {
    text.bytes().filter(|byte| (0x20..0x7F).contains(byte)).take(200).collect()
}
