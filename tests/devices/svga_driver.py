"""A driver of VMware's SVGA II that knows no more than Linux's header."""

from __future__ import annotations

import struct
from typing import cast

from tests.storage.wire import Wire

from tetrarch._native import Vm
from tetrarch.devices.svga2 import Svga2
from tetrarch.display.frame import Rect
from tetrarch.machine.engine_vm import InterruptWire
from tetrarch.pci.function import COMMAND, IO_SPACE, MEMORY_SPACE

RAM = 1 << 20
VRAM, FIFO = 0xD000_0000, 0xD800_0000
ENABLE, WIDTH, HEIGHT, STRIDE, CONFIG_DONE, SYNC, BUSY, PITCHLOCK, IRQMASK = (
    *(1, 2, 3, 12, 20, 21, 22, 32, 33),
)
UPDATE, RECT_COPY, DEFINE_CURSOR, ALPHA_CURSOR, FENCE = 1, 3, 19, 22, 30
ANY_FENCE, PROGRESS, GOAL = 1, 2, 4
MIN, MAX, NEXT, STOP, CAPS, _, LAST_FENCE = range(7)


class Driver:
    def __init__(self, engine: str = "bt") -> None:
        self.vm = Vm(engine, RAM)
        self.device = Svga2(self.vm)
        self.wire = Wire()
        self.function = self.device.function
        self.function.plug(cast(InterruptWire, self.wire))
        (part,) = self.function.bars[0].parts
        self.ports = part.device
        self.place(VRAM, FIFO)

    def place(self, vram: int, fifo: int) -> None:
        self.function.write_config(COMMAND, 2, 0)
        self.function.write_config(0x14, 4, vram)
        self.function.write_config(0x18, 4, fifo)
        self.function.write_config(COMMAND, 2, IO_SPACE | MEMORY_SPACE)
        self.fifo = fifo

    def read(self, register: int) -> int:
        self.ports.write(0, 4, register)
        return self.ports.read(1, 4)

    def write(self, register: int, value: int) -> None:
        self.ports.write(0, 4, register)
        self.ports.write(1, 4, value)

    def word(self, at: int) -> int:
        return int.from_bytes(self.vm.read_memory(self.fifo + 4 * at, 4), "little")

    def set_words(self, at: int, *values: int) -> None:
        self.vm.write_memory(self.fifo + 4 * at, struct.pack(f"<{len(values)}I", *values))

    def start(self, width: int = 64, height: int = 32) -> None:
        """As Linux's driver does."""
        self.write(0, 0x9000_0002)
        assert self.read(0) == 0x9000_0002
        self.write(ENABLE, 3)
        self.set_words(MIN, 4096, self.read(19), 4096, 4096)
        self.write(CONFIG_DONE, 1)
        assert self.word(CAPS) & 1
        self.write(WIDTH, width)
        self.write(HEIGHT, height)
        self.write(ENABLE, 1)

    def send(self, *words: int, sync: bool = True) -> None:
        least, most, at = self.word(MIN), self.word(MAX), self.word(NEXT)
        for word in words:
            self.set_words(at // 4, word)
            at += 4
            if at == most:
                at = least
        self.set_words(NEXT, at)
        if sync:
            self.write(SYNC, 1)
            assert self.read(BUSY) == 0
            assert self.word(STOP) == at

    def draw(self, x: int, y: int, *colours: int, vram: int = VRAM) -> None:
        place = y * self.read(STRIDE) + 4 * x
        self.vm.write_memory(vram + place, struct.pack(f"<{len(colours)}I", *colours))

    def look(self) -> tuple[bytes, list[Rect] | None]:
        shown = self.device.look()
        assert shown is not None
        frame, parts = shown
        return frame.points, None if parts is None else list(parts)
