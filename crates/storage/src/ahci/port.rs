//! A port and the device at it (3.3, 5.3).

use tetrarch_block::{BlockError, Failures, Request};
use tetrarch_memory::GuestMemory;

use super::SLOTS;
use super::fis::{Received, Result as Ended, TYPE_COMMAND};
use super::table::Slot;
use crate::ata::{self, By, Drive, Medium, Refusal, SECTOR, Step, TaskFile, status};
use crate::requests::Requests;
use crate::scsi::{Answer, PACKET, Sense};

/// Bits of PxIS (3.3.5), of which software clears all but the change of the port.
pub mod interrupt {
    pub const REGISTERS: u32 = 1 << 0;
    pub const PIO_SETUP: u32 = 1 << 1;
    pub const DEVICE_BITS: u32 = 1 << 3;
    pub const PORT_CHANGE: u32 = 1 << 6;
    pub const INTERFACE: u32 = 1 << 27;
    pub const HOST_BUS: u32 = 1 << 29;
    pub const TASK_FILE: u32 = 1 << 30;
    pub const ALL: u32 = 0xFDC0_00FF;
}

/// Bits of PxCMD (3.3.7).
mod command {
    pub const START: u32 = 1 << 0;
    pub const SPUN_UP: u32 = 1 << 1;
    pub const POWERED: u32 = 1 << 2;
    pub const OVERRIDE: u32 = 1 << 3;
    pub const RECEIVE: u32 = 1 << 4;
    pub const RECEIVES: u32 = 1 << 14;
    pub const RUNS: u32 = 1 << 15;
    /// Those that software sets and reads back: also ATAPI, and how its lamp is lit.
    pub const KEPT: u32 = START | RECEIVE | 0b1111 << 24;
}

pub use command::KEPT as COMMAND_KEPT;

/// PxSERR: a device was exchanged (3.3.12, DIAG.X).
const EXCHANGED: u32 = 1 << 26;
/// PxSCTL.DET: reset the link, and keep it down (3.3.11).
const DETECT_RESET: u32 = 1;
const DETECT_OFF: u32 = 4;
/// PxSSTS of a device that is there, at 6 Gbit/s.
const LINK_UP: u32 = 0x133;

/// A device's status when it has nothing to do.
const IDLE: u8 = status::READY | status::SEEK;

/// READ LOG EXT, and the log of queued commands that failed.
const READ_LOG: u8 = 0x2F;
const QUEUED_ERROR_LOG: u64 = 0x10;

/// A command that the disk has.
pub struct Waiting {
    index: usize,
    slot: Slot,
    task: TaskFile,
    queued: bool,
    packet: bool,
    writes: bool,
    by: By,
    bytes: u64,
}

/// The registers that software sees (figure 12), as far as they are no functions of others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    pub list: u64,
    pub received: u64,
    pub interrupts: u32,
    pub enabled: u32,
    pub command: u32,
    pub status: u8,
    pub error: u8,
    pub signature: u32,
    pub control: u32,
    pub errors: u32,
    /// Queued commands that have not ended, and all that were given.
    pub active: u32,
    pub issued: u32,
    /// Nothing more is done before software stops the port: a command failed.
    pub halted: bool,
    /// A software reset has begun.
    pub resetting: bool,
    /// Slots that were taken up.
    pub taken: u32,
    /// The queued command that failed: slot plus one, and the error.
    pub failed: u8,
    pub failure: u8,
}

pub struct Port {
    pub name: String,
    pub drive: Option<Drive>,
    /// While there is a disk.
    pub requests: Option<Requests<Waiting>>,
    pub registers: Registers,
    /// The controller has the bus: commands are taken.
    pub master: bool,
    /// It is without it: memory is left alone.
    pub away: bool,
    ended: Vec<(Waiting, Result<(), BlockError>)>,
    failures: Failures,
}

