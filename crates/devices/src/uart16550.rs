//! The registers of the 16550A UART.
//!
//! Names and behaviour follow the PC16550D data sheet (National Semiconductor,
//! June 1995). Line speed is not modelled: a transmitted byte leaves at once, so
//! THRE and TEMT are always set. A PC's board passes the interrupt on only while
//! OUT2 is set; here it is passed on always, as other VMMs do, since small guests
//! enable interrupts and forget OUT2.

use std::collections::VecDeque;

const FIFO_SIZE: usize = 16;

const IER_RDI: u8 = 0x01;
const IER_THRI: u8 = 0x02;
const IER_RLSI: u8 = 0x04;
const IER_MSI: u8 = 0x08;
const IER_MASK: u8 = 0x0F;

const IIR_NONE: u8 = 0x01;
const IIR_MSI: u8 = 0x00;
const IIR_THRI: u8 = 0x02;
const IIR_RDI: u8 = 0x04;
const IIR_RLSI: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0C;
const IIR_FIFOS: u8 = 0xC0;

const FCR_ENABLE: u8 = 0x01;
const FCR_CLEAR_RX: u8 = 0x02;
const FCR_STORED: u8 = 0xC9;
const TRIGGER: [usize; 4] = [1, 4, 8, 14];

const LCR_BREAK: u8 = 0x40;
const LCR_DLAB: u8 = 0x80;

const MCR_DTR: u8 = 0x01;
const MCR_RTS: u8 = 0x02;
const MCR_OUT1: u8 = 0x04;
const MCR_OUT2: u8 = 0x08;
const MCR_LOOP: u8 = 0x10;
const MCR_MASK: u8 = 0x1F;

/// A driver that starts or sends reads LSR a few times before it writes again.
const POLLS: u8 = 16;

const LSR_DR: u8 = 0x01;
const LSR_OE: u8 = 0x02;
const LSR_FE: u8 = 0x08;
const LSR_BI: u8 = 0x10;
const LSR_THRE: u8 = 0x20;
const LSR_TEMT: u8 = 0x40;
const LSR_FIFO_ERROR: u8 = 0x80;

const MSR_TERI: u8 = 0x04;
const MSR_CTS: u8 = 0x10;
const MSR_DSR: u8 = 0x20;
const MSR_RI: u8 = 0x40;
const MSR_DCD: u8 = 0x80;
/// A terminal is connected and ready.
const MODEM_INPUTS: u8 = MSR_CTS | MSR_DSR | MSR_DCD;

/// The UART as the guest can tell it, and the input that waits for it.
///
/// The fields are what a saved machine has of it; whatever they hold, no access
/// does more than give the guest wrong values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registers {
    pub ier: u8,
    pub fcr: u8,
    pub lcr: u8,
    pub mcr: u8,
    pub mcr_written: bool,
    /// How often LSR was read since anything was written, up to `POLLS`.
    pub polls: u8,
    pub overrun: bool,
    pub msr_delta: u8,
    pub scr: u8,
    pub divisor: u16,
    pub thre_pending: bool,
    /// The receiver's FIFO: each a byte, and above it its errors as LSR shows them.
    pub rx: VecDeque<u16>,
    /// What comes on the line when the guest is ready for it.
    pub line: VecDeque<u8>,
}

impl Default for Registers {
    fn default() -> Self {
        Self {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            mcr_written: false,
            polls: 0,
            overrun: false,
            msr_delta: 0,
            scr: 0,
            divisor: 1, // 115200 baud from the usual 1.8432 MHz
            thre_pending: false,
            rx: VecDeque::with_capacity(FIFO_SIZE),
            line: VecDeque::new(),
        }
    }
}

// The side of the line.
impl Registers {
    /// The level of the interrupt line.
    pub fn irq(&self) -> bool {
        self.interrupt() != IIR_NONE
    }

