//! A channel: its two devices, and the command that one of them carries out.

use std::sync::Arc;

use tetrarch_block::{BlockBackend, BlockError, Failures, Request};
use tetrarch_devices::Drive as Line;
use tetrarch_io::Attachment;
use tetrarch_memory::{GuestMemory, GuestPhys, ScatterList};

use super::DRIVES;
use super::bus_master::{BusMaster, Change};
use super::device::{PACKET, Registers, SELECT, TO_HOST};
use crate::ata::{self, By, Drive, Medium, Refusal, SECTOR, Step, TaskFile, error, status};
use crate::requests::Requests;
use crate::scsi::{self, Answer, Sense};

/// Device control: no interrupts, reset, what was written before the last (ATA8-APT 7.4).
const NO_INTERRUPTS: u8 = 1 << 1;
const RESET: u8 = 1 << 2;
const BEFORE: u8 = 1 << 7;

const IDLE: u8 = status::READY | status::SEEK;

/// Bytes that are read or written at once for programmed I/O: any block of it fits.
pub const BUFFER: usize = 1 << 16;

/// What a command waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wait {
    /// There is none.
    #[default]
    Nothing,
    Disk,
    /// The bus master is to be started.
    Master,
    /// The host reads the data register,
    Reads,
    /// or writes it.
    Writes,
}

/// What the host's bytes are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Purpose {
    #[default]
    Data,
    Ranges,
    Packet,
}

/// A command between its beginning and its end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Work {
    pub wait: Wait,
    pub purpose: Purpose,
    /// It came by a packet.
    pub packet: bool,
    /// Data goes from the host.
    pub writes: bool,
    pub durable: bool,
    pub dma: bool,
    /// Where on the disk, and how many bytes are to come beyond the buffer's.
    pub offset: u64,
    pub left: u64,
    /// Bytes for which the host is asked once.
    pub block: usize,
    /// For programmed I/O, and data that no disk has: where the host is in it, and where
    /// the block ends.
    pub buffer: Vec<u8>,
    pub at: usize,
    pub end: usize,
}

/// What the disk was asked for.
pub struct Waiting {
    writes: bool,
    /// The bus master has no regions beyond.
    done: bool,
    flush: bool,
}

pub struct Device {
    pub name: String,
    pub drive: Drive,
    requests: Option<Requests<Waiting>>,
    failures: Failures,
}

pub struct Channel {
    number: usize,
    memory: Arc<GuestMemory>,
    pub devices: [Option<Device>; DRIVES],
    pub registers: [Registers; DRIVES],
    /// Device control.
    pub control: u8,
    pub master: BusMaster,
    /// The function has the bus.
    pub has_bus: bool,
    pub work: Work,
    /// The device wants an interrupt.
    pub interrupt: bool,
    line: Line,
    /// Memory of ours, for disks' requests with data that the host moves by itself.
    bounce: GuestMemory,
    ended: Vec<(Waiting, Result<(), BlockError>)>,
}

impl Device {
    pub fn new(name: String, drive: Drive) -> Self {
        Self { name, drive, requests: None, failures: Failures::default() }
    }
}

impl Channel {
    pub fn new(
        number: usize,
        memory: Arc<GuestMemory>,
        devices: [Option<Device>; DRIVES],
        line: Line,
    ) -> Result<Self, tetrarch_memory::MemoryError> {
        let mut channel = Self {
            number,
            memory,
            devices,
            registers: [Registers::default(); DRIVES],
            control: 0,
            master: BusMaster::default(),
            has_bus: true,
            work: Work::default(),
            interrupt: false,
            line,
            bounce: GuestMemory::new(BUFFER as u64)?,
            ended: Vec::new(),
        };
        channel.sign();
        Ok(channel)
    }

    /// The devices say what they are, and the first is selected.
    fn sign(&mut self) {
        for (registers, device) in self.registers.iter_mut().zip(&self.devices) {
            registers.device = 0;
            match device {
                Some(device) => registers.sign(&device.drive),
                None => *registers = Registers::default(),
            }
        }
    }