impl Port {
    pub fn new(name: String, drive: Option<Drive>) -> Self {
        let mut port = Self {
            name,
            drive,
            requests: None,
            registers: Registers::default(),
            master: true,
            away: false,
            ended: Vec::new(),
            failures: Failures::default(),
        };
        port.link_reset();
        port
    }

    fn running(&self) -> bool {
        self.registers.command & command::START != 0 && !self.registers.halted
    }

    // Registers

    pub fn read(&self, offset: u64) -> u32 {
        let registers = &self.registers;
        match offset {
            0x00 => registers.list as u32,
            0x04 => (registers.list >> 32) as u32,
            0x08 => registers.received as u32,
            0x0C => (registers.received >> 32) as u32,
            0x10 => self.interrupts(),
            0x14 => registers.enabled,
            0x18 => self.command(),
            0x20 => u32::from(registers.status) | u32::from(registers.error) << 8,
            0x24 => registers.signature,
            0x28 => self.link(),
            0x2C => registers.control,
            0x30 => registers.errors,
            0x34 => registers.active,
            0x38 => registers.issued,
            _ => 0,
        }
    }

    /// What is written is done but for commands, which the I/O thread takes up: gives whether
    /// it has to look. `reopen` is called where requests in flight are to be forgotten.
    pub fn write(
        &mut self,
        offset: u64,
        value: u32,
        memory: &GuestMemory,
        reopen: impl FnOnce(&mut Self),
    ) -> bool {
        let registers = &mut self.registers;
        let (high, low) = (u64::from(value) << 32, u64::from(value));
        match offset {
            0x00 => registers.list = registers.list & !0xFFFF_FFFF | low & !0x3FF,
            0x04 => registers.list = registers.list & 0xFFFF_FFFF | high,
            0x08 => registers.received = registers.received & !0xFFFF_FFFF | low & !0xFF,
            0x0C => registers.received = registers.received & 0xFFFF_FFFF | high,
            0x10 => registers.interrupts &= !value,
            0x14 => registers.enabled = value & interrupt::ALL,
            0x18 => self.set_command(value, memory, reopen),
            0x2C => self.set_control(value, memory, reopen),
            0x30 => registers.errors &= !value,
            // Set by ones, while the port runs (3.3.13, 3.3.14).
            0x34 if registers.command & command::START != 0 => registers.active |= value,
            0x38 if registers.command & command::START != 0 => {
                registers.issued |= value;
                return true;
            }
            _ => {}
        }
        false
    }

    /// PxIS: the change of the port is what PxSERR says of it.
    pub fn interrupts(&self) -> u32 {
        let change = self.registers.errors & EXCHANGED != 0;
        self.registers.interrupts | if change { interrupt::PORT_CHANGE } else { 0 }
    }

    fn command(&self) -> u32 {
        let set = self.registers.command;
        let mut value = set | command::SPUN_UP | command::POWERED;
        if set & command::RECEIVE != 0 {
            value |= command::RECEIVES;
        }
        if set & command::START != 0 {
            // The slot of the command that is carried out.
            let slot = self.registers.taken.trailing_zeros() & 31;
            value |= command::RUNS | slot << 8;
        }
        value
    }

    fn set_command(&mut self, value: u32, memory: &GuestMemory, reopen: impl FnOnce(&mut Self)) {
        let before = self.registers.command;
        self.registers.command = value & command::KEPT;
        if value & command::OVERRIDE != 0 {
            self.registers.status &= !(status::BUSY | status::DATA_REQUEST);
        }
        if before & command::RECEIVE == 0 && value & command::RECEIVE != 0 {
            // What the device has said of itself since the link came up.
            self.send_signature(memory);
        }
        if before & command::START != 0 && value & command::START == 0 {
            self.stop(reopen);
        }
    }

