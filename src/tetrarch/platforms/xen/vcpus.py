"""HYPERVISOR_vcpu_op (xen/include/public/vcpu.h), but for timers, which are crates/xen's."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from tetrarch.platforms.xen.arguments import physical, read, write
from tetrarch.platforms.xen.errno import EINVAL, ENOSYS

if TYPE_CHECKING:
    from tetrarch._native import GuestCall, XenDomain

__all__ = ["Vcpus"]

_ADDRESS: Final = struct.Struct("<Q")
# mfn, offset.
_INFO: Final = struct.Struct("<QI4x")
# State, since when, and time in each: running, runnable, blocked, offline.
_RUNSTATE: Final = struct.Struct("<i4xQ4Q")
_RUNNING: Final = 0
#: vcpu_time_info.
_TIME_BYTES: Final = 32


class Vcpus:
    def __init__(self, domain: XenDomain) -> None:
        self._domain = domain

    def __call__(self, call: GuestCall) -> int:
        command, vcpu, argument = call["rdi"], call["rsi"], call["rdx"]
        if vcpu >> 32:
            return EINVAL
        match command:
            case 4:  # VCPUOP_get_runstate_info
                write(call, argument, self._runstate())
                return 0
            case 5:  # VCPUOP_register_runstate_memory_area
                (at,) = read(call, argument, _ADDRESS)
                write(call, at, self._runstate())
                return 0
            case 10:  # VCPUOP_register_vcpu_info
                frame, offset = read(call, argument, _INFO)
                if frame >> 40 or offset >> 12:
                    return EINVAL
                return self._domain.register_vcpu_info(vcpu, (frame << 12) + offset)
            case 13:  # VCPUOP_register_vcpu_time_memory_area
                (at,) = read(call, argument, _ADDRESS)
                return self._register_time(call, vcpu, at)
        return ENOSYS

    def _register_time(self, call: GuestCall, vcpu: int, linear: int) -> int:
        if linear % _TIME_BYTES:  # it would lie in two pages
            return EINVAL
        return self._domain.register_time(vcpu, physical(call, linear))

    def _runstate(self) -> bytes:
        """It runs, and always has: no time is stolen that the guest is told of."""
        return _RUNSTATE.pack(_RUNNING, 0, self._domain.now_ns(), 0, 0, 0)
