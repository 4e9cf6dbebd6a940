//! Table of contents of a disc with one track of data (MMC-5, 6.26).

use super::sense::Sense;

/// The number that stands for what is behind the last track.
const LEAD_OUT: u8 = 0xAA;
/// A track of data, and Q channel with a position.
const DATA_TRACK: u8 = 0x14;
/// Sectors before the first, as minutes and seconds count.
const PREGAP: u32 = 150;

/// A place as 4 bytes: a block, or (minute, second, frame).
fn place(block: u32, by_time: bool) -> [u8; 4] {
    if !by_time {
        return block.to_be_bytes();
    }
    let at = block.saturating_add(PREGAP);
    [0, (at / 75 / 60).min(99) as u8, (at / 75 % 60) as u8, (at % 75) as u8]
}

/// READ TOC/PMA/ATIP for a disc of so many blocks.
pub fn read(packet: &[u8], blocks: u32) -> Result<Vec<u8>, Sense> {
    let by_time = packet[1] & 2 != 0;
    // SFF-8020 had the format in the last byte, where drivers still put it.
    let format = match packet[2] & 0xF {
        0 => packet[9] >> 6,
        format => format,
    };
    let mut body = match format {
        0 => {
            let first = packet[6];
            if first > 1 && first != LEAD_OUT {
                return Err(Sense::INVALID_FIELD);
            }
            let mut body = vec![1, 1];
            let mut track = |number, block| {
                body.extend([0, DATA_TRACK, number, 0]);
                body.extend(place(block, by_time));
            };
            if first <= 1 {
                track(1, 0);
            }
            track(LEAD_OUT, blocks);
            body
        }
        // Sessions: the first track of the last.
        1 => {
            let mut body = vec![1, 1, 0, DATA_TRACK, 1, 0];
            body.extend(place(0, by_time));
            body
        }
        // The whole of it, always by time.
        2 => {
            let mut body = vec![1, 1];
            for (point, [_, minute, second, frame]) in [
                (0xA0, [0, 1, 0, 0]),
                (0xA1, [0, 1, 0, 0]),
                (0xA2, place(blocks, true)),
                (1, place(0, true)),
            ] {
                body.extend([1, DATA_TRACK, 0, point, 0, 0, 0, 0, minute, second, frame]);
            }
            body
        }
        _ => return Err(Sense::INVALID_FIELD),
    };
    let mut data = (body.len() as u16).to_be_bytes().to_vec();
    data.append(&mut body);
    Ok(data)
}
