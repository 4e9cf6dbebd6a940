//! MSI-X: the table of vectors and the pending bits (PCI Local Bus 3.0, 6.8.2).

use std::sync::Arc;

use tetrarch_bus::{Device, DeviceError};

use crate::messages::{Messages, SendMessage};

/// Where the pending bits begin, behind the largest table that goes before them.
pub const PENDING_OFFSET: u64 = 0x800;
pub const MAX_VECTORS: usize = PENDING_OFFSET as usize / ENTRY;

const ENTRY: usize = 16;
/// Vector control (6.8.2.9): reset value and the one bit that there is.
const MASK: u32 = 1;

/// The structures in memory of one function: a page, the table at its start.
pub struct MsixTable {
    messages: Arc<Messages>,
}

impl MsixTable {
    /// With at most [`MAX_VECTORS`].
    pub fn new(vectors: usize, send: SendMessage) -> Self {
        Self { messages: Arc::new(Messages::new(vectors.min(MAX_VECTORS), true, send)) }
    }

    pub fn messages(&self) -> &Arc<Messages> {
        &self.messages
    }

    /// As after a reset of the function: all masked, none pending.
    pub fn reset(&self) {
        self.messages.reset(true);
    }

    /// Four words of each vector, and which are pending.
    pub fn save(&self) -> (Vec<u32>, Vec<bool>) {
        let numbers = 0..self.messages.vectors();
        let pending = numbers.clone().map(|number| self.messages.pending(number)).collect();
        let words = numbers.flat_map(|number| (0..4).map(move |word| (number, word)));
        (words.map(|(number, word)| self.word(number, word)).collect(), pending)
    }

    /// Takes what `save` of a table with as many vectors gave, while MSI-X is off; false where it
    /// is of another.
    pub fn load(&self, words: &[u32], pending: &[bool]) -> bool {
        let vectors = self.messages.vectors();
        if words.len() != 4 * vectors || pending.len() != vectors {
            return false;
        }
        self.messages.set_control(false, false);
        for (index, &value) in words.iter().enumerate() {
            self.set_word(index / 4, index % 4, value);
        }
        for (number, &pending) in pending.iter().enumerate() {
            self.messages.set_pending(number, pending);
        }
        true
    }

    /// Message address, upper address, data, vector control.
    fn word(&self, number: usize, word: usize) -> u32 {
        let Some(message) = self.messages.get(number) else { return 0 };
        match word {
            0 => message.address as u32,
            1 => (message.address >> 32) as u32,
            2 => message.data,
            _ => u32::from(message.masked),
        }
    }

    fn set_word(&self, number: usize, word: usize, value: u32) {
        let messages = &self.messages;
        let address = messages.get(number).map_or(0, |message| message.address);
        match word {
            0 => messages.set_address(number, address >> 32 << 32 | u64::from(value & !3)),
            1 => messages.set_address(number, address & 0xFFFF_FFFF | u64::from(value) << 32),
            2 => messages.set_data(number, value),
            _ => messages.set_masked(number, value & MASK != 0),
        }
    }

    fn read_word(&self, offset: u64) -> u32 {
        if let Some(at) = offset.checked_sub(PENDING_OFFSET) {
            let first = (at as usize).saturating_mul(8);
            return (0..32).fold(0, |word, bit| {
                let pending = self.messages.pending(first.saturating_add(bit));
                word | u32::from(pending) << bit
            });
        }
        self.word(offset as usize / ENTRY, offset as usize % ENTRY / 4)
    }

    fn write_word(&self, offset: u64, value: u32) {
        // The pending bits are read-only (6.8.2.10).
        if offset < PENDING_OFFSET {
            self.set_word(offset as usize / ENTRY, offset as usize % ENTRY / 4, value);
        }
    }
}