    /// Bytes from a flow-controlled line: they come as fast as the guest takes them.
    pub fn offer(&mut self, data: &[u8]) {
        self.line.extend(data);
        self.feed();
    }

    /// Moves into the FIFO what the guest is ready for.
    pub fn feed(&mut self) {
        for _ in 0..self.room() {
            let Some(byte) = self.line.pop_front() else { break };
            self.receive(u16::from(byte));
        }
    }

    /// How many bytes the guest is ready to receive.
    fn room(&self) -> usize {
        // Flow control: hold input back until the guest says that it receives, by RTS
        // or by the interrupt. Linux does so when the port is opened, after its startup
        // code has cleared the FIFOs and thrown a byte away. A guest that never touched
        // MCR may be polling, and one that does nothing but read LSR is: so UEFI firmware
        // waits for a key.
        let polls = !self.mcr_written || self.polls >= POLLS;
        let ready = self.mcr & MCR_RTS != 0 || self.ier & IER_RDI != 0 || polls;
        if self.mcr & MCR_LOOP != 0 || !ready {
            return 0;
        }
        self.capacity().saturating_sub(self.rx.len())
    }

    fn capacity(&self) -> usize {
        if self.fifos() { FIFO_SIZE } else { 1 }
    }

    fn fifos(&self) -> bool {
        self.fcr & FCR_ENABLE != 0
    }

    fn receive(&mut self, item: u16) {
        if self.rx.len() < self.capacity() {
            self.rx.push_back(item);
            return;
        }
        self.overrun = true;
        // Without FIFO the newer byte overwrites the one in RBR; with it, the FIFO
        // stays and the byte in the shift register is lost (data sheet, 8.6.3, bit 1).
        if let Some(last) = self.rx.back_mut()
            && self.fcr & FCR_ENABLE == 0
        {
            *last = item;
        }
    }
}

// The side of the bus.
impl Registers {
    pub fn read(&mut self, offset: u64) -> u8 {
        let latch = self.lcr & LCR_DLAB != 0;
        match offset {
            0 if latch => self.divisor as u8,
            0 => self.rx.pop_front().unwrap_or(0) as u8,
            1 if latch => (self.divisor >> 8) as u8,
            1 => self.ier,
            2 => {
                let interrupt = self.interrupt();
                // Data sheet, table V: reading IIR resets the THRE interrupt if it is
                // the one reported.
                if interrupt == IIR_THRI {
                    self.thre_pending = false;
                }
                interrupt | if self.fifos() { IIR_FIFOS } else { 0 }
            }
            3 => self.lcr,
            4 => self.mcr,
            5 => {
                self.polls = POLLS.min(self.polls.saturating_add(1));
                self.read_lsr()
            }
            6 => self.modem_inputs() | std::mem::take(&mut self.msr_delta),
            7 => self.scr,
            _ => 0xFF,
        }
    }

    /// Gives the byte that goes out on the line, if one does.
    #[must_use]
    pub fn write(&mut self, offset: u64, value: u8) -> Option<u8> {
        let latch = self.lcr & LCR_DLAB != 0;
        self.polls = 0;
        match offset {
            0 if latch => self.divisor = self.divisor & 0xFF00 | u16::from(value),
            0 => return self.transmit(value),
            1 if latch => self.divisor = self.divisor & 0xFF | u16::from(value) << 8,
            1 => {
                // Enabling THRE while the transmitter is empty raises it at once. The
                // data sheet is silent; Linux's 8250 driver starts transmission this way
                // and tests for it (serial8250_THRE_test).
                if value & !self.ier & IER_THRI != 0 {
                    self.thre_pending = true;
                }
                self.ier = value & IER_MASK;
            }
            2 => self.write_fcr(value),
            3 => self.set_controls(value, self.mcr),
            4 => {
                self.mcr_written = true;
                self.set_controls(self.lcr, value & MCR_MASK);
            }
            7 => self.scr = value,
            _ => {} // LSR and MSR are read-only here: factory test bits
        }
        None
    }

