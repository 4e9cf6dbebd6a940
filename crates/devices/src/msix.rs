//! MSI-X: the table of vectors and the pending bits (PCI Local Bus 3.0, 6.8.2).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tetrarch_bus::{Device, DeviceError, Interrupt};

/// Sends a message: address and data.
pub type SendMessage = Box<dyn Fn(u64, u32) + Send + Sync>;

/// Where the pending bits begin, behind the largest table that goes before them.
pub const PENDING_OFFSET: u64 = 0x800;
pub const MAX_VECTORS: usize = PENDING_OFFSET as usize / ENTRY;

const ENTRY: usize = 16;
/// Vector control (6.8.2.9): reset value and the one bit that there is.
const MASK: u32 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    /// Message address, upper address, data, vector control.
    words: [u32; 4],
    pending: bool,
}

impl Entry {
    const RESET: Self = Self { words: [0, 0, 0, MASK], pending: false };

    fn message(&self) -> (u64, u32) {
        (u64::from(self.words[1]) << 32 | u64::from(self.words[0]), self.words[2])
    }
}

struct State {
    entries: Vec<Entry>,
    /// Function mask of the capability's message control (6.8.2.3).
    masked: bool,
}

/// The structures in memory of one function: a page, the table at its start.
///
/// Lock: `state`, which is never held while a message is sent.
pub struct MsixTable {
    state: Mutex<State>,
    enabled: AtomicBool,
    send: SendMessage,
}

impl MsixTable {
    /// With at most [`MAX_VECTORS`].
    pub fn new(vectors: usize, send: SendMessage) -> Self {
        let entries = vec![Entry::RESET; vectors.min(MAX_VECTORS)];
        let state = Mutex::new(State { entries, masked: false });
        Self { state, enabled: AtomicBool::new(false), send }
    }

    /// What the driver wrote to message control. Unmasking sends what is pending.
    pub fn set_control(&self, enabled: bool, masked: bool) {
        self.state.lock().masked = masked;
        self.enabled.store(enabled, Ordering::SeqCst);
        self.deliver();
    }

    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
    }

    /// The interrupt of a vector. While MSI-X is off it is `otherwise`; with a number that
    /// is no vector it is none.
    pub fn vector(
        self: &Arc<Self>,
        number: usize,
        otherwise: Option<Arc<dyn Interrupt>>,
    ) -> Arc<dyn Interrupt> {
        Arc::new(Vector { table: Arc::clone(self), number, otherwise })
    }

    fn raise(&self, number: usize) {
        let mut state = self.state.lock();
        let masked = state.masked;
        let Some(entry) = state.entries.get_mut(number) else { return };
        if masked || entry.words[3] & MASK != 0 {
            entry.pending = true;
            return;
        }
        let (address, data) = entry.message();
        drop(state);
        (self.send)(address, data);
    }

    /// Sends what is pending and no longer masked.
    fn deliver(&self) {
        if !self.enabled() {
            return;
        }
        let mut due = Vec::new();
        {
            let mut state = self.state.lock();
            if state.masked {
                return;
            }
            for entry in &mut state.entries {
                if entry.pending && entry.words[3] & MASK == 0 {
                    entry.pending = false;
                    due.push(entry.message());
                }
            }
        }
        for (address, data) in due {
            (self.send)(address, data);
        }
    }

    /// As after a reset of the function: all masked, none pending.
    pub fn reset(&self) {
        self.enabled.store(false, Ordering::SeqCst);
        let mut state = self.state.lock();
        state.masked = false;
        state.entries.fill(Entry::RESET);
    }

    /// Four words of each vector, and which are pending.
    pub fn save(&self) -> (Vec<u32>, Vec<bool>) {
        let state = self.state.lock();
        let words = state.entries.iter().flat_map(|entry| entry.words).collect();
        (words, state.entries.iter().map(|entry| entry.pending).collect())
    }

    /// Takes what `save` of a table with as many vectors gave; false where it is of another.
    pub fn load(&self, words: &[u32], pending: &[bool]) -> bool {
        let mut state = self.state.lock();
        if words.len() != 4 * state.entries.len() || pending.len() != state.entries.len() {
            return false;
        }
        for ((entry, words), &pending) in
            state.entries.iter_mut().zip(words.chunks_exact(4)).zip(pending)
        {
            let words = [words[0] & !3, words[1], words[2], words[3] & MASK];
            *entry = Entry { words, pending };
        }
        true
    }

    fn read_word(&self, offset: u64) -> u32 {
        let state = self.state.lock();
        if let Some(at) = offset.checked_sub(PENDING_OFFSET) {
            let first = at as usize * 8;
            let bits = state.entries.iter().skip(first).take(32).enumerate();
            return bits.fold(0, |word, (bit, entry)| word | u32::from(entry.pending) << bit);
        }
        let entry = state.entries.get(offset as usize / ENTRY);
        entry.map_or(0, |entry| entry.words[offset as usize % ENTRY / 4])
    }

    fn write_word(&self, offset: u64, value: u32) {
        if offset >= PENDING_OFFSET {
            return; // read-only (6.8.2.10)
        }
        let mut state = self.state.lock();
        if let Some(entry) = state.entries.get_mut(offset as usize / ENTRY) {
            let word = offset as usize % ENTRY / 4;
            entry.words[word] = match word {
                0 => value & !3,
                3 => value & MASK,
                _ => value,
            };
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
            _ => return Ok(()),
        }
        self.deliver();
        Ok(())
    }
}

struct Vector {
    table: Arc<MsixTable>,
    number: usize,
    otherwise: Option<Arc<dyn Interrupt>>,
}

impl Interrupt for Vector {
    fn raise(&self) {
        if self.table.enabled() {
            self.table.raise(self.number);
        } else if let Some(otherwise) = &self.otherwise {
            otherwise.raise();
        }
    }
}

#[cfg(test)]
mod tests {
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
        table.set_control(true, false);
        let first = table.vector(39, None);
        first.raise();
        assert!(log.lock().is_empty(), "masked after reset");
        assert_eq!(table.read(PENDING_OFFSET + 4, 4).unwrap(), 1 << 7);
        set(&table, 39, 0x1_FEE0_0003, 0x41, 0);
        assert_eq!(*log.lock(), [(0x1_FEE0_0000, 0x41)], "aligned, and sent when unmasked");
        assert_eq!(table.read(PENDING_OFFSET, 8).unwrap(), 0);
        table.set_control(true, true);
        first.raise();
        first.raise();
        assert_eq!(log.lock().len(), 1);
        table.set_control(true, false);
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
        let vector = table.vector(0xFFFF, Some(Arc::new(Line(Arc::clone(&line)))));
        vector.raise();
        assert!(line.swap(false, Ordering::SeqCst));
        table.set_control(true, false);
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
        table.vector(0, None).raise();
        table.set_control(true, false);
        table.vector(2, None).raise();
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