    /// Forgets commands (10.3.2).
    fn stop(&mut self, reopen: impl FnOnce(&mut Self)) {
        let registers = &mut self.registers;
        (registers.issued, registers.active, registers.taken) = (0, 0, 0);
        registers.halted = false;
        if registers.status & status::BUSY != 0 && self.drive.is_some() {
            registers.status = IDLE;
        }
        self.ended.clear();
        if self.requests.as_ref().is_some_and(|requests| !requests.is_empty()) {
            reopen(self);
        }
    }

    /// PxSSTS.
    fn link(&self) -> u32 {
        match self.registers.control & 0xF {
            DETECT_RESET => 0,
            DETECT_OFF => 4,
            _ if self.drive.is_some() => LINK_UP,
            _ => 0,
        }
    }

    fn set_control(&mut self, value: u32, memory: &GuestMemory, reopen: impl FnOnce(&mut Self)) {
        let before = self.registers.control & 0xF;
        let now = value & 0xF;
        self.registers.control = value & 0xFFF;
        if now == DETECT_RESET || now == DETECT_OFF {
            self.stop(reopen);
            (self.registers.status, self.registers.error) = (0x7F, 0);
        } else if now == 0 && before != 0 {
            self.link_reset();
            self.send_signature(memory);
        }
    }

    /// The link comes up, and the device with it (10.4.2).
    fn link_reset(&mut self) {
        let registers = &mut self.registers;
        registers.resetting = false;
        match &mut self.drive {
            Some(drive) => {
                drive.reset();
                let (count, lba) = drive.signature();
                registers.signature = (lba as u32) << 8 | u32::from(count);
                (registers.status, registers.error) = (IDLE, 1);
                registers.errors |= EXCHANGED;
            }
            None => {
                registers.signature = u32::MAX;
                (registers.status, registers.error) = (0x7F, 0);
            }
        }
    }

    /// As after a reset of the controller: the places in memory stay (10.4.3).
    pub fn reset(&mut self, reopen: impl FnOnce(&mut Self)) {
        self.stop(reopen);
        let Registers { list, received, .. } = self.registers;
        self.registers = Registers { list, received, ..Registers::default() };
        self.link_reset();
    }

