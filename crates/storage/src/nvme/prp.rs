//! Physical region pages: where a command's data is in guest memory (4.3).

use tetrarch_memory::{GuestMemory, GuestPhys, ScatterList};

use super::command::Command;
use super::status::Status;
use super::{MAX_TRANSFER, PAGE};
use crate::runs::Runs;

/// Entries of a list that fills a page.
const ENTRIES: u64 = PAGE / 8;

/// The `length` bytes that a command names.
///
/// An entry is read for each page of the data and one for each list, so that lists which lead
/// to each other end with the data.
pub fn data(memory: &GuestMemory, command: &Command, length: u64) -> Result<ScatterList, Status> {
    if length > MAX_TRANSFER {
        return Err(Status::INVALID_FIELD);
    }
    let (first, second) = command.prps();
    if !first.is_multiple_of(4) {
        return Err(Status::PRP_OFFSET);
    }
    let mut pages = Pages(Runs::new(memory));
    let mut left = length;
    let here = (PAGE - first % PAGE).min(left);
    pages.add(first, here)?;
    left -= here;
    if left > PAGE {
        list(memory, second, left, &mut pages)?;
    } else if left > 0 {
        pages.add(aligned(second)?, left)?;
    }
    pages.0.finish().map_err(|_| Status::DATA_TRANSFER)
}

/// The rest, by the list at `at`: the last entry of a page leads to the next list where it does
/// not suffice.
fn list(memory: &GuestMemory, at: u64, length: u64, pages: &mut Pages) -> Result<(), Status> {
    let (mut at, mut left) = (at, length);
    if !at.is_multiple_of(8) {
        return Err(Status::PRP_OFFSET);
    }
    let mut entries = [0; PAGE as usize];
    loop {
        let room = ENTRIES - at % PAGE / 8;
        let wanted = left.div_ceil(PAGE);
        let count = wanted.min(room);
        let bytes = &mut entries[..8 * count as usize];
        memory.read(GuestPhys(at), bytes).map_err(|_| Status::DATA_TRANSFER)?;
        let (entries, _) = bytes.as_chunks::<8>();
        let mut entries = entries.iter().map(|&entry| u64::from_le_bytes(entry));
        for _ in 0..if wanted > room { count - 1 } else { count } {
            let here = left.min(PAGE);
            pages.add(aligned(entries.next().unwrap_or(0))?, here)?;
            left -= here;
        }
        if left == 0 {
            return Ok(());
        }
        at = aligned(entries.next().unwrap_or(0))?;
    }
}

/// All but the first entries begin at a page.
fn aligned(entry: u64) -> Result<u64, Status> {
    if entry.is_multiple_of(PAGE) { Ok(entry) } else { Err(Status::PRP_OFFSET) }
}

/// Runs of pages.
struct Pages(Runs);

impl Pages {
    fn add(&mut self, address: u64, length: u64) -> Result<(), Status> {
        self.0.add(address, length).map_err(|_| Status::DATA_TRANSFER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: u64 = 1 << 20;
    const LISTS: u64 = 0x1_0000;

    /// Where the bytes of a transfer are, as runs of pages.
    fn runs(
        memory: &GuestMemory,
        prps: (u64, u64),
        length: u64,
    ) -> Result<Vec<(u64, usize)>, Status> {
        let list = data(memory, &Command::new([0, 0, 0, prps.0, prps.1, 0, 0, 0]), length)?;
        assert_eq!(list.len(), length);
        let base = memory.host(GuestPhys(0), 1).unwrap() as u64;
        Ok(list.iovecs().iter().map(|one| (one.iov_base as u64 - base, one.iov_len)).collect())
    }

    fn write(memory: &GuestMemory, at: u64, entries: &[u64]) {
        for (index, entry) in entries.iter().enumerate() {
            memory.write(GuestPhys(at + 8 * index as u64), &entry.to_le_bytes()).unwrap();
        }
    }

    #[test]
    fn one_page_two_pages_and_lists_are_followed() {
        let memory = GuestMemory::new(RAM).unwrap();
        assert_eq!(runs(&memory, (0x3004, 0), 512).unwrap(), [(0x3004, 512)]);
        assert_eq!(runs(&memory, (0x3000, 0), PAGE).unwrap(), [(0x3000, 4096)]);
        assert_eq!(
            runs(&memory, (0x3800, 0x8000), PAGE).unwrap(),
            [(0x3800, 2048), (0x8000, 2048)]
        );
        write(&memory, LISTS, &[0x4000, 0x9000, 0xA000]);
        let found = runs(&memory, (0x3FFC, LISTS), 4 + 2 * PAGE + 8).unwrap();
        assert_eq!(found, [(0x3FFC, 4 + 4096), (0x9000, 4096 + 8)]);
        // A list that begins at the end of its page: its only entry there leads to the next.
        write(&memory, LISTS + PAGE - 8, &[LISTS + 2 * PAGE]);
        write(&memory, LISTS + 2 * PAGE, &[0x4000, 0x6000]);
        let found = runs(&memory, (0x2000, LISTS + PAGE - 8), 3 * PAGE).unwrap();
        assert_eq!(found, [(0x2000, 4096), (0x4000, 4096), (0x6000, 4096)]);
    }

    #[test]
    fn most_data_goes_and_more_does_not() {
        let memory = GuestMemory::new(RAM).unwrap();
        let entries: Vec<u64> =
            (0..MAX_TRANSFER / PAGE).map(|page| 0x4_0000 + PAGE * page).collect();
        write(&memory, LISTS, &entries);
        let found = runs(&memory, (0x2800, LISTS), MAX_TRANSFER).unwrap();
        assert_eq!(found, [(0x2800, 2048), (0x4_0000, MAX_TRANSFER as usize - 2048)]);
        let more = runs(&memory, (0x2000, LISTS), MAX_TRANSFER + 512);
        assert_eq!(more, Err(Status::INVALID_FIELD));
    }

    #[test]
    fn nonsense_is_refused() {
        let memory = GuestMemory::new(RAM).unwrap();
        let list = LISTS + PAGE - 8;
        // Leads to itself: it begins at no page.
        write(&memory, list, &[list]);
        for (prps, length, status) in [
            ((0x3001, 0), 512, Status::PRP_OFFSET),
            ((0x3800, 0x8004), PAGE, Status::PRP_OFFSET),
            ((0x3000, LISTS + 4), 3 * PAGE, Status::PRP_OFFSET),
            ((0x3000, list), 3 * PAGE, Status::PRP_OFFSET),
            ((0x3000, RAM), 3 * PAGE, Status::DATA_TRANSFER),
            ((0x3000, !7), 3 * PAGE, Status::DATA_TRANSFER),
            ((RAM, 0), 512, Status::DATA_TRANSFER),
            ((RAM - 512, RAM), PAGE, Status::DATA_TRANSFER),
            ((!3, 0), 512, Status::DATA_TRANSFER),
        ] {
            assert_eq!(runs(&memory, prps, length), Err(status), "{prps:x?} {length}");
        }
        // A page that leads to itself is data too: the transfer ends with its length.
        write(&memory, LISTS, &[LISTS; ENTRIES as usize]);
        let found = runs(&memory, (LISTS, LISTS), MAX_TRANSFER).unwrap();
        assert_eq!(found.len(), (MAX_TRANSFER / PAGE) as usize);
    }
}
