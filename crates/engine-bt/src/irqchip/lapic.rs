//! The local APIC, Intel SDM volume 3A, chapter 11 (xAPIC, and x2APIC in 11.12), as one vCPU's
//! register machine: no lock, no other CPU. What leaves it is an [`Action`] for the caller.
//!
//! Fixed by choice: version 14h with six LVT entries (no CMCI, no EOI broadcast suppression),
//! an APIC ID that is the vCPU's index and cannot be changed, and no trigger-level LINT pins.

use tetrarch_engine::{LAPIC_REGISTERS, LapicState};

use super::timer::{Mode, Timer};
use super::{BadState, Delivery, Event, ProtectionFault};
use crate::state::address::PHYS_MASK;

pub(super) const DEFAULT_BASE: u64 = 0xfee0_0000;
const BASE_BSP: u64 = 1 << 8;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ENABLE: u64 = 1 << 11;
/// Bits 0-7 and 9, and what lies above the widest physical address (11.4.4).
const BASE_RESERVED: u64 = !PHYS_MASK | 0x2ff;

const VERSION: u32 = 0x14 | (LVTS as u32 - 1) << 16;

const LVTS: usize = 6;
const LVT_TIMER: usize = 0;
pub(super) const LVT_LINT0: usize = 3;
const LVT_LINT1: usize = 4;
const LVT_ERROR: usize = 5;
const LVT_MASKED: u32 = 1 << 16;
/// Writable bits in the order of the registers 320h to 370h (figure 11-8).
const LVT_WRITABLE: [u32; LVTS] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];
/// Delivery status and remote IRR, which are read-only but not reserved.
const LVT_STATUS: u32 = 1 << 12 | 1 << 14;

const SVR_ENABLE: u32 = 1 << 8;
const DFR_FLAT: u32 = 0xf000_0000;

const ESR_SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
const ESR_RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;

/// Reserved bits of the x2APIC ICR; bit 12, delivery status, is left out because software that
/// copied the xAPIC register may set it (11.12.9).
const X2APIC_ICR_RESERVED: u64 = 0xfff3_2000;
const ICR_WRITABLE: u32 = 0x000c_cfff;

/// Register numbers: bits 4-11 of the xAPIC offset, or the MSR number less 800h (table 11-6).
mod reg {
    pub const ID: u32 = 0x02;
    pub const VERSION: u32 = 0x03;
    pub const TPR: u32 = 0x08;
    pub const APR: u32 = 0x09;
    pub const PPR: u32 = 0x0a;
    pub const EOI: u32 = 0x0b;
    pub const LDR: u32 = 0x0d;
    pub const DFR: u32 = 0x0e;
    pub const SVR: u32 = 0x0f;
    pub const ISR: u32 = 0x10;
    pub const TMR: u32 = 0x18;
    pub const IRR: u32 = 0x20;
    pub const ESR: u32 = 0x28;
    pub const ICR: u32 = 0x30;
    pub const ICR_HIGH: u32 = 0x31;
    pub const LVT: u32 = 0x32;
    pub const LVT_LAST: u32 = 0x37;
    pub const TIMER_INITIAL: u32 = 0x38;
    pub const TIMER_CURRENT: u32 = 0x39;
    pub const TIMER_DIVIDE: u32 = 0x3e;
    pub const SELF_IPI: u32 = 0x3f;
}

/// Whether time counts in an access to this offset of the xAPIC page: in all that
/// has to do with the timer.
pub fn is_timed(offset: u32) -> bool {
    const LVT: u32 = reg::LVT + LVT_TIMER as u32;
    matches!(
        offset >> 4,
        reg::SVR | LVT | reg::TIMER_INITIAL | reg::TIMER_CURRENT | reg::TIMER_DIVIDE
    )
}

/// What a register write asks of the rest of the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Action {
    None,
    /// The EOI of a level-triggered vector, for the I/O APIC.
    Eoi(u8),
    Ipi(Icr),
}

/// An interrupt command with its destination; `wide` if it came in the x2APIC format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Icr {
    pub low: u32,
    pub dest: u32,
    pub wide: bool,
}

/// The register is reserved or does not allow this access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Illegal;

/// In x2APIC mode (11.12.1.2).
impl From<Illegal> for ProtectionFault {
    fn from(Illegal: Illegal) -> Self {
        Self
    }
}

