"""The registers by which a VGA BIOS sets modes with a linear frame buffer (Bochs' VBE extensions;
SeaBIOS, vgasrc/bochsvga.h): in the memory of a screen that has some, from its beginning.

Shown are modes of 32 bits a point; the BIOS is told of no more than those that fit.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

from tetrarch._native import GuestMemoryError
from tetrarch.devices._access import all_ones
from tetrarch.devices._state import DeviceState, State, memory, register
from tetrarch.devices.ramfb import FrameBuffer
from tetrarch.display.frame import POINT_BYTES, Cursor, Frame, Rect
from tetrarch.display.linear import FORMATS, linear_frame
from tetrarch.errors import MachineStateError
from tetrarch.pci.memory import BarMemory

__all__ = ["PORTS", "PORT_BASE", "VbeDispi", "VbeDispiState"]

#: An index, and behind it a value, of 16 bits each; the second begins at an odd port.
PORT_BASE: Final = 0x1CE
PORTS: Final = 3
INDEX_PORT, VALUE_PORT = 0, 1

ID, XRES, YRES, BPP, ENABLE, BANK, VIRT_WIDTH, VIRT_HEIGHT, X_OFFSET, Y_OFFSET, MEMORY = range(11)
VERSION: Final = 0xB0C5
OLDEST: Final = 0xB0C0

ENABLED, GET_CAPS, NO_CLEAR = 0x01, 0x02, 0x80
#: What GET_CAPS tells.
MOST: Final = {XRES: 2560, YRES: 1600, BPP: 32}
_BANK_BYTES: Final = 64 << 10


@dataclass
class VbeDispiState(DeviceState):
    kind = "vbe-dispi"

    index: int = register(0, 0xFFFF)
    identity: int = register(VERSION, 0xFFFF)
    registers: bytearray = memory(2 * MEMORY)


class VbeDispi:
    """At its ports, and as a source of a display. Lock: ``_lock``, for the state."""

    def __init__(self, vram: BarMemory) -> None:
        self.state = VbeDispiState()
        self._vram = vram
        self._lock = threading.Lock()

    def _get(self, index: int) -> int:
        return int.from_bytes(self.state.registers[2 * index : 2 * index + 2], "little")

    def _set(self, index: int, value: int) -> None:
        self.state.registers[2 * index : 2 * index + 2] = value.to_bytes(2, "little")

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            index = self.state.index
            if offset == INDEX_PORT:
                value = index
            elif offset != VALUE_PORT:
                value = 0
            elif index == ID:
                value = self.state.identity
            elif index == MEMORY:
                value = self._vram.length // _BANK_BYTES
            elif index in MOST and self._get(ENABLE) & GET_CAPS:
                value = MOST[index]
            else:
                value = self._get(index) if index < MEMORY else 0
        return value & all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 2:
            return
        with self._lock:
            index = self.state.index
            if offset == INDEX_PORT:
                self.state.index = value
            elif offset != VALUE_PORT or index >= MEMORY:
                return
            elif index == ID:
                if OLDEST <= value <= VERSION:
                    self.state.identity = value
            elif index not in MOST or value <= MOST[index]:
                self._set(index, value)
                if index == ENABLE and value & ENABLED:
                    self._begin(clear=not value & NO_CLEAR)

    def _begin(self, *, clear: bool) -> None:
        """A mode: lines as long as they are seen, all from the first on."""
        self._set(VIRT_WIDTH, self._get(XRES))
        self._set(VIRT_HEIGHT, self._get(YRES))
        self._set(X_OFFSET, 0)
        self._set(Y_OFFSET, 0)
        if clear:
            seen = POINT_BYTES * self._get(XRES) * self._get(YRES)
            self._vram.write(0, bytes(min(seen, self._vram.length)))

    # What it shows

    def still(self) -> Frame | None:
        with self._lock:
            if not self._get(ENABLE) & ENABLED:
                return None
            width, height, bits = (self._get(index) for index in (XRES, YRES, BPP))
            stride = POINT_BYTES * max(width, self._get(VIRT_WIDTH))
            first = self._get(Y_OFFSET) * stride + POINT_BYTES * self._get(X_OFFSET)
        if bits != 32 or not width or not height:
            raise MachineStateError(
                f"the screen has {bits} bits a point, which is not shown",
                mend="let the guest use 32",
            )
        place = FrameBuffer(first, FORMATS[0], width, height, stride)
        return linear_frame(place, self._vram.read, GuestMemoryError)

    def look(self) -> tuple[Frame, list[Rect] | None] | None:
        frame = self.still()
        return None if frame is None else (frame, None)

    def cursor(self) -> Cursor | None:
        return None

    # Life

    def reset(self) -> None:
        with self._lock:
            self.state.reset()

    def save(self) -> State:
        with self._lock:
            return self.state.save()

    def load(self, state: State) -> None:
        with self._lock:
            self.state.load(state)
