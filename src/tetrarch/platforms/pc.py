"""The plain PC: the guest believes that it runs on KVM."""

from tetrarch.platforms.platform import Platform

__all__ = ["PC"]

PC = Platform(
    name="pc",
    kvm=True,
    cpuid={
        # Advanced power management: no invariant TSC. A saved machine may go on where the TSC
        # has another frequency, and only kvmclock tells the guest so; with the promise of this
        # bit Linux would take the TSC for its clock (arch/x86/kernel/kvmclock.c).
        0x8000_0007: (0, 0, 0, 0),
    },
)
