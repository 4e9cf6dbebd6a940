//! Queue pairs: two rings of bytes in pages of the guest's.
//!
//! Each ring begins with a page that has the tail of this ring and the head of the *other* one
//! (Linux, struct vmci_queue_header): so the guest writes the first ring's header alone, and the
//! host the second's. The host believes its own head and tail, and of the guest's only those that
//! can be.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release, SeqCst};
use std::sync::atomic::fence;

use tetrarch_memory::{GuestMemory, GuestPhys, MemoryError, Window};

use crate::inbox::Inbox;
use crate::layout::{
    ALREADY_EXISTS, Event, GUEST, HOST, Handle, INVALID_ARGS, INVALID_ID, INVALID_SIZE,
    LAST_DETACH, LAST_RESERVED, NO_ACCESS, NO_RESOURCES, NOT_FOUND, PAGE, PAIR_ATTACHED,
    PAIR_CREATED, PAIR_MISMATCH, SUCCESS,
};

/// Of all rings together (VMCI_MAX_GUEST_QP_MEMORY).
const MAX_BYTES: u64 = 128 << 20;
/// Each connection has one.
const MAX_PAIRS: usize = 2 * tetrarch_vsock::MAX_CONNECTIONS;

// Flags of who wants one.
const ATTACH_ONLY: u32 = 1 << 0;
/// Both ends are in the guest, which needs nobody for that.
const LOCAL: u32 = 1 << 1;
const ALL_FLAGS: u32 = 0xF;

// In a header.
const HANDLE: usize = 0;
const TAIL: usize = 8;
const HEAD: usize = 16;

/// The guest has changed heads, tails or memory to what cannot be.
#[derive(Debug, PartialEq, Eq)]
pub struct Corrupt;

impl From<MemoryError> for Corrupt {
    fn from(_: MemoryError) -> Self {
        Self
    }
}

struct Ring {
    header: Window,
    /// Addresses of the pages that have the bytes.
    pages: Vec<GuestPhys>,
    size: u64,
}

impl Ring {
    /// A number of the header: it is below the size of a ring, or it is none.
    fn number(&self, offset: usize, size: u64) -> Result<u64, Corrupt> {
        let low = self.header.load_u32(offset, Acquire);
        let high = self.header.load_u32(offset + 4, Acquire);
        let number = u64::from(low) | u64::from(high) << 32;
        if number < size { Ok(number) } else { Err(Corrupt) }
    }

    fn set_number(&self, offset: usize, number: u64) {
        // Below the size of a ring: the high part is 0 from the start.
        self.header.store_u32(offset, number as u32, Release);
    }

    fn init(&self, handle: Handle) {
        self.header.write(HANDLE, handle.word());
        self.header.write(TAIL, 0_u64);
        self.header.write(HEAD, 0_u64);
    }

    /// Calls `each` with the pieces of `length` bytes from `at` on: address, and where they are in
    /// the whole.
    fn pieces(
        &self,
        at: u64,
        length: u64,
        mut each: impl FnMut(GuestPhys, std::ops::Range<usize>) -> Result<(), MemoryError>,
    ) -> Result<(), Corrupt> {
        let mut done = 0;
        while done < length {
            let offset = (at + done) % self.size;
            let inside = offset % PAGE;
            let page = self.pages.get((offset / PAGE) as usize).ok_or(Corrupt)?;
            let here = (PAGE - inside).min(self.size - offset).min(length - done);
            each(page.offset(inside), done as usize..(done + here) as usize)?;
            done += here;
        }
        Ok(())
    }
}

/// A queue pair of the guest's.
pub struct QueuePair {
    memory: Arc<GuestMemory>,
    /// From the guest, and to it.
    produce: Ring,
    consume: Ring,
    /// The host has its end.
    attached: bool,
    /// Of the first ring, and of the second.
    head: u64,
    tail: u64,
    /// How often they have come around.
    pub head_wraps: u64,
    pub tail_wraps: u64,
}

fn between(from: u64, to: u64, size: u64) -> u64 {
    if to >= from { to - from } else { size - from + to }
}

impl QueuePair {
    /// Bytes from the guest.
    pub fn incoming(&self) -> Result<u64, Corrupt> {
        let size = self.produce.size;
        Ok(between(self.head, self.produce.number(TAIL, size)?, size))
    }

