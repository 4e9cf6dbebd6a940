"""The ports where firmware writes what it does: 0x402 for SeaBIOS and OVMF, 0xE9 as in Bochs.

Each is known to be there by what it reads as (QEMU, hw/char/debugcon.c).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

from tetrarch.devices._state import DeviceState, State

__all__ = ["PORTS", "DebugConsole", "DebugConsoleState"]

PORTS: Final = (0x402, 0xE9)
PRESENT: Final = 0xE9
#: What is kept, the newest.
KEPT: Final = 1 << 20


@dataclass
class DebugConsoleState(DeviceState):
    """Nothing: what was written is the host's."""

    kind = "debug_console"


class DebugConsole:
    """Keeps what the guest writes. Attach it at each of PORTS."""

    def __init__(self) -> None:
        self.state = DebugConsoleState()
        self._text = bytearray()
        self._lock = threading.Lock()

    @property
    def text(self) -> str:
        """The last 1 MiB that was written."""
        with self._lock:
            return self._text[-KEPT:].decode(errors="replace")

    def read(self, offset: int, size: int) -> int:
        return PRESENT if size > 0 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            self._text.append(value & 0xFF)
            if len(self._text) >= 2 * KEPT:
                del self._text[:KEPT]

    def reset(self) -> None:
        self.state.reset()

    def save(self) -> State:
        return self.state.save()

    def load(self, state: State) -> None:
        self.state.load(state)
