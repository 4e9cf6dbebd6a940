//! Pages of parameters of a disk (SPC-3, 7.4; SBC-3, 6.4). Nothing in them can be changed.

use tetrarch_block::BlockInfo;

use super::Sense;
use super::cdb::Cdb;
use super::disk::{block_size, blocks};
use super::unit::{Step, cut};

const ERROR_RECOVERY: u8 = 0x01;
const CACHING: u8 = 0x08;
const CONTROL: u8 = 0x0A;
const ALL: u8 = 0x3F;

/// A write cache, which is flushed.
const WRITE_CACHE: u8 = 1 << 2;
/// Requests may pass each other, though they be for the same blocks.
const REORDERS: u8 = 1 << 4;
/// Of the header: writes are refused, and DPO and FUA are known.
const WRITE_PROTECT: u8 = 1 << 7;
const FORCE_ACCESS: u8 = 1 << 4;

/// MODE SENSE (6), or (10).
pub fn sense(cdb: &Cdb, info: &BlockInfo, short: bool) -> Result<Step, Sense> {
    let (control, page, subpage) = (cdb.byte(2) >> 6, cdb.byte(2) & 0x3F, cdb.byte(3));
    if control == 3 {
        return Err(Sense::NOT_SAVED);
    }
    if subpage != 0 && !(page == ALL && subpage == 0xFF) {
        return Err(Sense::INVALID_FIELD);
    }
    let mut pages = Vec::new();
    for (number, length) in [(ERROR_RECOVERY, 10), (CACHING, 18), (CONTROL, 10)] {
        if page != number && page != ALL {
            continue;
        }
        let start = pages.len();
        pages.extend([number, length]);
        pages.resize(start + 2 + usize::from(length), 0);
        match number {
            // Of what can be changed.
            _ if control == 1 => {}
            CACHING => pages[start + 2] = WRITE_CACHE,
            CONTROL => pages[start + 3] = REORDERS,
            _ => {}
        }
    }
    if pages.is_empty() {
        return Err(Sense::INVALID_FIELD);
    }
    let protected = if info.readonly { WRITE_PROTECT } else { 0 };
    let specific = protected | FORCE_ACCESS;
    let descriptor = if cdb.byte(1) & 1 << 3 != 0 { Vec::new() } else { descriptor(info) };
    let mut data = if short {
        let length = 3 + descriptor.len() + pages.len();
        vec![length as u8, 0, specific, descriptor.len() as u8]
    } else {
        let length = (6 + descriptor.len() + pages.len()) as u16;
        let [high, low] = length.to_be_bytes();
        vec![high, low, 0, specific, 0, 0, 0, descriptor.len() as u8]
    };
    data.extend(descriptor);
    data.append(&mut pages);
    cut(data, if short { cdb.byte(4).into() } else { cdb.word(7).into() })
}

/// The short one (SBC-3, 6.4.2.2).
fn descriptor(info: &BlockInfo) -> Vec<u8> {
    let count = u32::try_from(blocks(info)).unwrap_or(u32::MAX);
    let mut descriptor = count.to_be_bytes().to_vec();
    descriptor.extend((block_size(info) as u32).to_be_bytes());
    descriptor
}
