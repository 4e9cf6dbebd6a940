//! Why the interrupt controllers refuse something.

use thiserror::Error;

/// An access to an MSR that a CPU answers with #GP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("general-protection exception")]
pub struct ProtectionFault;

/// A saved state in which no such controller can be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BadState {
    #[error("there is no vCPU {0}")]
    Vcpu(usize),
    #[error("APIC base {0:#x} is invalid")]
    ApicBase(u64),
    #[error("{0} APIC registers are not 64")]
    ApicRegisters(usize),
    #[error("PIT mode {mode} with access {access} is none")]
    PitMode { mode: u8, access: u8 },
    #[error("PIT count {0:#x} is outside 1..=0x10000")]
    PitCount(u32),
    /// Beyond what the arithmetic has room for: no PIT has run for so long.
    #[error("PIT clock {0:#x} is absurd")]
    PitClock(u64),
    #[error("port 61h {0:#x} is above 0xf")]
    Port61(u8),
}