    fn received<'a>(&self, memory: &'a GuestMemory) -> Received<'a> {
        let receives = self.registers.command & command::RECEIVE != 0 && !self.away;
        Received { memory, base: receives.then_some(self.registers.received) }
    }

    fn send_signature(&self, memory: &GuestMemory) {
        if let Some(drive) = &self.drive {
            let (count, lba) = drive.signature();
            let task = TaskFile { count, lba, ..TaskFile::default() };
            let Registers { status, error, .. } = self.registers;
            self.received(memory).registers(Ended { status, error }, &task, false);
        }
    }

    // Commands

    /// Takes up what was given and answers what the disk has done.
    pub fn serve(&mut self, memory: &GuestMemory, quiet: bool) {
        self.finish(memory);
        while !quiet && self.master && self.running() && self.drive.is_some() {
            let waiting = self.registers.issued & !self.registers.taken;
            let index = waiting.trailing_zeros() as usize;
            // One command at a time, but for those of the device's queue.
            if index >= SLOTS || self.registers.status & status::BUSY != 0 {
                break;
            }
            if !self.begin(memory, index) {
                break;
            }
        }
        if let Some(requests) = &mut self.requests {
            requests.kick();
        }
        self.finish(memory);
    }

    /// Whether there may be more to begin.
    fn begin(&mut self, memory: &GuestMemory, index: usize) -> bool {
        let bit = 1 << index;
        let Ok(slot) = Slot::read(memory, self.registers.list, index) else {
            return self.halt(interrupt::HOST_BUS);
        };
        if slot.frame[0] != TYPE_COMMAND {
            return self.halt(interrupt::INTERFACE);
        }
        if slot.frame[1] & 0x80 == 0 {
            self.registers.issued &= !bit;
            self.control(memory, slot.frame[15]);
            return true;
        }
        let task = TaskFile::of_fis(&slot.frame);
        let queued = matches!(task.command, 0x60 | 0x61)
            && self.drive.as_ref().is_some_and(|drive| !drive.is_packet());
        if !queued && self.requests.as_ref().is_some_and(|requests| !requests.is_empty()) {
            return false; // it waits for those that are queued
        }
        self.registers.taken |= bit;
        let waiting = Waiting {
            index,
            slot,
            task,
            queued,
            packet: task.command == 0xA0,
            writes: false,
            by: By::Dma,
            bytes: 0,
        };
        if queued {
            // The device has taken it, and the slot's bit is PxSACT's now (5.5.1).
            self.registers.issued &= !bit;
            self.begin_queued(memory, waiting);
        } else {
            self.registers.status |= status::BUSY;
            self.begin_one(memory, waiting);
        }
        true
    }

    /// A register frame without a command: a software reset is one that sets a bit and one that
    /// clears it (10.4.1).
    fn control(&mut self, memory: &GuestMemory, control: u8) {
        const RESET: u8 = 1 << 2;
        if control & RESET != 0 {
            self.registers.resetting = true;
        } else if self.registers.resetting {
            self.registers.resetting = false;
            let exchanged = self.registers.errors & EXCHANGED;
            self.link_reset();
            self.registers.errors = self.registers.errors & !EXCHANGED | exchanged;
            self.send_signature(memory);
        }
    }

    fn begin_queued(&mut self, memory: &GuestMemory, waiting: Waiting) {
        let Some(drive) = &self.drive else { return };
        // The tag is the slot's number (5.5.1), and the command is one of the device's queue.
        let tag = usize::from(waiting.task.count >> 3 & 31);
        let good = tag == waiting.index && self.registers.active & 1 << tag != 0;
        let step = if good { drive.begin_queued(&waiting.task) } else { Err(Refusal(ABORT)) };
        match step {
            Ok(step) => self.carry_out(memory, waiting, step),
            Err(Refusal(error)) => self.fail(memory, &waiting, error),
        }
    }

    fn begin_one(&mut self, memory: &GuestMemory, waiting: Waiting) {
        let Some(drive) = &mut self.drive else { return };
        let step = match waiting.task.command {
            READ_LOG if !drive.is_packet() => self.read_log(&waiting.task),
            _ => drive.begin(&waiting.task),
        };
        match step {
            Ok(step) => self.carry_out(memory, waiting, step),
            Err(Refusal(error)) => self.fail(memory, &waiting, error),
        }
    }

    /// The directory of logs, and the queued command that failed (ATA8-ACS, A.12).
    fn read_log(&self, task: &TaskFile) -> Result<Step, Refusal> {
        let mut page = vec![0; SECTOR as usize];
        match task.lba & 0xFF {
            0 => {
                page[0] = 1;
                page[2 * QUEUED_ERROR_LOG as usize] = 1;
            }
            QUEUED_ERROR_LOG => {
                let Registers { failed, failure, .. } = self.registers;
                // No queued one where there is none.
                page[0] = failed.checked_sub(1).unwrap_or(1 << 7);
                page[2] = IDLE | status::ERROR;
                page[3] = failure;
                let sum = page.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte));
                page[511] = sum.wrapping_neg();
            }
            _ => return Err(Refusal(ABORT)),
        }
        if task.count == 1 { Ok(Step::Reply(page)) } else { Err(Refusal(ABORT)) }
    }

    fn carry_out(&mut self, memory: &GuestMemory, mut waiting: Waiting, step: Step) {
        match step {
            Step::Done(count) => {
                waiting.task.count = count;
                self.succeed(memory, &waiting);
            }
            Step::Reply(bytes) => {
                let Ok(list) = waiting.slot.data(memory, bytes.len() as u64) else {
                    return self.halt_with(interrupt::HOST_BUS);
                };
                waiting.bytes = list.write_at(0, &bytes) as u64;
                waiting.by = By::Pio;
                self.succeed(memory, &waiting);
            }
            Step::Read { offset, length, by } => {
                let Ok(data) = waiting.slot.data(memory, length) else {
                    return self.halt_with(interrupt::HOST_BUS);
                };
                if data.len() < length {
                    return self.fail(memory, &waiting, ABORT);
                }
                (waiting.by, waiting.bytes) = (by, length);
                self.submit(waiting, vec![Request::Read { offset, data }], false);
            }
            Step::Write { offset, length, by, durable } => {
                let Ok(data) = waiting.slot.data(memory, length) else {
                    return self.halt_with(interrupt::HOST_BUS);
                };
                if data.len() < length {
                    return self.fail(memory, &waiting, ABORT);
                }
                (waiting.by, waiting.bytes, waiting.writes) = (by, length, true);
                let through = self.drive.as_ref().is_some_and(Drive::write_through);
                self.submit(waiting, vec![Request::Write { offset, data }], durable || through);
            }
            Step::Trim { length } => self.trim(memory, waiting, length),
            Step::Flush => {
                waiting.writes = true;
                self.submit(waiting, vec![Request::Flush], false);
            }
            Step::Packet => self.packet(memory, waiting),
            Step::Reset => {
                if let Some(drive) = &mut self.drive {
                    drive.reset();
                    (waiting.task.count, waiting.task.lba) = drive.signature();
                }
                self.succeed(memory, &waiting);
            }
        }
    }

    fn trim(&mut self, memory: &GuestMemory, mut waiting: Waiting, length: u64) {
        // A block of ranges or more, of which a drive takes what it says (word 105).
        let Ok(list) = waiting.slot.data(memory, length) else {
            return self.halt_with(interrupt::HOST_BUS);
        };
        if length > ata::TRIM_BLOCKS * SECTOR || list.len() < length {
            return self.fail(memory, &waiting, ABORT);
        }
        let mut ranges = vec![0; length as usize];
        list.read_at(0, &mut ranges);
        let Some(drive) = &self.drive else { return };
        match drive.trimmed(&ranges) {
            Ok(ranges) => {
                let discard = |(offset, length)| Request::Discard { offset, length };
                let requests: Vec<_> = ranges.into_iter().map(discard).collect();
                (waiting.bytes, waiting.writes) = (length, true);
                if requests.is_empty() {
                    return self.succeed(memory, &waiting);
                }
                self.submit(waiting, requests, false);
            }
            Err(Refusal(error)) => self.fail(memory, &waiting, error),
        }
    }

    fn packet(&mut self, memory: &GuestMemory, mut waiting: Waiting) {
        let Some(drive) = &mut self.drive else { return };
        let size = drive.info().size;
        let Medium::Cd(cd) = &mut drive.medium else { return };
        let mut packet = [0; PACKET];
        packet.copy_from_slice(&waiting.slot.packet[..PACKET]);
        match cd.begin(&packet, size) {
            Ok(Answer::Done) => self.succeed(memory, &waiting),
            Ok(Answer::Data(bytes)) => {
                // A driver takes as much as it has room for.
                let Ok(list) = waiting.slot.data(memory, bytes.len() as u64) else {
                    return self.halt_with(interrupt::HOST_BUS);
                };
                waiting.bytes = list.write_at(0, &bytes) as u64;
                self.succeed(memory, &waiting);
            }
            Ok(Answer::Read { offset, length }) => {
                let Ok(data) = waiting.slot.data(memory, length) else {
                    return self.halt_with(interrupt::HOST_BUS);
                };
                waiting.bytes = data.len();
                if data.is_empty() {
                    return self.succeed(memory, &waiting);
                }
                self.submit(waiting, vec![Request::Read { offset, data }], false);
            }
            Err(sense) => self.fail(memory, &waiting, sense.error()),
        }
    }

    fn submit(&mut self, waiting: Waiting, requests: Vec<Request>, durable: bool) {
        match &mut self.requests {
            Some(queue) => queue.submit(waiting, requests.into_iter(), durable),
            // The host has closed the disk.
            None => self.halt_with(interrupt::INTERFACE),
        }
    }

    /// Whether nothing is in flight.
    pub fn settled(&mut self) -> bool {
        self.requests.as_mut().is_none_or(|requests| {
            requests.hurry();
            requests.idle()
        })
    }

    /// Answers what the disk has done.
    fn finish(&mut self, memory: &GuestMemory) {
        let Some(requests) = &mut self.requests else { return };
        let mut ended = std::mem::take(&mut self.ended);
        requests.take(&mut ended);
        if self.away {
            self.ended = ended; // it is said when the bus is there again
            return;
        }
        for (waiting, result) in ended.drain(..) {
            if let Err(error) = result {
                self.failures.tell(&self.name, error);
            }
            // A device that has failed says no more of others in its queue.
            if self.registers.halted {
                continue;
            }
            match (result, &mut self.drive) {
                (Ok(()), _) => self.succeed(memory, &waiting),
                (Err(_), Some(Drive { medium: Medium::Cd(cd), .. })) => {
                    let sense = cd.failed(Sense::READ_ERROR);
                    self.fail(memory, &waiting, sense.error());
                }
                (Err(error), _) => {
                    self.fail(memory, &waiting, ata::failure(error, waiting.writes));
                }
            }
        }
        self.ended = ended;
    }

    fn succeed(&mut self, memory: &GuestMemory, waiting: &Waiting) {
        let bit = 1 << waiting.index;
        let ended = Ended { status: IDLE, error: 0 };
        self.registers.taken &= !bit;
        (self.registers.status, self.registers.error) = (IDLE, 0);
        waiting.slot.moved(memory, waiting.bytes);
        let received = self.received(memory);
        if waiting.queued {
            received.device_bits(ended, bit);
            self.registers.active &= !bit;
            self.registers.interrupts |= interrupt::DEVICE_BITS;
            return;
        }
        self.registers.issued &= !bit;
        let mut task = waiting.task;
        if waiting.packet {
            task.count = 0b11; // neither data nor a packet: the end (interrupt reason)
        }
        if waiting.by == By::Pio && waiting.bytes > 0 && !waiting.packet {
            let before = Ended { status: IDLE | status::DATA_REQUEST, error: 0 };
            received.pio_setup(before, ended, &task, waiting.bytes, !waiting.writes);
            self.registers.interrupts |= interrupt::PIO_SETUP;
            if !waiting.writes {
                return;
            }
        }
        received.registers(ended, &task, true);
        self.registers.interrupts |= interrupt::REGISTERS;
    }

    /// The device says that a command failed, and the port waits to be stopped (6.2.2.1).
    fn fail(&mut self, memory: &GuestMemory, waiting: &Waiting, error: u8) {
        let ended = Ended { status: IDLE | status::ERROR, error };
        (self.registers.status, self.registers.error) = (ended.status, error);
        let received = self.received(memory);
        if waiting.queued {
            received.device_bits(ended, 0);
            (self.registers.failed, self.registers.failure) = (waiting.index as u8 + 1, error);
            self.registers.interrupts |= interrupt::DEVICE_BITS;
        } else {
            let mut task = waiting.task;
            if waiting.packet {
                task.count = 0b11;
            }
            received.registers(ended, &task, true);
            self.registers.interrupts |= interrupt::REGISTERS;
        }
        self.halt_with(interrupt::TASK_FILE);
    }

    fn halt_with(&mut self, cause: u32) {
        self.registers.halted = true;
        self.registers.interrupts |= cause;
    }

    fn halt(&mut self, cause: u32) -> bool {
        self.halt_with(cause);
        false
    }
}

const ABORT: u8 = ata::error::ABORT;
