//! The registers of the controller (3.1), and its interrupt.

use std::sync::Arc;

use tetrarch_block::BlockBackend;
use tetrarch_bus::Interrupt;
use tetrarch_devices::Drive as Line;
use tetrarch_io::{Attachment, Handler};
use tetrarch_memory::GuestMemory;

use super::port::Port;
use crate::landed::Landed;
use crate::requests::Requests;

/// Where the registers of ports begin, and how many bytes each has.
const PORTS: u64 = 0x100;
const PORT: u64 = 0x80;

/// CAP (3.1.1): 32 slots, 6 Gbit/s, AHCI alone, override of busy devices, queues, 64 bits.
const CAPABILITIES: u32 = 31 << 8 | 1 << 18 | 3 << 20 | 1 << 24 | 1 << 30 | 1 << 31;
const VERSION: u32 = 0x0001_0301;

/// GHC (3.1.2).
const RESET: u32 = 1 << 0;
const INTERRUPTS: u32 = 1 << 1;
const AHCI: u32 = 1 << 31;

pub struct Hba {
    pub memory: Arc<GuestMemory>,
    pub ports: Vec<Port>,
    /// GHC.IE.
    pub enabled: bool,
    /// IS: the ports that have interrupts.
    pub interrupts: u32,
    line: Line,
    message: Arc<dyn Interrupt>,
    quiet: bool,
    landed: Arc<Landed>,
}

impl Hba {
    pub fn new(
        memory: Arc<GuestMemory>,
        ports: Vec<Port>,
        line: Line,
        message: Arc<dyn Interrupt>,
        landed: Arc<Landed>,
    ) -> Self {
        let (enabled, interrupts, quiet) = (false, 0, false);
        Self { memory, ports, enabled, interrupts, line, message, quiet, landed }
    }

    pub fn read(&self, offset: u64) -> u32 {
        if let Some(at) = offset.checked_sub(PORTS) {
            let port = self.ports.get((at / PORT) as usize);
            return port.map_or(0, |port| port.read(at % PORT));
        }
        match offset {
            0x00 => CAPABILITIES | (self.ports.len() as u32 - 1),
            0x04 => AHCI | if self.enabled { INTERRUPTS } else { 0 },
            0x08 => self.interrupts,
            0x0C => ((1u64 << self.ports.len()) - 1) as u32,
            0x10 => VERSION,
            _ => 0,
        }
    }

    /// Gives whether the I/O thread has something to do.
    pub fn write(&mut self, offset: u64, value: u32, io: &Attachment) -> bool {
        let mut work = false;
        if let Some(at) = offset.checked_sub(PORTS) {
            let index = (at / PORT) as usize;
            if let Some(port) = self.ports.get_mut(index) {
                let reopen = |port: &mut Port| open(port, index, io);
                work = port.write(at % PORT, value, &self.memory, reopen);
            }
        } else {
            match offset {
                0x04 if value & RESET != 0 => self.reset(io),
                0x04 => self.enabled = value & INTERRUPTS != 0,
                0x08 => self.interrupts &= !value,
                _ => {}
            }
        }
        self.interrupt();
        work
    }

    /// Whether nothing is in flight.
    pub fn settled(&mut self) -> bool {
        // Of each port, whatever the others say: all are to hurry.
        self.ports.iter_mut().filter_map(|port| (!port.settled()).then_some(())).count() == 0
    }

    pub fn reset(&mut self, io: &Attachment) {
        (self.enabled, self.interrupts) = (false, 0);
        for (index, port) in self.ports.iter_mut().enumerate() {
            port.reset(|port| open(port, index, io));
        }
    }

    /// A port's interrupt that is enabled is one of the controller's (5.6): the line is high
    /// while there is one, and a message is sent of each that is new.
    pub fn interrupt(&mut self) {
        let before = self.interrupts;
        for (index, port) in self.ports.iter().enumerate() {
            if port.interrupts() & port.registers.enabled != 0 {
                self.interrupts |= 1 << index;
            }
        }
        (self.line)(self.enabled && self.interrupts != 0);
        if self.enabled && self.interrupts & !before != 0 {
            self.message.raise();
        }
    }
}

/// Opens a port's queue of its disk anew: what was in flight is over when this returns.
pub fn open(port: &mut Port, index: usize, io: &Attachment) {
    port.requests = None;
    let Some(disk) = port.drive.as_ref().and_then(|drive| drive.backend()) else { return };
    let disk: &dyn BlockBackend = &**disk;
    match Requests::open(disk, io, index as u32) {
        Ok(requests) => port.requests = Some(requests),
        Err(error) => log::warn!("{}: the disk cannot be used: {error}", port.name),
    }
}

impl Handler for Hba {
    fn ready(&mut self, source: u32) {
        let memory = Arc::clone(&self.memory);
        let quiet = self.quiet;
        match self.ports.get_mut(source as usize) {
            Some(port) => port.serve(&memory, quiet),
            // The registers' event, of any port.
            None => self.ports.iter_mut().for_each(|port| port.serve(&memory, quiet)),
        }
        self.interrupt();
        self.landed.signal();
    }

    fn settled(&mut self) -> bool {
        Self::settled(self)
    }

    fn quiesce(&mut self) -> bool {
        self.quiet = true;
        self.settled()
    }

    fn resume(&mut self) {
        self.quiet = false;
        self.ready(u32::MAX);
    }
}
