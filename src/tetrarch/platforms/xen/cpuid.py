"""CPUID leaves of Xen (xen/include/public/arch-x86/cpuid.h)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tetrarch.platforms.platform import Leaf, Leaves

__all__ = ["HYPERCALL_PAGE_MSR", "leaves"]

BASE: Final = 0x4000_0000
#: Where the guest writes the address of its hypercall page.
HYPERCALL_PAGE_MSR: Final = 0x4000_0000
MAJOR: Final = 4
MINOR: Final = 17
# Leaf 4 of an HVM guest, EAX.
_X2APIC: Final = 1 << 1
_VCPU_ID: Final = 1 << 3
_DOMID: Final = 1 << 4
_UPCALL_VECTOR: Final = 1 << 6


def leaves(domid: int) -> Leaves:
    def hvm(vcpu: int) -> tuple[int, int, int, int]:
        return (_X2APIC | _VCPU_ID | _DOMID | _UPCALL_VECTOR, vcpu, domid, 0)

    ebx, ecx, edx = struct.unpack("<3I", b"XenVMMXenVMM")
    table: dict[int, Leaf] = {
        BASE: (BASE + 4, ebx, ecx, edx),
        BASE + 1: (MAJOR << 16 | MINOR, 0, 0, 0),
        BASE + 2: (1, HYPERCALL_PAGE_MSR, 0, 0),
        BASE + 3: (0, 0, 0, 0),
        BASE + 4: hvm,
    }
    return table