    /// How many bytes the guest has room for.
    pub fn room(&self) -> Result<u64, Corrupt> {
        Ok(self.consume.size - 1 - self.unread()?)
    }

    /// Bytes to the guest that it has not taken.
    pub fn unread(&self) -> Result<u64, Corrupt> {
        let size = self.consume.size;
        Ok(between(self.produce.number(HEAD, size)?, self.tail, size))
    }

    /// Takes so many bytes, as there are; whether the guest had no room before.
    pub fn take(&mut self, length: u64, out: &mut VecDeque<u8>) -> Result<bool, Corrupt> {
        let mut data = vec![0; length as usize];
        let memory = &self.memory;
        self.produce.pieces(self.head, length, |at, range| memory.read(at, &mut data[range]))?;
        out.extend(data);
        let size = self.produce.size;
        self.head_wraps += u64::from(self.head + length >= size);
        self.head = (self.head + length) % size;
        self.consume.set_number(HEAD, self.head);
        // The guest looks at the head when it has moved the tail: one of the two sees the other.
        fence(SeqCst);
        Ok(size - 1 - self.incoming()? == length)
    }

    /// Gives so many bytes, as there is room for; whether the guest had none before.
    pub fn put(&mut self, data: &[u8]) -> Result<bool, Corrupt> {
        let (memory, length) = (&self.memory, data.len() as u64);
        self.consume.pieces(self.tail, length, |at, range| memory.write(at, &data[range]))?;
        let size = self.consume.size;
        self.tail_wraps += u64::from(self.tail + length >= size);
        self.tail = (self.tail + length) % size;
        self.consume.set_number(TAIL, self.tail);
        fence(SeqCst);
        Ok(self.unread()? == length)
    }

    /// Where the next byte from the guest will be, and how often the ring has come around then.
    pub fn awaited(&self) -> [u64; 2] {
        let wraps = self.head + 1 >= self.produce.size;
        let at = if wraps { 0 } else { self.head + 1 };
        [self.head_wraps + u64::from(wraps), at]
    }

    /// The same of the place that the guest has to make for one more byte.
    pub fn wanted(&self) -> [u64; 2] {
        let left = self.consume.size - self.tail;
        if 2 >= left {
            [self.tail_wraps, 2 - left]
        } else {
            [self.tail_wraps.wrapping_sub(1), self.tail + 2]
        }
    }
}

/// What a guest asks for.
pub struct Wanted<'a> {
    pub handle: Handle,
    pub peer: u32,
    pub flags: u32,
    pub produce: u64,
    pub consume: u64,
    /// Pages of the first ring, its header first, then of the second.
    pub pages: &'a [u64],
}

/// All of one guest.
#[derive(Default)]
pub struct Pairs {
    pairs: BTreeMap<Handle, QueuePair>,
    /// Those that the host has made, with the size of each ring, until the guest attaches.
    offered: BTreeMap<Handle, u64>,
    /// Those that the guest has yet of a machine that was saved: with nobody at the other end.
    left: BTreeSet<Handle>,
    bytes: u64,
    next: u32,
}

