//! Asynchronous events: what a controller says without having been asked just then (5.2).

use super::log_page;

/// Requests that may wait at once, as AERL says plus one.
pub const MAX_REQUESTS: usize = 4;

/// Types (figure 146), as numbers of bits and places.
const TYPES: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A register was written that is no queue's doorbell.
    InvalidDoorbell,
    /// A doorbell was written with what its queue has no entry for.
    InvalidDoorbellValue,
    /// The namespace has another size.
    NamespaceChanged,
}

impl Event {
    /// Type, information, and the log page that tells more.
    fn parts(self) -> (u8, u8, u8) {
        match self {
            Self::InvalidDoorbell => (0, 0, log_page::ERRORS),
            Self::InvalidDoorbellValue => (0, 1, log_page::ERRORS),
            Self::NamespaceChanged => (2, 0, log_page::CHANGED_NAMESPACES),
        }
    }
}

/// Events that wait for a request, and requests that wait for an event.
#[derive(Default)]
pub struct Events {
    /// Commands, by their numbers.
    pub requests: Vec<u16>,
    /// The result that is due of each type.
    pub pending: [Option<u32>; TYPES],
    /// One of its type was told, and its log page has not been read since.
    pub masked: [bool; TYPES],
}

impl Events {
    /// Further ones of a type that waits, or that was told and not looked at, are the same.
    pub fn add(&mut self, event: Event) {
        let (kind, information, page) = event.parts();
        let result = u32::from(kind) | u32::from(information) << 8 | u32::from(page) << 16;
        self.pending[usize::from(kind)].get_or_insert(result);
    }

    /// A log page was read.
    pub fn read(&mut self, page: u8) {
        match page {
            log_page::ERRORS => self.masked[0] = false,
            log_page::HEALTH => self.masked[1] = false,
            log_page::CHANGED_NAMESPACES => self.masked[2] = false,
            _ => {}
        }
    }

    /// The type of an event that a request can be answered with.
    fn due(&self) -> Option<usize> {
        let due = |kind: &usize| !self.masked[*kind] && self.pending[*kind].is_some();
        (0..TYPES).find(due).filter(|_| !self.requests.is_empty())
    }

    pub fn is_due(&self) -> bool {
        self.due().is_some()
    }

    /// A request that can be answered, and its answer.
    pub fn answer(&mut self) -> Option<(u16, u32)> {
        let kind = self.due()?;
        self.masked[kind] = true;
        Some((self.requests.remove(0), self.pending[kind].take()?))
    }
}
