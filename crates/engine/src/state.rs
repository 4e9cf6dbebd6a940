//! What a saved machine needs beside its memory: one form for every engine, so
//! that what one saved another can take up.
//!
//! Everything is named as in the manuals. Times are those of the machine's
//! clock or relative to the moment of saving; nothing refers to the host.

use serde::{Deserialize, Serialize};

use crate::section::{self, SectionError};
use crate::{EngineError, Registers, SystemRegisters};

/// DR0 to DR3, DR6 and DR7 (Intel SDM 3B, 18.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DebugRegisters {
    pub breakpoints: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
}

/// An exception that was raised and not delivered yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingException {
    pub vector: u8,
    pub error: Option<u32>,
    /// What CR2 or DR6 is to hold, where the exception has not set it yet.
    pub payload: Option<u64>,
    /// Its delivery has begun: what fails in it is a double fault.
    pub injected: bool,
}

/// What waits to interrupt the CPU, beside what the local APIC holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingEvents {
    pub exception: Option<PendingException>,
    /// The vector of an interrupt that was acknowledged and not delivered yet.
    pub interrupt: Option<u8>,
    /// That interrupt is INT n.
    pub interrupt_soft: bool,
    pub nmi: bool,
    /// Until the next IRET (Intel SDM 3A, 6.7.1).
    pub nmi_blocked: bool,
    /// The next instruction runs without interrupts: after STI, after MOV or POP SS.
    pub shadow_sti: bool,
    pub shadow_mov_ss: bool,
    pub init: bool,
    pub sipi: Option<u8>,
}

/// What the CPU is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RunState {
    #[default]
    Runnable,
    /// In HLT.
    Halted,
    /// An application processor that was not started (Intel SDM 3A, 9.4).
    WaitForSipi,
    /// After a triple fault.
    Shutdown,
}

/// A local APIC (Intel SDM 3A, chapter 11).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LapicState {
    /// IA32_APIC_BASE.
    pub base: u64,
    /// The register at offset 16 * n (table 11-1), 64 of them; the ID in bits 31 to
    /// 24 in x2APIC mode too, the current count as of the moment of saving.
    pub registers: Vec<u32>,
    /// Errors that the next write of ESR shows.
    pub esr_pending: u32,
    /// An ExtINT message asks for an INTA cycle.
    pub ext_int: bool,
    /// IA32_TSC_DEADLINE; 0: not armed.
    pub tsc_deadline: u64,
    /// To the timer's expiry, where the engine knows it finer than by the current
    /// count; less than 0 where it is overdue.
    pub timer_left_ns: Option<i64>,
}

/// Registers of a local APIC.
pub const LAPIC_REGISTERS: usize = 64;

/// One vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    pub registers: Registers,
    pub system: SystemRegisters,
    pub debug: DebugRegisters,
    pub xcr0: u64,
    /// The XSAVE image in the standard format (Intel SDM 1, 13.4.2).
    pub xsave: Vec<u8>,
    /// Model-specific registers by number, those of the guest interface too, without
    /// those that have a place elsewhere.
    pub msrs: Vec<(u32, u64)>,
    /// IA32_TIME_STAMP_COUNTER at the moment that the machine's clock stands at.
    pub tsc: u64,
    pub events: PendingEvents,
    pub run: RunState,
    pub lapic: LapicState,
}

/// More than any CPU and guest interface have.
const MSRS_MAX: usize = 4096;

impl VcpuState {
    /// Whether the lists in it are of a length that a vCPU can have: each entry costs an
    /// engine work, and the state may be somebody else's.
    pub fn check(&self) -> Result<(), EngineError> {
        if self.msrs.len() > MSRS_MAX {
            return Err(EngineError::Refused(format!(
                "the saved vCPU has {} MSRs, more than any CPU; it is damaged",
                self.msrs.len()
            )));
        }
        Ok(())
    }
}

/// One 8259A (order 231468).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicState {
    /// Levels of the inputs.
    pub lines: u8,
    pub irr: u8,
    pub imr: u8,
    pub isr: u8,
    /// Inputs that are level-triggered (Intel 82371SB, 2.5.5.8).
    pub elcr: u8,
    /// ICW2.
    pub base: u8,
    /// The input with the highest priority.
    pub highest: u8,
    /// The initialisation word that is awaited: 2, 3 or 4; 0: none.
    pub awaits: u8,
    pub icw4_follows: bool,
    pub single: bool,
    pub auto_eoi: bool,
    pub rotate_on_auto_eoi: bool,
    pub special_fully_nested: bool,
    pub special_mask: bool,
    pub poll: bool,
    /// Reads give ISR, not IRR.
    pub read_isr: bool,
}