    /// As at power on.
    pub fn reset(&mut self, io: &Attachment) {
        self.forget(io);
        for device in self.devices.iter_mut().flatten() {
            device.drive.reset();
        }
        (self.control, self.master) = (0, BusMaster::default());
        self.sign();
        self.set_interrupt(false);
    }

    /// Ends the command, and what is in flight for it.
    fn forget(&mut self, io: &Attachment) {
        self.work = Work::default();
        self.ended.clear();
        for index in 0..DRIVES {
            let busy = self.devices[index].as_ref().is_some_and(|device| {
                device.requests.as_ref().is_some_and(|requests| !requests.is_empty())
            });
            if busy {
                self.open(index, io);
            }
        }
    }

    /// Opens a device's queue of its disk anew: what was in flight is over when this returns.
    pub fn open(&mut self, index: usize, io: &Attachment) {
        let Some(device) = &mut self.devices[index] else { return };
        device.requests = None;
        let Some(disk) = device.drive.backend() else { return };
        let disk: &dyn BlockBackend = &**disk;
        match Requests::open(disk, io, (DRIVES * self.number + index) as u32) {
            Ok(requests) => device.requests = Some(requests),
            Err(error) => log::warn!("{}: the disk cannot be used: {error}", device.name),
        }
    }

    pub fn close(&mut self) {
        for device in self.devices.iter_mut().flatten() {
            device.requests = None;
            device.drive.close();
        }
    }

    pub fn requests(&mut self) -> impl Iterator<Item = &mut Requests<Waiting>> {
        self.devices.iter_mut().flatten().filter_map(|device| device.requests.as_mut())
    }

    fn selected(&self) -> usize {
        usize::from(self.registers[0].device & SELECT != 0)
    }

    fn current(&mut self) -> &mut Registers {
        let selected = self.selected();
        &mut self.registers[selected]
    }

    fn device(&mut self) -> Option<&mut Device> {
        let selected = self.selected();
        self.devices[selected].as_mut()
    }

    fn set_interrupt(&mut self, interrupt: bool) {
        if interrupt && !self.interrupt {
            self.master.interrupted();
        }
        self.interrupt = interrupt;
        self.drive_line();
    }

    pub fn drive_line(&self) {
        (self.line)(self.interrupt && self.control & NO_INTERRUPTS == 0);
    }

    // Registers

    /// Of one byte, but for the data register.
    pub fn read(&mut self, offset: u64) -> u8 {
        if self.device().is_none() {
            return 0;
        }
        if offset == 7 {
            // The status acknowledges the interrupt.
            self.set_interrupt(false);
        }
        let before = self.control & BEFORE != 0;
        self.current().read(offset, before)
    }

    pub fn alternate_status(&mut self) -> u8 {
        if self.device().is_none() { 0 } else { self.current().status }
    }

    pub fn write(&mut self, offset: u64, value: u8, io: &Attachment) {
        // Any write shows again what was written last.
        self.control &= !BEFORE;
        match offset {
            7 => self.command(value, io),
            // A device that is busy takes nothing.
            _ if self.work.wait == Wait::Disk => {}
            _ => self.registers.iter_mut().for_each(|registers| registers.write(offset, value)),
        }
    }

    pub fn write_control(&mut self, value: u8, io: &Attachment) {
        let before = self.control;
        self.control = value & (NO_INTERRUPTS | RESET | BEFORE);
        if value & RESET != 0 && before & RESET == 0 {
            self.forget(io);
            self.interrupt = false;
            self.registers.iter_mut().for_each(|registers| registers.status = status::BUSY);
        } else if before & RESET != 0 && value & RESET == 0 {
            for device in self.devices.iter_mut().flatten() {
                device.drive.reset();
            }
            self.sign();
        }
        self.drive_line();
    }

