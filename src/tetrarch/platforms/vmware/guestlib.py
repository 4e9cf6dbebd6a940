"""VMware's guest library: the session of the machine, and statistics (open-vm-tools,
libguestlib/vmGuestLib.c and guestlibV3.x)."""

from __future__ import annotations

import secrets
import struct
import time
from collections.abc import Callable, Mapping
from typing import Final

from tetrarch.platforms.vmware.balloon import VmwareBalloon
from tetrarch.platforms.vmware.rpci import RpcRefused

__all__ = ["GuestLib"]

#: Of the form in which it is told; the guest asks for the newest that it knows.
VERSION: Final = 3

# Statistics, by number, of which a guest wants all up to the last that there is.
MEM_BALLOONED_MB: Final = 12
ELAPSED_MS: Final = 17
RESOURCE_POOL_PATH: Final = 18
MEM_TARGET_SIZE_MB: Final = 20
LAST: Final = MEM_TARGET_SIZE_MB
#: Those of 64 bits; but for the path, which is text, the others have 32.
_WIDE: Final = (4, ELAPSED_MS, 19, MEM_TARGET_SIZE_MB)
_MIB: Final = 1 << 20


class GuestLib:
    def __init__(
        self, balloon: VmwareBalloon, now_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._balloon = balloon
        self._now_ns = now_ns
        self._begun_ns = now_ns()
        # Another one where a saved machine goes on: a guest that compares statistics is not to
        # take them for those of the same.
        self.session = secrets.randbits(64) or 1

    def requests(self) -> Mapping[str, Callable[[str], str]]:
        return {"guestlib.info.get": self._info}

    def _info(self, rest: str) -> str:
        if rest.strip() != str(VERSION):
            raise RpcRefused(str(VERSION))
        values = {
            MEM_BALLOONED_MB: self._balloon.actual // _MIB,
            ELAPSED_MS: (self._now_ns() - self._begun_ns) // 1_000_000,
        }
        if memory := self._balloon.memory:
            values[MEM_TARGET_SIZE_MB] = (memory - self._balloon.target) // _MIB
        # Marshalled by XDR (RFC 4506): what each is, whether it is known, and it.
        data = struct.pack(">I", LAST)
        for number in range(1, LAST + 1):
            data += struct.pack(">II", number, number in values)
            # A path of no length is as long as a number of 32 bits.
            data += struct.pack(">Q" if number in _WIDE else ">I", values.get(number, 0))
        answer = struct.pack("<IQI", VERSION, self.session, len(data)) + data
        return answer.decode(errors="surrogateescape")
