//! The interrupt controllers of a PC: a local APIC for each vCPU (Intel SDM volume 3A, chapter
//! 11), one I/O APIC (82093AA), two 8259A and an 8254, wired as the MultiProcessor Specification
//! 1.4, 3.6.2 shows, with the ISA timer at I/O APIC pin 2.
//!
//! Time comes in with each call, as nanoseconds of the machine clock; nothing here reads a
//! clock, sleeps or starts a thread. The engine asks [`IrqChip::next_deadline`] how long a vCPU
//! may sleep and calls [`IrqChip::run_timers`] when that has passed.
//!
//! Locks: `legacy` (PIC, PIT, I/O APIC) first, then at most one local APIC. [`Wake::wake`] and
//! the [`Resampler`] are called with none held. What a vCPU asks in every loop (`pending`, `next_deadline`) and what a
//! sender must know to find its targets are atomics, published before the lock they summarise is
//! released.

mod error;
mod ioapic;
mod lapic;
#[cfg(test)]
mod paravirtual_tests;
mod pic;
mod pit;
mod resample;
#[cfg(test)]
mod tests;
mod timer;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use tetrarch_engine::cpuid::Topology;
use tetrarch_engine::{ChipsetState, LapicState};

pub use error::{BadState, ProtectionFault};
use ioapic::IoApic;
pub use lapic::is_timed;
use lapic::{Action, Icr, Lapic, Route};
use pic::Pic;
use pit::Pit;
use resample::{Resample, Resampler};

const MSR_APIC_BASE: u32 = 0x1b;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
const MSR_X2APIC_FIRST: u32 = 0x800;
const MSR_X2APIC_LAST: u32 = 0x8ff;

/// Destinations that mean every local APIC, in an 8-bit and in a 32-bit message.
const BROADCAST: u32 = 0xff;
const BROADCAST_WIDE: u32 = u32::MAX;

/// ISA IRQ 0 is wired to this I/O APIC pin; the MADT says so.
const TIMER_PIN: usize = 2;

const NEVER: u64 = u64::MAX;

/// How the engine learns that a vCPU may have something new to look at.
pub trait Wake: Send + Sync {
    /// Called with no lock of the interrupt chip held, from any thread, the vCPU's own included.
    fn wake(&self, vcpu: usize);
}

/// What reaches a processor beside maskable interrupts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    Nmi,
    /// Reset to the INIT state. The local APIC has been reset by the time this is returned.
    Init,
    /// Start in real mode at this page.
    Sipi(u8),
}

/// Delivery modes, as in the ICR, redirection entries and MSI data (SDM 11.6.1, 11.11.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Delivery {
    Fixed,
    LowestPriority,
    Smi,
    Reserved,
    Nmi,
    Init,
    Startup,
    ExtInt,
}

impl Delivery {
    /// The lowest three bits.
    fn from_bits(bits: u32) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            3 => Self::Reserved,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::Startup,
            _ => Self::ExtInt,
        }
    }

    /// Whether the vector field is the interrupt's vector, which an EOI will answer.
    fn has_vector(self) -> bool {
        matches!(self, Self::Fixed | Self::LowestPriority)
    }
}

/// An interrupt message on its way to the local APICs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Message {
    dest: u32,
    /// The destination has 32 bits; from an x2APIC only.
    wide: bool,
    logical: bool,
    mode: Delivery,
    vector: u8,
    /// Level triggered: its EOI is reported to the I/O APIC.
    level: bool,
}

/// vCPUs to wake once the locks are released.
#[derive(Default)]
struct WakeSet {
    low: u64,
    rest: Vec<usize>,
}

impl WakeSet {
    fn add(&mut self, vcpu: usize) {
        if vcpu < 64 {
            self.low |= 1 << vcpu;
        } else {
            self.rest.push(vcpu);
        }
    }

    fn wake(mut self, wake: &dyn Wake) {
        while self.low != 0 {
            wake.wake(self.low.trailing_zeros() as usize);
            self.low &= self.low - 1;
        }
        for vcpu in self.rest {
            wake.wake(vcpu);
        }
    }
}

/// One vCPU's local APIC and what others may know about it without its lock.
struct LocalApic {
    lapic: Mutex<Lapic>,
    pending: AtomicBool,
    event: AtomicBool,
    takes_pic: AtomicBool,
    /// Another vCPU has asked for an end of its halt.
    unhalted: AtomicBool,
    /// A [`Route`].
    route: AtomicU64,
    deadline: AtomicU64,
    /// IA32_APIC_BASE.
    base: AtomicU64,
}

