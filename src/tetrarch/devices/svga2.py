"""VMware's SVGA II, for two dimensions: registers by index and value, memory for the picture, and a
queue of commands in memory of its own (Linux, drivers/gpu/drm/vmwgfx/device_include/svga_reg.h).

What the guest draws it draws into the memory itself, and says by a command where. It shows its
picture while it is enabled and not hidden; else the screen is the VGA's.
"""

from __future__ import annotations

import base64
import binascii
import logging
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tetrarch._native import Intx
from tetrarch._seldom import Seldom
from tetrarch.devices._access import all_ones
from tetrarch.devices._state import DeviceState, State, queue, register
from tetrarch.display.frame import POINT_BYTES, Cursor, Frame, Rect
from tetrarch.errors import StateError
from tetrarch.pci.function import Bar, BarPart, Identity, PciFunction
from tetrarch.pci.memory import BarMemory

if TYPE_CHECKING:
    from tetrarch._native import Vm

__all__ = ["FIFO_BYTES", "VRAM_BYTES", "Svga2", "Svga2State"]

log = logging.getLogger(__name__)

VENDOR: Final = 0x15AD
DEVICE: Final = 0x0405
#: A display controller that is compatible with a VGA.
CLASS: Final = 0x030000

PORTS: Final = 16
INDEX_PORT, VALUE_PORT, IRQ_STATUS_PORT = 0, 1, 8
VRAM_BYTES: Final = 16 << 20
FIFO_BYTES: Final = 256 << 10
#: With lines of 4 bytes a point they fit into the memory.
WIDTH_MAX, HEIGHT_MAX = 2560, 1600

IDS: Final = (0x9000_0000, 0x9000_0001, 0x9000_0002)

# Registers.
ID, ENABLE, WIDTH, HEIGHT, MAX_WIDTH, MAX_HEIGHT, DEPTH, BITS_PER_PIXEL = range(8)
PSEUDOCOLOR, RED_MASK, GREEN_MASK, BLUE_MASK, BYTES_PER_LINE = range(8, 13)
FB_START, FB_OFFSET, VRAM_SIZE, FB_SIZE, CAPABILITIES, MEM_START, MEM_SIZE = range(13, 20)
CONFIG_DONE, SYNC, BUSY, GUEST_ID, CURSOR_ID, CURSOR_X, CURSOR_Y, CURSOR_ON = range(20, 28)
HOST_BITS_PER_PIXEL, SCRATCH_SIZE, MEM_REGS, NUM_DISPLAYS, PITCHLOCK, IRQMASK = range(28, 34)
TRACES: Final = 45
SCRATCH: Final = 1024 + 768
SCRATCH_REGISTERS: Final = 64

ENABLED, HIDDEN = 1, 2

#: RECT_COPY, CURSOR, CURSOR_BYPASS, CURSOR_BYPASS_2, ALPHA_CURSOR, EXTENDED_FIFO, PITCHLOCK,
#: IRQMASK.
CAPS: Final = 0x2 | 0x20 | 0x40 | 0x80 | 0x200 | 0x8000 | 0x2_0000 | 0x4_0000

# The queue's registers, words of 32 bits at its beginning; commands are behind them.
FIFO_MIN, FIFO_MAX, FIFO_NEXT, FIFO_STOP, FIFO_CAPS, FIFO_FLAGS, FIFO_FENCE = range(7)
FIFO_CURSOR_ON: Final = 9
FIFO_FENCE_GOAL, FIFO_BUSY, FIFO_REGISTERS = 289, 290, 291
#: FENCE, PITCHLOCK, CURSOR_BYPASS_3, RESERVE.
FIFO_CAPABILITIES: Final = 0x1 | 0x4 | 0x10 | 0x40
#: The least that a driver leaves for commands.
FIFO_LEAST: Final = 10 << 10

# Interrupts.
ANY_FENCE, FIFO_PROGRESS, FENCE_GOAL = 1, 2, 4