    pub fn read_master(&self, offset: u64) -> u8 {
        self.master.read(offset)
    }

    pub fn write_master(&mut self, offset: u64, value: u8, io: &Attachment) {
        match self.master.write(offset, value) {
            Change::Start if self.work.wait == Wait::Master && self.has_bus => self.start_master(),
            Change::Stop if self.work.wait == Wait::Disk && self.work.dma => {
                // In the middle of a transfer: the command fails.
                self.forget(io);
                self.fail(error::ABORT);
            }
            _ => {}
        }
    }

    /// The bus master waits while the function is without the bus.
    pub fn set_bus(&mut self, has_bus: bool) {
        self.has_bus = has_bus;
        if has_bus && self.work.wait == Wait::Master && self.master.started() {
            self.start_master();
        }
    }

    /// Whether the disk accesses no guest memory.
    pub fn settled(&mut self) -> bool {
        let moves = self.work.dma && self.work.wait == Wait::Disk;
        !moves
            || self.requests().fold(true, |settled, requests| {
                requests.hurry();
                requests.idle() && settled
            })
    }

    // The data register

    /// A word of 16 bits.
    pub fn read_data(&mut self) -> u16 {
        let work = &mut self.work;
        if work.wait != Wait::Reads || self.device().is_none() {
            return 0;
        }
        let work = &mut self.work;
        let mut word = [0; 2];
        // A block of an odd number of bytes ends with one that is nothing.
        let here = (work.end - work.at).min(2);
        word[..here].copy_from_slice(&work.buffer[work.at..work.at + here]);
        work.at += here;
        if work.at == work.end {
            self.next_block();
        }
        u16::from_le_bytes(word)
    }

    pub fn write_data(&mut self, word: u16) {
        if self.work.wait != Wait::Writes || self.device().is_none() {
            return;
        }
        let work = &mut self.work;
        let here = (work.end - work.at).min(2);
        work.buffer[work.at..work.at + here].copy_from_slice(&word.to_le_bytes()[..here]);
        work.at += here;
        if work.at == work.end {
            self.next_block();
        }
    }

    /// The host has moved a block.
    fn next_block(&mut self) {
        let work = &self.work;
        if work.purpose == Purpose::Packet {
            let mut packet = [0; scsi::PACKET];
            packet.copy_from_slice(&work.buffer[..scsi::PACKET]);
            return self.packet(&packet);
        }
        if work.at < work.buffer.len() {
            return self.ask_for_block(true);
        }
        if work.writes {
            self.write_buffer();
        } else if work.left > 0 {
            self.fill_buffer();
        } else {
            self.succeed_quietly();
        }
    }

    /// Lets the host move the next block of the buffer.
    fn ask_for_block(&mut self, interrupt: bool) {
        let work = &mut self.work;
        work.end = (work.at + work.block).min(work.buffer.len());
        work.wait = if work.writes { Wait::Writes } else { Wait::Reads };
        let (bytes, packet, writes) = (work.end - work.at, work.packet, work.writes);
        let registers = self.current();
        registers.status = IDLE | status::DATA_REQUEST;
        if packet {
            registers.set_byte_count(bytes as u16);
            registers.count = u16::from(if writes { 0 } else { TO_HOST });
        }
        if interrupt {
            self.set_interrupt(true);
        }
    }

    // Commands