/// Sequentially consistent, because a sleeper checks these after it announced its sleep and the
/// waker looks for that announcement after this store. Unchanged values skip the costly store.
fn publish_bool(cell: &AtomicBool, value: bool) {
    if cell.load(Ordering::Relaxed) != value {
        cell.store(value, Ordering::SeqCst);
    }
}

fn publish_u64(cell: &AtomicU64, value: u64) {
    if cell.load(Ordering::Relaxed) != value {
        cell.store(value, Ordering::SeqCst);
    }
}

impl LocalApic {
    fn new(lapic: Lapic) -> Self {
        let cpu = Self {
            pending: AtomicBool::new(false),
            event: AtomicBool::new(false),
            takes_pic: AtomicBool::new(false),
            unhalted: AtomicBool::new(false),
            route: AtomicU64::new(0),
            deadline: AtomicU64::new(NEVER),
            base: AtomicU64::new(0),
            lapic: Mutex::new(lapic),
        };
        cpu.publish(&cpu.lapic.lock());
        cpu
    }

    /// Called with the lock held, after each change.
    fn publish(&self, lapic: &Lapic) {
        publish_bool(&self.pending, lapic.pending());
        publish_bool(&self.event, lapic.has_event());
        publish_bool(&self.takes_pic, lapic.takes_pic());
        publish_u64(&self.route, lapic.route().bits());
        publish_u64(&self.deadline, lapic.deadline().unwrap_or(NEVER));
        publish_u64(&self.base, lapic.base());
    }

    fn route(&self) -> Route {
        Route::from_bits(self.route.load(Ordering::SeqCst))
    }
}

/// Everything that the machine has once.
#[derive(Clone)]
struct Legacy {
    pic: Pic,
    pit: Pit,
    ioapic: IoApic,
    /// Lines as [`IrqChip::irq_line`] last drove them.
    lines: u32,
    /// The timer's line as last driven.
    timer_out: bool,
    resample: Resample,
}

impl Legacy {
    fn new() -> Self {
        let mut legacy = Self {
            pic: Pic::new(),
            pit: Pit::new(),
            ioapic: IoApic::new(),
            lines: 0,
            timer_out: false,
            resample: Resample::default(),
        };
        legacy.settle_timer(false, &mut |_| false);
        // As firmware leaves the pair: the PC's vectors, everything masked. Initialising it also
        // forgets the edge of the timer's idle output.
        for (command, base, wiring) in [(0x20, 0x08, 4), (0xa0, 0x70, 2)] {
            legacy.pic.write(command, 0x11);
            for value in [base, wiring, 1, 0xff] {
                legacy.pic.write(command + 1, value);
            }
        }
        legacy
    }

    fn line(&self, gsi: u32) -> bool {
        (self.lines | self.resample.high) >> gsi & 1 != 0
    }

    fn drive_timer(&mut self, level: bool, send: &mut dyn FnMut(&Message) -> bool) {
        self.timer_out = level;
        let isa = level || self.line(0);
        self.pic.set_line(0, isa);
        let pin = isa || self.line(TIMER_PIN as u32);
        self.ioapic.set_line(TIMER_PIN, pin, send);
    }

    /// Brings the timer's line to its present level, through a rising edge if it `rose`.
    fn settle_timer(&mut self, rose: bool, send: &mut dyn FnMut(&Message) -> bool) {
        if rose {
            self.drive_timer(false, send);
            self.drive_timer(true, send);
        }
        let out = self.pit.irq0();
        if out != self.timer_out {
            self.drive_timer(out, send);
        }
    }

    fn sync(&mut self, now_ns: u64, send: &mut dyn FnMut(&Message) -> bool) {
        let rose = self.pit.sync(now_ns);
        self.settle_timer(rose, send);
    }

    fn set_line(&mut self, gsi: u32, level: bool, send: &mut dyn FnMut(&Message) -> bool) {
        if level {
            self.lines |= 1 << gsi;
        } else {
            self.lines &= !(1 << gsi);
        }
        self.apply(gsi, send);
    }

    /// Takes a line's level to the controllers.
    fn apply(&mut self, gsi: u32, send: &mut dyn FnMut(&Message) -> bool) {
        if gsi == 0 || gsi == TIMER_PIN as u32 {
            self.drive_timer(self.timer_out, send);
            return;
        }
        let level = self.line(gsi);
        if let Ok(irq @ 0..=15) = u8::try_from(gsi) {
            self.pic.set_line(irq, level);
        }
        self.ioapic.set_line(gsi as usize, level, send);
    }

