"""The backdoor: a port, or a hypercall, by which any program in the guest asks its hypervisor.

Low bandwidth only: IN from port 0x5658, or VMCALL and VMMCALL, with a magic number in EAX, the
command in CX and arguments in the other registers, which also hold the answer (open-vm-tools,
lib/include/backdoor_def.h and lib/backdoor). The second port, which moves strings, is not
announced, so messages go four bytes at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tetrarch._native import GuestCall, RegisterPortAccess

__all__ = ["MAGIC", "NO_COMMAND", "PORT", "Backdoor", "Command", "low"]

PORT: Final = 0x5658
MAGIC: Final = 0x564D_5868
#: What EAX is where there is no such command; the other registers stay.
NO_COMMAND: Final = 0xFFFF_FFFF

# Of the hypercall, in EDX (BDOOR_FLAGS_HB).
_HIGH_BANDWIDTH: Final = 1 << 0

Command = Callable[["GuestCall"], int]
"""Takes its arguments from the registers, leaves its answers there, and gives EAX."""


def low(call: GuestCall, name: str) -> int:
    """The 32 bits of a register that count."""
    return call[name] & 0xFFFF_FFFF


class Backdoor:
    """Calls the command that the guest names."""

    def __init__(self, commands: Mapping[int, Command]) -> None:
        self._commands = commands

    def port(self, call: GuestCall, access: RegisterPortAccess) -> int | None:
        """IN EAX, DX. Other accesses find what no device claims."""
        if not access.input or access.string:
            return None
        if access.size != 4 or low(call, "rax") != MAGIC:
            return (1 << 8 * access.size) - 1
        return self._run(call)

    def hypercall(self, call: GuestCall) -> int:
        if low(call, "rax") != MAGIC or low(call, "rdx") & _HIGH_BANDWIDTH:
            return NO_COMMAND
        return self._run(call)

    def _run(self, call: GuestCall) -> int:
        command = self._commands.get(call["rcx"] & 0xFFFF)
        return NO_COMMAND if command is None else command(call) & 0xFFFF_FFFF
