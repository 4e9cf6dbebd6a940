//! Commands of the admin queue (5).

use super::command::Command;
use super::controller::Inner;
use super::events::MAX_REQUESTS;
use super::queue::{Completions, Submissions};
use super::status::Status;
use super::{MAX_ENTRIES, MAX_TRANSFER, PAGE, identify, log_page, prp};

/// Opcodes (figure 139).
const DELETE_SUBMISSION_QUEUE: u8 = 0x00;
const CREATE_SUBMISSION_QUEUE: u8 = 0x01;
const GET_LOG_PAGE: u8 = 0x02;
const DELETE_COMPLETION_QUEUE: u8 = 0x04;
const CREATE_COMPLETION_QUEUE: u8 = 0x05;
const IDENTIFY: u8 = 0x06;
const ABORT: u8 = 0x08;
const SET_FEATURES: u8 = 0x09;
const GET_FEATURES: u8 = 0x0A;
const ASYNCHRONOUS_EVENT_REQUEST: u8 = 0x0C;

/// Of word 11 of what makes a queue: it lies in one piece, and it interrupts.
const CONTIGUOUS: u32 = 1 << 0;
const INTERRUPTS: u32 = 1 << 1;

/// How a command ended: its result, or that it goes on.
pub enum Admin {
    Done(u32),
    /// It ends when something is over that is in flight.
    Later,
    /// It waits, for as long as it likes, in no queue.
    Waits,
}

impl Inner {
    pub fn admin(&mut self, command: &Command) -> Result<Admin, Status> {
        if !command.is_plain() {
            return Err(Status::INVALID_FIELD);
        }
        let (word, argument) = (command.word(10), command.word(11));
        match command.opcode() {
            CREATE_COMPLETION_QUEUE => self.create_completions(command),
            CREATE_SUBMISSION_QUEUE => self.create_submissions(command),
            DELETE_COMPLETION_QUEUE => self.delete_completions(word),
            DELETE_SUBMISSION_QUEUE => return self.delete_submissions(command, word),
            IDENTIFY => self.identify(command),
            GET_LOG_PAGE => self.log_page(command),
            // None is: it would have to be found at the host's (5.1).
            ABORT => return Ok(Admin::Done(1)),
            SET_FEATURES => {
                let queues = self.submissions[1..].iter().any(Option::is_some)
                    || self.completions[1..].iter().any(Option::is_some);
                return self.features.set(word, argument, queues).map(Admin::Done);
            }
            GET_FEATURES => return self.features.get(word, argument).map(Admin::Done),
            ASYNCHRONOUS_EVENT_REQUEST => {
                if self.events.requests.len() >= MAX_REQUESTS {
                    return Err(Status::TOO_MANY_EVENT_REQUESTS);
                }
                self.events.requests.push(command.id());
                return Ok(Admin::Waits);
            }
            _ => Err(Status::INVALID_OPCODE),
        }?;
        Ok(Admin::Done(0))
    }