    /// Without what is high until an end: its device says it again.
    fn state(&self) -> ChipsetState {
        let (mut pic, mut ioapic) = (self.pic.clone(), self.ioapic.clone());
        let lent = self.resample.high & !self.lines;
        for gsi in (0..ioapic::PINS as u32).filter(|gsi| lent >> gsi & 1 != 0) {
            pic.set_line(gsi as u8, false);
            ioapic.set_line(gsi as usize, false, &mut |_| false);
        }
        ChipsetState {
            lines: self.lines,
            pics: pic.state(),
            ioapic: ioapic.state(),
            pit: self.pit.state(),
        }
    }

    fn restored(state: &ChipsetState) -> Result<Self, BadState> {
        let mut state = *state;
        state.lines &= (1 << ioapic::PINS) - 1;
        let pit = Pit::restored(&state.pit)?;
        // The timer's line is as its output says. An engine that only pulses the
        // line has it low, and no edge shall come of that.
        let timer_out = pit.irq0();
        let isa = timer_out || state.lines & 1 != 0;
        let pin = isa || state.lines >> TIMER_PIN & 1 != 0;
        state.pics[0].lines = state.pics[0].lines & !1 | u8::from(isa);
        state.ioapic.lines = state.ioapic.lines & !(1 << TIMER_PIN) | u32::from(pin) << TIMER_PIN;
        Ok(Self {
            pic: Pic::restored(&state.pics),
            pit,
            ioapic: IoApic::restored(&state.ioapic),
            lines: state.lines,
            timer_out,
            resample: Resample::default(),
        })
    }
}

pub fn is_port(port: u16) -> bool {
    matches!(port, 0x20 | 0x21 | 0x40..=0x43 | 0x61 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1)
}

fn is_pit(port: u16) -> bool {
    matches!(port, 0x40..=0x43 | 0x61)
}

/// The interrupt controllers of one machine. Every method may be called from any thread; what
/// names a `vcpu` that does not exist has no effect.
pub struct IrqChip {
    tsc_hz: u64,
    wake: Arc<dyn Wake>,
    topology: Topology,
    cpus: Vec<LocalApic>,
    legacy: Mutex<Legacy>,
    /// The PIC's INTR.
    intr: AtomicBool,
    /// When the PIT's channel 0 next interrupts.
    pit_deadline: AtomicU64,
    /// Where the search for the lowest priority begins, so that equals take turns.
    turn: AtomicUsize,
    resampler: OnceLock<Resampler>,
}

/// The controllers at one moment.
pub struct Copied {
    legacy: Legacy,
    cpus: Vec<(Lapic, bool)>,
    turn: usize,
}

impl IrqChip {
    pub fn new(topology: Topology, tsc_hz: u64, wake: Arc<dyn Wake>) -> Self {
        let cpus = (0..topology.vcpus())
            .map(|vcpu| LocalApic::new(Lapic::new(topology.apic_id(vcpu), tsc_hz)))
            .collect();
        Self {
            tsc_hz,
            wake,
            topology,
            cpus,
            legacy: Mutex::new(Legacy::new()),
            intr: AtomicBool::new(false),
            pit_deadline: AtomicU64::new(NEVER),
            turn: AtomicUsize::new(0),
            resampler: OnceLock::new(),
        }
    }

    /// Puts the bootstrap processor into virtual wire mode, as firmware leaves it: the local
    /// APIC enabled, the PIC through LINT0, NMI at LINT1. For boots without firmware.
    pub fn set_virtual_wire(&self) {
        self.with_lapic(0, Lapic::set_virtual_wire);
    }

    // Locking.

    /// Runs `f` on a vCPU's local APIC and wakes the vCPU if that gave it something to do.
    fn with_lapic<R>(&self, vcpu: usize, f: impl FnOnce(&mut Lapic) -> R) -> Option<R> {
        let cpu = self.cpus.get(vcpu)?;
        let signals = || [self.pending(vcpu), cpu.event.load(Ordering::SeqCst)];
        let mut lapic = cpu.lapic.lock();
        let before = signals();
        let result = f(&mut lapic);
        cpu.publish(&lapic);
        drop(lapic);
        if before.into_iter().zip(signals()).any(|(before, now)| now && !before) {
            self.wake.wake(vcpu);
        }
        Some(result)
    }

