//! The PC's pair of interrupt controllers, Intel 8259A datasheet (order 231468), with the ELCR of
//! Intel's 82371SB (PIIX3) datasheet in place of ICW1's LTIM bit.
//!
//! Two liberties, both taken by every chipset since: an edge stays latched when its line drops
//! before INTA, so a short pulse is never turned into a spurious interrupt; and the slave's INT
//! is seen by the master as a level, so that a request raised during an acknowledge is not lost.

use tetrarch_engine::PicState;

/// The master's input that the slave's INT is wired to.
const CASCADE: u8 = 2;

/// What the next write to the data port means.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Init {
    #[default]
    Done,
    Icw2,
    Icw3,
    Icw4,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Chip {
    /// Fixed wiring: which of the two chips this is.
    master: bool,
    /// Fixed by the chipset: pins whose trigger mode ELCR may change.
    elcr_mask: u8,

    lines: u8,
    irr: u8,
    imr: u8,
    isr: u8,
    elcr: u8,
    base: u8,
    /// The input with the highest priority; 0 unless rotated.
    highest: u8,
    init: Init,
    single: bool,
    icw4_follows: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_fully_nested: bool,
    special_mask: bool,
    poll: bool,
    read_isr: bool,
    /// Requests whose service has ended since somebody asked.
    ended: u8,
}

impl Chip {
    fn new(master: bool) -> Self {
        Self {
            master,
            // IRQ 0, 1, 2, 8 and 13 are edge triggered always (82371SB, 2.5.5.8).
            elcr_mask: if master { 0xf8 } else { 0xde },
            ..Self::default()
        }
    }

    fn level_pins(&self) -> u8 {
        // The cascade follows the slave's output, see the essay above.
        self.elcr | if self.master { 1 << CASCADE } else { 0 }
    }