    fn command(&mut self, command: u8, io: &Attachment) {
        let selected = self.selected();
        let busy = self.work.wait == Wait::Disk || self.control & RESET != 0;
        let Some(device) = self.devices[selected].as_mut() else { return };
        // DEVICE RESET ends any command of a packet device.
        if command == 0x08 && device.drive.is_packet() {
            self.forget(io);
            if let Some(device) = &mut self.devices[selected] {
                device.drive.reset();
                self.registers[selected].sign(&device.drive);
            }
            return self.set_interrupt(false);
        }
        if busy {
            return;
        }
        let task = self.registers[selected].task(command);
        self.work = Work::default();
        self.set_interrupt(false);
        self.current().error = 0;
        let Some(device) = &mut self.devices[selected] else { return };
        match device.drive.begin(&task) {
            Ok(step) => self.carry_out(&task, step),
            Err(Refusal(error)) => {
                // A packet device says who it is where it is asked as a disk (ATA8-ACS 7.12.6).
                if command == 0xEC && device.drive.is_packet() {
                    self.registers[selected].sign(&device.drive);
                }
                self.fail(error);
            }
        }
    }

    fn carry_out(&mut self, task: &TaskFile, step: Step) {
        match step {
            Step::Done(count) => {
                if count != 0 {
                    self.current().count = count;
                }
                self.succeed();
            }
            Step::Reply(bytes) => {
                self.work = Work { block: bytes.len(), buffer: bytes, ..Work::default() };
                self.ask_for_block(true);
            }
            Step::Read { offset, length, by } => {
                let Some(block) = self.block_of(task.command) else {
                    return self.fail(error::ABORT);
                };
                let dma = by == By::Dma;
                self.work = Work { offset, left: length, block, dma, ..Work::default() };
                if dma { self.wait_for_master() } else { self.fill_buffer() }
            }
            Step::Write { offset, length, by, durable } => {
                let Some(block) = self.block_of(task.command) else {
                    return self.fail(error::ABORT);
                };
                let dma = by == By::Dma;
                let through = self.device().is_some_and(|device| device.drive.write_through());
                let durable = durable || through;
                let writes = true;
                self.work =
                    Work { offset, left: length, block, dma, durable, writes, ..Work::default() };
                if dma { self.wait_for_master() } else { self.ask_for_data(false) }
            }
            Step::Trim { length } => {
                if length > ata::TRIM_BLOCKS * SECTOR {
                    return self.fail(error::ABORT);
                }
                let purpose = Purpose::Ranges;
                self.work =
                    Work { left: length, dma: true, writes: true, purpose, ..Work::default() };
                self.wait_for_master();
            }
            Step::Flush => {
                self.submit(vec![Request::Flush], false, true);
            }
            Step::Packet => {
                let buffer = vec![0; scsi::PACKET];
                let (purpose, dma) = (Purpose::Packet, task.features & 1 != 0);
                self.work = Work {
                    wait: Wait::Writes,
                    purpose,
                    packet: true,
                    dma,
                    end: buffer.len(),
                    buffer,
                    ..Work::default()
                };
                let registers = self.current();
                registers.status = IDLE | status::DATA_REQUEST;
                registers.count = PACKET.into();
            }
            Step::Reset => {
                // EXECUTE DEVICE DIAGNOSTIC is for both (ATA8-ACS 7.9).
                for device in self.devices.iter_mut().flatten() {
                    device.drive.reset();
                }
                self.sign();
                self.set_interrupt(true);
            }
        }
    }

    /// Bytes of a block of a command's data; none where READ or WRITE MULTIPLE was not set up.
    fn block_of(&mut self, command: u8) -> Option<usize> {
        let multiple = self.device()?.drive.state.multiple;
        match command {
            0xC4 | 0x29 | 0xC5 | 0x39 | 0xCE => {
                (multiple > 0).then_some(usize::from(multiple) * SECTOR as usize)
            }
            _ => Some(SECTOR as usize),
        }
    }

    fn packet(&mut self, packet: &[u8; scsi::PACKET]) {
        let dma = self.work.dma;
        let limit = self.current().byte_limit();
        let Some(device) = self.device() else { return };
        let size = device.drive.info().size;
        let Medium::Cd(cd) = &mut device.drive.medium else { return };
        let answer = cd.begin(packet, size);
        self.work = Work { packet: true, dma, block: limit.min(BUFFER), ..Work::default() };
        match answer {
            Ok(Answer::Done) => self.succeed(),
            Ok(Answer::Data(bytes)) => {
                self.work.buffer = bytes;
                if dma { self.wait_for_master() } else { self.ask_for_block(true) }
            }
            Ok(Answer::Read { offset, length }) => {
                (self.work.offset, self.work.left) = (offset, length);
                if dma { self.wait_for_master() } else { self.fill_buffer() }
            }
            Err(sense) => self.fail(sense.error()),
        }
    }

