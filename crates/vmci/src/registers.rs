//! The registers, by ports and in memory: all of 32 bits, but the data, which come in bytes.

use std::sync::Arc;

use parking_lot::Mutex;
use tetrarch_bus::{Device, DeviceError};

use crate::core::Core;

const STATUS: u64 = 0x00;
const CONTROL: u64 = 0x04;
const ICR: u64 = 0x08;
const IMR: u64 = 0x0C;
const DATA_OUT: u64 = 0x10;
const DATA_IN: u64 = 0x14;
const CAPS: u64 = 0x18;
const RESULT_LOW: u64 = 0x1C;
const RESULT_HIGH: u64 = 0x20;
const DATA_OUT_LOW: u64 = 0x24;
const DATA_OUT_HIGH: u64 = 0x28;
const DATA_IN_LOW: u64 = 0x2C;
const DATA_IN_HIGH: u64 = 0x30;
const GUEST_PAGE_SHIFT: u64 = 0x34;

const CONTROL_RESET: u32 = 1 << 0;
const ENABLE_INTERRUPTS: u32 = 1 << 1;
const DISABLE_INTERRUPTS: u32 = 1 << 2;

/// Of all guests on x86.
const PAGE_SHIFT: u32 = 12;

pub struct Registers(pub(crate) Arc<Mutex<Core>>);

fn with_low(address: u64, low: u32) -> u64 {
    address >> 32 << 32 | u64::from(low)
}

fn with_high(address: u64, high: u32) -> u64 {
    address & u64::from(u32::MAX) | u64::from(high) << 32
}

impl Device for Registers {
    fn read(&self, offset: u64, size: u8) -> Result<u64, DeviceError> {
        let mut core = self.0.lock();
        if offset == DATA_IN {
            return Ok(core.read_data(size));
        }
        let at = offset & !3;
        let value = match at {
            STATUS => core.interrupts.enabled().into(),
            ICR => core.interrupts.take_causes(),
            IMR => core.interrupts.mask(),
            CAPS => core.offered(),
            RESULT_LOW => core.take_result() as u32,
            RESULT_HIGH => (i64::from(core.result) >> 32) as u32,
            DATA_OUT_LOW => core.data_out as u32,
            DATA_OUT_HIGH => (core.data_out >> 32) as u32,
            DATA_IN_LOW => core.data_in as u32,
            DATA_IN_HIGH => (core.data_in >> 32) as u32,
            GUEST_PAGE_SHIFT => PAGE_SHIFT,
            _ => 0,
        };
        Ok(u64::from(value) >> (8 * (offset - at)))
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> Result<(), DeviceError> {
        let mut core = self.0.lock();
        if offset == DATA_OUT {
            core.write_data(&value.to_le_bytes()[..usize::from(size.min(8))]);
            return Ok(());
        }
        if size != 4 {
            return Ok(());
        }
        let value = value as u32;
        match offset {
            CONTROL if value & CONTROL_RESET != 0 => core.forget(),
            CONTROL => {
                let on = core.interrupts.enabled() || value & ENABLE_INTERRUPTS != 0;
                core.interrupts.set_enabled(on && value & DISABLE_INTERRUPTS == 0);
            }
            IMR => core.interrupts.set_mask(value),
            CAPS => core.used = value & core.offered(),
            DATA_OUT_HIGH => core.data_out = with_high(core.data_out, value),
            DATA_IN_HIGH => core.data_in = with_high(core.data_in, value),
            DATA_OUT_LOW => {
                core.data_out = with_low(core.data_out, value);
                core.send();
            }
            DATA_IN_LOW => {
                core.data_in = with_low(core.data_in, value);
                core.receive();
            }
            _ => {}
        }
        Ok(())
    }
}
