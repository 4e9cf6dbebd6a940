//! The device behind its registers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use tetrarch_io::{Event, Handler};
use tetrarch_memory::{GuestMemory, GuestPhys, MemoryError, ScatterList};

use crate::inbox::Inbox;
use crate::interrupts::{Cause, Interrupts};
use crate::layout::{
    DST_UNREACHABLE, Fields, HEADER, HOST, HYPERVISOR, Handle, INVALID_ARGS, INVALID_RESOURCE,
    MAX_DATAGRAM, NO_RESOURCES, PAYLOAD_TOO_LARGE,
};
use crate::pairs::Pairs;
use crate::sockets::{self, Guest, Sockets};

/// Descriptors on the I/O thread.
pub const PROGRAMS: u32 = 0;
pub const WORK: u32 = 1;

/// How often a guest that finds more is served before others are.
const PIECES: u32 = 64;

/// What a guest uses of the device (VMCI_CAPS_*).
pub const DATAGRAMS: u32 = 1 << 2;
pub const NOTIFICATIONS: u32 = 1 << 3;
pub const WIDE_PAGES: u32 = 1 << 4;
pub const TRANSFERS: u32 = 1 << 5;

// Before what is transferred (struct vmci_data_in_out_header): whether the device has it, the form
// of what follows, its size, and an answer.
const BUSY: u64 = 0;
const RESULT: u64 = 16;
const TRANSFER_HEADER: u64 = 24;
/// What follows is the data, or a list of where they are: address and size of each piece.
const INLINE: u32 = 0;
const LIST: u32 = 1;

pub struct Core {
    pub memory: Arc<GuestMemory>,
    /// The function may access memory.
    pub master: bool,
    pub interrupts: Interrupts,
    /// Whether flags and doorbells are offered.
    pub notifications: bool,
    /// Of those that are offered, what the guest uses.
    pub used: u32,
    /// To the last datagram.
    pub result: i32,
    /// A datagram that comes byte by byte, as far as it has come.
    pub sent: Vec<u8>,
    /// The one that comes is too long: what is left of it is lost.
    pub refused: bool,
    /// Addresses of transfers.
    pub data_in: u64,
    pub data_out: u64,
    pub inbox: Inbox,
    /// The page of flags; 0: none.
    pub flags_page: u64,
    /// By the number in the guest: its flag.
    pub doorbells: BTreeMap<u32, u16>,
    pub pairs: Pairs,
    pub sockets: Option<Sockets>,
    /// Has the I/O thread come.
    pub work: Arc<Event>,
}

impl Core {
    pub fn offered(&self) -> u32 {
        let notifications = if self.notifications { NOTIFICATIONS } else { 0 };
        DATAGRAMS | WIDE_PAGES | TRANSFERS | notifications
    }

    /// Tells the guest of datagrams that have come since.
    pub fn announce(&mut self) {
        if self.inbox.take_news() {
            self.interrupts.raise(Cause::Datagram);
        }
    }

    /// The guest may have made room for datagrams.
    fn fetched(&mut self, was_full: bool) {
        if was_full && !self.inbox.is_full() {
            self.work.signal();
        }
        self.announce();
    }

    pub fn read_data(&mut self, size: u8) -> u64 {
        let was_full = self.inbox.is_full();
        let bytes = (0..size).map(|at| u64::from(self.inbox.next_byte()) << (8 * at));
        let value = bytes.sum();
        self.fetched(was_full);
        value
    }

    /// The next bytes of a datagram.
    pub fn write_data(&mut self, data: &[u8]) {
        if self.refused {
            return;
        }
        self.sent.extend(data);
        let Some(payload) = Fields(self.sent.get(HEADER - 8..).unwrap_or_default()).u64() else {
            return;
        };
        let size = usize::try_from(payload).ok().and_then(|size| size.checked_add(HEADER));
        match size.filter(|&size| size <= MAX_DATAGRAM) {
            None => {
                self.sent.clear();
                self.refused = true;
                self.result = PAYLOAD_TOO_LARGE;
            }
            Some(size) if self.sent.len() >= size => {
                let mut datagram = std::mem::take(&mut self.sent);
                datagram.truncate(size);
                self.result = self.datagram(&datagram);
                self.announce();
            }
            Some(_) => {}
        }
    }

    /// Who asks for the answer has sent all.
    pub fn take_result(&mut self) -> i32 {
        self.sent.clear();
        self.refused = false;
        self.result
    }

    fn datagram(&mut self, datagram: &[u8]) -> i32 {
        let mut fields = Fields(datagram);
        let (Some(to), Some(_), Some(_)) = (fields.handle(), fields.handle(), fields.u64()) else {
            return INVALID_ARGS;
        };
        let payload = fields.0;
        match to.context {
            HYPERVISOR => self.question(to.resource, payload),
            HOST => self.hear(to, payload),
            _ => DST_UNREACHABLE,
        }
    }

