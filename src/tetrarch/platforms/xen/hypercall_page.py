"""The hypercall page: code that a guest has its hypervisor write, and calls
(xen/include/public/arch-x86/cpuid.h, leaf 2).

Each of the 128 entries is 32 bytes: MOV EAX, its number; VMCALL; RET. Kernels since 2024 execute
VMCALL or VMMCALL themselves.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from tetrarch._native import GuestFault, GuestMemoryError

if TYPE_CHECKING:
    from tetrarch._native import GuestCall

__all__ = ["write_hypercall_page"]

_ENTRIES: Final = 128
_ENTRY_BYTES: Final = 32
_IRET: Final = 23
_GENERAL_PROTECTION: Final = 13
_PAGE: Final = b"".join(
    # What an HVM guest does not call is UD2.
    (
        b"\x0f\x0b"
        if number == _IRET
        else b"\xb8" + struct.pack("<I", number) + b"\x0f\x01\xc1\xc3"
    ).ljust(_ENTRY_BYTES, b"\xcc")
    for number in range(_ENTRIES)
)


def write_hypercall_page(call: GuestCall, index: int, value: int) -> None:
    """WRMSR of the page's guest physical address; its lower bits are the page's number."""
    if value & 0xFFF:
        raise GuestFault(_GENERAL_PROTECTION)
    try:
        call.vm.write_memory(value, _PAGE)
    except GuestMemoryError as error:
        raise GuestFault(_GENERAL_PROTECTION) from error
