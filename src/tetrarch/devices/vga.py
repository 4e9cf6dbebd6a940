"""The registers of a VGA (IBM PS/2 Hardware Interface Technical Reference, Video Subsystem, 1992).

They are kept as they are written; what they make of the memory at 0xA0000, which is RAM, is
``tetrarch.display``'s. So text and the linear mode of 256 colours are seen, and planes are not.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

from tetrarch.devices._access import read_bytes, write_bytes
from tetrarch.devices._state import DeviceState, State, flag, memory, register

__all__ = ["PORTS", "PORT_BASE", "Vga", "VgaCore", "VgaState"]

PORT_BASE: Final = 0x3B0
PORTS: Final = 0x30

#: Display disabled and vertical retrace: a guest that waits for either finds it soon.
STATUS_BLANK: Final = 0x09

# Mode 3, 80 columns and 25 lines of 16 colours, as a VGA BIOS leaves it.
MODE_3_CRTC: Final = bytes.fromhex("5f4f50825581bf1f004f0d0e000000009c8e8f281f96b9a3ff")
MODE_3_ATTRIBUTE: Final = bytes.fromhex("00010203040514073839 3a3b3c3d3e3f 0c000f0800")
MODE_3_GRAPHICS: Final = bytes.fromhex("0000000000100e0fff")
MODE_3_SEQUENCER: Final = bytes.fromhex("0300030002")


def _default_dac() -> bytes:
    """The 64 colours of an EGA: two bits of each of red, green and blue."""
    colours = bytearray()
    for value in range(64):
        for low, high in ((2, 5), (1, 4), (0, 3)):
            colours.append(0x2A * (value >> low & 1) + 0x15 * (value >> high & 1))
    return bytes(colours)


@dataclass
class VgaState(DeviceState):
    kind = "vga"

    misc: int = register(0x67, 0xFF)
    sequencer_index: int = register(0, 7)
    sequencer: bytearray = memory(8, MODE_3_SEQUENCER)
    graphics_index: int = register(0, 15)
    graphics: bytearray = memory(16, MODE_3_GRAPHICS)
    crtc_index: int = register(0, 0x3F)
    crtc: bytearray = memory(64, MODE_3_CRTC)
    attribute_index: int = register(0x20, 0x3F)
    attribute: bytearray = memory(32, MODE_3_ATTRIBUTE)
    attribute_data_next: bool = flag()
    pel_mask: int = register(0xFF, 0xFF)
    dac: bytearray = memory(768, _default_dac())
    dac_read: int = register(0, 0x3FF)
    """Where the next byte is read: three for each colour."""
    dac_write: int = register(0, 0x3FF)
    blank: bool = flag()


class VgaCore:
    """The register file. No bus, no threads, no memory."""

    def __init__(self) -> None:
        self.state = VgaState()

    def read(self, port: int) -> int:
        state = self.state
        match port:
            case 0x3C0:
                return state.attribute_index
            case 0x3C1:
                return state.attribute[state.attribute_index & 31]
            case 0x3C4:
                return state.sequencer_index
            case 0x3C5:
                return state.sequencer[state.sequencer_index]
            case 0x3C6:
                return state.pel_mask
            case 0x3C8:
                return state.dac_write // 3 & 0xFF
            case 0x3C9:
                value = state.dac[state.dac_read % 768]
                state.dac_read = (state.dac_read + 1) % 768
                return value
            case 0x3CC:
                return state.misc
            case 0x3CE:
                return state.graphics_index
            case 0x3CF:
                return state.graphics[state.graphics_index]
            case 0x3D4:
                return state.crtc_index
            case 0x3D5:
                return state.crtc[state.crtc_index]
            case 0x3DA:
                state.attribute_data_next = False
                state.blank = not state.blank
                return STATUS_BLANK if state.blank else 0
            case 0x3C2 | 0x3C7 | 0x3CA:
                return 0
            case _:
                return 0xFF

    def write(self, port: int, value: int) -> None:
        state = self.state
        match port:
            case 0x3C0:
                if state.attribute_data_next:
                    state.attribute[state.attribute_index & 31] = value
                else:
                    state.attribute_index = value & 0x3F
                state.attribute_data_next = not state.attribute_data_next
            case 0x3C2:
                state.misc = value
            case 0x3C4:
                state.sequencer_index = value & 7
            case 0x3C5:
                state.sequencer[state.sequencer_index] = value
            case 0x3C6:
                state.pel_mask = value
            case 0x3C7:
                state.dac_read = 3 * value
            case 0x3C8:
                state.dac_write = 3 * value
            case 0x3C9:
                state.dac[state.dac_write % 768] = value & 0x3F
                state.dac_write = (state.dac_write + 1) % 768
            case 0x3CE:
                state.graphics_index = value & 15
            case 0x3CF:
                state.graphics[state.graphics_index] = value
            case 0x3D4:
                state.crtc_index = value & 0x3F
            case 0x3D5:
                self._write_crtc(value)
            case _:
                pass

    def _write_crtc(self, value: int) -> None:
        index, crtc = self.state.crtc_index, self.state.crtc
        if index < 8 and crtc[0x11] & 0x80:
            # Protected but for bit 4 of the overflow register (line compare).
            if index == 7:
                crtc[7] = crtc[7] & ~0x10 | value & 0x10
            return
        crtc[index] = value


class Vga:
    """The registers on a machine, at PORT_BASE."""

    def __init__(self) -> None:
        self._core = VgaCore()
        self._lock = threading.Lock()

    def registers(self) -> VgaState:
        """A copy."""
        state = VgaState()
        state.load(self.save())
        return state

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            return read_bytes(self._core.read, PORT_BASE + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            write_bytes(self._core.write, PORT_BASE + offset, size, value)

    def reset(self) -> None:
        with self._lock:
            self._core.state.reset()

    def save(self) -> State:
        with self._lock:
            return self._core.state.save()

    def load(self, state: State) -> None:
        with self._lock:
            self._core.state.load(state)