/// 256 bits, one a vector.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Vectors([u32; 8]);

impl Vectors {
    fn set(&mut self, vector: u8, on: bool) {
        let word = &mut self.0[usize::from(vector >> 5)];
        let bit = 1 << (vector & 31);
        *word = if on { *word | bit } else { *word & !bit };
    }

    fn get(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 5)] >> (vector & 31) & 1 != 0
    }

    fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|&word| word != 0)?;
        Some((word as u32 * 32 + self.0[word].ilog2()) as u8)
    }

    /// The vector if it is one.
    fn only(&self) -> Option<u8> {
        let count: u32 = self.0.iter().map(|word| word.count_ones()).sum();
        self.highest().filter(|_| count == 1)
    }
}

/// How messages find this APIC, in one word so that senders can read it without the lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Route(u64);

impl Route {
    const ENABLED: u64 = 1 << 32;
    const X2APIC: u64 = 1 << 33;
    const FLAT: u64 = 1 << 34;
    const SOFT_ENABLED: u64 = 1 << 35;
    const PPR_SHIFT: u32 = 40;

    pub fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub fn bits(self) -> u64 {
        self.0
    }

    pub fn enabled(self) -> bool {
        self.0 & Self::ENABLED != 0
    }

    /// The processor priority if this APIC takes lowest-priority interrupts at all.
    pub fn arbitration(self) -> Option<u8> {
        (self.0 & Self::SOFT_ENABLED != 0).then_some((self.0 >> Self::PPR_SHIFT) as u8)
    }

