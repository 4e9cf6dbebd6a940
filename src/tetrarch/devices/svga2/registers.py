"""Registers of the SVGA II, by their numbers, and what they hold (svga_reg.h, SVGA_REG_*)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tetrarch.devices._state import DeviceState, queue, register
from tetrarch.devices.svga2.queue import FIFO_BYTES, FIFO_REGISTERS

__all__ = ["HEIGHT_MAX", "VRAM_BYTES", "WIDTH_MAX", "Svga2State"]

VRAM_BYTES: Final = 16 << 20
#: With lines of 4 bytes a point they fit into the memory.
WIDTH_MAX, HEIGHT_MAX = 2560, 1600

IDS: Final = (0x9000_0000, 0x9000_0001, 0x9000_0002)

ID, ENABLE, WIDTH, HEIGHT, MAX_WIDTH, MAX_HEIGHT, DEPTH, BITS_PER_PIXEL = range(8)
PSEUDOCOLOR, RED_MASK, GREEN_MASK, BLUE_MASK, BYTES_PER_LINE = range(8, 13)
FB_START, FB_OFFSET, VRAM_SIZE, FB_SIZE, CAPABILITIES, MEM_START, MEM_SIZE = range(13, 20)
CONFIG_DONE, SYNC, BUSY, GUEST_ID, CURSOR_ID, CURSOR_X, CURSOR_Y, CURSOR_ON = range(20, 28)
HOST_BITS_PER_PIXEL, SCRATCH_SIZE, MEM_REGS, NUM_DISPLAYS, PITCHLOCK, IRQMASK = range(28, 34)
TRACES: Final = 45
SCRATCH: Final = 1024 + 768
SCRATCH_REGISTERS: Final = 64

# ENABLE
ENABLED, HIDDEN = 1, 2

#: RECT_COPY, CURSOR, CURSOR_BYPASS, CURSOR_BYPASS_2, ALPHA_CURSOR, EXTENDED_FIFO, PITCHLOCK,
#: IRQMASK.
CAPS: Final = 0x2 | 0x20 | 0x40 | 0x80 | 0x200 | 0x8000 | 0x2_0000 | 0x4_0000

# Interrupts.
ANY_FENCE, FIFO_PROGRESS, FENCE_GOAL = 1, 2, 4

_U32: Final = 0xFFFF_FFFF


@dataclass
class Svga2State(DeviceState):
    kind = "svga2"

    index: int = register(0, _U32)
    identity: int = register(IDS[2], _U32)
    enable: int = register(0, ENABLED | HIDDEN)
    config_done: int = register(0, 1)
    width: int = register(1024, 0xFFF)
    height: int = register(768, 0xFFF)
    pitchlock: int = register(0, _U32)
    guest: int = register(0, _U32)
    cursor_id: int = register(0, _U32)
    cursor_x: int = register(0, _U32)
    cursor_y: int = register(0, _U32)
    cursor_on: int = register(0, _U32)
    traces: int = register(0, 1)
    irq_mask: int = register(0, _U32)
    irq_status: int = register(0, ANY_FENCE | FIFO_PROGRESS | FENCE_GOAL)
    scratch: deque[int] = queue(SCRATCH_REGISTERS, _U32)


#: Registers that hold what is written, by the names of the state's fields.
KEPT: Final[Mapping[int, str]] = {
    GUEST_ID: "guest",
    CURSOR_ID: "cursor_id",
    CURSOR_X: "cursor_x",
    CURSOR_Y: "cursor_y",
    CURSOR_ON: "cursor_on",
    IRQMASK: "irq_mask",
    PITCHLOCK: "pitchlock",
}
#: Registers that say what there is.
ALWAYS: Final[Mapping[int, int]] = {
    MAX_WIDTH: WIDTH_MAX,
    MAX_HEIGHT: HEIGHT_MAX,
    DEPTH: 24,
    BITS_PER_PIXEL: 32,
    HOST_BITS_PER_PIXEL: 32,
    RED_MASK: 0xFF_0000,
    GREEN_MASK: 0x00_FF00,
    BLUE_MASK: 0x00_00FF,
    VRAM_SIZE: VRAM_BYTES,
    CAPABILITIES: CAPS,
    MEM_SIZE: FIFO_BYTES,
    SCRATCH_SIZE: SCRATCH_REGISTERS,
    MEM_REGS: FIFO_REGISTERS,
    NUM_DISPLAYS: 1,
}
