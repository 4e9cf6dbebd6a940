//! The controller as its function has it: registers, life, saved state.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use tetrarch_bus::{Device, DeviceError, Interrupt};
use tetrarch_devices::Drive as Line;
use tetrarch_io::{Attachment, Event, IoThread, Trigger};
use tetrarch_memory::GuestMemory;

use super::MAX_PORTS;
use super::hba::{Hba, open};
use super::port::{COMMAND_KEPT, Port, Registers, interrupt};
use crate::ata::Drive;
use crate::landed::Landed;
use crate::requests::Requests;
use crate::saved::{DamagedState, load_drive, save_drive};

/// The source of the registers' event; below are those of disks, by port.
const REGISTERS: u32 = MAX_PORTS as u32;

/// A controller at rest, in numbers: of itself, and of each port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    pub controller: Vec<u64>,
    pub ports: Vec<Vec<u64>>,
}

/// One controller of a machine.
///
/// Lock: `hba`, held for an access to a register and while the I/O thread serves ports;
/// interrupts are raised under it.
pub struct Ahci {
    hba: Arc<Mutex<Hba>>,
    event: Event,
    landed: Arc<Landed>,
    name: String,
    attachment: Attachment,
}

impl Ahci {
    /// With the drives at its ports, by their names: 1 to [`MAX_PORTS`]. `line` and `message`
    /// are its interrupt, whichever its driver takes.
    pub fn new(
        io: &IoThread,
        memory: Arc<GuestMemory>,
        name: &str,
        drives: Vec<Option<(String, Drive)>>,
        line: Line,
        message: Arc<dyn Interrupt>,
    ) -> io::Result<Self> {
        let port = |drive: Option<(String, Drive)>| match drive {
            Some((name, drive)) => Port::new(name, Some(drive)),
            None => Port::new(String::new(), None),
        };
        let ports = drives.into_iter().take(MAX_PORTS).map(port).collect();
        let landed = Arc::new(Landed::default());
        let hba = Hba::new(memory, ports, line, message, Arc::clone(&landed));
        let hba = Arc::new(Mutex::new(hba));
        let attachment = io.attach(name, Arc::clone(&hba) as _);
        let event = Event::new()?;
        attachment.add(&event, REGISTERS, Trigger::Edge)?;
        for (index, port) in hba.lock().ports.iter_mut().enumerate() {
            open(port, index, &attachment);
        }
        Ok(Self { hba, event, landed, name: name.into(), attachment })
    }

    pub fn reset(&self) {
        let hba = &mut *self.hba.lock();
        hba.reset(&self.attachment);
        for port in &mut hba.ports {
            (port.registers.list, port.registers.received) = (0, 0);
        }
        hba.interrupt();
    }

    /// Whether the controller may access memory; at first it may. When it was taken from it,
    /// nothing is read or written there any more, and it goes on when it is given back.
    pub fn set_master(&self, master: bool) {
        let mut hba = self.hba.lock();
        for port in &mut hba.ports {
            (port.master, port.away) = (master, false);
        }
        if master {
            return self.event.signal();
        }
        self.landed.wait(&self.name, &mut hba, Hba::settled);
        hba.ports.iter_mut().for_each(|port| port.away = true);
    }

    /// How many requests wait for the host to be mended: they are no part of a saved state.
    pub fn stopped(&self) -> usize {
        let hba = self.hba.lock();
        hba.ports.iter().filter_map(|port| port.requests.as_ref()).map(Requests::stopped).sum()
    }

    /// Lets go of the disks.
    pub fn close(&self) {
        for port in &mut self.hba.lock().ports {
            port.requests = None;
            if let Some(drive) = &mut port.drive {
                drive.close();
            }
        }
    }

    /// Exact while the machine is held.
    pub fn save(&self) -> Saved {
        let hba = self.hba.lock();
        let controller = vec![hba.enabled.into(), hba.interrupts.into()];
        Saved { controller, ports: hba.ports.iter().map(save_port).collect() }
    }

    pub fn load(&self, saved: &Saved) -> Result<(), DamagedState> {
        self.reset();
        let hba = &mut *self.hba.lock();
        let &[enabled, interrupts] = &saved.controller[..] else { return Err(DamagedState) };
        if saved.ports.len() != hba.ports.len() {
            return Err(DamagedState);
        }
        for (port, saved) in hba.ports.iter_mut().zip(&saved.ports) {
            load_port(port, saved)?;
        }
        (hba.enabled, hba.interrupts) = (enabled != 0, interrupts as u32);
        hba.interrupt();
        self.event.signal();
        Ok(())
    }
}

fn save_port(port: &Port) -> Vec<u64> {
    let Registers {
        list,
        received,
        interrupts,
        enabled,
        command,
        status,
        error,
        signature,
        control,
        errors,
        active,
        issued,
        halted,
        resetting,
        taken,
        failed,
        failure,
    } = port.registers.clone();
    let mut saved = vec![
        list,
        received,
        interrupts.into(),
        enabled.into(),
        command.into(),
        status.into(),
        error.into(),
        signature.into(),
        control.into(),
        errors.into(),
        active.into(),
        issued.into(),
        halted.into(),
        resetting.into(),
        taken.into(),
        failed.into(),
        failure.into(),
    ];
    if let Some(drive) = &port.drive {
        saved.extend(save_drive(drive));
    }
    saved
}

fn load_port(port: &mut Port, saved: &[u64]) -> Result<(), DamagedState> {
    let (registers, rest) = saved.split_first_chunk::<17>().ok_or(DamagedState)?;
    let flag = |at: usize| registers[at] != 0;
    let word = |at: usize| registers[at] as u32;
    let byte = |at: usize| registers[at] as u8;
    match &mut port.drive {
        Some(drive) => load_drive(drive, rest)?,
        None if rest.is_empty() => {}
        None => return Err(DamagedState),
    }
    port.registers = Registers {
        list: registers[0] & !0x3FF,
        received: registers[1] & !0xFF,
        interrupts: word(2),
        enabled: word(3) & interrupt::ALL,
        command: word(4) & COMMAND_KEPT,
        // Nothing is in flight: a device at rest is not busy.
        status: byte(5) & 0x7F,
        error: byte(6),
        signature: word(7),
        control: word(8),
        errors: word(9),
        active: word(10),
        issued: word(11),
        halted: flag(12),
        resetting: flag(13),
        // Of a port that goes on, none was taken up.
        taken: if flag(12) { word(14) } else { 0 },
        failed: byte(15).min(32),
        failure: byte(16),
    };
    Ok(())
}

/// The memory that BAR 5 shows: words of 32 bits, or two of them (3).
pub struct AhciRegisters(pub Arc<Ahci>);

impl Device for AhciRegisters {
    fn read(&self, offset: u64, size: u8) -> Result<u64, DeviceError> {
        let hba = self.0.hba.lock();
        let (at, within) = (offset & !3, offset & 3);
        let mut value = u64::from(hba.read(at));
        if within + u64::from(size) > 4 {
            value |= u64::from(hba.read(at + 4)) << 32;
        }
        Ok(value >> (8 * within))
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> Result<(), DeviceError> {
        if size < 4 || !offset.is_multiple_of(4) {
            return Ok(());
        }
        let ahci = &*self.0;
        let mut hba = ahci.hba.lock();
        let mut work = hba.write(offset, value as u32, &ahci.attachment);
        if size == 8 {
            work |= hba.write(offset + 4, (value >> 32) as u32, &ahci.attachment);
        }
        drop(hba);
        if work {
            ahci.event.signal();
        }
        Ok(())
    }
}
