//! The machine-check architecture that a guest finds (Intel SDM 3B, 17.3; AMD APM 2, 9.3): the same
//! on every engine, since an operating system counts the banks of a CPU when it comes up, and reads
//! all of them from then on.

/// Banks, each of four registers: CTL, STATUS, ADDR, MISC. Nothing is ever in them.
pub const BANKS: u32 = 10;
/// IA32_MCG_CAP: the banks, and that there is an IA32_MCG_CTL.
pub const MCG_CAP: u64 = 1 << 8 | BANKS as u64;
