"""A linear frame buffer in the guest's own RAM, which UEFI firmware sets up by a file of fw_cfg
(QEMU, hw/display/ramfb.c; EDK II, OvmfPkg/QemuRamfbDxe)."""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass
from typing import Final, NamedTuple

from tetrarch.devices._state import DeviceState, State, memory

__all__ = ["RAMFB_FILE", "FrameBuffer", "Ramfb", "RamfbState"]

RAMFB_FILE: Final = "etc/ramfb"
#: Address, format, flags, width, height, bytes of a line.
CONFIG: Final = struct.Struct(">QIIIII")


class FrameBuffer(NamedTuple):
    """As the guest has set it up: nothing of it is checked."""

    address: int
    format: int
    """A code of four characters, as those of Linux's drm_fourcc.h."""
    width: int
    height: int
    stride: int


@dataclass
class RamfbState(DeviceState):
    kind = "ramfb"

    config: bytearray = memory(CONFIG.size)


class Ramfb:
    """An item of fw_cfg that is written; from any thread."""

    size: Final = CONFIG.size

    def __init__(self) -> None:
        self.state = RamfbState()
        self._lock = threading.Lock()

    @property
    def frame_buffer(self) -> FrameBuffer | None:
        """None until there is one."""
        with self._lock:
            address, code, _, width, height, stride = CONFIG.unpack(self.state.config)
        return FrameBuffer(address, code, width, height, stride) if width and height else None

    def read(self, offset: int, length: int) -> bytes:
        with self._lock:
            return bytes(self.state.config[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        """Within it."""
        with self._lock:
            self.state.config[offset : offset + len(data)] = data

    def reset(self) -> None:
        with self._lock:
            self.state.reset()

    def save(self) -> State:
        with self._lock:
            return self.state.save()

    def load(self, state: State) -> None:
        with self._lock:
            self.state.load(state)
