//! Where a request's data is in guest memory: in one piece, or by a list of segments.

use tetrarch_memory::{GuestMemory, GuestPhys, ScatterList};

use super::PAGE;
use super::request::{HostStatus, Request, Way};
use crate::runs::Runs;

/// Bytes of an element of a list: address, length, flags.
const ELEMENT: u64 = 16;
/// It leads to the next part of the list.
const CHAIN: u32 = 1 << 0;
/// The most parts of a list, as VMware's own device has it.
const MAX_PARTS: usize = 128;
/// Elements that are read at a time: most lists have no more.
const AT_ONCE: u64 = 16;

/// The first `length` bytes of a request's buffer.
pub fn data(
    memory: &GuestMemory,
    request: &Request,
    way: Way,
    length: u64,
) -> Result<ScatterList, HostStatus> {
    const WRONG: HostStatus = HostStatus::INVALID_PARAMETER;
    if request.room(way)? < length {
        return Err(HostStatus::DATA_RUN);
    }
    let mut runs = Runs::new(memory);
    if length == 0 {
        return Ok(ScatterList::new(memory.snapshot()));
    }
    if request.is_scattered() {
        elements(memory, request.address(), length, &mut runs)?;
    } else {
        runs.add(request.address(), length).map_err(|_| WRONG)?;
    }
    runs.finish().map_err(|_| WRONG)
}

/// Each part of a list is inside one page, which bounds how many elements are looked at.
fn elements(memory: &GuestMemory, at: u64, length: u64, runs: &mut Runs) -> Result<(), HostStatus> {
    const WRONG: HostStatus = HostStatus::INVALID_PARAMETER;
    let (mut at, mut left) = (at, length);
    let mut bytes = [0; (ELEMENT * AT_ONCE) as usize];
    'parts: for _ in 0..MAX_PARTS {
        let mut here = (PAGE - at % PAGE) / ELEMENT;
        while here > 0 {
            let count = here.min(AT_ONCE);
            let bytes = &mut bytes[..(ELEMENT * count) as usize];
            memory.read(GuestPhys(at), bytes).map_err(|_| WRONG)?;
            for element in bytes.as_chunks::<{ ELEMENT as usize }>().0 {
                let element = u128::from_le_bytes(*element);
                let (address, size) = (element as u64, (element >> 64) as u32);
                if (element >> 96) as u32 & CHAIN != 0 {
                    at = address;
                    continue 'parts;
                }
                let size = u64::from(size).min(left);
                if size > 0 {
                    runs.add(address, size).map_err(|_| WRONG)?;
                    left -= size;
                }
                if left == 0 {
                    return Ok(());
                }
            }
            here -= count;
            // Inside the page.
            at += ELEMENT * count;
        }
        break;
    }
    Err(WRONG)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: u64 = 1 << 20;
    const LIST: u64 = 0x1_0000;

    fn write(memory: &GuestMemory, at: u64, elements: &[(u64, u32, u32)]) {
        for (index, &(address, length, flags)) in elements.iter().enumerate() {
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(length.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            memory.write(GuestPhys(at + ELEMENT * index as u64), &bytes).unwrap();
        }
    }

    fn found(
        memory: &GuestMemory,
        address: u64,
        flags: u32,
        room: u64,
        length: u64,
    ) -> Result<Vec<(u64, u64)>, HostStatus> {
        let mut words = [0; 16];
        (words[1], words[2], words[4]) = (address, room, u64::from(flags) << 32);
        let list = data(memory, &Request::of_words(words), Way::ToGuest, length)?;
        assert_eq!(list.len(), length);
        Ok(list.ranges().map(|(start, length)| (start.0, length)).collect())
    }

    #[test]
    fn one_piece_lists_and_chains_are_followed() {
        let memory = GuestMemory::new(RAM).unwrap();
        assert_eq!(found(&memory, 0x3001, 0, 512, 512).unwrap(), [(0x3001, 512)]);
        assert_eq!(found(&memory, 0x3001, 0, 4096, 36).unwrap(), [(0x3001, 36)], "less than room");
        assert_eq!(found(&memory, u64::MAX, 0, 4096, 0).unwrap(), []);
        // Pieces that follow each other are one; empty ones are none.
        write(&memory, LIST, &[(0x4000, 512, 0), (0x4200, 512, 0), (9, 0, 0), (0x9000, 4096, 0)]);
        let two = [(0x4000, 1024), (0x9000, 512)];
        assert_eq!(found(&memory, LIST, 1, 1536, 1536).unwrap(), two);
        write(&memory, LIST + PAGE - ELEMENT, &[(LIST + 0x4008, 77, 1)]);
        write(&memory, LIST + 0x4008, &[(0x5000, 4, 0), (0x7000, 8, 0)]);
        let chained = found(&memory, LIST + PAGE - ELEMENT, 1, 12, 12);
        assert_eq!(chained.unwrap(), [(0x5000, 4), (0x7000, 8)]);
        let full: Vec<_> = (0..255).map(|index| (0x2_0000 + 0x200 * index, 256, 0)).collect();
        write(&memory, LIST, &full);
        assert_eq!(found(&memory, LIST, 1, 255 * 256, 255 * 256).unwrap().len(), 255);
    }

    #[test]
    fn nonsense_is_refused() {
        let memory = GuestMemory::new(RAM).unwrap();
        const WRONG: HostStatus = HostStatus::INVALID_PARAMETER;
        write(&memory, LIST, &[(LIST, 512, 1)]);
        assert_eq!(found(&memory, LIST, 1, 512, 512), Err(WRONG), "leads to itself");
        for list in [RAM, RAM - 8, u64::MAX, !15, 0x8000, 0x8FF8] {
            assert_eq!(found(&memory, list, 1, 512, 512), Err(WRONG), "{list:x}");
        }
        for address in [RAM, RAM - 511, u64::MAX, u64::MAX - 511] {
            assert_eq!(found(&memory, address, 0, 512, 512), Err(WRONG), "{address:x}");
            write(&memory, LIST, &[(address, 512, 0)]);
            assert_eq!(found(&memory, LIST, 1, 512, 512), Err(WRONG), "{address:x}");
        }
        assert_eq!(found(&memory, 0, 0, 511, 512), Err(HostStatus::DATA_RUN));
        assert_eq!(found(&memory, 0, 0, u64::MAX, u64::MAX), Err(WRONG));
        assert_eq!(found(&memory, 0, 1 << 2, 512, 512), Err(HostStatus::DATA_RUN), "no data");
        assert_eq!(found(&memory, 0, 1 << 4, 512, 512), Err(WRONG), "the other way");
        // More pieces than a system call takes.
        for part in 0..6 {
            let at = LIST + PAGE * part;
            let mut pieces: Vec<_> = (0..255).map(|index| (0x8_0000 + 16 * index, 8, 0)).collect();
            pieces.push((at + PAGE, 0, 1));
            write(&memory, at, &pieces);
        }
        assert_eq!(found(&memory, LIST, 1, 8192, 8192).unwrap().len(), 1024);
        assert_eq!(found(&memory, LIST, 1, 8200, 8200), Err(WRONG));
    }
}