    /// Runs `f` on the shared controllers; its second argument sends interrupt messages.
    fn with_legacy<R>(
        &self,
        f: impl FnOnce(&mut Legacy, &mut dyn FnMut(&Message) -> bool) -> R,
    ) -> R {
        let mut wakes = WakeSet::default();
        let mut legacy = self.legacy.lock();
        let mut send = |message: &Message| self.deliver(message, &mut wakes);
        let result = f(&mut legacy, &mut send);
        let ended = legacy.pic.take_ended();
        legacy.ended(ended.into(), &mut send);
        let ended = std::mem::take(&mut legacy.resample.due);
        self.publish_legacy(&legacy, &mut wakes);
        drop(legacy);
        wakes.wake(&*self.wake);
        self.tell_ended(ended);
        result
    }

    fn publish_legacy(&self, legacy: &Legacy, wakes: &mut WakeSet) {
        let intr = legacy.pic.output();
        let rose = intr && !self.intr.load(Ordering::Relaxed);
        publish_bool(&self.intr, intr);
        if rose {
            self.raise_intr(wakes);
        }
        let deadline = legacy.pit.next_deadline().unwrap_or(NEVER);
        if deadline < self.pit_deadline.load(Ordering::Relaxed) {
            // vCPU 0 keeps this time and may be asleep until a later one.
            wakes.add(0);
        }
        publish_u64(&self.pit_deadline, deadline);
    }

    fn raise_intr(&self, wakes: &mut WakeSet) {
        for (index, cpu) in self.cpus.iter().enumerate() {
            if cpu.takes_pic.load(Ordering::SeqCst) {
                wakes.add(index);
            }
        }
        // LINT0 may turn INTR into a fixed interrupt or NMI instead of an INTA cycle.
        if let Some(cpu) = self.cpus.first() {
            let mut lapic = cpu.lapic.lock();
            lapic.local_interrupt(lapic::LVT_LINT0);
            cpu.publish(&lapic);
            if lapic.pending() || lapic.has_event() {
                wakes.add(0);
            }
        }
    }

    // Messages.

    /// Delivers to every target; true if at least one took it. Only targets are locked.
    fn deliver(&self, message: &Message, wakes: &mut WakeSet) -> bool {
        let broadcast = if message.wide { BROADCAST_WIDE } else { BROADCAST };
        let everyone = message.dest == broadcast;
        if !everyone && !message.logical {
            return self.deliver_to_id(message.dest, message, wakes);
        }
        let matches = |cpu: &LocalApic| everyone || cpu.route().matches_logical(message.dest);
        if message.mode == Delivery::LowestPriority {
            return match self.lowest_priority(matches) {
                Some(index) => self.deliver_to(index, message, wakes),
                None => false,
            };
        }
        let mut taken = false;
        for (index, cpu) in self.cpus.iter().enumerate() {
            if matches(cpu) {
                taken |= self.deliver_to(index, message, wakes);
            }
        }
        taken
    }

    fn lowest_priority(&self, matches: impl Fn(&LocalApic) -> bool) -> Option<usize> {
        let count = self.cpus.len();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        (0..count)
            .map(|step| (turn % count + step) % count)
            .filter(|&index| matches(&self.cpus[index]))
            .filter_map(|index| Some((self.cpus[index].route().arbitration()?, index)))
            .min_by_key(|&(priority, _)| priority)
            .map(|(_, index)| index)
    }

    fn deliver_to_id(&self, apic_id: u32, message: &Message, wakes: &mut WakeSet) -> bool {
        let vcpu = self.topology.vcpu(apic_id);
        vcpu.is_some_and(|vcpu| self.deliver_to(vcpu as usize, message, wakes))
    }

    fn deliver_to(&self, index: usize, message: &Message, wakes: &mut WakeSet) -> bool {
        let Some(cpu) = self.cpus.get(index).filter(|cpu| cpu.route().enabled()) else {
            return false;
        };
        let mut lapic = cpu.lapic.lock();
        let taken = lapic.receive(message.mode, message.vector, message.level);
        cpu.publish(&lapic);
        // Refused messages count, too: they may have raised the error interrupt.
        if lapic.pending() || lapic.has_event() {
            wakes.add(index);
        }
        taken
    }

    fn perform(&self, vcpu: usize, action: Action) {
        match action {
            Action::None => {}
            Action::Eoi(vector) => {
                self.with_legacy(|legacy, send| legacy.eoi(vector, send));
            }
            Action::Ipi(icr) => self.send_ipi(vcpu, icr),
        }
    }