    // Programmed I/O

    /// Bytes of the next piece that goes through the buffer: whole blocks of it.
    fn piece(&self) -> usize {
        let whole = (BUFFER / self.work.block.max(1)).max(1) * self.work.block.max(1);
        self.work.left.min(whole.min(BUFFER) as u64) as usize
    }

    fn bounced(&self, length: usize) -> Option<ScatterList> {
        ScatterList::of(self.bounce.snapshot(), [(GuestPhys(0), length as u64)]).ok()
    }

    /// Reads the next piece from the disk.
    fn fill_buffer(&mut self) {
        let length = self.piece();
        let Some(data) = self.bounced(length) else { return self.fail(error::ABORT) };
        let offset = self.work.offset;
        self.submit(vec![Request::Read { offset, data }], false, false);
    }

    /// Lets the host give the next piece.
    fn ask_for_data(&mut self, interrupt: bool) {
        let length = self.piece();
        self.work.buffer.clear();
        self.work.buffer.resize(length, 0);
        self.work.at = 0;
        self.ask_for_block(interrupt);
    }

    /// Writes what the host has given.
    fn write_buffer(&mut self) {
        let Some(data) = self.bounced(self.work.buffer.len()) else {
            return self.fail(error::ABORT);
        };
        data.write_at(0, &self.work.buffer);
        let (offset, durable) = (self.work.offset, self.work.durable);
        self.submit_as(vec![Request::Write { offset, data }], durable, false, true);
    }

    // DMA

    fn wait_for_master(&mut self) {
        self.work.wait = Wait::Master;
        self.current().status = IDLE | status::DATA_REQUEST;
        if self.work.packet {
            self.current().count = TO_HOST.into();
        }
        if self.master.started() && self.has_bus {
            self.start_master();
        }
    }

    /// Moves all data of the command between the disk and the bus master's regions.
    fn start_master(&mut self) {
        let work = &self.work;
        let reply = !work.buffer.is_empty();
        let length = if reply { work.buffer.len() as u64 } else { work.left };
        let regions = self.master.regions(&self.memory, length);
        let right_way = self.master.fills_memory() != work.writes;
        let (list, done) = match regions {
            Ok(found) if right_way => found,
            _ => {
                self.master.failed();
                return self.fail(error::ABORT);
            }
        };
        if list.len() < length && !work.packet {
            self.master.failed();
            return self.fail(error::ABORT);
        }
        let offset = work.offset;
        if reply {
            list.write_at(0, &work.buffer);
            self.master.ended(done);
            return self.succeed();
        }
        if work.purpose == Purpose::Ranges {
            return self.trim(&list, done);
        }
        let (writes, durable) = (work.writes, work.durable);
        let request = if writes {
            Request::Write { offset, data: list }
        } else {
            Request::Read { offset, data: list }
        };
        if request.range().1 == 0 {
            self.master.ended(done);
            return self.succeed();
        }
        self.submit_as(vec![request], durable, done, writes);
    }

    fn trim(&mut self, list: &ScatterList, done: bool) {
        let mut ranges = vec![0; list.len() as usize];
        list.read_at(0, &mut ranges);
        let Some(device) = self.device() else { return };
        match device.drive.trimmed(&ranges) {
            Ok(ranges) if ranges.is_empty() => {
                self.master.ended(done);
                self.succeed();
            }
            Ok(ranges) => {
                let discard = |(offset, length)| Request::Discard { offset, length };
                let requests = ranges.into_iter().map(discard).collect();
                self.submit_as(requests, false, done, true);
            }
            Err(Refusal(error)) => {
                self.master.ended(done);
                self.fail(error);
            }
        }
    }

