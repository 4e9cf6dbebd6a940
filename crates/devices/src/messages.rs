//! Interrupts that are messages: the vectors of a function, by MSI or MSI-X (PCI Local Bus 3.0,
//! 6.8), whichever way its driver sets them up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};

use tetrarch_bus::Interrupt;

/// Sends a message: address and data.
pub type SendMessage = Box<dyn Fn(u64, u32) + Send + Sync>;

/// A vector. A driver changes address and data only while it is masked (6.8.2): to others
/// who read one of them new and one old, a message of either is as good.
struct Entry {
    address: AtomicU64,
    data: AtomicU32,
    masked: AtomicBool,
    pending: AtomicBool,
}

/// What a driver has set a vector to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    pub address: u64,
    pub data: u32,
    pub masked: bool,
}

/// No lock: an I/O thread raises a vector by a few loads, and a store where it is masked.
///
/// A raise and an unmasking that meet: the raise sets the pending bit and then looks at the masks
/// again, the unmasking changes them and then looks for the bit. One of the two finds it, and who
/// takes it sends.
pub struct Messages {
    entries: Vec<Entry>,
    enabled: AtomicBool,
    /// Of the whole function.
    masked: AtomicBool,
    send: SendMessage,
}

impl Messages {
    /// `masked` is what the vectors are after a reset.
    pub fn new(vectors: usize, masked: bool, send: SendMessage) -> Self {
        let entry = || Entry {
            address: AtomicU64::new(0),
            data: AtomicU32::new(0),
            masked: AtomicBool::new(masked),
            pending: AtomicBool::new(false),
        };
        let entries = std::iter::repeat_with(entry).take(vectors).collect();
        Self { entries, enabled: AtomicBool::new(false), masked: AtomicBool::new(false), send }
    }

    pub fn vectors(&self) -> usize {
        self.entries.len()
    }

    pub fn enabled(&self) -> bool {
        self.enabled.load(SeqCst)
    }

    /// What the driver wrote to message control. Unmasking sends what is pending.
    pub fn set_control(&self, enabled: bool, masked: bool) {
        self.masked.store(masked, SeqCst);
        self.enabled.store(enabled, SeqCst);
        (0..self.entries.len()).for_each(|number| self.deliver(number));
    }

    /// `None` of what is no vector.
    pub fn get(&self, number: usize) -> Option<Message> {
        self.entries.get(number).map(|entry| Message {
            address: entry.address.load(SeqCst),
            data: entry.data.load(SeqCst),
            masked: entry.masked.load(SeqCst),
        })
    }

    pub fn set_address(&self, number: usize, address: u64) {
        if let Some(entry) = self.entries.get(number) {
            entry.address.store(address, SeqCst);
        }
    }

    pub fn set_data(&self, number: usize, data: u32) {
        if let Some(entry) = self.entries.get(number) {
            entry.data.store(data, SeqCst);
        }
    }

    /// Unmasking sends what is pending.
    pub fn set_masked(&self, number: usize, masked: bool) {
        if let Some(entry) = self.entries.get(number) {
            entry.masked.store(masked, SeqCst);
            self.deliver(number);
        }
    }

    pub fn pending(&self, number: usize) -> bool {
        self.entries.get(number).is_some_and(|entry| entry.pending.load(SeqCst))
    }

    /// As a saved state has it; sends nothing.
    pub fn set_pending(&self, number: usize, pending: bool) {
        if let Some(entry) = self.entries.get(number) {
            entry.pending.store(pending, SeqCst);
        }
    }

    /// The interrupt of a vector. While messages are off it is `otherwise`; with a number that
    /// is no vector it is none.
    pub fn vector(
        self: &Arc<Self>,
        number: usize,
        otherwise: Option<Arc<dyn Interrupt>>,
    ) -> Arc<dyn Interrupt> {
        Arc::new(Vector { messages: Arc::clone(self), number, otherwise })
    }

    /// Off; every vector as it was made.
    pub fn reset(&self, masked: bool) {
        self.enabled.store(false, SeqCst);
        self.masked.store(false, SeqCst);
        for entry in &self.entries {
            entry.address.store(0, SeqCst);
            entry.data.store(0, SeqCst);
            entry.masked.store(masked, SeqCst);
            entry.pending.store(false, SeqCst);
        }
    }

    fn raise(&self, number: usize) {
        let Some(entry) = self.entries.get(number) else { return };
        if self.stays(entry) {
            entry.pending.store(true, SeqCst);
            self.deliver(number);
        } else {
            (self.send)(entry.address.load(SeqCst), entry.data.load(SeqCst));
        }
    }

    /// Whether a mask keeps its message back.
    fn stays(&self, entry: &Entry) -> bool {
        self.masked.load(SeqCst) || entry.masked.load(SeqCst)
    }

    /// Sends what is pending and no longer masked.
    fn deliver(&self, number: usize) {
        let Some(entry) = self.entries.get(number) else { return };
        let due = self.enabled() && !self.stays(entry) && entry.pending.swap(false, SeqCst);
        if due {
            (self.send)(entry.address.load(SeqCst), entry.data.load(SeqCst));
        }
    }
}

struct Vector {
    messages: Arc<Messages>,
    number: usize,
    otherwise: Option<Arc<dyn Interrupt>>,
}

impl Interrupt for Vector {
    fn raise(&self) {
        if self.messages.enabled() {
            self.messages.raise(self.number);
        } else if let Some(otherwise) = &self.otherwise {
            otherwise.raise();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn no_message_is_lost_or_sent_twice_where_a_driver_masks_while_a_device_raises() {
        const ROUNDS: usize = 20_000;
        let sent = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&sent);
        let send = Box::new(move |_, _| {
            count.fetch_add(1, SeqCst);
        });
        let messages = Arc::new(Messages::new(1, false, send));
        messages.set_control(true, false);
        let done = Arc::new(AtomicBool::new(false));
        let driver = {
            let (messages, done) = (Arc::clone(&messages), Arc::clone(&done));
            std::thread::spawn(move || {
                let mut masked = false;
                while !done.load(SeqCst) {
                    masked = !masked;
                    messages.set_masked(0, masked);
                }
                messages.set_masked(0, false);
            })
        };
        let vector = messages.vector(0, None);
        for round in 1..=ROUNDS {
            vector.raise();
            // The driver unmasks again and again, so that each is sent before the next.
            loop {
                let now = sent.load(SeqCst);
                assert!(now <= round, "sent twice");
                if now == round {
                    break;
                }
                std::thread::yield_now();
            }
        }
        done.store(true, SeqCst);
        driver.join().unwrap();
        assert_eq!(sent.load(SeqCst), ROUNDS);
        assert!(!messages.pending(0));
    }
}
