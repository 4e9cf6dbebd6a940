//! The I/O APIC, Intel 82093AA datasheet (order 290566), with the EOI register of version 20h
//! (Intel I/O Controller Hub datasheets, "I/O APIC EOI Register").
//!
//! A line's level is its logical assertion; the polarity bit is kept and has no effect.

use tetrarch_engine::IoapicState;

use super::{Delivery, Message};

pub(super) const PINS: usize = 24;
/// The offset of the register that ends interrupts of a vector.
pub(super) const EOI: u32 = 0x40;
const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;

const RTE_LOGICAL: u64 = 1 << 11;
const RTE_REMOTE_IRR: u64 = 1 << 14;
const RTE_LEVEL: u64 = 1 << 15;
const RTE_MASKED: u64 = 1 << 16;
/// Delivery status (bit 12) always reads idle: messages arrive at once.
const RTE_WRITABLE: u64 = 0xff00_0000_0001_afff;

/// Registers and pins. Interrupts leave through the `send` argument, which tells whether a local
/// APIC took the message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct IoApic {
    select: u8,
    id: u8,
    lines: u32,
    entries: [u64; PINS],
}

impl IoApic {
    pub fn new() -> Self {
        Self { select: 0, id: 0, lines: 0, entries: [RTE_MASKED; PINS] }
    }

    pub fn set_line(&mut self, pin: usize, level: bool, send: &mut dyn FnMut(&Message) -> bool) {
        let Some(&entry) = self.entries.get(pin) else {
            return;
        };
        let was = self.lines >> pin & 1 != 0;
        if level {
            self.lines |= 1 << pin;
        } else {
            self.lines &= !(1 << pin);
        }
        if entry & RTE_LEVEL != 0 {
            self.service_level(pin, send);
        } else if level && !was && entry & RTE_MASKED == 0 {
            // An edge on a masked pin is lost (3.2.4, bit 16).
            send(&Self::message(entry));
        }
    }

    fn message(entry: u64) -> Message {
        let mode = Delivery::from_bits((entry >> 8) as u32);
        Message {
            dest: (entry >> 56) as u32,
            wide: false,
            logical: entry & RTE_LOGICAL != 0,
            mode,
            vector: entry as u8,
            level: entry & RTE_LEVEL != 0 && mode.has_vector(),
        }
    }

    fn service_level(&mut self, pin: usize, send: &mut dyn FnMut(&Message) -> bool) {
        let Some(entry) = self.entries.get_mut(pin) else {
            return;
        };
        let ready = *entry & (RTE_LEVEL | RTE_MASKED | RTE_REMOTE_IRR) == RTE_LEVEL;
        if !ready || self.lines >> pin & 1 == 0 {
            return;
        }
        let message = Self::message(*entry);
        // Only an interrupt with a vector is answered by an EOI.
        if send(&message) && message.level {
            *entry |= RTE_REMOTE_IRR;
        }
    }

    /// The pins, a bit each, that an EOI of this vector ends.
    pub fn in_service(&self, vector: u8) -> u32 {
        (0..PINS)
            .filter(|&pin| self.entries[pin] as u8 == vector)
            .filter(|&pin| self.entries[pin] & RTE_REMOTE_IRR != 0)
            .fold(0, |pins, pin| pins | 1 << pin)
    }

    /// A local APIC's EOI message: a level still asserted is delivered again.
    pub fn eoi(&mut self, vector: u8, send: &mut dyn FnMut(&Message) -> bool) {
        for pin in 0..PINS {
            let entry = &mut self.entries[pin];
            if *entry as u8 == vector && *entry & RTE_REMOTE_IRR != 0 {
                *entry &= !RTE_REMOTE_IRR;
                self.service_level(pin, send);
            }
        }
    }

    pub fn read(&self, offset: u32) -> u32 {
        match offset {
            0x00 => u32::from(self.select),
            0x10 => match self.select {
                // The arbitration ID is loaded with the ID.
                0 | 2 => u32::from(self.id) << 24,
                1 => VERSION,
                reg => match self.entry_of(reg) {
                    Some((pin, false)) => self.entries[pin] as u32,
                    Some((pin, true)) => (self.entries[pin] >> 32) as u32,
                    None => 0,
                },
            },
            _ => 0,
        }
    }

    fn entry_of(&self, reg: u8) -> Option<(usize, bool)> {
        let index = usize::from(reg.checked_sub(0x10)?);
        (index / 2 < PINS).then_some((index / 2, index & 1 != 0))
    }

    pub fn write(&mut self, offset: u32, value: u32, send: &mut dyn FnMut(&Message) -> bool) {
        match offset {
            0x00 => self.select = value as u8,
            0x10 => {
                if self.select == 0 {
                    self.id = (value >> 24 & 0xf) as u8;
                } else if let Some((pin, high)) = self.entry_of(self.select) {
                    self.write_entry(pin, high, value, send);
                }
            }
            EOI => self.eoi(value as u8, send),
            _ => {}
        }
    }

    /// The pin that a write of this register unmasks.
    pub fn unmasks(&self, offset: u32, value: u32) -> Option<usize> {
        let (pin, high) = self.entry_of(self.select).filter(|_| offset == 0x10)?;
        let unmasks = !high && u64::from(value) & RTE_MASKED == 0;
        (unmasks && self.entries[pin] & RTE_MASKED != 0).then_some(pin)
    }