/// Words and pairs of them, aligned; the result of others is undefined (6.8.2), here zero
/// and no effect.
impl Device for MsixTable {
    fn read(&self, offset: u64, size: u8) -> Result<u64, DeviceError> {
        Ok(match size {
            4 if offset.is_multiple_of(4) => u64::from(self.read_word(offset)),
            8 if offset.is_multiple_of(8) => {
                u64::from(self.read_word(offset)) | u64::from(self.read_word(offset + 4)) << 32
            }
            _ => 0,
        })
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> Result<(), DeviceError> {
        match size {
            4 if offset.is_multiple_of(4) => self.write_word(offset, value as u32),
            8 if offset.is_multiple_of(8) => {
                self.write_word(offset, value as u32);
                self.write_word(offset + 4, (value >> 32) as u32);
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use parking_lot::Mutex;
    use tetrarch_bus::Interrupt;

    use super::*;

    type Log = Arc<Mutex<Vec<(u64, u32)>>>;

    fn table() -> (Arc<MsixTable>, Log) {
        let log = Log::default();
        let sent = Arc::clone(&log);
        let send = Box::new(move |address, data| sent.lock().push((address, data)));
        (Arc::new(MsixTable::new(40, send)), log)
    }

    fn set(table: &MsixTable, vector: u64, address: u64, data: u32, mask: u32) {
        table.write(16 * vector, 8, address).unwrap();
        table.write(16 * vector + 8, 4, u64::from(data)).unwrap();
        table.write(16 * vector + 12, 4, u64::from(mask)).unwrap();
    }

    #[test]
    fn message_is_sent_unless_it_is_masked_and_then_later() {
        let (table, log) = table();
        table.messages.set_control(true, false);
        let first = table.messages.vector(39, None);
        first.raise();
        assert!(log.lock().is_empty(), "masked after reset");
        assert_eq!(table.read(PENDING_OFFSET + 4, 4).unwrap(), 1 << 7);
        set(&table, 39, 0x1_FEE0_0003, 0x41, 0);
        assert_eq!(*log.lock(), [(0x1_FEE0_0000, 0x41)], "aligned, and sent when unmasked");
        assert_eq!(table.read(PENDING_OFFSET, 8).unwrap(), 0);
        table.messages.set_control(true, true);
        first.raise();
        first.raise();
        assert_eq!(log.lock().len(), 1);
        table.messages.set_control(true, false);
        assert_eq!(log.lock().len(), 2, "once for both");
        first.raise();
        assert_eq!(log.lock().len(), 3);
    }

    #[test]
    fn what_is_no_vector_is_nothing_and_the_line_serves_while_it_is_off() {
        struct Line(Arc<AtomicBool>);
        impl Interrupt for Line {
            fn raise(&self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let (table, log) = table();
        let line = Arc::new(AtomicBool::new(false));
        let vector = table.messages.vector(0xFFFF, Some(Arc::new(Line(Arc::clone(&line)))));
        vector.raise();
        assert!(line.swap(false, Ordering::SeqCst));
        table.messages.set_control(true, false);
        vector.raise();
        assert!(!line.load(Ordering::SeqCst) && log.lock().is_empty());
        for (offset, size) in
            [(0x280, 4), (0x7FC, 8), (0xFF8, 8), (u64::MAX - 7, 8), (1, 1), (2, 8)]
        {
            table.write(offset, size, u64::MAX).unwrap();
            assert_eq!(table.read(offset, size).unwrap(), 0, "{offset:#x} {size}");
        }
    }

    #[test]
    fn saved_table_is_the_same_and_another_is_refused() {
        let (table, _) = table();
        set(&table, 1, 0xFEE0_1000, 7, 0);
        table.messages.vector(0, None).raise();
        table.messages.set_control(true, false);
        table.messages.vector(2, None).raise();
        let (words, pending) = table.save();
        let (copy, _) = self::table();
        assert!(copy.load(&words, &pending));
        assert_eq!(copy.save(), (words.clone(), pending.clone()));
        assert!(!copy.load(&words[4..], &pending));
        table.reset();
        assert_eq!(table.read(12, 4).unwrap(), 1);
        assert_eq!(table.save().1, [false; 40]);
    }
}