    fn hear(&mut self, to: Handle, payload: &[u8]) -> i32 {
        let Some(sockets) = self.sockets.as_mut().filter(|_| to.resource == sockets::RESOURCE)
        else {
            return INVALID_RESOURCE;
        };
        if payload.len() < sockets::BYTES {
            return INVALID_ARGS;
        }
        if self.inbox.is_full() || !sockets.hear(payload) {
            return NO_RESOURCES;
        }
        self.work.signal();
        // What was sent, and not that it was: 0 is a failure to who sends.
        (HEADER + payload.len()) as i32
    }

    // Transfers, which end before the access does

    /// Where the data are, and how many bytes at most.
    fn transfer(&self, at: u64) -> Result<ScatterList, MemoryError> {
        let mut header = [0; TRANSFER_HEADER as usize];
        self.memory.read(GuestPhys(at), &mut header)?;
        let mut fields = Fields(&header[4..]);
        let form = fields.u32().unwrap_or_default();
        let size = fields.u32().unwrap_or_default();
        let data = GuestPhys(at).offset(TRANSFER_HEADER);
        let none = MemoryError::OutOfRange { address: data, length: size.into() };
        match form {
            INLINE => ScatterList::of(self.memory.snapshot(), [(data, size.into())]),
            LIST if size <= PIECES => {
                let mut list = vec![0; 16 * size as usize];
                self.memory.read(data, &mut list)?;
                let (mut fields, mut ranges) = (Fields(&list), Vec::new());
                while let (Some(address), Some(length)) = (fields.u64(), fields.u64()) {
                    ranges.push((GuestPhys(address), length));
                }
                ScatterList::of(self.memory.snapshot(), ranges)
            }
            _ => Err(none),
        }
    }

    fn end_transfer(&self, at: u64, result: i32, busy: u32) {
        let at = GuestPhys(at);
        // Where this is no memory there was no header.
        let _ = self.memory.write(at.offset(RESULT), &i64::from(result).to_le_bytes());
        fence(Ordering::Release);
        let _ = self.memory.write(at.offset(BUSY), &busy.to_le_bytes());
    }

    /// Gives the guest datagrams.
    pub fn receive(&mut self) {
        if !self.master {
            return;
        }
        let (at, was_full) = (self.data_in, self.inbox.is_full());
        let result = match self.transfer(at) {
            Ok(list) => {
                let room = usize::try_from(list.len()).unwrap_or(MAX_DATAGRAM).min(MAX_DATAGRAM);
                list.write_at(0, &self.inbox.fetch(room));
                0
            }
            Err(_) => INVALID_ARGS,
        };
        self.end_transfer(at, result, 1);
        self.interrupts.raise(Cause::Transfer);
        self.fetched(was_full);
    }

    /// Takes a datagram of the guest's.
    pub fn send(&mut self) {
        if !self.master {
            return;
        }
        let at = self.data_out;
        self.result = match self.transfer(at) {
            Ok(list) if list.len() > MAX_DATAGRAM as u64 => PAYLOAD_TOO_LARGE,
            Ok(list) => {
                let mut datagram = vec![0; list.len() as usize];
                list.read_at(0, &mut datagram);
                let payload = Fields(datagram.get(HEADER - 8..).unwrap_or_default()).u64();
                let size = payload.and_then(|size| (HEADER as u64).checked_add(size));
                match size.filter(|&size| size <= list.len()) {
                    Some(size) => self.datagram(&datagram[..size as usize]),
                    None => INVALID_ARGS,
                }
            }
            Err(_) => INVALID_ARGS,
        };
        self.end_transfer(at, self.result, 0);
        self.announce();
    }

    // Life

    pub fn set_master(&mut self, master: bool) {
        self.master = master;
        self.work.signal();
    }

    /// A reset by the driver: who had connections is gone.
    pub fn forget(&mut self) {
        self.interrupts.reset();
        self.used = DATAGRAMS | NOTIFICATIONS | WIDE_PAGES;
        self.result = 0;
        self.sent.clear();
        self.refused = false;
        (self.data_in, self.data_out) = (0, 0);
        self.inbox.clear();
        self.flags_page = 0;
        self.doorbells.clear();
        self.pairs = Pairs::default();
        if let Some(sockets) = &mut self.sockets {
            sockets.clear();
        }
    }
}

impl Handler for Core {
    fn ready(&mut self, source: u32) {
        let Some(sockets) = &mut self.sockets else { return };
        let listens = self.interrupts.enabled();
        let guest = &mut Guest { listens, pairs: &mut self.pairs, inbox: &mut self.inbox };
        if source == PROGRAMS {
            sockets.ready(guest);
        }
        if self.master && sockets.work(guest) {
            self.work.signal();
        }
        self.announce();
    }
}