    fn write_entry(
        &mut self,
        pin: usize,
        high: bool,
        value: u32,
        send: &mut dyn FnMut(&Message) -> bool,
    ) {
        let (shift, half) = if high { (32, !0 << 32) } else { (0, 0xffff_ffff) };
        let writable = RTE_WRITABLE & half;
        let entry = &mut self.entries[pin];
        *entry = *entry & !writable | u64::from(value) << shift & writable;
        if *entry & RTE_LEVEL == 0 {
            // Not in the datasheet; chips do it, and Linux's __eoi_ioapic_pin relies on it for
            // versions without the EOI register.
            *entry &= !RTE_REMOTE_IRR;
        }
        self.service_level(pin, send);
    }

    pub fn state(&self) -> IoapicState {
        let Self { select, id, lines, entries } = *self;
        IoapicState { select, id, lines, entries }
    }

    pub fn restored(state: &IoapicState) -> Self {
        let writable = |entry| entry & (RTE_WRITABLE | RTE_REMOTE_IRR);
        Self {
            select: state.select,
            id: state.id & 15,
            lines: state.lines & ((1 << PINS) - 1),
            entries: state.entries.map(writable),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench {
        ioapic: IoApic,
        sent: Vec<Message>,
    }

    impl Bench {
        fn new() -> Self {
            Self { ioapic: IoApic::new(), sent: Vec::new() }
        }

        fn write(&mut self, reg: u32, value: u32) {
            let sent = &mut self.sent;
            let mut send = |m: &Message| {
                sent.push(*m);
                true
            };
            self.ioapic.write(0, reg, &mut send);
            self.ioapic.write(0x10, value, &mut send);
        }

        fn line(&mut self, pin: usize, level: bool) {
            let sent = &mut self.sent;
            self.ioapic.set_line(pin, level, &mut |m| {
                sent.push(*m);
                true
            });
        }

        fn eoi(&mut self, vector: u8) {
            let sent = &mut self.sent;
            self.ioapic.eoi(vector, &mut |m| {
                sent.push(*m);
                true
            });
        }

        fn read(&mut self, reg: u32) -> u32 {
            self.ioapic.write(0, reg, &mut |_| true);
            self.ioapic.read(0x10)
        }

        fn vectors(&mut self) -> Vec<u8> {
            self.sent.drain(..).map(|m| m.vector).collect()
        }
    }

    #[test]
    fn reset_state_and_identification() {
        let mut b = Bench::new();
        assert_eq!(b.read(1), 0x0017_0020);
        assert_eq!(b.read(0x10), 0x1_0000);
        assert_eq!(b.read(0x3f), 0);
        b.write(0, 0xffff_ffff);
        assert_eq!((b.read(0), b.read(2)), (0x0f00_0000, 0x0f00_0000));
        assert_eq!(b.read(0x40), 0);
    }

    #[test]
    fn edge_is_sent_once_per_rise_and_lost_while_masked() {
        let mut b = Bench::new();
        b.write(0x18, 0x1_0031);
        b.line(4, true);
        b.write(0x18, 0x31);
        assert_eq!(b.vectors(), []);
        b.line(4, true);
        b.line(4, false);
        b.line(4, true);
        assert_eq!(b.vectors(), [0x31]);
    }

    #[test]
    fn level_waits_for_eoi_and_repeats_while_asserted() {
        let mut b = Bench::new();
        b.write(0x22, 0x8041);
        b.line(9, true);
        b.line(9, true);
        assert_eq!(b.vectors(), [0x41]);
        assert_eq!(b.read(0x22), 0xc041);
        b.eoi(0x41);
        assert_eq!(b.vectors(), [0x41]);
        b.line(9, false);
        b.eoi(0x41);
        assert_eq!(b.vectors(), []);
        assert_eq!(b.read(0x22), 0x8041);
    }

    #[test]
    fn level_asserted_while_masked_is_sent_on_unmask() {
        let mut b = Bench::new();
        b.write(0x22, 0x1_8041);
        b.line(9, true);
        assert_eq!(b.vectors(), []);
        b.write(0x22, 0x8041);
        assert_eq!(b.vectors(), [0x41]);
    }

    #[test]
    fn eoi_register_and_edge_trick_clear_remote_irr() {
        let mut b = Bench::new();
        b.write(0x22, 0x8041);
        b.line(9, true);
        b.line(9, false);
        b.ioapic.write(0x40, 0x41, &mut |_| true);
        assert_eq!(b.read(0x22), 0x8041);
        b.line(9, true);
        b.line(9, false);
        b.write(0x22, 0x1_0041);
        b.write(0x22, 0x8041);
        assert_eq!(b.read(0x22), 0x8041);
    }

    #[test]
    fn message_carries_destination_and_modes() {
        let mut b = Bench::new();
        b.write(0x15, 0xab00_0000);
        b.write(0x14, 0x0951);
        b.line(2, true);
        let message = b.sent[0];
        assert_eq!((message.dest, message.logical), (0xab, true));
        assert_eq!(message.mode, Delivery::LowestPriority);
    }

    #[test]
    fn refused_level_message_sets_no_remote_irr() {
        let mut b = Bench::new();
        b.write(0x22, 0x8041);
        b.ioapic.set_line(9, true, &mut |_| false);
        assert_eq!(b.read(0x22), 0x8041);
    }
}
