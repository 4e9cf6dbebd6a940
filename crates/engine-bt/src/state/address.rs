//! Widths of addresses.

/// Physical address bits that CPUID reports; higher ones are reserved.
pub const PHYS_BITS: u32 = 40;
pub const PHYS_MASK: u64 = (1 << PHYS_BITS) - 1;

/// Whether bits 63:47 of a linear address are all alike (Intel SDM 1, 3.3.7.1).
#[inline]
pub fn canonical(linear: u64) -> bool {
    (linear as i64) << 16 >> 16 == linear as i64
}