    /// (base, entries) of a queue that is to be made; (5.3, 5.4).
    fn new_queue(&self, command: &Command) -> Result<(u64, u32), Status> {
        let size = (command.word(10) >> 16) + 1;
        let (base, _) = command.prps();
        if !(2..=MAX_ENTRIES).contains(&size) {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        // CAP.CQR: no queue is in pieces.
        if command.word(11) & CONTIGUOUS == 0 {
            return Err(Status::INVALID_FIELD);
        }
        if base.is_multiple_of(PAGE) { Ok((base, size)) } else { Err(Status::PRP_OFFSET) }
    }

    fn create_completions(&mut self, command: &Command) -> Result<(), Status> {
        let (word, argument) = (command.word(10), command.word(11));
        let id = usable(&self.completions, word, false).ok_or(Status::INVALID_QUEUE)?;
        let (base, size) = self.new_queue(command)?;
        let vector = (argument >> 16) as u16;
        if usize::from(vector) >= self.interrupts.len() {
            return Err(Status::INVALID_VECTOR);
        }
        let vector = (argument & INTERRUPTS != 0).then_some(vector);
        let queue = Completions::new(&self.memory, base, size, vector)
            .map_err(|_| Status::INVALID_FIELD)?;
        self.doorbells.set_completions(id, (0, 0), vector.is_some());
        self.completions[id] = Some(queue);
        Ok(())
    }

    fn create_submissions(&mut self, command: &Command) -> Result<(), Status> {
        let (word, argument) = (command.word(10), command.word(11));
        let id = usable(&self.submissions, word, false).ok_or(Status::INVALID_QUEUE)?;
        let completions = usable(&self.completions, argument >> 16, true)
            .ok_or(Status::INVALID_COMPLETION_QUEUE)?;
        let (base, size) = self.new_queue(command)?;
        let queue = Submissions::new(&self.memory, base, size, completions)
            .map_err(|_| Status::INVALID_FIELD)?;
        self.doorbells.set_tail(id, 0);
        self.submissions[id] = Some(queue);
        Ok(())
    }

    fn delete_completions(&mut self, word: u32) -> Result<(), Status> {
        let id = usable(&self.completions, word, true).ok_or(Status::INVALID_QUEUE)?;
        if self.submissions.iter().flatten().any(|queue| queue.completions == id) {
            return Err(Status::INVALID_QUEUE_DELETION);
        }
        self.completions[id] = None;
        self.doorbells.set_completions(id, (0, 0), false);
        Ok(())
    }

    /// Ends when the last command that was taken from the queue has ended (5.6).
    fn delete_submissions(&mut self, command: &Command, word: u32) -> Result<Admin, Status> {
        let id = usable(&self.submissions, word, true).ok_or(Status::INVALID_QUEUE)?;
        let slot = &mut self.submissions[id];
        match slot {
            Some(queue) if queue.deletion.is_some() => Err(Status::INVALID_QUEUE),
            Some(queue) if queue.in_flight > 0 => {
                queue.deletion = Some(command.id());
                Ok(Admin::Later)
            }
            _ => {
                *slot = None;
                Ok(Admin::Done(0))
            }
        }
    }

    fn identify(&mut self, command: &Command) -> Result<(), Status> {
        let info = self.info();
        let data = self.about.identify(command.word(10) as u8, command.namespace(), &info)?;
        prp::data(&self.memory, command, identify::BYTES)?.write_at(0, &data);
        Ok(())
    }

    fn log_page(&mut self, command: &Command) -> Result<(), Status> {
        let (word, argument) = (command.word(10), command.word(11));
        let words = u64::from(word >> 16) | u64::from(argument & 0xFFFF) << 16;
        let length = 4 * (words + 1);
        let offset = u64::from(command.word(12)) | u64::from(command.word(13)) << 32;
        if length > MAX_TRANSFER || !log_page::is_for(command.namespace()) {
            return Err(Status::INVALID_FIELD);
        }
        let keep = word & 1 << 15 != 0;
        let list = prp::data(&self.memory, command, length)?;
        let id = word as u8;
        let page = self.log.page(id, keep)?;
        let part = usize::try_from(offset).ok().and_then(|offset| page.get(offset..));
        // What lies beyond a page is undefined.
        let written = list.write_at(0, part.ok_or(Status::INVALID_FIELD)?) as u64;
        list.zero(written, length.saturating_sub(written));
        if !keep {
            self.events.read(id);
        }
        Ok(())
    }
}

/// The place of an I/O queue by its number, where there is one or is none yet.
fn usable<Q>(queues: &[Option<Q>], word: u32, there: bool) -> Option<usize> {
    let id = (word & 0xFFFF) as usize;
    let slot = queues.get(id).filter(|_| id > 0)?;
    (slot.is_some() == there).then_some(id)
}
