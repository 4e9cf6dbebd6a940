//! Who answers an access outside RAM: a chip of the engine, or the machine.
//!
//! The engine has the interrupt controllers and the PIT ([`crate::irqchip`]); all
//! other ports and addresses are the machine's, whose answer an [`Exit`] asks for.
//! The clock is read only for registers that time is behind.

use tetrarch_engine::Exit;
use tetrarch_memory::GuestPhys;

use crate::cpu::Cpu;
use crate::irqchip;
use crate::state::fault::{R, Stop};
use crate::state::mask;

/// Where the I/O APIC lies (82093AA, 3.1: as a PC's firmware leaves it).
pub const IOAPIC_BASE: u64 = 0xFEC0_0000;

impl Cpu {
    /// Reads a port. The error asks the machine, and its answer is the value.
    pub fn port_in(&mut self, port: u16, size: usize) -> Result<u64, Exit> {
        if !irqchip::is_port(port) {
            return Err(Exit::PortIn { port, size: size as u8 });
        }
        let value = self.vm.irqchip.port_read(port, size as u8, self.now_ns());
        Ok(value.map_or(u64::MAX, u64::from) & mask(size))
    }

    /// Writes a port.
    pub fn port_out(&mut self, port: u16, size: usize, value: u64) -> Result<(), Exit> {
        let data = (value & mask(size)) as u32;
        if !irqchip::is_port(port) {
            return Err(Exit::PortOut { port, size: size as u8, data });
        }
        self.vm.irqchip.port_write(port, size as u8, data, self.now_ns());
        Ok(())
    }

    /// Reads memory that is not RAM.
    pub fn read_device(&mut self, address: GuestPhys, size: usize) -> Result<u64, Exit> {
        let (page, offset) = (address.0 & !0xFFF, address.page_offset() as u32);
        let value = if page == IOAPIC_BASE {
            self.settle_eoi();
            self.vm.irqchip.ioapic_read(offset)
        } else if self.is_local_apic(page) {
            self.settle_eoi();
            let now = if irqchip::is_timed(offset) { self.now_ns() } else { 0 };
            self.vm.irqchip.lapic_read(self.id, offset & !3, now) >> (offset % 4 * 8)
        } else {
            return Err(Exit::MmioRead { address: address.0, size: size as u8 });
        };
        Ok(u64::from(value) & mask(size))
    }

    /// Writes memory that is not RAM.
    pub fn write_device(
        &mut self,
        address: GuestPhys,
        size: usize,
        value: u64,
    ) -> Result<(), Exit> {
        let (page, offset) = (address.0 & !0xFFF, address.page_offset() as u32);
        if page == IOAPIC_BASE {
            self.settle_eoi();
            self.vm.irqchip.ioapic_write(offset, value as u32);
        } else if self.is_local_apic(page) {
            self.settle_eoi();
            // Other widths are undefined (SDM 3A, 11.4.1); they are ignored.
            if size == 4 && offset.is_multiple_of(4) {
                let timed = irqchip::is_timed(offset);
                let (now, tsc) = if timed { (self.now_ns(), self.tsc()) } else { (0, 0) };
                self.vm.irqchip.lapic_write(self.id, offset, value as u32, now, tsc);
            }
        } else {
            let data = value & mask(size);
            return Err(Exit::MmioWrite { address: address.0, size: size as u8, data });
        }
        Ok(())
    }

    /// The answer to `exit`, or the exit itself where there is none yet. A doorbell's
    /// answer is in the log too: it rings once for each run of the instruction.
    pub fn ask(&mut self, exit: Exit) -> R<u64> {
        if let Some(answer) = self.replay.next() {
            return Ok(answer);
        }
        if self.vm.doorbells.rang(&exit) {
            self.replay.answer(0);
            return Ok(self.replay.next().unwrap_or(0));
        }
        Err(Stop::Exit(exit))
    }

    /// RAM goes first: an APIC page that a guest moves over RAM is not seen there.
    fn is_local_apic(&self, page: u64) -> bool {
        self.vm.irqchip.lapic_page(self.id) == Some(page)
    }
}