    fn send_ipi(&self, from: usize, icr: Icr) {
        let mode = Delivery::from_bits(icr.low >> 8);
        let deassert = icr.low & 1 << 14 == 0 && icr.low & 1 << 15 != 0;
        match mode {
            // The INIT level de-assert only synchronised arbitration IDs (11.6.1).
            Delivery::Init if deassert => return,
            // Not for the ICR (table 11-3).
            Delivery::Reserved | Delivery::ExtInt => return,
            _ => {}
        }
        let message = Message {
            dest: icr.dest,
            wide: icr.wide,
            logical: icr.low & 1 << 11 != 0,
            mode,
            vector: icr.low as u8,
            level: false,
        };
        let mut wakes = WakeSet::default();
        match icr.low >> 18 & 3 {
            0 => {
                self.deliver(&message, &mut wakes);
            }
            1 => {
                self.deliver_to(from, &message, &mut wakes);
            }
            shorthand => {
                for index in 0..self.cpus.len() {
                    if shorthand == 2 || index != from {
                        self.deliver_to(index, &message, &mut wakes);
                    }
                }
            }
        }
        wakes.wake(&*self.wake);
    }

    /// Sends the low half of an ICR to the APIC IDs from `first` on whose bits are set. Returns
    /// how many took it; None if the ICR has a destination of its own.
    pub fn send_ipis(&self, targets: u128, first: u32, icr: u64) -> Option<u32> {
        const LOGICAL: u64 = 1 << 11;
        const SHORTHAND: u64 = 3 << 18;
        if icr & (LOGICAL | SHORTHAND) != 0 {
            return None;
        }
        let mode = Delivery::from_bits((icr >> 8) as u32);
        if matches!(mode, Delivery::Reserved | Delivery::ExtInt) {
            return Some(0);
        }
        let level = icr & 1 << 15 != 0;
        if level && icr & 1 << 14 == 0 {
            // De-assertion of a level: nothing follows it.
            return Some(0);
        }
        let (mut taken, mut wakes) = (0, WakeSet::default());
        for bit in (0..u128::BITS).filter(|bit| targets >> bit & 1 != 0) {
            let Some(dest) = first.checked_add(bit) else { break };
            let vector = icr as u8;
            let message = Message { dest, wide: true, logical: false, mode, vector, level };
            taken += u32::from(self.deliver_to_id(dest, &message, &mut wakes));
        }
        wakes.wake(&*self.wake);
        Some(taken)
    }

    /// Ends the halt of the vCPU with this APIC ID, the one that it is in or its next.
    pub fn unhalt(&self, apic_id: u32) {
        let Some(vcpu) = self.topology.vcpu(apic_id).map(|vcpu| vcpu as usize) else { return };
        if let Some(cpu) = self.cpus.get(vcpu) {
            cpu.unhalted.store(true, Ordering::SeqCst);
            self.wake.wake(vcpu);
        }
    }

    /// A message-signalled interrupt (11.11): a write of `data` to `address`.
    pub fn msi(&self, address: u64, data: u32) {
        if address >> 20 != 0xfee {
            return;
        }
        let level = data & 1 << 15 != 0;
        if level && data & 1 << 14 == 0 {
            // De-assertion of a level: nothing follows it.
            return;
        }
        let logical = address & 4 != 0;
        let redirect = address & 8 != 0;
        let mode = match Delivery::from_bits(data >> 8) {
            // The redirection hint asks for one processor of the logical set.
            Delivery::Fixed if logical && redirect => Delivery::LowestPriority,
            mode => mode,
        };
        let message = Message {
            dest: (address >> 12 & 0xff) as u32,
            wide: false,
            logical,
            mode,
            vector: data as u8,
            level,
        };
        let mut wakes = WakeSet::default();
        self.deliver(&message, &mut wakes);
        wakes.wake(&*self.wake);
    }

    /// Drives line `gsi` (0..=23). Lines 0-15 are ISA interrupts as well; 0 arrives at I/O APIC
    /// pin 2.
    pub fn irq_line(&self, gsi: u32, level: bool, now_ns: u64) {
        if gsi as usize >= ioapic::PINS {
            return;
        }
        self.with_legacy(|legacy, send| {
            if now_ns >= self.pit_deadline.load(Ordering::Relaxed) {
                legacy.sync(now_ns, send);
            }
            legacy.set_line(gsi, level, send);
        });
    }

    // Registers.

    /// None if the port is not one of the chip's. Wider accesses are split into bytes, those
    /// beyond the chip's ports read as ones.
    pub fn port_read(&self, port: u16, size: u8, now_ns: u64) -> Option<u32> {
        if !is_port(port) {
            return None;
        }
        Some(self.with_legacy(|legacy, send| {
            let mut value = 0;
            for index in 0..size.clamp(1, 4) {
                let byte = match port.wrapping_add(u16::from(index)) {
                    port if is_pit(port) => {
                        legacy.sync(now_ns, send);
                        legacy.pit.read(port)
                    }
                    port if is_port(port) => legacy.pic.read(port),
                    _ => 0xff,
                };
                value |= u32::from(byte) << (8 * index);
            }
            value
        }))
    }