    fn set_line(&mut self, pin: u8, level: bool) {
        let bit = 1 << (pin & 7);
        let was = self.lines & bit != 0;
        if level {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
        if self.level_pins() & bit != 0 {
            self.irr = self.irr & !bit | self.lines & bit;
        } else if level && !was {
            self.irr |= bit;
        }
    }

    /// The set bit of `set` with the highest priority, and its rank (0 is the highest).
    fn first(&self, set: u8) -> Option<(u8, u32)> {
        if set == 0 {
            return None;
        }
        let rank = set.rotate_right(u32::from(self.highest)).trailing_zeros();
        Some(((self.highest + rank as u8) & 7, rank))
    }

    /// The request that raises INT now.
    fn request(&self) -> Option<u8> {
        let (pin, rank) = self.first(self.irr & !self.imr)?;
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        if self.special_fully_nested && self.master {
            // A slave's higher request passes while its lower one is in service.
            in_service &= !(1 << CASCADE);
        }
        match self.first(in_service) {
            Some((_, busy)) if busy <= rank => None,
            _ => Some(pin),
        }
    }

    fn acknowledge(&mut self, pin: u8) {
        let bit = 1 << (pin & 7);
        if self.level_pins() & bit == 0 {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
            return;
        }
        self.ended |= bit;
        if self.rotate_on_auto_eoi {
            self.highest = (pin + 1) & 7;
        }
    }

    fn end(&mut self, requests: u8) {
        self.ended |= self.isr & requests;
        self.isr &= !requests;
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            // ICW1 (p. 11): edge sense, IMR, special mask and status read are reset.
            self.irr = self.lines & self.level_pins();
            self.imr = 0;
            self.end(self.isr);
            self.highest = 0;
            self.special_mask = false;
            self.read_isr = false;
            self.poll = false;
            self.auto_eoi = false;
            self.rotate_on_auto_eoi = false;
            self.special_fully_nested = false;
            self.single = value & 2 != 0;
            self.icw4_follows = value & 1 != 0;
            self.init = Init::Icw2;
        } else if value & 8 != 0 {
            if value & 4 != 0 {
                self.poll = true;
            }
            if value & 2 != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let level = value & 7;
        // In special mask mode a masked level is left alone by the non-specific EOI (p. 15).
        let in_service = if self.special_mask { self.isr & !self.imr } else { self.isr };
        match value >> 5 {
            0 => self.rotate_on_auto_eoi = false,
            4 => self.rotate_on_auto_eoi = true,
            command @ (1 | 5) => {
                if let Some((pin, _)) = self.first(in_service) {
                    self.end(1 << pin);
                    if command == 5 {
                        self.highest = (pin + 1) & 7;
                    }
                }
            }
            3 => self.end(1 << level),
            7 => {
                self.end(1 << level);
                self.highest = (level + 1) & 7;
            }
            6 => self.highest = (level + 1) & 7,
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        let after_icw3 = if self.icw4_follows { Init::Icw4 } else { Init::Done };
        match self.init {
            Init::Done => self.imr = value,
            Init::Icw2 => {
                self.base = value & 0xf8;
                self.init = if self.single { after_icw3 } else { Init::Icw3 };
            }
            // The wiring is the board's, whatever ICW3 claims.
            Init::Icw3 => self.init = after_icw3,
            Init::Icw4 => {
                self.special_fully_nested = value & 0x10 != 0;
                self.auto_eoi = value & 2 != 0;
                self.init = Init::Done;
            }
        }
    }

    fn set_elcr(&mut self, value: u8) {
        self.elcr = value & self.elcr_mask;
        let level = self.level_pins();
        self.irr = self.irr & !level | self.lines & level;
    }

    fn state(&self) -> PicState {
        PicState {
            lines: self.lines,
            irr: self.irr,
            imr: self.imr,
            isr: self.isr,
            elcr: self.elcr,
            base: self.base,
            highest: self.highest,
            awaits: match self.init {
                Init::Done => 0,
                Init::Icw2 => 2,
                Init::Icw3 => 3,
                Init::Icw4 => 4,
            },
            icw4_follows: self.icw4_follows,
            single: self.single,
            auto_eoi: self.auto_eoi,
            rotate_on_auto_eoi: self.rotate_on_auto_eoi,
            special_fully_nested: self.special_fully_nested,
            special_mask: self.special_mask,
            poll: self.poll,
            read_isr: self.read_isr,
        }
    }

    fn restored(master: bool, state: &PicState) -> Self {
        let fresh = Self::new(master);
        Self {
            lines: state.lines,
            irr: state.irr,
            imr: state.imr,
            isr: state.isr,
            elcr: state.elcr & fresh.elcr_mask,
            base: state.base & 0xf8,
            highest: state.highest & 7,
            init: match state.awaits {
                2 => Init::Icw2,
                3 => Init::Icw3,
                4 => Init::Icw4,
                _ => Init::Done,
            },
            icw4_follows: state.icw4_follows,
            single: state.single,
            auto_eoi: state.auto_eoi,
            rotate_on_auto_eoi: state.rotate_on_auto_eoi,
            special_fully_nested: state.special_fully_nested,
            special_mask: state.special_mask,
            poll: state.poll,
            read_isr: state.read_isr,
            ..fresh
        }
    }
}

/// Master and slave. No lock, no time, no CPU: the caller looks at [`Pic::output`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pic {
    master: Chip,
    slave: Chip,
}

impl Pic {
    pub fn new() -> Self {
        Self { master: Chip::new(true), slave: Chip::new(false) }
    }

    fn update(&mut self) {
        let slave_int = self.slave.request().is_some();
        self.master.set_line(CASCADE, slave_int);
    }

    /// The INTR line to the processor.
    pub fn output(&self) -> bool {
        self.master.request().is_some()
    }

    /// Drives one of the 16 ISA lines. Input 2 of the master is the cascade and has no line.
    pub fn set_line(&mut self, irq: u8, level: bool) {
        match irq {
            CASCADE => return,
            0..=7 => self.master.set_line(irq, level),
            8..=15 => self.slave.set_line(irq - 8, level),
            _ => return,
        }
        self.update();
    }

