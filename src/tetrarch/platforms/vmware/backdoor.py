"""The backdoor: ports, or a hypercall, by which any program in the guest asks its hypervisor.

Low bandwidth: IN from port 0x5658, or VMCALL and VMMCALL, with a magic number in EAX, the command
in CX and arguments in the other registers, which also hold the answer. High bandwidth, for strings:
REP INSB and OUTSB at port 0x5659, or the same calls with flags in DX; the command is in BX
(open-vm-tools, lib/include/backdoor_def.h and lib/backdoor).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tetrarch._native import GuestCall, RegisterPortAccess

__all__ = [
    "HIGH_BANDWIDTH_PORT",
    "MAGIC",
    "NO_COMMAND",
    "PORT",
    "Backdoor",
    "Command",
    "StringCommand",
    "low",
]

PORT: Final = 0x5658
HIGH_BANDWIDTH_PORT: Final = 0x5659
MAGIC: Final = 0x564D_5868
#: What EAX is where there is no such command; the other registers stay.
NO_COMMAND: Final = 0xFFFF_FFFF

# Of the hypercall, in EDX (BDOOR_FLAGS_HB, BDOOR_FLAGS_OUT).
_HIGH_BANDWIDTH: Final = 1 << 0
_OUT: Final = 1 << 1

Command = Callable[["GuestCall"], int]
"""Takes its arguments from the registers, leaves its answers there, and gives EAX."""
StringCommand = Callable[["GuestCall", bool], None]
"""The same with a string, that the guest sends (true) or fetches."""


def low(call: GuestCall, name: str) -> int:
    """The 32 bits of a register that count."""
    return call[name] & 0xFFFF_FFFF


class Backdoor:
    """Calls the command that the guest names."""

    def __init__(
        self, commands: Mapping[int, Command], string_commands: Mapping[int, StringCommand]
    ) -> None:
        self._commands = commands
        self._string_commands = string_commands

    def port(self, call: GuestCall, access: RegisterPortAccess) -> int | None:
        """IN EAX, DX. Other accesses find what no device claims."""
        if not access.input or access.string:
            return None
        if access.size != 4 or low(call, "rax") != MAGIC:
            return (1 << 8 * access.size) - 1
        return self._run(call)

    def string_port(self, call: GuestCall, access: RegisterPortAccess) -> int | None:
        """REP INSB and OUTSB. Others move nothing."""
        if not access.string:
            return (1 << 8 * access.size) - 1 if access.input else None
        if access.size == 1 and low(call, "rax") == MAGIC:
            self._run_string(call, not access.input)
        return None

    def hypercall(self, call: GuestCall) -> int:
        if low(call, "rax") != MAGIC:
            return NO_COMMAND
        flags = low(call, "rdx")
        if flags & _HIGH_BANDWIDTH:
            return MAGIC if self._run_string(call, bool(flags & _OUT)) else NO_COMMAND
        return self._run(call)

    def _run(self, call: GuestCall) -> int:
        command = self._commands.get(call["rcx"] & 0xFFFF)
        return NO_COMMAND if command is None else command(call) & 0xFFFF_FFFF

    def _run_string(self, call: GuestCall, out: bool) -> bool:
        command = self._string_commands.get(call["rbx"] & 0xFFFF)
        if command is not None:
            command(call, out)
        return command is not None
