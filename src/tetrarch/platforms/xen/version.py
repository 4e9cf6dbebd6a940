"""HYPERVISOR_xen_version (xen/include/public/version.h)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from tetrarch.platforms.xen.arguments import read, write
from tetrarch.platforms.xen.cpuid import MAJOR, MINOR
from tetrarch.platforms.xen.errno import EINVAL, ENOSYS

if TYPE_CHECKING:
    from uuid import UUID

    from tetrarch._native import GuestCall

__all__ = ["Version"]

_EXTRA: Final = b".0"
_CAPABILITIES: Final = b"xen-3.0-x86_64 hvm-3.0-x86_32 hvm-3.0-x86_32p hvm-3.0-x86_64 "
#: What a guest may rely on (public/features.h): its page tables are its own, ...
_AUTO_TRANSLATED_PHYSMAP: Final = 1 << 2
#: events come by a vector, and the clock in memory is right without migration's help.
_HVM_CALLBACK_VECTOR: Final = 1 << 8
_HVM_SAFE_PVCLOCK: Final = 1 << 9
_FEATURES: Final = _AUTO_TRANSLATED_PHYSMAP | _HVM_CALLBACK_VECTOR | _HVM_SAFE_PVCLOCK


class Version:
    def __init__(self, uuid: UUID) -> None:
        self._answers = {
            1: _EXTRA.ljust(16, b"\0"),
            2: b"gcc".ljust(64, b"\0") + bytes(16 + 32 + 32),
            3: _CAPABILITIES.ljust(1024, b"\0"),
            4: b"unavailable".ljust(64, b"\0"),
            5: struct.pack("<Q", 0),
            8: uuid.bytes,
            9: b"".ljust(1024, b"\0"),
        }

    def __call__(self, call: GuestCall) -> int:
        command, argument = call["rdi"], call["rsi"]
        match command:
            case 0:  # XENVER_version
                return MAJOR << 16 | MINOR
            case 6:  # XENVER_get_features
                (submap,) = read(call, argument, struct.Struct("<I"))
                if submap:
                    return EINVAL
                write(call, argument + 4, struct.pack("<I", _FEATURES))
                return 0
            case 7:  # XENVER_pagesize
                return 4096
            case _ if command in self._answers:
                write(call, argument, self._answers[command])
                return 0
        return ENOSYS
