//! What a guest asks its hypervisor: a datagram to one of its resources, answered by a number.

use tetrarch_memory::GuestPhys;

use crate::core::{Core, WIDE_PAGES};
use crate::interrupts::Cause;
use crate::layout::{
    ALREADY_EXISTS, EVENT_UNKNOWN, Event, Fields, GUEST, Handle, INVALID_ARGS, INVALID_RESOURCE,
    NO_RESOURCES, NOT_FOUND, PAGE, SUCCESS, UNAVAILABLE,
};
use crate::pairs::Wanted;

// Resources.
const RESOURCES_QUERY: u32 = 0;
const GET_CONTEXT_ID: u32 = 1;
const SET_NOTIFY_BITMAP: u32 = 2;
const DOORBELL_LINK: u32 = 3;
const DOORBELL_UNLINK: u32 = 4;
const DOORBELL_NOTIFY: u32 = 5;
const EVENT_SUBSCRIBE: u32 = 8;
const EVENT_UNSUBSCRIBE: u32 = 9;
const QUEUEPAIR_ALLOC: u32 = 10;
const QUEUEPAIR_DETACH: u32 = 11;

/// An answer has so many bits for as many resources, and a sign (VMCI_RESOURCE_QUERY_MAX_NUM).
const MAX_QUERY: u32 = 31;
/// Flags of the page, of a byte each, and so doorbells that there can be.
pub const FLAGS: usize = PAGE as usize;

/// As a datagram has it: too short is no question.
fn whole<T>(value: Option<T>) -> Result<T, i32> {
    value.ok_or(INVALID_ARGS)
}

impl Core {
    fn answers(&self, resource: u32) -> bool {
        match resource {
            RESOURCES_QUERY | GET_CONTEXT_ID | EVENT_SUBSCRIBE | EVENT_UNSUBSCRIBE
            | QUEUEPAIR_ALLOC | QUEUEPAIR_DETACH => true,
            SET_NOTIFY_BITMAP | DOORBELL_LINK | DOORBELL_UNLINK | DOORBELL_NOTIFY => {
                self.notifications
            }
            _ => false,
        }
    }

    pub fn question(&mut self, resource: u32, payload: &[u8]) -> i32 {
        if !self.answers(resource) {
            return INVALID_RESOURCE;
        }
        let mut fields = Fields(payload);
        let answer = match resource {
            RESOURCES_QUERY => self.query(&mut fields),
            GET_CONTEXT_ID => Ok(GUEST as i32),
            SET_NOTIFY_BITMAP => self.set_flags(&mut fields),
            DOORBELL_LINK => self.link(&mut fields),
            DOORBELL_UNLINK => self.unlink(&mut fields),
            DOORBELL_NOTIFY => self.notify(&mut fields),
            QUEUEPAIR_ALLOC => self.alloc(&mut fields),
            QUEUEPAIR_DETACH => self.detach(&mut fields),
            // All guests hear of all events; Linux does not even ask.
            _ => whole(fields.u32()).and_then(|event| {
                if Event::is_known(event) { Ok(SUCCESS) } else { Err(EVENT_UNKNOWN) }
            }),
        };
        answer.unwrap_or_else(|error| error)
    }

    /// A bit for each question of the list that would be answered.
    fn query(&self, fields: &mut Fields) -> Result<i32, i32> {
        let (count, _) = (whole(fields.u32())?, whole(fields.u32())?);
        if count > MAX_QUERY {
            return Err(INVALID_ARGS);
        }
        let mut answer = 0;
        for at in 0..count {
            answer |= i32::from(self.answers(whole(fields.u32())?)) << at;
        }
        Ok(answer)
    }

    /// The number of a page, as wide as the guest has said.
    fn page(&self, fields: &mut Fields) -> Option<u64> {
        if self.used & WIDE_PAGES != 0 { fields.u64() } else { fields.u32().map(u64::from) }
    }

    fn set_flags(&mut self, fields: &mut Fields) -> Result<i32, i32> {
        let page = whole(self.page(fields))?;
        let address = whole(page.checked_mul(PAGE).filter(|&address| address != 0))?;
        if !self.memory.contains(GuestPhys(address), PAGE) {
            return Err(INVALID_ARGS);
        }
        self.flags_page = page;
        Ok(SUCCESS)
    }

    fn link(&mut self, fields: &mut Fields) -> Result<i32, i32> {
        let (handle, flag) = (whole(fields.handle())?, whole(fields.u64())?);
        if handle.context != GUEST || flag >= FLAGS as u64 {
            return Err(INVALID_ARGS);
        }
        if self.doorbells.contains_key(&handle.resource) {
            return Err(ALREADY_EXISTS);
        }
        if self.doorbells.len() == FLAGS {
            return Err(NO_RESOURCES);
        }
        self.doorbells.insert(handle.resource, flag as u16);
        Ok(SUCCESS)
    }

    fn unlink(&mut self, fields: &mut Fields) -> Result<i32, i32> {
        let handle = whole(fields.handle())?;
        let known = handle.context == GUEST && self.doorbells.remove(&handle.resource).is_some();
        if known { Ok(SUCCESS) } else { Err(NOT_FOUND) }
    }

    fn notify(&mut self, fields: &mut Fields) -> Result<i32, i32> {
        let handle = whole(fields.handle())?;
        if self.ring(handle) { Ok(SUCCESS) } else { Err(NOT_FOUND) }
    }

    /// Sets the flag of a doorbell and tells the guest; false where it has no such doorbell.
    pub fn ring(&mut self, doorbell: Handle) -> bool {
        let Some(&flag) = self.doorbells.get(&doorbell.resource) else { return false };
        if doorbell.context != GUEST || self.flags_page == 0 || !self.master {
            return false;
        }
        let at = GuestPhys(self.flags_page * PAGE + u64::from(flag));
        let mut old = [0];
        let set = self.memory.read(at, &mut old);
        if set.and_then(|()| self.memory.write(at, &[old[0] | 1])).is_err() {
            return false;
        }
        self.interrupts.raise(Cause::Notification);
        true
    }

    fn alloc(&mut self, fields: &mut Fields) -> Result<i32, i32> {
        let handle = whole(fields.handle())?;
        let (peer, flags) = (whole(fields.u32())?, whole(fields.u32())?);
        let (produce, consume) = (whole(fields.u64())?, whole(fields.u64())?);
        let count = whole(fields.u64())?;
        let width = if self.used & WIDE_PAGES != 0 { 8 } else { 4 };
        if count.checked_mul(width) != Some(fields.0.len() as u64) {
            return Err(INVALID_ARGS);
        }
        if !self.master {
            return Err(UNAVAILABLE);
        }
        let mut pages = Vec::with_capacity(count as usize);
        while let Some(page) = self.page(fields) {
            pages.push(page);
        }
        let wanted = Wanted { handle, peer, flags, produce, consume, pages: &pages };
        self.pairs.alloc(&self.memory, &wanted)
    }

    fn detach(&mut self, fields: &mut Fields) -> Result<i32, i32> {
        let handle: Handle = whole(fields.handle())?;
        let (answer, pair) = self.pairs.detach(handle)?;
        if let (Some(pair), Some(sockets)) = (pair, &mut self.sockets) {
            sockets.detached(handle, pair);
            self.work.signal();
        }
        Ok(answer)
    }
}