    /// The INTA sequence: the vector on the bus. With no request left it is the spurious
    /// interrupt, level 7 with no in-service bit (p. 18).
    pub fn inta(&mut self) -> u8 {
        let vector = match self.master.request() {
            Some(CASCADE) => {
                self.master.acknowledge(CASCADE);
                let pin = self.slave.request();
                if let Some(pin) = pin {
                    self.slave.acknowledge(pin);
                }
                self.slave.base | pin.unwrap_or(7)
            }
            Some(pin) => {
                self.master.acknowledge(pin);
                self.master.base | pin
            }
            None => self.master.base | 7,
        };
        self.update();
        vector
    }

    /// Lines whose interrupts have ended since the last call, a bit each.
    pub fn take_ended(&mut self) -> u16 {
        let take = |chip: &mut Chip| u16::from(std::mem::take(&mut chip.ended));
        take(&mut self.master) & !(1 << CASCADE) | take(&mut self.slave) << 8
    }

    fn chip(&mut self, slave: bool) -> &mut Chip {
        if slave { &mut self.slave } else { &mut self.master }
    }

    fn poll(&mut self, slave: bool) -> u8 {
        let chip = self.chip(slave);
        chip.poll = false;
        let pin = chip.request();
        if let Some(pin) = pin {
            chip.acknowledge(pin);
        }
        self.update();
        pin.map_or(0, |pin| 0x80 | pin)
    }

    pub fn read(&mut self, port: u16) -> u8 {
        match port {
            0x20 | 0x21 | 0xa0 | 0xa1 => {
                let slave = port & 0x80 != 0;
                let chip = self.chip(slave);
                if chip.poll {
                    return self.poll(slave);
                }
                match (port & 1 != 0, chip.read_isr) {
                    (true, _) => chip.imr,
                    (false, true) => chip.isr,
                    (false, false) => chip.irr,
                }
            }
            0x4d0 => self.master.elcr,
            0x4d1 => self.slave.elcr,
            _ => 0xff,
        }
    }

    pub fn write(&mut self, port: u16, value: u8) {
        match port {
            0x20 | 0xa0 => self.chip(port == 0xa0).write_command(value),
            0x21 | 0xa1 => self.chip(port == 0xa1).write_data(value),
            0x4d0 => self.master.set_elcr(value),
            0x4d1 => self.slave.set_elcr(value),
            _ => return,
        }
        self.update();
    }

    pub fn state(&self) -> [PicState; 2] {
        [self.master.state(), self.slave.state()]
    }

