//! The UART on a machine: ports, interrupt line, output and queued input.

use parking_lot::Mutex;
use tetrarch_bus::{Device, DeviceError};
use tetrarch_io::Output;

use crate::uart16550::Registers;

/// Takes the level of the interrupt line to the machine; must not call into devices.
pub type Drive = Box<dyn Fn(bool) + Send + Sync>;

/// Order of locks: the wire's, then the registers', then the output's. Only the
/// wire's is held while calling out, so that levels come in their order.
pub struct SerialPort {
    registers: Mutex<Registers>,
    /// The level that was driven last.
    wire: Mutex<bool>,
    drive: Drive,
    output: Output,
}

impl SerialPort {
    pub fn new(drive: Drive) -> Self {
        Self {
            registers: Mutex::default(),
            wire: Mutex::default(),
            drive,
            output: Output::default(),
        }
    }

    pub fn output(&self) -> &Output {
        &self.output
    }

    /// Input for the guest. Never blocks: the FIFO is fed as the guest drains it.
    pub fn receive(&self, data: &[u8]) {
        self.registers.lock().offer(data);
        self.update_wire();
    }

    /// Input bytes that the guest has not taken into its FIFO.
    pub fn queued(&self) -> usize {
        self.registers.lock().line.len()
    }

    pub fn registers(&self) -> Registers {
        self.registers.lock().clone()
    }

    pub fn set_registers(&self, registers: Registers) {
        *self.registers.lock() = registers;
        self.update_wire();
    }

    /// The level is asked for inside the lock that orders the changes: the last caller
    /// drives what is true then, and no stale level stays.
    fn update_wire(&self) {
        let mut wire = self.wire.lock();
        let level = self.registers.lock().irq();
        if *wire != level {
            *wire = level;
            (self.drive)(level);
        }
    }
}

/// A wide access is a row of byte accesses, upwards, as an ISA bus makes it of an
/// 8-bit device.
impl Device for SerialPort {
    fn read(&self, offset: u64, size: u8) -> Result<u64, DeviceError> {
        let mut value = 0;
        {
            let mut registers = self.registers.lock();
            for index in 0..u64::from(size.min(8)) {
                value |= u64::from(registers.read(offset.saturating_add(index))) << (8 * index);
            }
            registers.feed();
        }
        self.update_wire();
        Ok(value)
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> Result<(), DeviceError> {
        let mut full = false;
        {
            let mut registers = self.registers.lock();
            for index in 0..u64::from(size.min(8)) {
                let byte = (value >> (8 * index)) as u8;
                if let Some(byte) = registers.write(offset.saturating_add(index), byte) {
                    full |= self.output.push(byte);
                }
            }
            registers.feed();
        }
        self.update_wire();
        if full {
            self.output.wait_for_room();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn wire_follows_and_tells_changes_alone() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        let port = SerialPort::new(Box::new(move |level| log.lock().push(level)));
        port.write(1, 1, 0x01).unwrap();
        port.receive(b"ab");
        assert_eq!(*seen.lock(), [true]);
        assert_eq!(port.read(0, 1).unwrap(), u64::from(b'a'));
        assert_eq!(port.read(0, 1).unwrap(), u64::from(b'b'));
        assert_eq!(*seen.lock(), [true, false]);
        port.write(0, 2, 0x0258).unwrap(); // THR, then IER
        assert_eq!(*seen.lock(), [true, false, true]);
        assert_eq!(port.output().take(), b"X");
        port.set_registers(Registers::default());
        assert_eq!(seen.lock().last(), Some(&false));
    }

    #[test]
    fn offsets_outside_are_nobody_s() {
        let port = SerialPort::new(Box::new(|_| {}));
        port.write(u64::MAX, 8, u64::MAX).unwrap();
        assert_eq!(port.read(u64::MAX, 8).unwrap(), u64::MAX);
        assert_eq!(port.read(7, 2).unwrap(), 0xFF00);
        assert_eq!(port.registers(), Registers::default());
    }
}