    /// What LSR says of the byte that is read next (data sheet, 8.4).
    fn errors(&self) -> u8 {
        self.rx.front().map_or(0, |item| (item >> 8) as u8)
    }

    fn read_lsr(&mut self) -> u8 {
        let mut lsr = LSR_THRE | LSR_TEMT;
        if !self.rx.is_empty() {
            lsr |= LSR_DR | self.errors();
            if self.fifos() && self.rx.iter().any(|item| item >> 8 != 0) {
                lsr |= LSR_FIFO_ERROR;
            }
            self.rx[0] &= 0xFF; // reading clears the errors
        }
        if std::mem::take(&mut self.overrun) {
            lsr |= LSR_OE;
        }
        lsr
    }

    /// The IIR code of highest priority, or `IIR_NONE`.
    fn interrupt(&self) -> u8 {
        let enabled = |bit| self.ier & bit != 0;
        if enabled(IER_RLSI) && (self.overrun || self.errors() != 0) {
            return IIR_RLSI;
        }
        if enabled(IER_RDI) && !self.rx.is_empty() {
            let trigger = if self.fifos() { TRIGGER[usize::from(self.fcr >> 6)] } else { 1 };
            // Below the trigger level a time of four characters has to pass; without a
            // line speed it has passed.
            return if self.rx.len() >= trigger { IIR_RDI } else { IIR_TIMEOUT };
        }
        if enabled(IER_THRI) && self.thre_pending {
            return IIR_THRI;
        }
        if enabled(IER_MSI) && self.msr_delta != 0 {
            return IIR_MSI;
        }
        IIR_NONE
    }

    fn transmit(&mut self, value: u8) -> Option<u8> {
        self.thre_pending = true;
        if self.mcr & MCR_LOOP != 0 {
            self.receive(u16::from(value));
            return None;
        }
        Some(value)
    }

    fn write_fcr(&mut self, value: u8) {
        // Data sheet, 8.5: changing bit 0 clears both FIFOs, and the other bits are only
        // programmed while bit 0 is written as 1.
        let enable = value & FCR_ENABLE != 0;
        if enable != self.fifos() || enable && value & FCR_CLEAR_RX != 0 {
            while let Some(item) = self.rx.pop_back() {
                // A flow-controlled line: what the guest cleared unread it gets again, so
                // that input sent before a driver starts is not lost.
                if self.mcr & MCR_LOOP == 0 {
                    self.line.push_front(item as u8);
                }
            }
        }
        self.fcr = if enable { value & FCR_STORED } else { 0 };
    }

    /// SOUT, which the loop leads to SIN, is held at 0 (data sheet, 8.6.7, bit 4).
    fn loops_break(&self) -> bool {
        self.mcr & MCR_LOOP != 0 && self.lcr & LCR_BREAK != 0
    }