    pub fn restored([master, slave]: &[PicState; 2]) -> Self {
        let mut pic =
            Self { master: Chip::restored(true, master), slave: Chip::restored(false, slave) };
        pic.update();
        pic
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bases 0x20 and 0x28, nothing masked; `icw4` for both.
    fn ready(icw4: u8) -> Pic {
        let mut pic = Pic::new();
        for (command, base, icw3) in [(0x20, 0x20, 4), (0xa0, 0x28, 2)] {
            pic.write(command, 0x11);
            pic.write(command + 1, base);
            pic.write(command + 1, icw3);
            pic.write(command + 1, icw4);
        }
        pic
    }

    fn pulse(pic: &mut Pic, irq: u8) {
        pic.set_line(irq, true);
        pic.set_line(irq, false);
    }

    fn isr(pic: &mut Pic, port: u16) -> u8 {
        pic.write(port, 0x0b);
        pic.read(port)
    }

    #[test]
    fn edge_gives_one_vector_and_waits_for_eoi() {
        let mut pic = ready(1);
        pic.set_line(4, true);
        assert!(pic.output());
        assert_eq!(pic.inta(), 0x24);
        assert!(!pic.output());
        pic.write(0x20, 0x20);
        // The line is still high: an edge counts once.
        assert!(!pic.output());
        pic.set_line(4, false);
        pic.set_line(4, true);
        assert!(pic.output());
    }

    #[test]
    fn higher_priority_preempts_and_lower_waits() {
        let mut pic = ready(1);
        pulse(&mut pic, 4);
        assert_eq!(pic.inta(), 0x24);
        pulse(&mut pic, 5);
        assert!(!pic.output());
        pulse(&mut pic, 1);
        assert_eq!(pic.inta(), 0x21);
        assert_eq!(isr(&mut pic, 0x20), 0x12);
        pic.write(0x20, 0x20);
        assert_eq!(isr(&mut pic, 0x20), 0x10);
        pic.write(0x20, 0x20);
        assert_eq!(pic.inta(), 0x25);
    }

    #[test]
    fn slave_goes_through_the_cascade() {
        let mut pic = ready(1);
        pulse(&mut pic, 12);
        pulse(&mut pic, 8);
        assert_eq!(pic.inta(), 0x28);
        assert_eq!(isr(&mut pic, 0x20), 4);
        assert_eq!(isr(&mut pic, 0xa0), 1);
        pic.write(0xa0, 0x20);
        // The slave asks again, but the master's level 2 is still in service.
        assert!(!pic.output());
        pic.write(0x20, 0x20);
        assert_eq!(pic.inta(), 0x2c);
    }

    #[test]
    fn special_fully_nested_lets_a_higher_slave_request_in() {
        let mut pic = ready(0x11);
        pulse(&mut pic, 12);
        assert_eq!(pic.inta(), 0x2c);
        pulse(&mut pic, 8);
        assert!(pic.output());
        assert_eq!(pic.inta(), 0x28);
    }

    #[test]
    fn level_pin_repeats_until_the_line_drops() {
        let mut pic = ready(1);
        pic.write(0x4d1, 0xff);
        assert_eq!(pic.read(0x4d1), 0xde);
        pic.set_line(10, true);
        assert_eq!(pic.inta(), 0x2a);
        pic.write(0xa0, 0x20);
        pic.write(0x20, 0x20);
        assert!(pic.output());
        pic.set_line(10, false);
        assert!(!pic.output());
    }

    #[test]
    fn acknowledge_without_request_is_spurious_seven() {
        let mut pic = ready(1);
        assert_eq!(pic.inta(), 0x27);
        assert_eq!(isr(&mut pic, 0x20), 0);
    }

    #[test]
    fn auto_eoi_leaves_nothing_in_service_and_can_rotate() {
        let mut pic = ready(3);
        pic.write(0x20, 0x80);
        pulse(&mut pic, 3);
        assert_eq!(pic.inta(), 0x23);
        assert_eq!(isr(&mut pic, 0x20), 0);
        // Level 3 is now the lowest.
        pulse(&mut pic, 3);
        pulse(&mut pic, 6);
        assert_eq!(pic.inta(), 0x26);
    }

    #[test]
    fn rotation_and_specific_eoi() {
        let mut pic = ready(1);
        pic.write(0x20, 0xc0 | 5);
        pulse(&mut pic, 0);
        pulse(&mut pic, 6);
        assert_eq!(pic.inta(), 0x26);
        pic.write(0x20, 0x60 | 6);
        assert_eq!(pic.inta(), 0x20);
        pic.write(0x20, 0xa0);
        assert_eq!(isr(&mut pic, 0x20), 0);
    }

    #[test]
    fn special_mask_lets_lower_levels_through() {
        let mut pic = ready(1);
        pulse(&mut pic, 3);
        assert_eq!(pic.inta(), 0x23);
        pulse(&mut pic, 6);
        assert!(!pic.output());
        pic.write(0x21, 1 << 3);
        pic.write(0x20, 0x68);
        assert!(pic.output());
    }

    #[test]
    fn poll_acknowledges_on_read() {
        let mut pic = ready(1);
        pulse(&mut pic, 1);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0x81);
        assert!(!pic.output());
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0);
    }

    #[test]
    fn mask_register_reads_back_and_blocks() {
        // Linux's probe_8259A relies on the read back.
        let mut pic = ready(1);
        pic.write(0x21, 0xfb);
        assert_eq!(pic.read(0x21), 0xfb);
        pulse(&mut pic, 4);
        assert!(!pic.output());
        pic.write(0x21, 0xeb);
        assert!(pic.output());
    }
}
