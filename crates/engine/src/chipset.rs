//! What every engine answers itself, since /dev/kvm does: the interrupt
//! controllers and the interval timer. No exit comes from there.

/// Ports: base, length, and what they are.
pub const ENGINE_PORTS: [(u64, u64, &str); 5] = [
    (0x20, 2, "the primary interrupt controller"),
    (0x40, 4, "the interval timer"),
    (0x61, 1, "the interval timer's gate"),
    (0xA0, 2, "the secondary interrupt controller"),
    (0x4D0, 2, "the interrupt controllers' trigger modes"),
];

/// Memory. The local APIC's mebibyte is also where interrupt messages go
/// (Intel SDM 3A, 11.11.1).
pub const ENGINE_MMIO: [(u64, u64, &str); 2] =
    [(0xFEC0_0000, 0x1000, "the I/O APIC"), (0xFEE0_0000, 0x10_0000, "the local APICs")];

/// Lines of the interrupt controllers: the pins of one I/O APIC.
pub const GSI_COUNT: u32 = 24;
