"""Commands of the backdoor that say something of the machine (backdoor_def.h)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final
from uuid import UUID

from tetrarch.platforms.vmware.backdoor import MAGIC, Command

if TYPE_CHECKING:
    from tetrarch._native import GuestCall

__all__ = ["Facts"]

GETMHZ: Final = 1
GETVERSION: Final = 10
GETGUIOPTIONS: Final = 13
GETHWVERSION: Final = 17
GETUUID: Final = 19
GETMEMSIZE: Final = 20
GETTIME: Final = 23
STOPCATCHUP: Final = 24
ISACPIDISABLED: Final = 34
GETHZ: Final = 45
GETTIMEFULL: Final = 46
GETTIMEFULL_WITH_LAG: Final = 55
GET_VCPU_INFO: Final = 68

#: Of the backdoor, and of the product that answers (VMX_TYPE_WORKSTATION, vm_version.h).
VERSION: Final = 6
WORKSTATION: Final = 4
HARDWARE_VERSION: Final = 19
#: The local APIC's timer, undivided.
APIC_HZ: Final = 1_000_000_000
#: Of GET_VCPU_INFO: x2APIC mode works without remapping of interrupts.
LEGACY_X2APIC_OK: Final = 1 << 3
#: How far behind a guest's clock may be before its tools set it forward at once, in us; a step a
#: minute for a few of them would be the worse clock.
_LAG_MAX_US: Final = 100_000
#: How late the timer's interrupts are, in us: that is not counted here.
_LAG_US: Final = 0


class Facts:
    """``host_time_ns`` is the host's wall clock, since 1970."""

    def __init__(
        self,
        uuid: Callable[[], UUID],
        gui_options: Callable[[], int],
        host_time_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._uuid = uuid
        self._gui_options = gui_options
        self._host_time_ns = host_time_ns

    def commands(self) -> Mapping[int, Command]:
        return {
            GETMHZ: lambda call: call.vm.tsc_hz() // 1_000_000,
            GETVERSION: self.version,
            GETGUIOPTIONS: lambda call: self._gui_options(),
            GETHWVERSION: lambda call: HARDWARE_VERSION,
            GETUUID: self.uuid,
            GETMEMSIZE: lambda call: sum(length for _, length in call.vm.ram) >> 20,
            GETTIME: self.time,
            STOPCATCHUP: lambda call: 0,
            ISACPIDISABLED: lambda call: 0,
            GETHZ: self.hz,
            GETTIMEFULL: self.full_time,
            GETTIMEFULL_WITH_LAG: self.full_time_with_lag,
            GET_VCPU_INFO: lambda call: LEGACY_X2APIC_OK,
        }

    def version(self, call: GuestCall) -> int:
        call["rbx"] = MAGIC
        call["rcx"] = WORKSTATION
        return VERSION

    def uuid(self, call: GuestCall) -> int:
        words = [int.from_bytes(self._uuid().bytes[at : at + 4], "little") for at in (0, 4, 8, 12)]
        for name, word in zip(("rbx", "rcx", "rdx"), words[1:], strict=True):
            call[name] = word
        return words[0]

    def hz(self, call: GuestCall) -> int:
        hz = call.vm.tsc_hz()
        call["rbx"] = hz >> 32
        call["rcx"] = APIC_HZ
        return hz & 0xFFFF_FFFF

    def time(self, call: GuestCall) -> int:
        seconds, rest_ns = divmod(self._host_time_ns(), 1_000_000_000)
        call["rbx"] = rest_ns // 1000
        call["rcx"] = _LAG_MAX_US
        call["rdx"] = 0  # minutes of the time zone: UTC
        return seconds & 0xFFFF_FFFF

    def full_time(self, call: GuestCall) -> int:
        seconds, rest_ns = divmod(self._host_time_ns(), 1_000_000_000)
        call["rsi"] = seconds >> 32
        call["rdx"] = seconds & 0xFFFF_FFFF
        call["rbx"] = rest_ns // 1000
        call["rcx"] = _LAG_MAX_US
        return MAGIC

    def full_time_with_lag(self, call: GuestCall) -> int:
        """The lag of interrupts comes in EDI."""
        call["rdi"] = _LAG_US
        return self.full_time(call)
