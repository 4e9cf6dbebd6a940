"""HYPERVISOR_sched_op (xen/include/public/sched.h); yield and poll are in crates/xen."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from tetrarch.platforms.xen.arguments import read
from tetrarch.platforms.xen.errno import EINVAL, ENOSYS

if TYPE_CHECKING:
    from tetrarch._native import GuestCall

__all__ = ["Scheduling"]

_SHUTDOWN: Final = 2
_REASON: Final = struct.Struct("<I")


class Scheduling:
    """``ends`` has what is to be done where the guest shuts down, by its reason."""

    def __init__(self) -> None:
        self.ends: Mapping[int, Callable[[], None]] = {}

    def __call__(self, call: GuestCall) -> int:
        if call["rdi"] != _SHUTDOWN:
            return ENOSYS
        (reason,) = read(call, call["rsi"], _REASON)
        end = self.ends.get(reason)
        if end is None:
            return EINVAL
        end()
        return 0