    // The disk

    fn submit(&mut self, requests: Vec<Request>, done: bool, flush: bool) {
        let waiting = Waiting { writes: flush, done, flush };
        self.give(requests, false, waiting);
    }

    fn submit_as(&mut self, requests: Vec<Request>, durable: bool, done: bool, writes: bool) {
        self.give(requests, durable, Waiting { writes, done, flush: false });
    }

    fn give(&mut self, requests: Vec<Request>, durable: bool, waiting: Waiting) {
        self.work.wait = Wait::Disk;
        self.current().status = status::BUSY;
        match self.device().and_then(|device| device.requests.as_mut()) {
            Some(queue) => {
                queue.submit(waiting, requests.into_iter(), durable);
                queue.kick();
            }
            // The host has closed the disk.
            None => self.fail(error::ABORT),
        }
    }

    /// Answers what the disk has done.
    pub fn finish(&mut self) {
        let mut ended = std::mem::take(&mut self.ended);
        let selected = self.selected();
        for index in 0..DRIVES {
            let Some(device) = &mut self.devices[index] else { continue };
            let Some(requests) = &mut device.requests else { continue };
            requests.take(&mut ended);
            for (waiting, result) in ended.drain(..) {
                if let (Err(error), Some(device)) = (result, &mut self.devices[index]) {
                    device.failures.tell(&device.name, error);
                }
                // Only the device that was selected has a command: others are not while it is busy.
                if index == selected && self.work.wait == Wait::Disk {
                    self.disk_ended(&waiting, result);
                }
            }
        }
        self.ended = ended;
    }

    fn disk_ended(&mut self, waiting: &Waiting, result: Result<(), BlockError>) {
        if let Err(error) = result {
            if self.work.dma {
                self.master.ended(waiting.done);
            }
            let failure = match self.device().map(|device| &mut device.drive.medium) {
                Some(Medium::Cd(cd)) => cd.failed(Sense::READ_ERROR).error(),
                _ => ata::failure(error, waiting.writes),
            };
            return self.fail(failure);
        }
        if self.work.dma {
            self.master.ended(waiting.done);
            return self.succeed();
        }
        if waiting.flush {
            return self.succeed();
        }
        let length = if waiting.writes { self.work.buffer.len() } else { self.piece() };
        self.work.offset += length as u64;
        self.work.left -= (length as u64).min(self.work.left);
        if !waiting.writes {
            let Some(data) = self.bounced(length) else { return self.fail(error::ABORT) };
            self.work.buffer.clear();
            self.work.buffer.resize(length, 0);
            data.read_at(0, &mut self.work.buffer);
            self.work.at = 0;
            self.ask_for_block(true);
        } else if self.work.left > 0 {
            self.ask_for_data(true);
        } else {
            self.succeed();
        }
    }

    // Ends

    fn succeed(&mut self) {
        self.succeed_quietly();
        self.set_interrupt(true);
    }

    /// The last block of data that a disk gives ends the command without a further interrupt;
    /// that of a packet command's has one.
    fn succeed_quietly(&mut self) {
        let Work { packet, wait, .. } = std::mem::take(&mut self.work);
        let registers = self.current();
        (registers.status, registers.error) = (IDLE, 0);
        if packet {
            registers.count = u16::from(PACKET | TO_HOST);
            if wait == Wait::Reads {
                self.set_interrupt(true);
            }
        }
    }

    fn fail(&mut self, error: u8) {
        let packet = std::mem::take(&mut self.work).packet;
        let registers = self.current();
        (registers.status, registers.error) = (IDLE | status::ERROR, error);
        if packet {
            registers.count = u16::from(PACKET | TO_HOST);
        }
        self.set_interrupt(true);
    }
}