    fn modem_inputs(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return MODEM_INPUTS;
        }
        // Data sheet, 8.6.7, bit 4: the outputs are looped to the inputs.
        [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)]
            .into_iter()
            .filter(|(output, _)| self.mcr & output != 0)
            .fold(0, |inputs, (_, input)| inputs | input)
    }

    fn set_controls(&mut self, lcr: u8, mcr: u8) {
        let breaking = self.loops_break();
        let before = self.modem_inputs();
        (self.lcr, self.mcr) = (lcr, mcr);
        let after = self.modem_inputs();
        if self.loops_break() && !breaking {
            // Data sheet, 8.4, bits 3 and 4: one zero character is loaded for a break of
            // any length, without a stop bit.
            self.receive(u16::from(LSR_BI | LSR_FE) << 8);
        }
        let mut delta = (before ^ after) >> 4;
        if before & MSR_RI == 0 || after & MSR_RI != 0 {
            delta &= !MSR_TERI; // only the trailing edge of RI counts
        }
        self.msr_delta |= delta;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u64 = 0;
    const IER: u64 = 1;
    const IIR: u64 = 2;
    const FCR: u64 = 2;
    const LCR: u64 = 3;
    const MCR: u64 = 4;
    const LSR: u64 = 5;
    const MSR: u64 = 6;

    fn after(writes: &[(u64, u8)]) -> Registers {
        let mut uart = Registers::default();
        for &(offset, value) in writes {
            assert_eq!(uart.write(offset, value), None);
        }
        uart
    }

    #[test]
    fn sent_byte_leaves_at_once_and_interrupts() {
        let mut uart = after(&[(IER, 0x02)]);
        assert_eq!(uart.read(IIR), 0x02, "the transmitter is empty");
        assert!(!uart.irq());
        assert_eq!(uart.write(DATA, b'x'), Some(b'x'));
        assert_eq!(uart.read(LSR), 0x60);
        assert_eq!(uart.read(IIR), 0x02);
    }

    #[test]
    fn input_comes_as_fast_as_the_guest_takes_it() {
        let mut uart = after(&[(FCR, 0x81), (IER, 0x01)]);
        uart.offer(b"0123456789abcdefXYZ");
        assert_eq!((uart.rx.len(), uart.line.len()), (16, 3));
        for &byte in b"0123456789abcdefXYZ" {
            assert_eq!(uart.read(IIR), if uart.rx.len() >= 8 { 0xC4 } else { 0xCC });
            assert_eq!(uart.read(DATA), byte);
            uart.feed();
        }
        assert!(!uart.irq());
        assert_eq!(uart.read(LSR), 0x60, "nothing was overrun");
    }

    #[test]
    fn cleared_input_comes_again_in_its_order() {
        let mut uart = after(&[(FCR, 0x01)]);
        uart.offer(b"abcdefghijklmnopqr");
        assert_eq!(uart.write(FCR, 0x03), None);
        assert!(uart.rx.is_empty());
        uart.feed();
        assert_eq!((uart.read(DATA), uart.read(DATA)), (b'a', b'b'));
    }

    #[test]
    fn break_goes_through_the_loop_as_one_character() {
        let mut uart = after(&[(FCR, 0x01), (IER, 0x04), (MCR, 0x10), (DATA, 0x41)]);
        assert_eq!((uart.write(LCR, 0x43), uart.write(LCR, 0x43)), (None, None));
        assert_eq!(uart.read(LSR), 0xE1, "an error is in the FIFO");
        assert_eq!(uart.read(DATA), 0x41);
        assert_eq!(uart.read(IIR), 0xC6);
        assert_eq!((uart.read(LSR), uart.read(LSR)), (0xF9, 0x61));
        assert_eq!((uart.read(DATA), uart.read(LSR)), (0, 0x60));
    }

    #[test]
    fn overrun_keeps_the_newest_without_fifo_and_the_oldest_with_it() {
        for (fcr, kept) in [(0, b'b'), (1, b'a')] {
            let count = if fcr == 0 { 1 } else { 16 };
            let mut uart = after(&[(MCR, 0x10), (FCR, fcr)]);
            for byte in [b'a'].repeat(count).into_iter().chain([b'b']) {
                assert_eq!(uart.write(DATA, byte), None);
            }
            assert_eq!(uart.read(LSR), 0x63);
            assert_eq!(uart.read(LSR), 0x61);
            let last = (0..count).map(|_| uart.read(DATA)).last();
            assert_eq!(last, Some(kept));
        }
    }

    #[test]
    fn ring_counts_when_it_ends() {
        let mut uart = after(&[(MCR, 0x10)]);
        uart.read(MSR);
        assert_eq!((uart.write(MCR, 0x14), uart.read(MSR)), (None, 0x40));
        assert_eq!((uart.write(MCR, 0x10), uart.read(MSR)), (None, 0x04));
        assert_eq!(uart.read(MSR), 0);
    }
}
