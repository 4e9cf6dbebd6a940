"""The SVGA II as a device: registers at ports, memory for the picture, and what of it is shown.

What the guest draws it draws into the memory itself, and says by a command where. It shows its
picture while it is enabled and not hidden; else the screen is the VGA's.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from tetrarch._native import Intx
from tetrarch._seldom import Seldom
from tetrarch.devices._access import all_ones
from tetrarch.devices._state import State
from tetrarch.devices.svga2 import queue, registers
from tetrarch.devices.svga2.cursor import alpha_cursor, load_cursor, masked_cursor, save_cursor
from tetrarch.devices.svga2.packed import packed, unpacked
from tetrarch.devices.svga2.queue import FIFO_BYTES, BadCommands, Command, CommandQueue
from tetrarch.devices.svga2.registers import (
    ALWAYS,
    ANY_FENCE,
    CONFIG_DONE,
    ENABLE,
    ENABLED,
    FENCE_GOAL,
    FIFO_PROGRESS,
    HEIGHT,
    HEIGHT_MAX,
    HIDDEN,
    IDS,
    KEPT,
    PITCHLOCK,
    SCRATCH,
    SCRATCH_REGISTERS,
    VRAM_BYTES,
    WIDTH,
    WIDTH_MAX,
    Svga2State,
)
from tetrarch.display.frame import POINT_BYTES, Cursor, Frame, Rect
from tetrarch.pci.function import Bar, BarPart, Identity, PciFunction
from tetrarch.pci.memory import BarMemory

if TYPE_CHECKING:
    from tetrarch._native import Vm

__all__ = ["Svga2"]

log = logging.getLogger(__name__)

VENDOR: Final = 0x15AD
DEVICE: Final = 0x0405
#: A display controller that is compatible with a VGA.
CLASS: Final = 0x030000

PORTS: Final = 16
INDEX_PORT, VALUE_PORT, IRQ_STATUS_PORT = 0, 1, 8

#: Parts that have changed, until somebody looks; more become all.
PARTS_MAX: Final = 256
#: Bytes that one access copies within the picture before what is behind them has to wait for the
#: next one, or for who looks: a queue has room for commands that copy a hundred gigabytes.
COPIED_MAX: Final = 32 << 20
_U32: Final = 0xFFFF_FFFF

_POINTERS: Final[Mapping[int, Callable[[Sequence[int]], Cursor]]] = {
    queue.DEFINE_CURSOR: masked_cursor,
    queue.DEFINE_ALPHA_CURSOR: alpha_cursor,
}


class Svga2:
    """The function, as a device to plug in, and what it shows, as a source of a display.

    Lock: ``_lock``, for all of it.
    """

    def __init__(self, vm: Vm) -> None:
        self.state = Svga2State()
        self._vm = vm
        self._lock = threading.Lock()
        self._line = Intx()
        self._complaint = Seldom()
        self.vram = BarMemory(vm, VRAM_BYTES)
        self.fifo = BarMemory(vm, FIFO_BYTES)
        self._queue = CommandQueue(self.fifo)
        self._bars = (
            Bar(0, PORTS, [BarPart(0, PORTS, _Ports(self))], io=True),
            Bar(1, VRAM_BYTES, [], prefetchable=True, memory=self.vram),
            Bar(2, FIFO_BYTES, [], memory=self.fifo),
        )
        self.function = PciFunction(
            vm,
            Identity(VENDOR, DEVICE, CLASS, subsystem_vendor=VENDOR, subsystem=DEVICE),
            self._bars,
            intx=self._line,
        )
        self._cursor: Cursor | None = None
        self._frame: Frame | None = None
        self._parts: list[Rect] | None = None
        """Those that have changed since somebody looked; None: all."""
        self._reset()

    def _reset(self) -> None:
        self.state.reset()
        self.state.scratch = deque([0] * SCRATCH_REGISTERS)
        self._cursor = self._frame = self._parts = None

    # Registers

    def read_register(self, index: int) -> int:
        """The lock is held."""
        state = self.state
        if index in KEPT:
            return int(getattr(state, KEPT[index]))
        if SCRATCH <= index < SCRATCH + SCRATCH_REGISTERS:
            return state.scratch[index - SCRATCH]
        match index:
            case registers.ID:
                return state.identity
            case registers.ENABLE:
                return state.enable
            case registers.WIDTH:
                return state.width
            case registers.HEIGHT:
                return state.height
            case registers.BYTES_PER_LINE:
                return self._stride
            case registers.FB_START:
                return self.function.address(self._bars[1])
            case registers.FB_SIZE:
                return min(VRAM_BYTES, self._stride * state.height)
            case registers.MEM_START:
                return self.function.address(self._bars[2])
            case registers.CONFIG_DONE:
                return state.config_done
            case registers.BUSY:
                return int(not self._run())
            case registers.TRACES:
                return state.traces
            case _:
                return ALWAYS.get(index, 0)

    def write_register(self, index: int, value: int) -> None:
        """The lock is held."""
        state = self.state
        if index in KEPT:
            setattr(state, KEPT[index], value)
        elif SCRATCH <= index < SCRATCH + SCRATCH_REGISTERS:
            state.scratch[index - SCRATCH] = value
        match index:
            case registers.ID if value in IDS:
                state.identity = value
            case registers.ENABLE:
                state.enable = value & (ENABLED | HIDDEN)
            case registers.WIDTH if value <= WIDTH_MAX:
                state.width = value
            case registers.HEIGHT if value <= HEIGHT_MAX:
                state.height = value
            case registers.CONFIG_DONE:
                state.config_done = int(bool(value))
            case registers.SYNC:
                self._run()
            case registers.TRACES:
                state.traces = value & 1
        if index in (ENABLE, CONFIG_DONE) and state.enable:
            self._queue.tell_capabilities()
        if index in (ENABLE, WIDTH, HEIGHT, PITCHLOCK, CONFIG_DONE):
            self._parts = None
        self._update_line()

    def read_port(self, offset: int, size: int) -> int:
        with self._lock:
            if offset == INDEX_PORT:
                value = self.state.index
            elif offset == VALUE_PORT:
                value = self.read_register(self.state.index)
            else:
                value = self.state.irq_status if offset == IRQ_STATUS_PORT else 0
            return value & all_ones(size)

    def write_port(self, offset: int, size: int, value: int) -> None:
        if size != 4:
            return
        with self._lock:
            if offset == INDEX_PORT:
                self.state.index = value & _U32
            elif offset == VALUE_PORT:
                self.write_register(self.state.index, value & _U32)
            elif offset == IRQ_STATUS_PORT:
                self.state.irq_status &= ~value
                self._update_line()

    @property
    def _stride(self) -> int:
        least = POINT_BYTES * self.state.width
        locked = self.state.pitchlock
        return locked if least <= locked <= VRAM_BYTES else least

    def _update_line(self) -> None:
        self._line.set(bool(self.state.irq_status & self.state.irq_mask))

    def _interrupt(self, flags: int) -> None:
        self.state.irq_status |= flags & self.state.irq_mask
        self._update_line()

    # Commands

    def _run(self) -> bool:
        """Does what is in the queue by now, once around at most, and says whether that was all that
        one access may take. The lock is held."""
        if not self.state.config_done or not self.state.enable:
            return True
        self._queue.set_word(queue.FIFO_BUSY, 0)
        done = copied = 0
        pointer: Command | None = None
        try:
            waiting = self._queue.waiting()
        except BadCommands as error:
            self._complain(error)
            return True
        try:
            for command in waiting.commands():
                if command.number in _POINTERS:
                    pointer = command  # of many the last one counts
                copied += self._command(command)
                done = command.end
                if copied > COPIED_MAX:
                    break
        except BadCommands as error:
            self._complain(error)
            done = len(waiting.words)
        if pointer is not None:
            self._cursor = _POINTERS[pointer.number](pointer.arguments)
        self._queue.take(waiting, done)
        if done:
            self._interrupt(FIFO_PROGRESS)
        return copied <= COPIED_MAX

    def _command(self, command: Command) -> int:
        """All but those of the pointer; how many bytes it has copied."""
        match command.number:
            case queue.UPDATE | queue.UPDATE_VERBOSE:
                self._changed(Rect(*command.arguments[:4]))
            case queue.RECT_COPY:
                return self._copy(*command.arguments)
            case queue.FENCE:
                self._fence(command.arguments[0])
        return 0

    def _fence(self, value: int) -> None:
        self._queue.set_word(queue.FIFO_FENCE, value)
        goal = self._queue.word(queue.FIFO_FENCE_GOAL) == value
        self._interrupt(ANY_FENCE | (FENCE_GOAL if goal else 0))

    def _changed(self, part: Rect) -> None:
        if self._parts is not None:
            self._parts.append(part)
            if len(self._parts) > PARTS_MAX:
                self._parts = [Rect(0, 0, self.state.width, self.state.height)]

    def _copy(self, x: int, y: int, to_x: int, to_y: int, width: int, height: int) -> int:
        """A part of the picture; both places may overlap. How many bytes have been moved for it."""
        screen = Rect(0, 0, self.state.width, self.state.height)
        source, target = Rect(x, y, width, height), Rect(to_x, to_y, width, height)
        if source.within(screen) != source or target.within(screen) != target or not source:
            return 0
        stride, row = self._stride, POINT_BYTES * width
        if stride * self.state.height > VRAM_BYTES:
            return 0
        length = stride * (height - 1) + row
        lines = self.vram.read(y * stride + POINT_BYTES * x, length)
        place = to_y * stride + POINT_BYTES * to_x
        if row == stride:
            self.vram.write(place, lines)
        else:
            # What lies between the lines stays.
            changed = bytearray(self.vram.read(place, length))
            for at in range(0, length, stride):
                changed[at : at + row] = lines[at : at + row]
            self.vram.write(place, bytes(changed))
        self._changed(target)
        return length

    def _complain(self, what: BadCommands) -> None:
        if self._complaint.due():
            log.warning("the SVGA II's driver gives it %s", what)

    # What it shows

    def still(self) -> Frame | None:
        with self._lock:
            return self._picture()

    def look(self) -> tuple[Frame, Sequence[Rect] | None] | None:
        with self._lock:
            if not self._vm.held:
                self._run()  # a driver may leave it to us
            parts, size = self._parts, (self.state.width, self.state.height)
            frame = self._frame
            told = frame is not None and (frame.width, frame.height) == size
            if told and self.state.config_done and parts == [] and self._shows:
                return frame, []  # type: ignore[return-value]
            self._frame, self._parts = self._picture(), []
            if self._frame is None:
                self._parts = None
                return None
            return self._frame, parts if told and self.state.config_done else None

    @property
    def _shows(self) -> bool:
        return self.state.enable == ENABLED

    def _picture(self) -> Frame | None:
        width, height, stride = self.state.width, self.state.height, self._stride
        if not self._shows or not width or not height or stride * height > VRAM_BYTES:
            return None
        row = POINT_BYTES * width
        data = self.vram.read(0, stride * height)
        if stride != row:
            data = b"".join(data[at : at + row] for at in range(0, stride * height, stride))
        return Frame(width, height, data)

    def cursor(self) -> Cursor | None:
        with self._lock:
            on = self.state.cursor_on or self._queue.word(queue.FIFO_CURSOR_ON)
            return self._cursor if on and self._shows else None

    # Life

    def reset(self) -> None:
        with self._lock:
            self._reset()
            self._update_line()
        self.function.reset()

    def close(self) -> None:
        self.vram.close()
        self.fifo.close()

    def save(self) -> State:
        """To be called while the machine is held."""
        with self._lock:
            return {
                "registers": self.state.save(),
                "pci": self.function.save(),
                "vram": packed(self.vram.read(0, VRAM_BYTES)),
                "fifo": packed(self.fifo.read(0, FIFO_BYTES)),
                "cursor": save_cursor(self._cursor),
            }

    def load(self, state: Mapping[str, Any]) -> None:
        self.reset()
        saved, pci = (state.get(part) for part in ("registers", "pci"))
        self.function.load(pci if isinstance(pci, dict) else {})
        vram = unpacked(state.get("vram"), VRAM_BYTES)
        fifo = unpacked(state.get("fifo"), FIFO_BYTES)
        with self._lock:
            self.state.load(saved if isinstance(saved, dict) else {})
            self.state.width = min(self.state.width, WIDTH_MAX)
            self.state.height = min(self.state.height, HEIGHT_MAX)
            missing = SCRATCH_REGISTERS - len(self.state.scratch)
            self.state.scratch.extend([0] * missing)
            self.vram.write(0, vram)
            self.fifo.write(0, fifo)
            self._cursor = load_cursor(state.get("cursor"))
            self._update_line()


class _Ports:
    """The registers as ports: an index, a value behind it that begins at an odd one, and the
    status of interrupts."""

    def __init__(self, device: Svga2) -> None:
        self.read: Callable[[int, int], int] = device.read_port
        self.write: Callable[[int, int, int], None] = device.write_port