    /// False if the port is not one of the chip's.
    pub fn port_write(&self, port: u16, size: u8, value: u32, now_ns: u64) -> bool {
        if !is_port(port) {
            return false;
        }
        self.with_legacy(|legacy, send| {
            for index in 0..size.clamp(1, 4) {
                let byte = (value >> (8 * index)) as u8;
                let port = port.wrapping_add(u16::from(index));
                if is_pit(port) {
                    legacy.sync(now_ns, send);
                    legacy.pit.write(port, byte);
                    legacy.settle_timer(false, send);
                } else if is_port(port) {
                    legacy.pic.write(port, byte);
                }
            }
        });
        true
    }

    /// A 32-bit read at `offset` in the xAPIC page.
    pub fn lapic_read(&self, vcpu: usize, offset: u32, now_ns: u64) -> u32 {
        self.with_lapic(vcpu, |lapic| lapic.mmio_read(offset, now_ns)).unwrap_or(0)
    }

    /// A 32-bit write at `offset` in the xAPIC page.
    pub fn lapic_write(&self, vcpu: usize, offset: u32, value: u32, now_ns: u64, tsc: u64) {
        let action = self.with_lapic(vcpu, |lapic| lapic.mmio_write(offset, value, now_ns, tsc));
        self.perform(vcpu, action.unwrap_or(Action::None));
    }

    pub fn ioapic_read(&self, offset: u32) -> u32 {
        self.legacy.lock().ioapic.read(offset)
    }

    pub fn ioapic_write(&self, offset: u32, value: u32) {
        self.with_legacy(|legacy, send| legacy.write_ioapic(offset, value, send));
    }