/// The I/O APIC (82093AA).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoapicState {
    pub select: u8,
    pub id: u8,
    /// Levels of the pins.
    pub lines: u32,
    /// Redirection table, delivery status and remote IRR included.
    pub entries: [u64; 24],
}

/// Where a counter of the 8254 stands. Clocks are those of its input, 1.193182
/// MHz, counted in machine time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PitCounting {
    /// A control word was written and no count since.
    #[default]
    Stopped,
    /// The count was loaded at this clock, which may be the next one.
    Running { start: u64 },
    /// GATE is low; so many clocks had been counted.
    Held { elapsed: u64 },
}

/// A counter of the 8254 (order 231164).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitChannelState {
    pub mode: u8,
    /// 1: low byte, 2: high byte, 3: low, then high.
    pub access: u8,
    pub bcd: bool,
    /// 1 to 0x10000.
    pub count: u32,
    /// A count that the counter has not taken yet.
    pub reload: Option<u32>,
    pub counting: PitCounting,
    /// The low byte of a count whose high byte is awaited.
    pub first_byte: Option<u8>,
    /// The next read gives the high byte.
    pub read_high: bool,
    pub latch: Option<u16>,
    pub status: Option<u8>,
    pub gate: bool,
}

/// The 8254 and port 61h.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    /// The clock that the counters have been brought to.
    pub clock: u64,
    /// Bits 0 to 3 of port 61h.
    pub control: u8,
    pub channels: [PitChannelState; 3],
}

/// The interrupt controllers that a machine has once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChipsetState {
    /// Levels of the interrupt lines, one bit a GSI.
    pub lines: u32,
    /// The primary, then the secondary.
    pub pics: [PicState; 2],
    pub ioapic: IoapicState,
    pub pit: PitState,
}

/// What the vCPUs of a machine share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    pub vcpus: u32,
    /// The machine's clock.
    pub clock_ns: u64,
    /// What kvmclock says at that moment.
    pub kvmclock_ns: u64,
    /// Ticks of the guest's TSC in a second.
    pub tsc_hz: u64,
    pub chipset: ChipsetState,
}

/// A TSC that is off by more than one part in so many is another one. Two
/// measurements of the same differ by far less, and an operating system follows
/// what is left by its own clock discipline.
const TSC_TOLERANCE: u64 = 200;

/// What a machine's clocks can say: 292 years. Sums of it and any deadline do not wrap.
const CLOCK_MAX_NS: u64 = i64::MAX as u64;

impl VmState {
    /// Whether a machine with so many vCPUs on a host with this TSC can take it up.
    pub fn check(&self, vcpus: u32, tsc_hz: u64) -> Result<(), EngineError> {
        if self.vcpus != vcpus {
            return Err(EngineError::Refused(format!(
                "the saved machine has {} vCPUs, this one {vcpus}",
                self.vcpus
            ))
            .mended_by(format!("make it with {} of them", self.vcpus)));
        }
        if self.tsc_hz.abs_diff(tsc_hz) > tsc_hz / TSC_TOLERANCE {
            return Err(EngineError::Refused(format!(
                "the saved machine's TSC counts {} MHz, this host's {} MHz",
                self.tsc_hz / 1_000_000,
                tsc_hz / 1_000_000
            ))
            .mended_by("restore it on a host with the same"));
        }
        for clock in [self.clock_ns, self.kvmclock_ns] {
            if clock > CLOCK_MAX_NS {
                return Err(EngineError::Refused(format!(
                    "the saved machine's clock says {clock} ns, which none can; it is damaged"
                )));
            }
        }
        Ok(())
    }
}

/// State that is saved as a section of its own.
pub trait Saved: Serialize + for<'a> Deserialize<'a> {
    const NAME: &'static str;
    /// To be raised with each change of the form.
    const VERSION: u16;

    fn to_bytes(&self) -> Result<Vec<u8>, SectionError> {
        section::write(Self::NAME, Self::VERSION, self)
    }

    fn from_bytes(data: &[u8]) -> Result<Self, SectionError> {
        section::read(Self::NAME, Self::VERSION, data)
    }
}

impl Saved for VcpuState {
    const NAME: &'static str = "vcpu";
    const VERSION: u16 = 1;
}

impl Saved for VmState {
    const NAME: &'static str = "vm";
    const VERSION: u16 = 1;
}
