"""The SVGA II's queue of commands: memory with registers of its own at the beginning, where a
driver writes words and the device takes them, around and around (svga_reg.h, SVGA_FIFO_* and
SVGA_CMD_*).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from tetrarch.devices.svga2.cursor import CURSOR_MAX, mask_words

if TYPE_CHECKING:
    from tetrarch.pci.memory import BarMemory

__all__ = ["FIFO_BYTES", "BadCommands", "Command", "CommandQueue", "Waiting"]

FIFO_BYTES: Final = 256 << 10

# The queue's registers, words of 32 bits at its beginning; commands are behind them.
FIFO_MIN, FIFO_MAX, FIFO_NEXT, FIFO_STOP, FIFO_CAPS, FIFO_FLAGS, FIFO_FENCE = range(7)
FIFO_CURSOR_ON: Final = 9
FIFO_FENCE_GOAL, FIFO_BUSY, FIFO_REGISTERS = 289, 290, 291
#: FENCE, PITCHLOCK, CURSOR_BYPASS_3, RESERVE.
FIFO_CAPABILITIES: Final = 0x1 | 0x4 | 0x10 | 0x40
#: The least that a driver leaves for commands.
_LEAST: Final = 10 << 10

UPDATE, RECT_COPY, DEFINE_CURSOR, DISPLAY_CURSOR, MOVE_CURSOR = 1, 3, 19, 20, 21
DEFINE_ALPHA_CURSOR, UPDATE_VERBOSE, FENCE, ESCAPE = 22, 25, 30, 33
#: Words behind the number of a command; cursors and ESCAPE have more.
_WORDS: Final[Mapping[int, int]] = {
    UPDATE: 4,
    RECT_COPY: 6,
    DEFINE_CURSOR: 7,
    DISPLAY_CURSOR: 2,
    MOVE_CURSOR: 2,
    DEFINE_ALPHA_CURSOR: 5,
    UPDATE_VERBOSE: 5,
    FENCE: 1,
    ESCAPE: 2,
}


class BadCommands(Exception):
    """What a driver has written that cannot be."""


class Command(NamedTuple):
    number: int
    arguments: Sequence[int]
    end: int
    """How many words are done with when it is."""


class CommandQueue:
    def __init__(self, memory: BarMemory) -> None:
        self.memory = memory

    def word(self, at: int) -> int:
        return int.from_bytes(self.memory.read(4 * at, 4), "little")

    def set_word(self, at: int, value: int) -> None:
        self.memory.write(4 * at, value.to_bytes(4, "little"))

    def tell_capabilities(self) -> None:
        self.set_word(FIFO_CAPS, FIFO_CAPABILITIES)
        self.set_word(FIFO_FLAGS, 0)

    def waiting(self) -> Waiting:
        """What is in it by now: once around at most. Raises BadCommands."""
        least, most, end, stop = struct.unpack("<4I", self.memory.read(0, 16))
        sane = 16 <= least < most <= FIFO_BYTES and most - least >= _LEAST
        within = all(least <= place < most for place in (end, stop))
        if not sane or not within or (least | most | end | stop) & 3:
            raise BadCommands("a queue of commands that cannot be")
        if end >= stop:
            data = self.memory.read(stop, end - stop)
        else:
            data = self.memory.read(stop, most - stop) + self.memory.read(least, end - least)
        return Waiting(struct.unpack(f"<{len(data) // 4}I", data), least, most, stop)

    def take(self, waiting: Waiting, words: int) -> None:
        """So many words are done with."""
        stop = waiting.stop + 4 * words
        room = waiting.most - waiting.least
        self.set_word(FIFO_STOP, stop if stop < waiting.most else stop - room)


class Waiting(NamedTuple):
    words: Sequence[int]
    least: int
    most: int
    stop: int

    def commands(self) -> Iterator[Command]:
        """The last one may not have come as a whole. Raises BadCommands."""
        at = 0
        while at < len(self.words):
            length = _length(self.words, at)
            if length is None or 4 * length > self.most - self.least:
                raise BadCommands(f"a command {self.words[at]:#x} that it has not")
            if at + length > len(self.words):
                break
            yield Command(self.words[at], self.words[at + 1 : at + length], at + length)
            at += length


def _length(words: Sequence[int], at: int) -> int | None:
    """Of a command, with its number; None where it is not known."""
    fixed = _WORDS.get(words[at])
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
        return length + sum(mask_words(width, height, depth) for depth in depths)
    return length