    /// Logical destinations: 11.6.2.2 for xAPIC, 11.12.10 for x2APIC.
    pub fn matches_logical(self, dest: u32) -> bool {
        let ldr = self.0 as u32;
        if self.0 & Self::X2APIC != 0 {
            return dest >> 16 == ldr >> 16 && dest & ldr & 0xffff != 0;
        }
        let Ok(dest) = u8::try_from(dest) else {
            return false;
        };
        let ldr = ldr as u8;
        if self.0 & Self::FLAT != 0 {
            dest & ldr != 0
        } else {
            (dest >> 4 == ldr >> 4 || dest >> 4 == 0xf) && dest & ldr & 0xf != 0
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lapic {
    id: u32,

    base: u64,
    tpr: u8,
    ldr: u8,
    dfr: u32,
    svr: u32,
    esr: u32,
    esr_next: u32,
    icr_low: u32,
    icr_high: u32,
    lvt: [u32; LVTS],
    irr: Vectors,
    isr: Vectors,
    tmr: Vectors,
    timer: Timer,
    nmi: bool,
    init: bool,
    sipi: Option<u8>,
    wait_for_sipi: bool,
    /// An ExtINT message asks for an INTA cycle.
    ext_int: bool,

    /// The guest may end the interrupt in service without a word to us.
    quiet_eoi: bool,
}

impl Lapic {
    pub fn new(id: u32, tsc_hz: u64) -> Self {
        let bsp = if id == 0 { BASE_BSP } else { 0 };
        Self {
            id,
            base: DEFAULT_BASE | BASE_ENABLE | bsp,
            tpr: 0,
            ldr: 0,
            dfr: !0,
            svr: 0xff,
            esr: 0,
            esr_next: 0,
            icr_low: 0,
            icr_high: 0,
            lvt: [LVT_MASKED; LVTS],
            irr: Vectors::default(),
            isr: Vectors::default(),
            tmr: Vectors::default(),
            timer: Timer::new(tsc_hz),
            nmi: false,
            init: false,
            sipi: None,
            wait_for_sipi: id != 0,
            ext_int: false,
            quiet_eoi: false,
        }
    }

    /// The registers after power-up or INIT (11.4.7.1, 11.4.7.3): the ID and IA32_APIC_BASE stay.
    fn reset_registers(&mut self) {
        self.timer.reset();
        *self = Self {
            base: self.base,
            timer: self.timer.clone(),
            nmi: self.nmi,
            init: self.init,
            sipi: self.sipi,
            wait_for_sipi: self.wait_for_sipi,
            ..Self::new(self.id, 1)
        };
    }

    pub fn base(&self) -> u64 {
        self.base
    }

    /// Where the page of registers is: nowhere while the APIC is disabled, or in x2APIC mode
    /// (11.4.3, 11.12.2).
    pub fn page(base: u64) -> Option<u64> {
        (base & (BASE_ENABLE | BASE_X2APIC) == BASE_ENABLE).then_some(base & PHYS_MASK & !0xfff)
    }

    fn enabled(&self) -> bool {
        self.base & BASE_ENABLE != 0
    }

    fn x2apic(&self) -> bool {
        self.base & BASE_X2APIC != 0
    }

    fn soft_enabled(&self) -> bool {
        self.enabled() && self.svr & SVR_ENABLE != 0
    }

    fn x2apic_ldr(&self) -> u32 {
        // 11.12.10.2.
        self.id >> 4 << 16 | 1 << (self.id & 0xf)
    }

    pub fn route(&self) -> Route {
        let mut bits = u64::from(self.ppr()) << Route::PPR_SHIFT;
        if self.enabled() {
            bits |= Route::ENABLED;
        }
        if self.soft_enabled() {
            bits |= Route::SOFT_ENABLED;
        }
        if self.x2apic() {
            bits |= Route::X2APIC | u64::from(self.x2apic_ldr());
        } else {
            bits |= u64::from(self.ldr);
            if self.dfr & DFR_FLAT != 0 {
                bits |= Route::FLAT;
            }
        }
        Route(bits)
    }

    // Priorities and acknowledging (11.8.3).

    pub fn tpr(&self) -> u8 {
        self.tpr
    }

    pub fn set_tpr(&mut self, value: u8) {
        self.tpr = value;
    }

    fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= in_service { self.tpr } else { in_service }
    }

    /// The arbitration priority register (11.6.2.4).
    fn apr(&self) -> u8 {
        let class = |vectors: &Vectors| vectors.highest().unwrap_or(0) & 0xf0;
        let (isr, irr) = (class(&self.isr), class(&self.irr));
        if self.tpr & 0xf0 >= irr && self.tpr & 0xf0 > isr {
            self.tpr
        } else {
            (self.tpr & 0xf0).max(isr).max(irr)
        }
    }

    /// The vector that may interrupt the processor now. A soft-disabled APIC keeps what it had
    /// taken before (11.4.7.2).
    fn deliverable(&self) -> Option<u8> {
        if !self.enabled() {
            return None;
        }
        self.irr.highest().filter(|v| v & 0xf0 > self.ppr() & 0xf0)
    }

    pub fn pending(&self) -> bool {
        self.ext_int || self.deliverable().is_some()
    }

    /// True once for each ExtINT message taken.
    pub fn take_ext_int(&mut self) -> bool {
        std::mem::take(&mut self.ext_int)
    }

    pub fn accept(&mut self) -> Option<u8> {
        let vector = self.deliverable()?;
        self.irr.set(vector, false);
        self.isr.set(vector, true);
        Some(vector)
    }

    fn eoi(&mut self) -> Action {
        let Some(vector) = self.isr.highest() else {
            return Action::None;
        };
        self.isr.set(vector, false);
        if self.tmr.get(vector) { Action::Eoi(vector) } else { Action::None }
    }

    // An end of interrupt that the guest need not tell (KVM's MSR_KVM_PV_EOI_EN).

    /// Whether the guest may keep its next EOI to itself: nothing waits for it, neither another
    /// interrupt nor the I/O APIC. What arrives later is an event until the offer is settled.
    pub fn offer_quiet_eoi(&mut self) -> bool {
        let alone = self.isr.only().is_some_and(|vector| !self.tmr.get(vector));
        self.quiet_eoi = alone && self.irr.highest().is_none() && self.soft_enabled();
        self.quiet_eoi
    }

    /// Ends the offer; `ended` if the guest has used it.
    pub fn take_quiet_eoi(&mut self, ended: bool) {
        if std::mem::take(&mut self.quiet_eoi) && ended {
            self.eoi();
        }
    }

    /// Whether the 8259A's INTR reaches this processor: through LINT0, or around a disabled APIC
    /// on the bootstrap processor (11.4.3).
    pub fn takes_pic(&self) -> bool {
        if self.enabled() {
            self.lvt[LVT_LINT0] & (LVT_MASKED | 0x700) == 0x700
        } else {
            self.id == 0
        }
    }

    // What arrives.

    /// Takes a message; false if it is refused. `level` is the trigger mode.
    pub fn receive(&mut self, mode: Delivery, vector: u8, level: bool) -> bool {
        if !self.enabled() {
            return false;
        }
        match mode {
            Delivery::Fixed | Delivery::LowestPriority => self.receive_fixed(vector, level),
            Delivery::Nmi => {
                self.nmi = true;
                true
            }
            Delivery::Init => {
                self.init = true;
                self.nmi = false;
                self.sipi = None;
                // 9.4.1: the BSP starts at the reset vector instead of waiting.
                self.wait_for_sipi = self.id != 0;
                true
            }
            Delivery::Startup => {
                // Only a waiting processor listens, so that the second of the two that the MP
                // protocol sends (9.4.4) has no effect.
                if self.wait_for_sipi {
                    self.wait_for_sipi = false;
                    self.sipi = Some(vector);
                }
                true
            }
            Delivery::ExtInt => {
                self.ext_int = true;
                true
            }
            // There is no system management mode to enter.
            Delivery::Smi | Delivery::Reserved => false,
        }
    }

    fn receive_fixed(&mut self, vector: u8, level: bool) -> bool {
        if !self.soft_enabled() {
            return false;
        }
        if vector < 16 {
            self.error(ESR_RECEIVE_ILLEGAL_VECTOR);
            return false;
        }
        self.irr.set(vector, true);
        self.tmr.set(vector, level);
        true
    }

    /// An interrupt from the local vector table.
    pub fn local_interrupt(&mut self, index: usize) {
        let Some(&entry) = self.lvt.get(index) else {
            return;
        };
        if entry & LVT_MASKED != 0 || !self.enabled() {
            return;
        }
        let mode = match index {
            LVT_TIMER | LVT_ERROR => Delivery::Fixed,
            _ => Delivery::from_bits(entry >> 8),
        };
        // INIT and ExtINT need the pin's level, which takes_pic looks at; the others are messages.
        if matches!(mode, Delivery::Fixed | Delivery::Nmi) {
            self.receive(mode, entry as u8, false);
        }
    }

    fn error(&mut self, bit: u32) {
        if self.esr_next & bit == 0 {
            self.esr_next |= bit;
            self.local_interrupt(LVT_ERROR);
        }
    }

    pub fn waits_for_sipi(&self) -> bool {
        self.wait_for_sipi
    }

    pub fn has_event(&self) -> bool {
        let unsettled = self.quiet_eoi && self.irr.highest().is_some();
        self.init || self.sipi.is_some() || self.nmi && !self.wait_for_sipi || unsettled
    }

    pub fn take_event(&mut self) -> Option<Event> {
        if std::mem::take(&mut self.init) {
            self.reset_registers();
            return Some(Event::Init);
        }
        if let Some(vector) = self.sipi.take() {
            return Some(Event::Sipi(vector));
        }
        // A processor that waits for a SIPI holds NMIs back.
        if self.nmi && !self.wait_for_sipi {
            self.nmi = false;
            return Some(Event::Nmi);
        }
        None
    }

    // Time.

    /// When [`Lapic::run_timer`] would interrupt; a masked timer needs nobody to watch it.
    pub fn deadline(&self) -> Option<u64> {
        let audible = self.enabled() && self.lvt[LVT_TIMER] & LVT_MASKED == 0;
        self.timer.expiry_ns().filter(|_| audible)
    }

    pub fn run_timer(&mut self, now_ns: u64, tsc: u64) {
        if self.timer.expire(now_ns, tsc) {
            self.local_interrupt(LVT_TIMER);
        }
    }

    pub fn interrupt_by_timer(&mut self) {
        self.local_interrupt(LVT_TIMER);
    }

    // Registers.

    /// The registers that both modes share.
    fn read_register(&self, reg: u32, now_ns: u64) -> Result<u32, Illegal> {
        Ok(match reg {
            reg::VERSION => VERSION,
            reg::TPR => u32::from(self.tpr),
            reg::PPR => u32::from(self.ppr()),
            reg::SVR => self.svr,
            reg::ISR..reg::TMR => self.isr.0[(reg - reg::ISR) as usize],
            reg::TMR..reg::IRR => self.tmr.0[(reg - reg::TMR) as usize],
            reg::IRR..reg::ESR => self.irr.0[(reg - reg::IRR) as usize],
            reg::ESR => self.esr,
            reg::LVT..=reg::LVT_LAST => self.lvt[(reg - reg::LVT) as usize],
            reg::TIMER_INITIAL => self.timer.initial(),
            reg::TIMER_CURRENT => self.timer.current(now_ns),
            reg::TIMER_DIVIDE => self.timer.divide(),
            _ => return Err(Illegal),
        })
    }

    fn write_register(
        &mut self,
        reg: u32,
        value: u32,
        now_ns: u64,
        tsc: u64,
    ) -> Result<Action, Illegal> {
        match reg {
            reg::TPR => self.tpr = value as u8,
            reg::EOI => return Ok(self.eoi()),
            reg::SVR => {
                if value & SVR_ENABLE == 0 {
                    self.run_timer(now_ns, tsc);
                    // 11.4.7.2: all mask bits are set and stay so.
                    for entry in &mut self.lvt {
                        *entry |= LVT_MASKED;
                    }
                }
                self.svr = value & 0x3ff;
            }
            reg::ESR => {
                // 11.5.3: a write shows what was collected since the last one.
                self.esr = std::mem::take(&mut self.esr_next);
            }
            reg::LVT..=reg::LVT_LAST => {
                let index = (reg - reg::LVT) as usize;
                if index == LVT_TIMER {
                    // What expired under the old entry is settled by the old entry.
                    self.run_timer(now_ns, tsc);
                    self.timer.set_mode(Mode::from_lvt(value));
                }
                self.lvt[index] = value & LVT_WRITABLE[index];
                if self.svr & SVR_ENABLE == 0 {
                    self.lvt[index] |= LVT_MASKED;
                }
            }
            reg::TIMER_INITIAL => {
                self.run_timer(now_ns, tsc);
                self.timer.set_initial(value, now_ns);
            }
            reg::TIMER_DIVIDE => {
                self.run_timer(now_ns, tsc);
                self.timer.set_divide(value, now_ns);
            }
            _ => return Err(Illegal),
        }
        Ok(Action::None)
    }

    fn send(&mut self, low: u32, dest: u32, wide: bool) -> Action {
        self.icr_low = low & ICR_WRITABLE;
        let fixed =
            matches!(Delivery::from_bits(low >> 8), Delivery::Fixed | Delivery::LowestPriority);
        if fixed && low & 0xf0 == 0 {
            self.error(ESR_SEND_ILLEGAL_VECTOR);
            return Action::None;
        }
        Action::Ipi(Icr { low: self.icr_low, dest, wide })
    }

    /// The xAPIC page. Outside xAPIC mode there is none, and it reads as zero. Registers are
    /// 128-bit aligned; the bytes between them read as zero, too.
    pub fn mmio_read(&mut self, offset: u32, now_ns: u64) -> u32 {
        if !self.enabled() || self.x2apic() || offset & 0xf != 0 || offset > 0xfff {
            return 0;
        }
        match offset >> 4 {
            // The xAPIC ID is 8 bits wide.
            reg::ID => self.id << 24,
            reg::APR => u32::from(self.apr()),
            reg::EOI => 0,
            reg::LDR => u32::from(self.ldr) << 24,
            reg::DFR => self.dfr,
            reg::ICR => self.icr_low,
            reg::ICR_HIGH => self.icr_high,
            reg => self.read_register(reg, now_ns).unwrap_or_else(|Illegal| {
                self.error(ESR_ILLEGAL_REGISTER);
                0
            }),
        }
    }

    pub fn mmio_write(&mut self, offset: u32, value: u32, now_ns: u64, tsc: u64) -> Action {
        if !self.enabled() || self.x2apic() || offset & 0xf != 0 || offset > 0xfff {
            return Action::None;
        }
        match offset >> 4 {
            // Read only here (11.4.6 leaves it to the model), as are the others.
            reg::ID | reg::VERSION | reg::APR | reg::PPR | reg::TIMER_CURRENT => {}
            reg::ISR..reg::ESR => {}
            reg::LDR => self.ldr = (value >> 24) as u8,
            reg::DFR => self.dfr = value | 0x0fff_ffff,
            reg::ICR => return self.send(value, self.icr_high >> 24, false),
            reg::ICR_HIGH => self.icr_high = value & 0xff00_0000,
            reg => {
                return self.write_register(reg, value, now_ns, tsc).unwrap_or_else(|Illegal| {
                    self.error(ESR_ILLEGAL_REGISTER);
                    Action::None
                });
            }
        }
        Action::None
    }

    /// 11.12.1.2.
    pub fn x2apic_read(&self, reg: u32, now_ns: u64) -> Result<u64, ProtectionFault> {
        if !self.enabled() || !self.x2apic() {
            return Err(ProtectionFault);
        }
        match reg {
            reg::ID => Ok(u64::from(self.id)),
            reg::LDR => Ok(u64::from(self.x2apic_ldr())),
            reg::ICR => Ok(u64::from(self.icr_high) << 32 | u64::from(self.icr_low)),
            reg => Ok(u64::from(self.read_register(reg, now_ns)?)),
        }
    }

    pub fn x2apic_write(
        &mut self,
        reg: u32,
        value: u64,
        now_ns: u64,
        tsc: u64,
    ) -> Result<Action, ProtectionFault> {
        if !self.enabled() || !self.x2apic() {
            return Err(ProtectionFault);
        }
        if reg == reg::ICR {
            if value & X2APIC_ICR_RESERVED != 0 {
                return Err(ProtectionFault);
            }
            self.icr_high = (value >> 32) as u32;
            return Ok(self.send(value as u32, self.icr_high, true));
        }
        let value = u32::try_from(value).map_err(|_| ProtectionFault)?;
        match reg {
            reg::EOI | reg::ESR if value != 0 => Err(ProtectionFault),
            reg::TPR if value > 0xff => Err(ProtectionFault),
            reg::SVR if value & !0x3ff != 0 => Err(ProtectionFault),
            reg::TIMER_DIVIDE if value & !0xb != 0 => Err(ProtectionFault),
            reg::SELF_IPI if value > 0xff => Err(ProtectionFault),
            reg::LVT..=reg::LVT_LAST
                if value & !(LVT_WRITABLE[(reg - reg::LVT) as usize] | LVT_STATUS) != 0 =>
            {
                Err(ProtectionFault)
            }
            // 11.12.11: a fixed, edge-triggered interrupt to itself.
            reg::SELF_IPI => {
                if value < 16 {
                    self.error(ESR_SEND_ILLEGAL_VECTOR);
                } else {
                    self.receive_fixed(value as u8, false);
                }
                Ok(Action::None)
            }
            reg => Ok(self.write_register(reg, value, now_ns, tsc)?),
        }
    }

    pub fn tsc_deadline(&mut self, now_ns: u64, tsc: u64) -> u64 {
        self.run_timer(now_ns, tsc);
        self.timer.tsc_deadline()
    }

    pub fn set_tsc_deadline(&mut self, value: u64, now_ns: u64, tsc: u64) {
        self.run_timer(now_ns, tsc);
        self.timer.set_tsc_deadline(value, now_ns, tsc);
        // A deadline in the past interrupts at once.
        self.run_timer(now_ns, tsc);
    }

    /// IA32_APIC_BASE: the transitions of figure 11-27.
    pub fn set_base(&mut self, value: u64) -> Result<(), ProtectionFault> {
        if value & BASE_RESERVED != 0 {
            return Err(ProtectionFault);
        }
        let mode = |base: u64| (base & BASE_ENABLE != 0, base & BASE_X2APIC != 0);
        match (mode(self.base), mode(value)) {
            (_, (false, true)) | ((false, _), (true, true)) | ((true, true), (true, false)) => {
                return Err(ProtectionFault);
            }
            (_, (false, false)) => {
                self.base = value;
                // A disabled APIC comes back in its reset state (11.4.3, 11.12.5.1).
                self.reset_registers();
            }
            _ => self.base = value,
        }
        Ok(())
    }

    /// What firmware sets up before it starts an operating system: the MP specification's
    /// virtual wire mode (MultiProcessor Specification 1.4, 3.6.2.2).
    pub fn set_virtual_wire(&mut self) {
        self.svr = 0x1ff;
        self.lvt[LVT_LINT0] = 0x700;
        self.lvt[LVT_LINT1] = 0x400;
    }

    /// What waits beside interrupts: NMI, INIT, and the vector of a SIPI.
    pub fn waiting(&self) -> (bool, bool, Option<u8>) {
        (self.nmi, self.init, self.sipi)
    }

    pub fn set_waiting(&mut self, (nmi, init, sipi): (bool, bool, Option<u8>)) {
        (self.nmi, self.init, self.sipi) = (nmi, init, sipi);
    }

    pub fn set_waits_for_sipi(&mut self, waits: bool) {
        self.wait_for_sipi = waits;
    }

    pub fn state(&self, now_ns: u64) -> LapicState {
        let mut registers = vec![0; LAPIC_REGISTERS];
        let mut set = |reg: u32, value| registers[reg as usize] = value;
        set(reg::ID, self.id << 24);
        set(reg::VERSION, VERSION);
        set(reg::TPR, u32::from(self.tpr));
        set(reg::PPR, u32::from(self.ppr()));
        set(reg::LDR, if self.x2apic() { self.x2apic_ldr() } else { u32::from(self.ldr) << 24 });
        set(reg::DFR, self.dfr);
        set(reg::SVR, self.svr);
        set(reg::ESR, self.esr);
        set(reg::ICR, self.icr_low);
        set(reg::ICR_HIGH, self.icr_high);
        set(reg::TIMER_INITIAL, self.timer.initial());
        set(reg::TIMER_CURRENT, self.timer.current(now_ns));
        set(reg::TIMER_DIVIDE, self.timer.divide());
        for (first, words) in
            [(reg::ISR, &self.isr.0), (reg::TMR, &self.tmr.0), (reg::IRR, &self.irr.0)]
        {
            registers[first as usize..][..words.len()].copy_from_slice(words);
        }
        registers[reg::LVT as usize..][..LVTS].copy_from_slice(&self.lvt);
        LapicState {
            base: self.base,
            registers,
            esr_pending: self.esr_next,
            ext_int: self.ext_int,
            tsc_deadline: self.timer.tsc_deadline(),
            timer_left_ns: self.timer.left_ns(now_ns),
        }
    }

    /// An APIC with this state. What is waiting to happen is not part of it.
    pub fn restored(
        id: u32,
        tsc_hz: u64,
        state: &LapicState,
        now: (u64, u64),
    ) -> Result<Self, BadState> {
        let base = state.base;
        let x2apic_without_enable = base & (BASE_ENABLE | BASE_X2APIC) == BASE_X2APIC;
        if base & BASE_RESERVED != 0 || x2apic_without_enable {
            return Err(BadState::ApicBase(base));
        }
        let Ok(registers) = <&[u32; LAPIC_REGISTERS]>::try_from(&state.registers[..]) else {
            return Err(BadState::ApicRegisters(state.registers.len()));
        };
        let get = |reg: u32| registers[reg as usize];
        let vectors = |first: u32| Vectors(std::array::from_fn(|index| get(first + index as u32)));
        let lvt: [u32; LVTS] =
            std::array::from_fn(|index| get(reg::LVT + index as u32) & LVT_WRITABLE[index]);
        let timer = Timer::restored(
            tsc_hz,
            Mode::from_lvt(lvt[LVT_TIMER]),
            [get(reg::TIMER_INITIAL), get(reg::TIMER_DIVIDE), get(reg::TIMER_CURRENT)],
            (state.tsc_deadline, state.timer_left_ns),
            now,
        );
        Ok(Self {
            base,
            tpr: get(reg::TPR) as u8,
            // In x2APIC mode the register follows from the ID.
            ldr: if base & BASE_X2APIC == 0 { (get(reg::LDR) >> 24) as u8 } else { 0 },
            dfr: get(reg::DFR) | 0x0fff_ffff,
            svr: get(reg::SVR) & 0x3ff,
            esr: get(reg::ESR),
            esr_next: state.esr_pending,
            icr_low: get(reg::ICR) & ICR_WRITABLE,
            icr_high: get(reg::ICR_HIGH),
            lvt,
            irr: vectors(reg::IRR),
            isr: vectors(reg::ISR),
            tmr: vectors(reg::TMR),
            timer,
            ext_int: state.ext_int,
            ..Self::new(id, tsc_hz)
        })
    }
}