    /// Reads IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    pub fn apic_msr_read(
        &self,
        vcpu: usize,
        msr: u32,
        now_ns: u64,
        tsc: u64,
    ) -> Result<u64, ProtectionFault> {
        self.with_lapic(vcpu, |lapic| match msr {
            MSR_APIC_BASE => Ok(lapic.base()),
            MSR_TSC_DEADLINE => Ok(lapic.tsc_deadline(now_ns, tsc)),
            MSR_X2APIC_FIRST..=MSR_X2APIC_LAST => lapic.x2apic_read(msr - MSR_X2APIC_FIRST, now_ns),
            _ => Err(ProtectionFault),
        })
        .unwrap_or(Err(ProtectionFault))
    }

    /// Writes one of the same registers.
    pub fn apic_msr_write(
        &self,
        vcpu: usize,
        msr: u32,
        value: u64,
        now_ns: u64,
        tsc: u64,
    ) -> Result<(), ProtectionFault> {
        let action = self
            .with_lapic(vcpu, |lapic| match msr {
                MSR_APIC_BASE => lapic.set_base(value).map(|()| Action::None),
                MSR_TSC_DEADLINE => {
                    lapic.set_tsc_deadline(value, now_ns, tsc);
                    Ok(Action::None)
                }
                MSR_X2APIC_FIRST..=MSR_X2APIC_LAST => {
                    lapic.x2apic_write(msr - MSR_X2APIC_FIRST, value, now_ns, tsc)
                }
                _ => Err(ProtectionFault),
            })
            .unwrap_or(Err(ProtectionFault))?;
        self.perform(vcpu, action);
        Ok(())
    }

    pub fn apic_base(&self, vcpu: usize) -> u64 {
        match self.cpus.get(vcpu) {
            Some(cpu) => cpu.base.load(Ordering::Relaxed),
            None => 0,
        }
    }

    /// The physical page of a vCPU's local APIC, if it has one now. Takes no lock.
    pub fn lapic_page(&self, vcpu: usize) -> Option<u64> {
        Lapic::page(self.apic_base(vcpu))
    }

    /// CR8: the upper half of the task priority (SDM 11.8.6).
    pub fn cr8(&self, vcpu: usize) -> u8 {
        match self.cpus.get(vcpu) {
            Some(cpu) => cpu.lapic.lock().tpr() >> 4,
            None => 0,
        }
    }

    pub fn set_cr8(&self, vcpu: usize, v: u8) {
        self.with_lapic(vcpu, |lapic| lapic.set_tpr(v << 4));
    }

    // The vCPU's side.

    /// Whether an external interrupt can be delivered now. Takes no lock.
    pub fn pending(&self, vcpu: usize) -> bool {
        let Some(cpu) = self.cpus.get(vcpu) else {
            return false;
        };
        cpu.pending.load(Ordering::SeqCst)
            || self.intr.load(Ordering::SeqCst) && cpu.takes_pic.load(Ordering::SeqCst)
    }

    /// Acknowledges the interrupt to deliver: the PIC's first, as it has no priority to compare.
    /// None if it went away since [`IrqChip::pending`] was asked.
    pub fn accept(&self, vcpu: usize) -> Option<u8> {
        let cpu = self.cpus.get(vcpu)?;
        if self.intr.load(Ordering::SeqCst) && cpu.takes_pic.load(Ordering::SeqCst) {
            let vector = self.with_legacy(|legacy, _| {
                // Another vCPU may have been first: no spurious interrupt for that.
                legacy.pic.output().then(|| legacy.pic.inta())
            });
            if vector.is_some() {
                return vector;
            }
        }
        if !cpu.pending.load(Ordering::SeqCst) {
            return None;
        }
        let ext_int = self.with_lapic(vcpu, Lapic::take_ext_int)?;
        if ext_int {
            return Some(self.with_legacy(|legacy, _| legacy.pic.inta()));
        }
        self.with_lapic(vcpu, Lapic::accept)?
    }

    /// Takes a request to end this vCPU's halt.
    pub fn take_unhalt(&self, vcpu: usize) -> bool {
        let Some(cpu) = self.cpus.get(vcpu) else {
            return false;
        };
        cpu.unhalted.load(Ordering::SeqCst) && cpu.unhalted.swap(false, Ordering::SeqCst)
    }

    /// Whether there is one. Takes none.
    pub fn is_unhalted(&self, vcpu: usize) -> bool {
        self.cpus.get(vcpu).is_some_and(|cpu| cpu.unhalted.load(Ordering::SeqCst))
    }

    /// Whether the next halt of a vCPU that does not run ends at once.
    pub fn set_unhalted(&self, vcpu: usize, unhalted: bool) {
        if let Some(cpu) = self.cpus.get(vcpu) {
            cpu.unhalted.store(unhalted, Ordering::SeqCst);
        }
    }

    /// Whether the guest may keep its next EOI to itself, see [`Lapic::offer_quiet_eoi`]. The
    /// vCPU is woken when something arrives for which that matters.
    pub fn offer_quiet_eoi(&self, vcpu: usize) -> bool {
        self.with_lapic(vcpu, Lapic::offer_quiet_eoi).unwrap_or(false)
    }

    /// Ends that offer; `ended` if the guest has used it.
    pub fn take_quiet_eoi(&self, vcpu: usize, ended: bool) {
        self.with_lapic(vcpu, |lapic| lapic.take_quiet_eoi(ended));
    }

    /// Whether something waits beside maskable interrupts. Takes no lock.
    pub fn has_event(&self, vcpu: usize) -> bool {
        self.cpus.get(vcpu).is_some_and(|cpu| cpu.event.load(Ordering::SeqCst))
    }

    /// Whether the vCPU is an application processor that nothing but a SIPI starts.
    pub fn waits_for_sipi(&self, vcpu: usize) -> bool {
        self.cpus.get(vcpu).is_some_and(|cpu| cpu.lapic.lock().waits_for_sipi())
    }

    /// The next INIT, SIPI or NMI, in this order.
    pub fn take_event(&self, vcpu: usize) -> Option<Event> {
        let cpu = self.cpus.get(vcpu)?;
        if !cpu.event.load(Ordering::SeqCst) {
            return None;
        }
        self.with_lapic(vcpu, Lapic::take_event)?
    }

    // Time.

    /// When [`IrqChip::run_timers`] has something to do for this vCPU, in ns of the machine
    /// clock. vCPU 0 keeps the PIT's time.
    pub fn next_deadline(&self, vcpu: usize) -> Option<u64> {
        let mut deadline = self.cpus.get(vcpu)?.deadline.load(Ordering::SeqCst);
        if vcpu == 0 {
            deadline = deadline.min(self.pit_deadline.load(Ordering::SeqCst));
        }
        (deadline != NEVER).then_some(deadline)
    }

    /// Fires what is due. A periodic timer that missed ticks fires once and keeps its phase.
    pub fn run_timers(&self, vcpu: usize, now_ns: u64, tsc: u64) {
        let Some(cpu) = self.cpus.get(vcpu) else {
            return;
        };
        if now_ns >= cpu.deadline.load(Ordering::SeqCst) {
            self.with_lapic(vcpu, |lapic| lapic.run_timer(now_ns, tsc));
        }
        if vcpu == 0 && now_ns >= self.pit_deadline.load(Ordering::SeqCst) {
            self.with_legacy(|legacy, send| legacy.sync(now_ns, send));
        }
    }

    /// Has the local APIC's timer interrupt before its time, where its entry lets it.
    pub fn interrupt_by_timer(&self, vcpu: usize) {
        self.with_lapic(vcpu, Lapic::interrupt_by_timer);
    }

    // Snapshots.

    /// What the machine has once. Exact only while no vCPU runs.
    pub fn chipset(&self) -> ChipsetState {
        self.legacy.lock().state()
    }

    /// Takes over what [`IrqChip::chipset`] gave. On an error nothing has changed.
    pub fn set_chipset(&self, state: &ChipsetState) -> Result<(), BadState> {
        let mut legacy = Legacy::restored(state)?;
        let mut current = self.legacy.lock();
        let watched = current.resample.watched;
        legacy.resample.watched = watched;
        *current = legacy;
        // Not publish_legacy: INTR has not risen, it is as it was when saved.
        publish_bool(&self.intr, current.pic.output());
        let deadline = current.pit.next_deadline().unwrap_or(NEVER);
        publish_u64(&self.pit_deadline, deadline);
        drop(current);
        self.wake_all();
        self.tell_ended(watched);
        Ok(())
    }

    /// All of it as it is, for [`IrqChip::put_back`].
    pub fn copied(&self) -> Copied {
        let unhalted = |cpu: &LocalApic| cpu.unhalted.load(Ordering::SeqCst);
        Copied {
            legacy: self.legacy.lock().clone(),
            cpus: self.cpus.iter().map(|cpu| (cpu.lapic.lock().clone(), unhalted(cpu))).collect(),
            turn: self.turn.load(Ordering::SeqCst),
        }
    }

    /// While no vCPU runs.
    pub fn put_back(&self, copied: &Copied) {
        let mut legacy = self.legacy.lock();
        legacy.clone_from(&copied.legacy);
        publish_bool(&self.intr, legacy.pic.output());
        publish_u64(&self.pit_deadline, legacy.pit.next_deadline().unwrap_or(NEVER));
        drop(legacy);
        for (cpu, (lapic, unhalted)) in self.cpus.iter().zip(&copied.cpus) {
            let mut current = cpu.lapic.lock();
            current.clone_from(lapic);
            cpu.publish(&current);
            publish_bool(&cpu.unhalted, *unhalted);
        }
        self.turn.store(copied.turn, Ordering::SeqCst);
    }

    /// Has every vCPU look at itself.
    pub fn wake_all(&self) {
        for vcpu in 0..self.cpus.len() {
            self.wake.wake(vcpu);
        }
    }

    /// A vCPU's local APIC; `None` where there is no such vCPU.
    pub fn lapic(&self, vcpu: usize, now_ns: u64) -> Option<LapicState> {
        Some(self.cpus.get(vcpu)?.lapic.lock().state(now_ns))
    }

    /// Takes over what [`IrqChip::lapic`] gave, but for NMI, INIT and SIPI. `now`
    /// is machine time and the guest's TSC. On an error nothing has changed.
    pub fn set_lapic(
        &self,
        vcpu: usize,
        state: &LapicState,
        now: (u64, u64),
    ) -> Result<(), BadState> {
        let cpu = self.cpus.get(vcpu).ok_or(BadState::Vcpu(vcpu))?;
        let restored = Lapic::restored(vcpu as u32, self.tsc_hz, state, now)?;
        let mut lapic = cpu.lapic.lock();
        let (waiting, waits) = (lapic.waiting(), lapic.waits_for_sipi());
        *lapic = restored;
        lapic.set_waiting(waiting);
        lapic.set_waits_for_sipi(waits);
        cpu.publish(&lapic);
        drop(lapic);
        self.wake_all();
        Ok(())
    }

    /// NMI, INIT and the vector of a SIPI that wait for the vCPU, and whether it
    /// waits for a SIPI.
    pub fn waiting(&self, vcpu: usize) -> (bool, bool, Option<u8>, bool) {
        self.cpus.get(vcpu).map_or_else(Default::default, |cpu| {
            let lapic = cpu.lapic.lock();
            let (nmi, init, sipi) = lapic.waiting();
            (nmi, init, sipi, lapic.waits_for_sipi())
        })
    }

    pub fn set_waiting(
        &self,
        vcpu: usize,
        (nmi, init, sipi, waits): (bool, bool, Option<u8>, bool),
    ) {
        self.with_lapic(vcpu, |lapic| {
            lapic.set_waiting((nmi, init, sipi));
            lapic.set_waits_for_sipi(waits);
        });
        self.wake_all();
    }
}