impl Pairs {
    /// Makes one of the guest's pages, or attaches them to one of the host's.
    pub fn alloc(&mut self, memory: &Arc<GuestMemory>, wanted: &Wanted) -> Result<i32, i32> {
        let &Wanted { handle, peer, flags, produce, consume, .. } = wanted;
        if flags & !ALL_FLAGS != 0 || flags & LOCAL != 0 || handle.resource == INVALID_ID {
            return Err(INVALID_ARGS);
        }
        if produce == 0 || consume == 0 {
            return Err(INVALID_SIZE);
        }
        if self.pairs.contains_key(&handle) || self.left.contains(&handle) {
            return Err(ALREADY_EXISTS);
        }
        let offer = self.offered.get(&handle).copied();
        match offer {
            Some(size) if produce != size || consume != size => return Err(PAIR_MISMATCH),
            Some(_) => {}
            None if flags & ATTACH_ONLY != 0 => return Err(NOT_FOUND),
            None if handle.context != GUEST || (peer != HOST && peer != INVALID_ID) => {
                return Err(NO_ACCESS);
            }
            None => {}
        }
        let sum = produce.checked_add(consume).and_then(|sum| sum.checked_add(self.bytes));
        let Some(bytes) = sum.filter(|&sum| sum <= MAX_BYTES) else { return Err(NO_RESOURCES) };
        if self.pairs.len() + self.left.len() >= MAX_PAIRS {
            return Err(NO_RESOURCES);
        }
        let of_first = produce.div_ceil(PAGE) as usize + 1;
        let of_second = consume.div_ceil(PAGE) as usize + 1;
        if wanted.pages.len() != of_first + of_second {
            return Err(INVALID_ARGS);
        }
        let (first, second) = wanted.pages.split_at(of_first);
        let ring = |pages, size| ring(memory, pages, size).ok_or(INVALID_ARGS);
        let pair = QueuePair {
            memory: Arc::clone(memory),
            produce: ring(first, produce)?,
            consume: ring(second, consume)?,
            attached: offer.is_some(),
            head: 0,
            tail: 0,
            head_wraps: 0,
            tail_wraps: 0,
        };
        // The guest leaves that to the hypervisor.
        pair.produce.init(handle);
        pair.consume.init(handle);
        self.bytes = bytes;
        self.offered.remove(&handle);
        self.pairs.insert(handle, pair);
        Ok(if offer.is_some() { PAIR_ATTACHED } else { PAIR_CREATED })
    }

    /// The guest takes its pages back; with the pair, if it was one of pages.
    pub fn detach(&mut self, handle: Handle) -> Result<(i32, Option<QueuePair>), i32> {
        if let Some(pair) = self.pairs.remove(&handle) {
            self.bytes -= pair.produce.size + pair.consume.size;
            let answer = if pair.attached { SUCCESS } else { LAST_DETACH };
            return Ok((answer, Some(pair)));
        }
        if self.left.remove(&handle) { Ok((LAST_DETACH, None)) } else { Err(NOT_FOUND) }
    }

    pub fn get_mut(&mut self, handle: Handle) -> Option<&mut QueuePair> {
        self.pairs.get_mut(&handle)
    }

    /// A new one of the host's, with rings of a size.
    pub fn offer(&mut self, size: u64) -> Handle {
        loop {
            self.next = self.next.wrapping_add(1);
            let resource = self.next.max(LAST_RESERVED + 1);
            self.next = resource;
            let handle = Handle { context: HOST, resource };
            let taken = self.pairs.contains_key(&handle)
                || self.offered.contains_key(&handle)
                || self.left.contains(&handle);
            if resource != INVALID_ID && !taken {
                self.offered.insert(handle, size);
                return handle;
            }
        }
    }

    /// The host attaches to one of the guest's, with rings of a size; false where there is none.
    pub fn attach(&mut self, handle: Handle, size: u64, inbox: &mut Inbox) -> bool {
        let Some(pair) = self.pairs.get_mut(&handle) else { return false };
        if pair.attached || pair.produce.size != size || pair.consume.size != size {
            return false;
        }
        pair.attached = true;
        inbox.push(Event::Attached(handle).datagram());
        true
    }

    /// The host lets go of one.
    pub fn leave(&mut self, handle: Handle, inbox: &mut Inbox) {
        self.offered.remove(&handle);
        if let Some(pair) = self.pairs.get_mut(&handle)
            && std::mem::replace(&mut pair.attached, false)
        {
            inbox.push(Event::Detached(handle).datagram());
        }
    }

    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty() && self.left.is_empty()
    }

    pub fn save(&self) -> Vec<u64> {
        self.pairs.keys().chain(&self.left).map(|handle| handle.word()).collect()
    }

    pub fn load(&mut self, handles: &[u64]) {
        *self = Self::default();
        self.left = handles.iter().take(MAX_PAIRS).copied().map(Handle::of).collect();
    }
}

fn ring(memory: &GuestMemory, pages: &[u64], size: u64) -> Option<Ring> {
    let address = |&page: &u64| {
        let address = GuestPhys(page.checked_mul(PAGE)?);
        memory.contains(address, PAGE).then_some(address)
    };
    let (header, pages) = pages.split_first()?;
    let header = Window::new(&memory.snapshot(), address(header)?, PAGE as usize).ok()?;
    let pages = pages.iter().map(address).collect::<Option<Vec<_>>>()?;
    Some(Ring { header, pages, size })
}