UPDATE, RECT_COPY, DEFINE_CURSOR, DEFINE_ALPHA_CURSOR, FENCE, ESCAPE = 1, 3, 19, 22, 30, 33
UPDATE_VERBOSE: Final = 25
#: Words behind the number of a command; cursors and ESCAPE have more.
WORDS: Final[Mapping[int, int]] = {
    UPDATE: 4,
    RECT_COPY: 6,
    DEFINE_CURSOR: 7,
    20: 2,  # DISPLAY_CURSOR
    21: 2,  # MOVE_CURSOR
    DEFINE_ALPHA_CURSOR: 5,
    UPDATE_VERBOSE: 5,
    FENCE: 1,
    ESCAPE: 2,
}
CURSOR_MAX: Final = 256
#: Parts that have changed, until somebody looks; more become all.
PARTS_MAX: Final = 256
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
_KEPT: Final[Mapping[int, str]] = {
    GUEST_ID: "guest",
    CURSOR_ID: "cursor_id",
    CURSOR_X: "cursor_x",
    CURSOR_Y: "cursor_y",
    CURSOR_ON: "cursor_on",
    IRQMASK: "irq_mask",
    PITCHLOCK: "pitchlock",
}
_ALWAYS: Final[Mapping[int, int]] = {
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
        if index in _KEPT:
            return int(getattr(state, _KEPT[index]))
        if SCRATCH <= index < SCRATCH + SCRATCH_REGISTERS:
            return state.scratch[index - SCRATCH]
        match index:
            case 0:
                return state.identity
            case 1:
                return state.enable
            case 2:
                return state.width
            case 3:
                return state.height
            case 12:
                return self._stride
            case 13:
                return self.function.address(self._bars[1])
            case 16:
                return min(VRAM_BYTES, self._stride * state.height)
            case 18:
                return self.function.address(self._bars[2])
            case 20:
                return state.config_done
            case 22:
                self._run()  # so it is done
                return 0
            case 45:
                return state.traces
            case _:
                return _ALWAYS.get(index, 0)

    def write_register(self, index: int, value: int) -> None:
        """The lock is held."""
        state = self.state
        if index in _KEPT:
            setattr(state, _KEPT[index], value)
        elif SCRATCH <= index < SCRATCH + SCRATCH_REGISTERS:
            state.scratch[index - SCRATCH] = value
        elif index == ID and value in IDS:
            state.identity = value
        elif index == ENABLE:
            state.enable = value & (ENABLED | HIDDEN)
            self._tell_capabilities()
        elif index == WIDTH and value <= WIDTH_MAX:
            state.width = value
        elif index == HEIGHT and value <= HEIGHT_MAX:
            state.height = value
        elif index == CONFIG_DONE:
            state.config_done = int(bool(value))
            self._tell_capabilities()
        elif index == SYNC:
            self._run()
        elif index == TRACES:
            state.traces = value & 1
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

    # The queue of commands

    def _word(self, at: int) -> int:
        return int.from_bytes(self.fifo.read(4 * at, 4), "little")

    def _set_word(self, at: int, value: int) -> None:
        self.fifo.write(4 * at, value.to_bytes(4, "little"))

    def _tell_capabilities(self) -> None:
        if self.state.enable:
            self._set_word(FIFO_CAPS, FIFO_CAPABILITIES)
            self._set_word(FIFO_FLAGS, 0)

    def _run(self) -> None:
        """Does what is in the queue by now: once around at most. The lock is held."""
        if not self.state.config_done or not self.state.enable:
            return
        self._set_word(FIFO_BUSY, 0)
        least, most, end, stop = struct.unpack("<4I", self.fifo.read(0, 16))
        sane = 16 <= least < most <= FIFO_BYTES and most - least >= FIFO_LEAST
        within = all(least <= place < most for place in (end, stop))
        if not sane or not within or (least | most | end | stop) & 3:
            self._complain("a queue of commands that cannot be")
            return
        if end >= stop:
            data = self.fifo.read(stop, end - stop)
        else:
            data = self.fifo.read(stop, most - stop) + self.fifo.read(least, end - least)
        done = self._commands(struct.unpack(f"<{len(data) // 4}I", data), most - least)
        stop += 4 * done
        self._set_word(FIFO_STOP, stop if stop < most else stop - (most - least))
        if done:
            self._interrupt(FIFO_PROGRESS)

    def _commands(self, words: Sequence[int], room: int) -> int:
        """How many words have been done with: the last command may not have come as a whole."""
        at = 0
        while at < len(words):
            length = self._length(words, at)
            if length is None or 4 * length > room:
                self._complain(f"a command {words[at]:#x} that it has not")
                return len(words)
            if at + length > len(words):
                break
            self._command(words[at], words[at + 1 : at + length])
            at += length
        return at

    def _length(self, words: Sequence[int], at: int) -> int | None:
        """Of a command, with its number; None where it is not known."""
        fixed = WORDS.get(words[at])
        if fixed is None:
            return None
        length, arguments = 1 + fixed, words[at + 1 : at + 1 + fixed]
        if len(arguments) < fixed:
            return length
        if words[at] == ESCAPE:
            return length + -(-arguments[1] // 4)
        if words[at] in (DEFINE_CURSOR, DEFINE_ALPHA_CURSOR):
            width, height = arguments[3:5]
            if width > CURSOR_MAX or height > CURSOR_MAX:
                return None
            if words[at] == DEFINE_ALPHA_CURSOR:
                return length + width * height
            depths = arguments[5:7]
            if any(depth not in (1, 32) for depth in depths):
                return None
            return length + sum(_mask_words(width, height, depth) for depth in depths)
        return length

    def _command(self, number: int, arguments: Sequence[int]) -> None:
        match number:
            case 1 | 25:
                self._changed(Rect(*arguments[:4]))
            case 3:
                self._copy(*arguments)
            case 19:
                self._cursor = _masked_cursor(arguments)
            case 22:
                _, x, y, width, height = arguments[:5]
                points = struct.pack(f"<{width * height}I", *arguments[5:])
                self._cursor = Cursor(width, height, min(x, width), min(y, height), points)
            case 30:
                self._fence(arguments[0])

    def _fence(self, value: int) -> None:
        self._set_word(FIFO_FENCE, value)
        goal = self._word(FIFO_FENCE_GOAL) == value
        self._interrupt(ANY_FENCE | (FENCE_GOAL if goal else 0))

    def _changed(self, part: Rect) -> None:
        if self._parts is not None:
            self._parts.append(part)
            if len(self._parts) > PARTS_MAX:
                self._parts = [Rect(0, 0, self.state.width, self.state.height)]

    def _copy(self, x: int, y: int, to_x: int, to_y: int, width: int, height: int) -> None:
        """A part of the picture; both places may overlap."""
        screen = Rect(0, 0, self.state.width, self.state.height)
        source, target = Rect(x, y, width, height), Rect(to_x, to_y, width, height)
        if source.within(screen) != source or target.within(screen) != target or not source:
            return
        stride, row = self._stride, POINT_BYTES * width
        if stride * self.state.height > VRAM_BYTES:
            return
        first = y * stride + POINT_BYTES * x
        lines = self.vram.read(first, stride * (height - 1) + row)
        for line in range(height):
            place = (to_y + line) * stride + POINT_BYTES * to_x
            self.vram.write(place, lines[line * stride :][:row])
        self._changed(target)

    def _complain(self, what: str) -> None:
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
            on = self.state.cursor_on or self._word(FIFO_CURSOR_ON)
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
            registers = self.state.save()
            cursor = self._cursor
            picture: dict[str, Any] = {}
            if cursor is not None:
                size = [cursor.width, cursor.height, cursor.x, cursor.y]
                picture = {"size": size, "points": _packed(cursor.points)}
            return {
                "registers": registers,
                "pci": self.function.save(),
                "vram": _packed(self.vram.read(0, VRAM_BYTES)),
                "fifo": _packed(self.fifo.read(0, FIFO_BYTES)),
                "cursor": picture,
            }

    def load(self, state: Mapping[str, Any]) -> None:
        self.reset()
        registers, pci = (state.get(part) for part in ("registers", "pci"))
        self.function.load(pci if isinstance(pci, dict) else {})
        vram = _unpacked(state.get("vram"), VRAM_BYTES)
        fifo = _unpacked(state.get("fifo"), FIFO_BYTES)
        with self._lock:
            self.state.load(registers if isinstance(registers, dict) else {})
            self.state.width = min(self.state.width, WIDTH_MAX)
            self.state.height = min(self.state.height, HEIGHT_MAX)
            missing = SCRATCH_REGISTERS - len(self.state.scratch)
            self.state.scratch.extend([0] * missing)
            self.vram.write(0, vram)
            self.fifo.write(0, fifo)
            self._cursor = _saved_cursor(state.get("cursor"))
            self._update_line()


def _mask_words(width: int, height: int, depth: int) -> int:
    """Lines begin on a word."""
    return -(-width * depth // 32) * height


def _masked_cursor(arguments: Sequence[int]) -> Cursor:
    """Of a mask of what stays and one of what is turned over, of 1 or 32 bits each."""
    _, x, y, width, height, and_depth, xor_depth = arguments[:7]
    and_words = _mask_words(width, height, and_depth)
    keeps = _mask(arguments[7 : 7 + and_words], width, height, and_depth)
    turns = _mask(arguments[7 + and_words :], width, height, xor_depth)
    points = bytearray()
    for keep, turn in zip(keeps, turns, strict=True):
        # What is under it cannot be turned over by a viewer: it is black there.
        seen = not keep or bool(turn)
        colour = 0 if keep else turn
        points += (colour & 0xFF_FFFF | (0xFF00_0000 if seen else 0)).to_bytes(4, "little")
    return Cursor(width, height, min(x, width), min(y, height), bytes(points))


def _mask(words: Sequence[int], width: int, height: int, depth: int) -> list[int]:
    """A colour for each point; of one bit the leftmost is the highest of the first byte."""
    if depth == 32:
        return [word & 0xFF_FFFF for word in words]
    data = struct.pack(f"<{len(words)}I", *words)
    row = 4 * -(-width // 32)
    return [
        0xFF_FFFF if data[row * line + column // 8] & 0x80 >> column % 8 else 0
        for line in range(height)
        for column in range(width)
    ]


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 1)).decode()


def _unpacked(text: object, length: int) -> bytes:
    damaged = StateError("a saved SVGA II is damaged", mend="save the machine again")
    if not isinstance(text, str):
        raise damaged
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), length + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise damaged from error
    if len(data) != length:
        raise damaged
    return data


def _saved_cursor(saved: object) -> Cursor | None:
    if saved == {}:
        return None
    damaged = StateError("a saved SVGA II is damaged", mend="save the machine again")
    if not isinstance(saved, dict) or not isinstance(size := saved.get("size"), list):
        raise damaged
    if len(size) != 4 or not all(type(one) is int and 0 <= one <= CURSOR_MAX for one in size):
        raise damaged
    width, height, x, y = size
    return Cursor(width, height, x, y, _unpacked(saved.get("points"), 4 * width * height))


class _Ports:
    """The registers as ports: an index, a value behind it that begins at an odd one, and the
    status of interrupts."""

    def __init__(self, device: Svga2) -> None:
        self.read: Callable[[int, int], int] = device.read_port
        self.write: Callable[[int, int, int], None] = device.write_port
