//! Debugging a guest from outside, as KVM_SET_GUEST_DEBUG has it (Linux, api.rst, 4.87).

use crate::replay::ReplayStop;

/// What makes an access of the guest's stop it (the R/W fields of DR7, Intel SDM 3B, 18.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watched {
    /// Before the instruction at the address.
    Execute,
    /// Behind the instruction that writes.
    Write,
    /// Behind the instruction that reads or writes.
    Access,
}

/// A breakpoint that needs no change of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HardwareBreakpoint {
    pub watched: Watched,
    /// Linear, a multiple of `length`.
    pub address: u64,
    /// 1, 2, 4 or 8 bytes; 1 where it is executed.
    pub length: u8,
}

impl HardwareBreakpoint {
    /// `None` where the CPU has none such.
    pub fn new(watched: Watched, address: u64, length: u8) -> Option<Self> {
        let fits = match watched {
            Watched::Execute => length == 1,
            Watched::Write | Watched::Access => matches!(length, 1 | 2 | 4 | 8),
        };
        let aligned = fits && address.is_multiple_of(u64::from(length));
        aligned.then_some(Self { watched, address, length })
    }
}

/// What a debugger outside the guest wants of one vCPU. Beside what the guest has set
/// itself; the guest does not see it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestDebug {
    /// Stop when an instruction, an iteration of a REP prefix, or the way into a handler
    /// is done.
    pub step: bool,
    /// While stepping no interrupt is delivered, where the engine can hold it back.
    pub block_interrupts: bool,
    /// Stop at each INT3, before it.
    pub software: bool,
    pub hardware: [Option<HardwareBreakpoint>; 4],
}

impl GuestDebug {
    /// Whether every instruction has to be looked at.
    #[inline]
    pub fn watches(&self) -> bool {
        self.step || self.hardware.iter().any(Option::is_some)
    }

    /// The hardware breakpoints as DR0 to DR3 and DR7 have them.
    pub fn registers(&self) -> ([u64; 4], u64) {
        let mut addresses = [0; 4];
        let mut dr7 = 0;
        for (n, breakpoint) in self.hardware.iter().enumerate() {
            let Some(HardwareBreakpoint { watched, address, length }) = *breakpoint else {
                continue;
            };
            addresses[n] = address;
            let rw = match watched {
                Watched::Execute => 0,
                Watched::Write => 1,
                Watched::Access => 3,
            };
            let len = match length {
                8 => 2,
                length => u64::from(length) - 1,
            };
            dr7 |= 2 << (2 * n) | (len << 2 | rw) << (16 + 4 * n);
        }
        (addresses, dr7)
    }
}

/// Why a vCPU stopped for the debugger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DebugStop {
    /// The step is done.
    Step,
    /// RIP is at an INT3, whosever it is.
    Software {
        /// Where, with the base of CS.
        linear: u64,
    },
    /// Hardware breakpoints by number, as the low bits of DR6 have them.
    Hardware { hits: u8 },
    /// A machine that replays has come to where somebody waits for it.
    Replay(ReplayStop),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn breakpoints_that_no_cpu_has_are_refused() {
        assert!(HardwareBreakpoint::new(Watched::Execute, 3, 1).is_some());
        assert!(HardwareBreakpoint::new(Watched::Execute, 4, 2).is_none());
        assert!(HardwareBreakpoint::new(Watched::Write, 4, 8).is_none());
        assert!(HardwareBreakpoint::new(Watched::Access, 8, 8).is_some());
        assert!(HardwareBreakpoint::new(Watched::Access, 9, 3).is_none());
        assert!(HardwareBreakpoint::new(Watched::Access, 0, 0).is_none());
    }

    #[test]
    fn breakpoints_are_told_as_debug_registers() {
        let mut debug = GuestDebug::default();
        assert_eq!(debug.registers(), ([0; 4], 0));
        debug.hardware[0] = HardwareBreakpoint::new(Watched::Execute, 0x1001, 1);
        debug.hardware[3] = HardwareBreakpoint::new(Watched::Access, 0x2008, 8);
        // G0, execute, one byte; G3, R/W 3, LEN 2.
        assert_eq!(debug.registers(), ([0x1001, 0, 0, 0x2008], 0x82 | 0xB << 28));
    }
}
